"""Contractions of any number of factors, ordered by opt_einsum and written as plain matrix
products, products and sums.  The only importer of opt_einsum.

A factor is a value with one *label* an axis.  An axis of size 1 means "the same along this axis"
and never limits the size of a label.  Labels that are not asked for in the result are summed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import opt_einsum
import torch

from fxhess.emit import Emitter, Var
from fxhess.kinds import Label

Factor: TypeAlias = tuple["Var | float", Sequence[Label]]


@dataclass(frozen=True)
class _Operand:
    """``labels[i]`` is None where the axis has size 1."""

    var: Var
    labels: tuple[Label | None, ...]

    @property
    def present(self) -> tuple[Label, ...]:
        return tuple(a for a in self.labels if a is not None)


def contract(
    emitter: Emitter,
    factors: Sequence[Factor],
    output: Sequence[Label],
    universe: Mapping[Label, int] | None = None,
    batch_size: Callable[[Label], Var] | None = None,
) -> Var | float:
    """Write the product of ``factors``, summed over every label not in ``output``.

    The result has one axis for each label of ``output``, of size 1 where no factor varies along
    it; a number where no factor varies at all.  ``universe``: labels with sizes that the sum runs
    over even where no factor varies along them.  ``batch_size`` gives the size of a symbolic
    label as a value of the graph.
    """
    scale: float = 1  # an integer, so that integers stay integers
    operands: list[_Operand] = []
    for value, labels in factors:
        if isinstance(value, Var):
            shape = value.val.shape
            assert len(shape) == len(labels), (tuple(shape), tuple(labels))
            own = tuple(None if s == 1 else a for s, a in zip(shape, labels, strict=True))
            operands.append(_Operand(value, own))
        else:
            scale *= value
    varying = {a for operand in operands for a in operand.present}
    for label, size in (universe or {}).items():
        if label not in varying and label not in output:
            scale *= size
    if not operands:
        return scale
    operands = _scaled(operands, scale)
    writer = _Writer(emitter, batch_size)
    for pair in _path(operands, output):
        picked = [operands.pop(i) for i in sorted(pair, reverse=True)][::-1]
        needed = set(output).union(*(o.present for o in operands))
        last = not operands
        if len(picked) == 1:
            operands.append(writer.reduce(picked[0], needed))
        else:
            first, second = picked
            operands.append(writer.product(first, second, needed, output if last else None))
    (result,) = operands
    result = writer.reduce(result, set(output))
    return writer.arrange(result, tuple(output))


def _scaled(operands: list[_Operand], scale: float) -> list[_Operand]:
    if scale == 1:
        return operands
    at = min(range(len(operands)), key=lambda i: operands[i].var.val.numel())
    smallest = operands[at]
    scaled: Any = smallest.var * scale
    operands[at] = _Operand(scaled, smallest.labels)
    return operands


def _path(operands: Sequence[_Operand], output: Sequence[Label]) -> list[tuple[int, ...]]:
    """The order of pairwise products, by opt_einsum."""
    if len(operands) <= 2:
        return [tuple(range(len(operands)))]
    letters: dict[Label, str] = {}
    sizes: dict[str, int] = {}
    terms = []
    for operand in operands:
        term = ""
        for label, size in zip(operand.labels, operand.var.val.shape, strict=True):
            if label is not None:
                letter = letters.setdefault(label, opt_einsum.get_symbol(len(letters)))
                sizes[letter] = int(size)
                term += letter
        terms.append(term)
    out = "".join(letters[a] for a in output if a in letters)
    return _best_path(tuple(terms), out, tuple(sorted(sizes.items())))


@functools.lru_cache(maxsize=4096)
def _best_path(
    terms: tuple[str, ...], output: str, sizes: tuple[tuple[str, int], ...]
) -> list[tuple[int, ...]]:
    size = dict(sizes)
    path, _ = opt_einsum.contract_path(
        ",".join(terms) + "->" + output,
        *(tuple(size[c] for c in term) for term in terms),
        shapes=True,
        optimize="optimal" if len(terms) <= 6 else "auto",
    )
    return [tuple(p) for p in path]


def _ones_between(
    labels: Sequence[Label | None], want: Sequence[Label | None]
) -> tuple[tuple[int, ...], list[int]]:
    """Axes of size 1 to drop from ``labels``, then to insert (in order), to read as ``want``;
    both name the same labels in the same order."""
    dropped: list[int] = []
    inserted: list[int] = []
    at = 0
    for axis, wanted in enumerate(want):
        if wanted is None:
            if at < len(labels) and labels[at] is None:
                at += 1
            else:
                inserted.append(axis)
            continue
        while labels[at] != wanted:
            dropped.append(at)
            at += 1
        at += 1
    dropped += range(at, len(labels))
    return tuple(dropped), inserted


class _Writer:
    """Writes single steps of a contraction."""

    def __init__(self, emitter: Emitter, batch_size: Callable[[Label], Var] | None) -> None:
        self.emitter = emitter
        self.batch_size = batch_size

    def arrange(self, operand: _Operand, target: Sequence[Label | None]) -> Var:
        """The operand with its axes in the order of ``target``, of size 1 where it has none."""
        var: Any = operand.var
        labels = list(operand.labels)
        order = [a for a in target if a is not None and a in labels]
        present = [a for a in labels if a is not None]
        assert len(order) == len(present), (labels, target)
        if order != present:
            axes = [labels.index(a) for a in order]
            ones = [i for i, a in enumerate(labels) if a is None]
            var = torch.permute(var, [*ones, *axes])
            labels = [None] * len(ones) + order  # type: ignore[list-item]
        if [a if a in labels else None for a in target] == labels:
            return var
        want = [a if a in order else None for a in target]
        dropped, inserted = _ones_between(labels, want)
        if dropped:
            var = torch.squeeze(var, dropped)
        for axis in inserted:
            var = torch.unsqueeze(var, axis)
        return var

    def reduce(self, operand: _Operand, needed: set[Label]) -> _Operand:
        """Sum over the labels that nothing else needs."""
        dims = [i for i, a in enumerate(operand.labels) if a is not None and a not in needed]
        if not dims:
            return operand
        rest = tuple(a for i, a in enumerate(operand.labels) if i not in dims)
        total: Any = torch.sum(operand.var, dims)
        return _Operand(total, rest)

    def product(
        self, a: _Operand, b: _Operand, needed: set[Label], output: Sequence[Label] | None
    ) -> _Operand:
        """The product of two operands, summed over the labels that nothing else needs."""
        a = self.reduce(a, needed | set(b.present))
        b = self.reduce(b, needed | set(a.present))
        both = [x for x in a.present if x in b.present]
        summed = [x for x in both if x not in needed]
        if not summed:
            return self.multiply(a, b, output)
        shared = [x for x in both if x in needed]
        only_a = [x for x in a.present if x not in both]
        only_b = [x for x in b.present if x not in both]
        if not only_a and not only_b:
            order = [x for x in output if x in a.present] if output else None
            product = self.multiply(a, b, [*order, *summed] if order is not None else None)
            return self.reduce(product, needed)
        return self.matmul(a, b, shared, only_a, only_b, summed, output)

    def multiply(self, a: _Operand, b: _Operand, output: Sequence[Label] | None) -> _Operand:
        if output is not None:
            order = [x for x in output if x in a.present or x in b.present]
        else:
            if a.var.val.numel() < b.var.val.numel():
                a, b = b, a
            missing = [x for x in b.present if x not in a.present]
            order = [*missing, *a.present]
        ours, theirs = self.arrange(a, order), self.arrange(b, order)
        return _Operand(ours * theirs, tuple(order))

    def matmul(
        self,
        a: _Operand,
        b: _Operand,
        shared: list[Label],
        only_a: list[Label],
        only_b: list[Label],
        summed: list[Label],
        output: Sequence[Label] | None,
    ) -> _Operand:
        """A matrix product, flat where nothing is shared: ``[.., rows, k] @ [.., k, columns]``,
        or a matrix times a vector where one side has no axis of its own."""
        if not only_a or (only_b and self._prefers_swap(a, b, only_a, only_b, output)):
            a, b, only_a, only_b = b, a, only_b, only_a
        size = self._sizes(a, b)
        summed = [x for x in a.present if x in summed]
        only_a = [x for x in a.present if x in only_a]
        s, k, rows, m = len(shared), len(summed), len(only_a), len(only_b)
        vector = [None] if s and not m else []
        left: Any = self.arrange(a, [*shared, *only_a, *summed])
        right: Any = self.arrange(b, [*shared, *summed, *only_b, *vector])
        if k > 1:
            left = torch.flatten(left, -k, -1)
            right = torch.flatten(right, s, s + k - 1)
        if m > 1:
            right = torch.flatten(right, -m, -1)
        if s and rows > 1:
            left = torch.flatten(left, s, s + rows - 1)
        dtype = torch.promote_types(left.dtype, right.dtype)
        left = left if left.dtype == dtype else left.to(dtype)
        right = right if right.dtype == dtype else right.to(dtype)
        result: Any = torch.matmul(left, right)
        if vector:
            result = torch.squeeze(result, -1)
        if m > 1:
            result = torch.unflatten(result, -1, self._lengths(only_b, size))
        if s and rows > 1:
            result = torch.unflatten(result, s, self._lengths(only_a, size))
        return _Operand(result, (*shared, *only_a, *only_b))

    def _prefers_swap(
        self,
        a: _Operand,
        b: _Operand,
        only_a: list[Label],
        only_b: list[Label],
        output: Sequence[Label] | None,
    ) -> bool:
        """Symbolic labels belong to the rows; otherwise the order of the result decides."""
        symbolic_a = sum(self._symbolic(x) for x in only_a)
        symbolic_b = sum(self._symbolic(x) for x in only_b)
        if symbolic_a != symbolic_b:
            return symbolic_b > symbolic_a
        if output is not None:
            rank = {x: i for i, x in enumerate(output)}
            return rank.get(only_b[0], 0) < rank.get(only_a[0], 0)
        return b.var.val.numel() > a.var.val.numel()

    def _symbolic(self, label: Label) -> bool:
        return isinstance(label, str)

    def _sizes(self, *operands: _Operand) -> dict[Label, int]:
        return {
            label: int(size)
            for operand in operands
            for label, size in zip(operand.labels, operand.var.val.shape, strict=True)
            if label is not None
        }

    def _lengths(self, labels: Sequence[Label], size: Mapping[Label, int]) -> tuple[Any, ...]:
        lengths: list[Any] = []
        for label in labels:
            if self._symbolic(label):
                assert self.batch_size is not None
                lengths.append(self.batch_size(label))
            else:
                lengths.append(size[label])
        return tuple(lengths)


def evaluate(
    inputs: Sequence[Sequence[Label]],
    output: Sequence[Label],
    sizes: Mapping[Label, int],
    scale: Any,
    *operands: torch.Tensor,
) -> torch.Tensor:
    """The meaning of an equation over canonical axes, run directly: what :func:`contract` must
    equal.  ``sizes`` are those of broadcast output labels; axes of size 1 broadcast."""
    letters: dict[Label, str] = {}
    full: dict[Label, int] = {}
    terms, squeezed = [], []
    for labels, operand in zip(inputs, operands, strict=True):
        for label, size in zip(labels, operand.shape, strict=True):
            full[label] = max(full.get(label, 1), size) if size else 0
    for labels, operand in zip(inputs, operands, strict=True):
        keep = [
            i
            for i, a in enumerate(labels)
            if operand.shape[i] != 1 or (full[a] == 1 and a in output)
        ]
        terms.append(
            "".join(
                letters.setdefault(labels[i], opt_einsum.get_symbol(len(letters))) for i in keep
            )
        )
        dropped = tuple(i for i in range(operand.ndim) if i not in keep)
        squeezed.append(torch.squeeze(operand, dropped) if dropped else operand)
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in squeezed))
    squeezed = [t.to(dtype) for t in squeezed]
    known = [a for a in output if a in letters]
    equation = ",".join(terms) + "->" + "".join(letters[a] for a in known)
    result = torch.einsum(equation, *squeezed)
    if not isinstance(scale, (int, float)) or scale != 1:  # a bool stays a bool
        result = result * scale
    for i, label in enumerate(output):
        if label not in letters:
            result = result.unsqueeze(i)
    return result.expand([sizes.get(a, -1) if a not in letters else -1 for a in output])


class Same:
    """Which labels stand for one axis."""

    def __init__(self) -> None:
        self._first: dict[Label, Label] = {}

    def __call__(self, label: Label) -> Label:
        while label in self._first:
            label = self._first[label]
        return label

    def join(self, a: Label, b: Label) -> None:
        a, b = self(a), self(b)
        if a != b:
            self._first[b] = a
