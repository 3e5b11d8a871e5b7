"""Products whose result is symmetric: only one triangle is computed.

*Needs* a graph that runs without autograd, with sums ``A + A^T`` marked whose A is symmetric but
for rounding.  *Gives* the same program with one operation for the product and the sum::

    A = (rows @ matrix).permute(1, 0, 2); H = A + A.mT
                                        ==>   H = symmetric_product(rows, matrix, 0)

The rows are cut into blocks, each multiplied with the columns up to its own last one, so that the
arithmetic is little more than half; what lies above is copied from below.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import fx

from fxhess import _running
from fxhess.emit import SYMMETRIC, VAL

_ROWS = 48  # of a block, at least: fewer make slow products
_BLOCKS = 8


def blocks(size: int) -> Iterator[tuple[int, int]]:
    """The first and last row (exclusive) of every block."""
    count = max(1, min(_BLOCKS, size // _ROWS))
    step = -(-size // count)
    for start in range(0, size, step):
        yield start, min(size, start + step)


def share(size: int) -> float:
    """Which part of a matrix of this size is computed."""
    return sum((stop - start) * stop for start, stop in blocks(size)) / size**2


def symmetric_product(
    rows: torch.Tensor,
    matrix: torch.Tensor,
    axis: int = 1,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``A + A^T``, ``[B, d, d]``, for the product A of rows ``[B, d, k]`` (``[d, B, k]`` with
    ``axis=0``) and a matrix ``[k, d]`` or ``[B, k, d]``, where A is symmetric but for rounding.
    Has no derivative formula."""
    size, batch = rows.shape[axis], rows.shape[1 - axis]
    if out is None:
        out = rows.new_empty((batch, size, size))
    flat = matrix.ndim == 2 and rows.dtype == matrix.dtype == torch.float32
    columns = matrix.mT.contiguous() if matrix.ndim == 2 else matrix.mT  # [.., d, k]
    for start, stop in blocks(size):
        own, first = rows.narrow(axis, start, stop - start), columns[..., :stop, :]
        part = _running.onednn_linear(own, first) if flat else torch.matmul(own, first.mT)
        part = part.movedim(axis, 1)
        left, square = part[..., :start], part[..., start:]
        torch.add(square, square.mT, out=out[:, start:stop, start:stop])
        torch.add(left, left, out=out[:, start:stop, :start])
        torch.add(left.mT, left.mT, out=out[:, :start, start:stop])
    return out


def use_symmetric_products(graph: fx.Graph) -> fx.Graph:
    """Replace marked sums of a product and its transpose, in place; see the module's docstring."""
    for node in list(graph.nodes):
        found = _marked(node)
        if found is None or not _is_alone(node, found[0]):
            continue
        product, axis = found
        with graph.inserting_before(node):
            new = graph.call_function(symmetric_product, (*product.args, axis))
        new.meta = dict(node.meta)
        new.name = node.name
        node.replace_all_uses_with(new)
        for unused in dict.fromkeys((node, *node.all_input_nodes[::-1], product)):
            _erase(graph, unused)
    return graph


def product_of(node: fx.Node) -> fx.Node | None:
    """The product of which one triangle does, where the node is such a sum."""
    found = _marked(node)
    return None if found is None else found[0]


def _marked(node: fx.Node) -> tuple[fx.Node, int] | None:
    """The product, and the axis of its rows, where the node is marked, and the sum of a product, or
    a view of it, and of the transpose."""
    if not node.meta.get(SYMMETRIC) or node.target not in (operator.add, torch.add):
        return None
    plain, turned = node.args
    assert isinstance(plain, fx.Node) and isinstance(turned, fx.Node)
    if not _is_permutation(turned, plain, [0, 2, 1]):
        return None
    for axis, order in ((0, [1, 0, 2]), (0, [1, 2, 0]), (1, [0, 2, 1])):
        inner = plain.args[0] if plain.args else None
        if isinstance(inner, fx.Node) and _is_permutation(plain, inner, order):
            return (inner, axis) if _fits(inner, axis) else None
    return (plain, 1) if _fits(plain, 1) else None


def _is_alone(total: fx.Node, product: fx.Node) -> bool:
    """Whether nothing but the sum needs the product."""
    plain, turned = total.args
    assert isinstance(plain, fx.Node) and isinstance(turned, fx.Node)
    alone = set(plain.users) <= {turned, total} and set(turned.users) == {total}
    return alone and (product is plain or set(product.users) == {plain})


def _is_permutation(node: fx.Node, of: fx.Node, order: list[int]) -> bool:
    return node.target is torch.permute and node.args == (of, order)


def _fits(node: fx.Node, axis: int) -> bool:
    """Whether it is a product of such rows with a matrix, large enough for several blocks."""
    if node.target is not torch.matmul or node.meta[VAL].ndim != 3 or node.kwargs:
        return False
    rows, matrix = (n.meta[VAL] for n in node.args)  # type: ignore[union-attr]
    fitting = rows.ndim == 3 and (matrix.ndim == 2 or (matrix.ndim == 3 and axis == 1))
    if not fitting or rows.shape[:2] != node.meta[VAL].shape[:2]:
        return False
    size = rows.shape[axis]
    return bool(size == matrix.shape[-1]) and share(size) < 1


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    if not node.users and node.op != "placeholder":
        graph.erase_node(node)


__all__ = ["blocks", "product_of", "share", "symmetric_product", "use_symmetric_products"]
