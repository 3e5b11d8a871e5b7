"""PyTorch's control flow operators, run as they run in Python: a branch or a loop whose condition
is a tensor reads it (see ``fxhess.reads``), a loop over entries is unrolled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from fxhess.registry import substitute

_operators = torch.ops.higher_order


@substitute(_operators.cond)
def cond(
    pred: Any, true_fn: Callable[..., Any], false_fn: Callable[..., Any], operands: Any
) -> Any:
    return true_fn(*operands) if pred else false_fn(*operands)


@substitute(_operators.while_loop)
def while_loop(
    cond_fn: Callable[..., Any],
    body_fn: Callable[..., Any],
    carried_inputs: Sequence[Any],
    additional_inputs: Sequence[Any],
    *_: Any,
) -> Any:
    carried = tuple(carried_inputs)
    while cond_fn(*carried, *additional_inputs):
        carried = tuple(body_fn(*carried, *additional_inputs))
    return carried


@substitute(_operators.scan)
def scan(
    combine_fn: Callable[..., Any],
    init: Sequence[Any],
    xs: Sequence[Any],
    additional_inputs: Sequence[Any] = (),
) -> Any:
    carry, rows = None, []
    state = list(init)
    for i in range(len(xs[0])):
        carry, row = combine_fn(*state, *(x[i] for x in xs), *additional_inputs)
        state = tree_leaves(carry)
        rows.append(row)
    return carry, _stacked(rows)


@substitute(_operators.associative_scan)
def associative_scan(
    combine_fn: Callable[..., Any], xs: Sequence[Any], additional_inputs: Sequence[Any] = ()
) -> Any:
    state: Sequence[Any] = [x[0] for x in xs]
    rows = [list(state)]
    for i in range(1, len(xs[0])):
        state = tree_leaves(combine_fn(*state, *(x[i] for x in xs), *additional_inputs))
        rows.append(list(state))
    return _stacked(rows)


@substitute(_operators.map_impl)
def map_each(f: Callable[..., Any], xs: Sequence[Any], args: Sequence[Any] = ()) -> Any:
    n = xs[0].shape[0]
    if not isinstance(n, int):  # over the batch
        return torch.vmap(f, in_dims=(*[0] * len(xs), *[None] * len(args)))(*xs, *args)
    return _stacked([f(*(x[i] for x in xs), *args) for i in range(n)])


def _stacked(rows: Sequence[Any]) -> Any:
    return tree_map(lambda *entries: torch.stack(entries), *rows)
