"""Labels to atoms: one set of axes that all operands of an operation can share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import sympy
import torch

from fxhess import _torch
from fxhess.emit import Var
from fxhess.passes.bound import Raw
from fxhess.passes.layout import Atom, Group, Laid, Layouts


class Unifier:
    """Finds for each label of an equation the one group of atoms that all operands can share."""

    def __init__(self, layouts: Layouts) -> None:
        self.layouts = layouts
        self.groups: dict[Any, Group] = {}
        self.batch_home: dict[int, Any] = {}

    def learn(self, operand: Laid, labels: Sequence[Any]) -> None:
        for label, group in zip(labels, operand.groups, strict=True):
            if label is None:
                continue
            for atom in group:
                if atom.batch is None:
                    continue
                if self.batch_home.setdefault(atom.batch, label) != label:
                    raise self.layouts.mixing("combines the batch with itself")
            self.groups[label] = (
                self._refine(self.groups[label], group) if label in self.groups else group
            )

    def learn_raw(self, operand: Raw, labels: Sequence[Any]) -> None:
        for label, size in zip(labels, operand.shape, strict=True):
            if label is None or label in self.groups:
                continue
            if not isinstance(size, int):
                raise self.layouts.mixing("gives each sample an axis as long as the batch")
            self.groups[label] = (Atom(size),)

    def _refine(self, a: Group, b: Group) -> Group:
        """The coarsest group that cuts at every place where a or b does."""
        left, right = list(a), list(b)
        result: list[Atom] = []
        while left and right:
            p, q = left.pop(0), right.pop(0)
            if p.batch is not None or q.batch is not None:
                if p.batch != q.batch:
                    raise self.layouts.mixing("combines values whose batch axes do not match")
                result.append(p)
            elif p.size == q.size:
                result.append(p)
            elif p.size % q.size == 0 and q.size > 1:
                result.append(Atom(q.size))
                left.insert(0, Atom(p.size // q.size))
            elif q.size % p.size == 0 and p.size > 1:
                result.append(Atom(p.size))
                right.insert(0, Atom(q.size // p.size))
            else:
                raise self.layouts.mixing("combines values whose merged axes do not match")
        return tuple(result)

    def conform(self, operand: Laid, labels: Sequence[Any]) -> tuple[Var, list[Any]]:
        """The operand cut like the groups, and a label for each canonical axis of it."""
        at_axis = dict(enumerate(labels))
        for axis, label in at_axis.items():
            if label is None:
                continue
            want = list(self.groups[label])
            for atom in operand.groups[axis]:
                if atom.batch is not None:
                    want.pop(0)
                    continue
                sizes: list[int] = []
                while math.prod(sizes) != atom.size or not sizes:
                    sizes.append(want.pop(0).size)
                if len(sizes) > 1:
                    operand, _ = self.layouts.split(operand, atom, sizes)
        names: list[Any] = [f"b{i}" for i in range(self.layouts.nb)]
        for axis, group in enumerate(operand.groups):
            label = at_axis[axis]
            for position, atom in enumerate(group):
                if atom.batch is None:
                    dropped = label is None
                    names.append(("one", axis, position) if dropped else (label, position))
        return operand.var, names

    def conform_raw(self, operand: Raw, labels: Sequence[Any]) -> tuple[Var, list[Any]]:
        """Likewise for a constant: its axes are cut as the groups say, batch axes first."""
        var: Any = operand.var
        sizes: list[Any] = []
        names: list[Any] = []
        for axis, (label, size) in enumerate(zip(labels, operand.shape, strict=True)):
            group = () if label is None else self.groups[label]
            if label is None or (isinstance(size, int) and size == 1):
                sizes.append(1)
                names.append(("one", axis, 0))
                continue
            if self.layouts.extent(group) != as_expression(size):
                raise self.layouts.mixing(
                    f"combines an axis of {self.layouts.extent(group)} with one of {size}"
                )
            for position, atom in enumerate(group):
                if atom.batch is None:
                    sizes.append(atom.size)
                    names.append((label, position))
                else:
                    sizes.append(self.layouts.batch_size(atom.batch))
                    names.append(f"b{atom.batch}")
        if len(sizes) != len(operand.shape):
            var = torch.reshape(var, sizes)
        return var, names

    def event_names(self, labels: Sequence[Any]) -> list[Any]:
        """A name for each event axis of a value whose axes read as ``labels``."""
        return [
            (label, position)
            for label in labels
            for position, atom in enumerate(self.groups[label])
            if atom.batch is None
        ]


def conform(unifier: Unifier, value: Laid | Raw, labels: Sequence[Any]) -> tuple[Var, list[Any]]:
    if isinstance(value, Laid):
        return unifier.conform(value, labels)
    return unifier.conform_raw(value, labels)


def broadcast_labels(value: Laid | Raw, shape: Sequence[Any]) -> list[Any]:
    """The axis of the result for each axis of an operand, None where it is broadcast."""
    if isinstance(value, Laid):
        ones = [all(a.batch is None and a.size == 1 for a in g) for g in value.groups]
    else:
        ones = [isinstance(s, int) and s == 1 for s in value.shape]
    offset = len(shape) - len(ones)
    wide = [not (isinstance(s, int) and s == 1) for s in shape[offset:]]
    return [
        None if o and w else offset + i for i, (o, w) in enumerate(zip(ones, wide, strict=True))
    ]


def combined_sums(operands: Sequence[Laid], layouts: Layouts) -> frozenset[int]:
    """Batch axes over which the result is a sum; refuses sums that go back to the samples."""
    summed = frozenset[int]().union(*(o.summed for o in operands))
    if summed & frozenset[int]().union(*(o.batches for o in operands)):
        raise layouts.mixing("feeds a sum over the batch back to the samples")
    return summed


def as_expression(size: Any) -> Any:
    return size if isinstance(size, sympy.Basic) else _torch.size_expression(size)
