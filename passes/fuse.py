"""Fusion: small batched products as pointwise sums, for programs that a compiler fuses.

*Needs* a lowered graph.  *Gives* the same program with products of many tiny matrices written out::

    matmul(a [B, 3, 64], b [B, 64, 3])    ==>    sum(a[:, :, None] * b.mT[:, None], -1)

Run eagerly the product is faster (it makes no large temporary); compiled, the sum is: it fuses
with what makes its operands, and nothing is written in between.

Sums of such products, and of their transposes, are written entry by entry: what is summed along one
axis is added up before, and of what is symmetric only one triangle is computed::

    C = matmul(a, b) + matmul(c, d)       ==>    H_ij = H_ji = sum(a_i * b_j + a_j * b_i
    H = C + C.mT                                                   + c_i * d_j + c_j * d_i, -1)
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxhess.cost import is_tiny_product
from fxhess.emit import VAL

_ADDS = (operator.add, torch.add)


@dataclass(frozen=True)
class _Product:
    """``left @ right``, or its transpose where ``turned``; the nodes are those of the copy."""

    left: fx.Node
    right: fx.Node
    length: int
    symmetric: bool  # but for rounding
    turned: bool = False


@dataclass(frozen=True)
class _Tiny:
    """A sum of tiny products and of other values of the same shape, each with whether its
    transpose is meant; not written yet."""

    products: tuple[_Product, ...]
    others: tuple[tuple[fx.Node, bool], ...]
    shape: tuple[int, ...]

    def turn(self) -> _Tiny:
        """The transpose."""
        return _Tiny(
            tuple(_Product(p.left, p.right, p.length, p.symmetric, not p.turned)
                  for p in self.products),
            tuple((node, not turned) for node, turned in self.others),
            (*self.shape[:-2], self.shape[-1], self.shape[-2]),
        )  # fmt: skip

    @property
    def is_symmetric(self) -> bool:
        """Whether it is a sum of something and its transpose."""
        for whole in (self.products, self.others):
            turned = [_unturned(p) for p in whole if _is_turned(p)]
            plain = [_unturned(p) for p in whole if not _is_turned(p)]
            if sorted(map(repr, turned)) != sorted(map(repr, plain)):
                return False
        return True


def _is_turned(part: Any) -> bool:
    return part.turned if isinstance(part, _Product) else part[1]


def _unturned(part: Any) -> Any:
    return (part.left, part.right) if isinstance(part, _Product) else part[0]


def fuse(graph: fx.Graph) -> fx.Graph:
    """A copy of ``graph`` for compiling; see the module's docstring."""
    return _Fusion().copy(graph)


def fusible(graph: fx.Graph) -> bool:
    """Whether :func:`fuse` would change anything."""
    return any(is_tiny_product(node) for node in graph.nodes)


class _Fusion:
    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.mapped: dict[fx.Node, fx.Node | _Tiny] = {}
        self.written: dict[fx.Node, fx.Node] = {}

    def copy(self, graph: fx.Graph) -> fx.Graph:
        for node in graph.nodes:
            tiny = self._tiny(node)
            if tiny is not None:
                self.mapped[node] = tiny
                if node.kwargs:  # written into a given tensor
                    target = self._plain(node.kwargs["out"])  # type: ignore[arg-type]
                    self._method("copy_", target, self._plain(node))
                continue
            self.mapped[node] = self.graph.node_copy(node, self._plain)
        return self.graph

    def _tiny(self, node: fx.Node) -> _Tiny | None:
        """The node as a sum of tiny products that is not written yet, if it is one."""
        if is_tiny_product(node):
            left, right = (self._plain(n) for n in node.args)  # type: ignore[arg-type]
            length = int(node.args[0].meta[VAL].shape[-1])  # type: ignore[union-attr]
            product = _Product(left, right, length, _is_square(node))
            return _Tiny((product,), (), tuple(node.meta[VAL].shape))
        value = node.meta.get(VAL)
        if not isinstance(value, torch.Tensor) or value.ndim < 2:
            return None
        operands = [n for n in node.args if isinstance(n, fx.Node)]
        known = [self.mapped.get(n) for n in operands]
        if not any(isinstance(k, _Tiny) for k in known):
            return None
        if node.target is torch.permute and isinstance(known[0], _Tiny):
            n = value.ndim
            order = [int(a) % n for a in node.args[1]]  # type: ignore[union-attr, arg-type]
            swaps = order == [*range(n - 2), n - 1, n - 2]
            return known[0].turn() if swaps else None
        same = all(n.meta[VAL].shape == value.shape for n in operands)
        if node.target not in _ADDS or len(operands) != 2 or not same:
            return None
        parts = [
            k if isinstance(k, _Tiny) else self._other(n)
            for k, n in zip(known, operands, strict=True)
        ]
        return _Tiny(
            tuple(p for part in parts for p in part.products),
            tuple(o for part in parts for o in part.others),
            tuple(value.shape),
        )

    def _other(self, node: fx.Node) -> _Tiny:
        """A value that is no product; a transpose as that of what it is the transpose of."""
        shape = tuple(node.meta[VAL].shape)
        n = len(shape)
        turns = node.target is torch.permute and list(node.args[1]) == [*range(n - 2), n - 1, n - 2]  # type: ignore[call-overload, arg-type]
        source = node.args[0] if turns else node
        return _Tiny((), ((self._plain(source), bool(turns)),), shape)  # type: ignore[arg-type]

    # --- writing --------------------------------------------------------------------------------

    def _plain(self, node: fx.Node) -> fx.Node:
        """The node's copy, written now if it was put off."""
        mapped = self.mapped[node]
        if isinstance(mapped, fx.Node):
            return mapped
        if node not in self.written:
            self.written[node] = self._write(mapped)
        return self.written[node]

    def _write(self, tiny: _Tiny) -> fx.Node:
        symmetric = tiny.is_symmetric and len(tiny.products) > 0
        if len(tiny.products) == 1 and not tiny.others and not tiny.products[0].turned:
            return self._broadcast(tiny.products[0])
        rows, columns = tiny.shape[-2:]
        entries: dict[tuple[int, int], fx.Node] = {}
        for i in range(rows):
            for j in range(columns):
                if symmetric and j < i:
                    entries[i, j] = entries[j, i]
                else:
                    entries[i, j] = self._entry(tiny.products, i, j, symmetric)
        stacked = self._call(torch.stack, list(entries.values()), -1)
        total = self._call(torch.unflatten, stacked, -1, (rows, columns))
        if tiny.is_symmetric:  # one half first, so that it stays symmetric bit for bit
            half = self._sum([node for node, turned in tiny.others if not turned])
            rest = half and self._sum([half, self._turned(half, True)])
        else:
            rest = self._sum([self._turned(node, turned) for node, turned in tiny.others])
        return total if rest is None else self._call(torch.add, total, rest)

    def _entry(self, products: Sequence[_Product], i: int, j: int, symmetric: bool) -> fx.Node:
        """Entry (i, j) of a sum of products."""
        by_length: dict[int, list[fx.Node]] = {}
        for p in products:
            if symmetric and p.symmetric and p.turned:
                continue  # the same as its transpose, which is counted twice
            row, column = (j, i) if p.turned else (i, j)
            a = self._call(torch.select, p.left, -2, row)
            b = self._call(torch.select, p.right, -1, column)
            entry = self._call(torch.mul, a, b)
            if symmetric and p.symmetric:
                entry = self._call(torch.mul, entry, 2.0)
            by_length.setdefault(p.length, []).append(entry)
        sums = [self._call(torch.sum, self._sum(parts), -1) for parts in by_length.values()]
        total = self._sum(sums)
        assert total is not None
        return total

    def _broadcast(self, p: _Product) -> fx.Node:
        rows = self._call(torch.unsqueeze, p.left, -2)
        turned = self._call(torch.transpose, p.right, -1, -2)
        columns = self._call(torch.unsqueeze, turned, -3)
        return self._call(torch.sum, self._call(torch.mul, rows, columns), -1)

    def _turned(self, node: fx.Node, turned: bool) -> fx.Node:
        return self._call(torch.transpose, node, -1, -2) if turned else node

    def _sum(self, parts: Sequence[fx.Node]) -> fx.Node | None:
        total: fx.Node | None = None
        for part in parts:
            total = part if total is None else self._call(torch.add, total, part)
        return total

    def _call(self, target: Any, *args: Any) -> fx.Node:
        return self.graph.call_function(target, args)

    def _method(self, name: str, *args: Any) -> fx.Node:
        return self.graph.call_method(name, args)


def _is_square(product: fx.Node) -> bool:
    """Whether a product is ``J (c J)^T``: permutations of J and of c times J, where c is the same
    for all rows; so it is symmetric, but for rounding."""
    left, right = product.args
    assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
    if left.target is not torch.permute or right.target is not torch.permute:
        return False
    J, scaled = left.args[0], right.args[0]
    order, turned = list(left.args[1]), list(right.args[1])  # type: ignore[arg-type]
    turned[-2:] = turned[:-3:-1]
    if order != turned or not isinstance(scaled, fx.Node) or scaled.kwargs:
        return False
    if scaled.target not in (operator.mul, torch.mul) or J not in scaled.args:
        return False
    a, b = scaled.args
    other = b if a is J else a
    if not isinstance(other, fx.Node) or not isinstance(J, fx.Node):
        return True  # a number
    c, whole = other.meta[VAL].shape, J.meta[VAL].shape
    axis = order[-2] - len(whole)  # from the end
    return other is not J and (-axis > len(c) or int(c[axis]) == 1)
