"""Structured derivatives: tangents and adjoints that are tied to axes of what they refer to.

The derivative of a value v (event axes ``e``) along a *basis* (axes ``t``), or of the outputs
along v, is a :class:`Structured`: a core tensor with the axes ::

    [*free basis axes, *batch, *event axes of v]

in which every axis may have size 1 ("the same along it").  An event axis *tied* to a basis axis
carries both: the derivative is block-diagonal over the pair, ``core[.., e, ..] * (t == e)``, and
has no free axis for t.  The identity is all ties and the core 1.  So pointwise operations keep a
derivative diagonal, a per-particle network keeps it block-diagonal, and mixing an axis unties it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fxhess.emit import Emitter, Var
from fxhess.errors import Origin
from fxhess.kinds import Label


@dataclass(frozen=True)
class Structured:
    """``ties[e]``: the basis axis that event axis e is tied to, or None.  ``basis``: sizes of the
    basis axes.  ``event``: true sizes of the event axes.  See the module's docstring."""

    core: Var | float
    ties: tuple[int | None, ...]
    basis: tuple[int, ...]
    event: tuple[int, ...]

    @property
    def free(self) -> tuple[int, ...]:
        """Basis axes that have an axis of their own in the core."""
        return tuple(k for k in range(len(self.basis)) if k not in self.ties)

    def labels(
        self, basis: Sequence[Label], batch: Sequence[Label], event: Sequence[Label]
    ) -> list[Label]:
        """The labels of the core's axes, given labels of the basis, batch and event axes."""
        return [*(basis[k] for k in self.free), *batch, *event]

    def basis_labels(self, free: Sequence[Label], event: Sequence[Label]) -> list[Label]:
        """The label that stands for each basis axis: the event axis it is tied to, or its own."""
        own = list(free)
        for e, k in enumerate(self.ties):
            if k is not None:
                own[k] = event[e]
        return own

    def __str__(self) -> str:
        tied = [k for k in self.ties if k is not None]
        if len(tied) == len([n for n in self.basis if n != 1]):
            return "identity" if not isinstance(self.core, Var) else "diagonal"
        return f"tied on {len(tied)} of {len(self.basis)} axes" if tied else "dense"


class Algebra:
    """The operations on structured derivatives that need no rule."""

    def __init__(
        self,
        emitter: Emitter,
        batch_ndim: int,
        like: Var,
        batch_size: Callable[[int], Var],
        device: torch.device,
    ) -> None:
        self.emitter = emitter
        self.nb = batch_ndim
        self.like = like
        self.batch_size = batch_size
        self.device = device
        # Where tangents lost structure, for `explain`: the operation, and the axis's size.
        self.losses: list[tuple[Origin | None, int]] = []

    def identity(self, event: tuple[int, ...]) -> Structured:
        """The derivative of a value along itself."""
        ties = tuple(i if n != 1 else None for i, n in enumerate(event))
        return Structured(1.0, ties, event, event)

    def tensor(self, s: Structured) -> Var:
        """The core as a tensor (a number becomes ones of size 1 on every axis)."""
        if isinstance(s.core, Var):
            return s.core
        rank = len(s.free) + self.nb + len(s.event)
        return self.full([1] * rank, s.core)

    def full(self, sizes: Sequence[int], value: float) -> Var:
        return self.emitter.call(
            torch.full, tuple(sizes), value, dtype=self.like.dtype, device=self.device
        )

    def eye(self, n: int) -> Var:
        return self.emitter.call(torch.eye, n, dtype=self.like.dtype, device=self.device)

    def untie(self, s: Structured, axes: Sequence[int]) -> Structured:
        """Give the basis axes tied to these event axes an axis of their own in the core."""
        for e in axes:
            k = s.ties[e]
            if k is None:
                continue
            if self.emitter.role == "tangent":
                self.losses.append((self.emitter.origin, s.event[e]))
            ties = tuple(None if i == e else t for i, t in enumerate(s.ties))
            wider = replace(s, ties=ties)
            position = wider.free.index(k)
            rank = len(wider.free) + self.nb + len(s.event)
            eye = self.eye(s.event[e])
            at = len(wider.free) + self.nb + e
            index: list[Any] = [None] * rank
            index[position] = slice(None)
            index[at] = slice(None)
            eye = eye[tuple(index)]
            if isinstance(s.core, Var):
                lift = (slice(None),) * position + (None,)
                core: Var | float = s.core[lift] * eye
            else:
                core = eye if s.core == 1.0 else eye * s.core
            s = replace(wider, core=core)
        return s

    def select(self, s: Structured, places: Var) -> Structured:
        """The derivative along some of its directions; nothing may be tied to its basis axis."""
        core = self.tensor(s)
        if core.val.shape[0] != 1:
            core = torch.index_select(core, 0, places)  # type: ignore[assignment, arg-type]
        return replace(s, core=core, basis=(places.size(0),))

    def widen(self, s: Structured, axes: Sequence[int]) -> Structured:
        """Give these event axes their full size in the core."""
        core = self.tensor(s)
        offset = len(s.free) + self.nb
        sizes = [-1] * core.ndim
        for e in axes:
            if core.val.shape[offset + e] != s.event[e]:
                sizes[offset + e] = s.event[e]
        if all(n == -1 for n in sizes):
            return replace(s, core=core)
        return replace(s, core=core.expand(sizes))

    def unify(self, items: Sequence[Structured]) -> list[Structured]:
        """The same ties on all: those that all have in common."""
        common = [
            first if all(s.ties[e] == first for s in items) else None
            for e, first in enumerate(items[0].ties)
        ]
        return [
            self.untie(s, [e for e, k in enumerate(s.ties) if k is not None and common[e] is None])
            for s in items
        ]

    def add(self, items: Sequence[Structured]) -> Structured:
        """The sum; ties that the terms do not share are lost."""
        total, *rest = self.unify(items)
        for s in rest:
            if isinstance(total.core, Var) or isinstance(s.core, Var):
                core: Var | float = self.tensor(total) + self.tensor(s)
            else:
                core = total.core + s.core
            total = replace(total, core=core)
        return total

    def spread(self, items: Sequence[Structured], own: Sequence[Sequence[int]]) -> list[Structured]:
        """Cores of one common size on every axis but the event axes ``own`` of each, for
        operations that do not broadcast (concatenation)."""
        cores = [self.tensor(s) for s in items]
        rank = cores[0].ndim
        offset = len(items[0].free)
        result = []
        for s, core, mine in zip(items, cores, own, strict=True):
            sizes: list[Any] = [-1] * rank
            for axis in range(rank):
                if axis - offset - self.nb in mine:
                    continue
                full = max(c.val.shape[axis] for c in cores)
                if core.val.shape[axis] != full:
                    batch = offset <= axis < offset + self.nb
                    sizes[axis] = self.batch_size(axis - offset) if batch else int(full)
            if any(not isinstance(n, int) or n != -1 for n in sizes):
                core = core.expand(sizes)
            result.append(replace(s, core=core))
        return result
