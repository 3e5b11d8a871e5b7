"""Fusion: small batched products as pointwise sums, for programs that a compiler fuses.

*Needs* a lowered graph.  *Gives* the same program with products of many tiny matrices written out::

    matmul(a [B, 3, 64], b [B, 64, 3])    ==>    sum(a[:, :, None] * b.mT[:, None], -1)

Run eagerly the product is faster (it makes no large temporary); compiled, the sum is: it fuses
with what makes its operands, and nothing is written in between.
"""

from __future__ import annotations

import torch
from torch import fx

from fxhess.emit import VAL

_TINY = 16  # entries of a result's matrix


def fuse(graph: fx.Graph) -> fx.Graph:
    """A copy of ``graph`` for compiling; see the module's docstring."""
    copy = fx.Graph()
    mapped: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if not _is_tiny(node):
            mapped[node] = copy.node_copy(node, mapped.__getitem__)
            continue
        left, right = (mapped[operand] for operand in node.args)  # type: ignore[index]
        rows = copy.call_function(torch.unsqueeze, (left, -2))
        turned = copy.call_function(torch.transpose, (right, -1, -2))
        columns = copy.call_function(torch.unsqueeze, (turned, -3))
        product = copy.call_function(torch.mul, (rows, columns))
        mapped[node] = copy.call_function(torch.sum, (product, -1))
    return copy


def fusible(graph: fx.Graph) -> bool:
    """Whether :func:`fuse` would change anything."""
    return any(_is_tiny(node) for node in graph.nodes)


def _is_tiny(node: fx.Node) -> bool:
    if node.op != "call_function" or node.target is not torch.matmul:
        return False
    operands = [n.meta[VAL] for n in node.args]  # type: ignore[union-attr]
    value = node.meta[VAL]
    return min(t.ndim for t in operands) > 2 and int(value.shape[-1] * value.shape[-2]) <= _TINY
