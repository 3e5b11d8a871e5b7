"""Axes: permuting and broadcasting are equations; cutting and joining are linear."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch

from fxhess.kinds import Along, Call, Equation, Reshape, Linear
from fxhess.registry import Rule, aten, composite, linear, multilinear, register_rule

for op in (aten.view.default, aten._unsafe_view.default, aten.reshape.default):
    register_rule(Rule(op, Reshape(), Linear(pull=lambda g, c: g)))


def _permuted(rank: int, order: list[int]) -> Equation:
    return Equation((tuple(range(rank)),), tuple(d % rank for d in order))


def _transposed(a: Mapping[str, Any]) -> Equation:
    rank = a["self"].ndim
    order = list(range(rank))
    i, j = a["dim0"], a["dim1"]
    order[i], order[j] = order[j], order[i]
    return _permuted(rank, order)


multilinear(aten.permute.default, lambda a: _permuted(a["self"].ndim, a["dims"]))
multilinear(aten.transpose.int, _transposed)
multilinear(aten.t.default, lambda a: _permuted(a["self"].ndim, list(range(a["self"].ndim))[::-1]))


def _unsqueezed(a: Mapping[str, Any]) -> Equation:
    rank = a["self"].ndim
    at = a["dim"] % (rank + 1)
    axes = tuple(range(rank))
    return Equation((axes,), (*axes[:at], None, *axes[at:]))


def _squeezed(a: Mapping[str, Any]) -> Equation:
    shape = a["self"].shape
    rank = len(shape)
    dims = a.get("dim")
    given = range(rank) if dims is None else dims if isinstance(dims, (list, tuple)) else [dims]
    gone = {d % max(rank, 1) for d in given if shape[d] == 1}
    return Equation(
        (tuple(None if i in gone else i for i in range(rank)),),
        tuple(i for i in range(rank) if i not in gone),
    )


multilinear(aten.unsqueeze.default, _unsqueezed)
multilinear(aten.squeeze.default, _squeezed)
multilinear(aten.squeeze.dim, _squeezed)
multilinear(aten.squeeze.dims, _squeezed)


def _expanded(a: Mapping[str, Any]) -> Equation:
    shape, size = a["self"].shape, a["size"]
    new = len(size) - len(shape)
    labels = tuple(
        None if s == 1 and not (isinstance(size[new + i], int) and size[new + i] in (1, -1)) else i
        for i, s in enumerate(shape)
    )
    output = [("new", i) for i in range(new)]
    output += [("wide", i) if a is None else a for i, a in enumerate(labels)]  # type: ignore[misc]
    return Equation((labels,), tuple(output))


multilinear(aten.expand.default, _expanded)


def _identity(a: Mapping[str, Any]) -> Equation:
    axes = tuple(range(a["self"].ndim))
    return Equation((axes,), axes)


for op in (aten.clone.default, aten.alias.default, aten.contiguous.default, aten.lift_fresh_copy.default):
    multilinear(op, _identity)


def _whole_slice(
    self: torch.Tensor,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Any:
    """A slice of a whole axis is the tensor itself, also along the batch."""
    whole = start in (None, 0) and (end is None or end >= sys.maxsize) and step == 1
    return torch.ops.aten.alias.default(self) if whole else NotImplemented


def _slice_pull(g: Any, c: Call) -> Any:
    """Zeros of the operand's size with g in the slice."""
    dim, n = c.args[1], c.operands[0].size(c.args[1])
    start, end, step = slice(*c.args[2:5]).indices(n)
    if step == 1:
        return torch.constant_pad_nd(g, [0, 0] * (-dim - 1) + [start, n - max(end, start)])
    index = torch.arange(start, end, step, device=g.val.device)
    raise NotImplementedError(index)


linear(aten.slice.Tensor, Along("dim"), pull=_slice_pull, rewrite=_whole_slice)


@composite(aten.select.int)
def select(self: torch.Tensor, dim: int, index: int) -> torch.Tensor:
    n = self.shape[dim]
    start = index + n if index < 0 else index
    return torch.squeeze(torch.ops.aten.slice.Tensor(self, dim, start, start + 1), dim)


def _cat_pull(g: Any, c: Call) -> tuple[Any, ...]:
    dim, start, parts = c.args[1], 0, []
    for operand in c.args[0]:
        n = operand.size(dim)
        parts.append(torch.narrow(g, dim, start, n))
        start += n
    return tuple(parts)


linear(
    aten.cat.default,
    Along("dim"),
    pull=_cat_pull,
    push=lambda c, *t: torch.cat(list(t), c.args[1]),
    differentiable=("tensors",),
)
