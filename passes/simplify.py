"""Simplification: no operation twice, none that no result needs.

*Needs* any graph of plain operations.  *Gives* the same program, smaller::

    a = tanh(x); b = tanh(x); y = a * b; z = exp(x)      ==>      a = tanh(x); y = a * a

Operations that draw random numbers, or write into their arguments, are never joined.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable
from typing import Any

import torch
from torch import fx

from fxhess.emit import VAL

CALLS = ("call_function", "call_method")


def simplify(graph: fx.Graph) -> fx.Graph:
    """Join equal operations and drop unused ones, in place; returns the graph."""
    seen: dict[Hashable, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op not in CALLS or not is_repeatable(node):
            continue
        key = _key(node)
        if key is None:
            continue
        known = seen.setdefault(key, node)
        if known is not node:
            node.replace_all_uses_with(known)
            graph.erase_node(node)
    _cancel_views(graph)
    _cancel_ones(graph)
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op in CALLS and not changes_operands(node):
            graph.erase_node(node)
    return graph


def _cancel_views(graph: fx.Graph) -> None:
    """An axis of size 1 that is inserted and dropped again need not be inserted."""
    for node in graph.nodes:
        if node.target is not torch.squeeze or len(node.args) != 2:
            continue
        inner, dims = node.args
        if not (isinstance(inner, fx.Node) and inner.target is torch.unsqueeze):
            continue
        rank = inner.meta[VAL].ndim
        dropped = [dims] if isinstance(dims, int) else list(dims)  # type: ignore[call-overload]
        if [d % rank for d in dropped] == [inner.args[1] % rank]:  # type: ignore[operator]
            node.replace_all_uses_with(inner.args[0])


def _cancel_ones(graph: fx.Graph) -> None:
    """A product with the number 1 is its other factor, where that has its type and shape."""
    for node in graph.nodes:
        if node.target not in (operator.mul, torch.mul) or len(node.args) != 2 or node.kwargs:
            continue
        number, factor = node.args if isinstance(node.args[1], fx.Node) else node.args[::-1]
        if isinstance(number, fx.Node) or number != 1 or not isinstance(factor, fx.Node):
            continue
        value, result = factor.meta.get(VAL), node.meta.get(VAL)
        if isinstance(value, torch.Tensor) and (value.dtype, value.shape) == (
            result.dtype,
            result.shape,
        ):
            node.replace_all_uses_with(factor)


def is_repeatable(node: fx.Node) -> bool:
    """Whether the operation gives the same result for the same operands, and changes nothing."""
    target: Any = node.target
    random = isinstance(target, torch._ops.OpOverload) and (
        torch.Tag.nondeterministic_seeded in target.tags
    )
    return not random and not changes_operands(node)


def changes_operands(node: fx.Node) -> bool:
    """Whether the operation writes into an operand."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return bool(target._schema.is_mutable)
    if node.op == "call_method":
        return str(target).endswith("_") and not str(target).endswith("__")
    return "out" in node.kwargs


def _key(node: fx.Node) -> Hashable | None:
    value = node.meta.get(VAL)
    dtype = value.dtype if isinstance(value, torch.Tensor) else None
    try:
        key = (node.op, node.target, _freeze(node.args), _freeze(node.kwargs), dtype)
        hash(key)
    except TypeError:
        return None
    return key


def _freeze(value: Any) -> Hashable:
    if isinstance(value, dict):
        return ("dict", *((k, _freeze(v)) for k, v in sorted(value.items())))
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, *map(_freeze, value))
    if isinstance(value, slice):
        return ("slice", _freeze(value.start), _freeze(value.stop), _freeze(value.step))
    # 1, 1.0 and True are equal and hash alike, yet give tensors of different types.
    return (type(value).__name__, value)
