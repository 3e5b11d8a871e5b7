"""Structured derivatives: tangents and adjoints that are tied to axes of what they refer to.

The derivative of a value v (event axes ``e``) along a *basis* (axes ``t``), or of the outputs
along v, is a :class:`Structured`: a core tensor with the axes ::

    [*free basis axes, *batch, *event axes of v]

in which every axis may have size 1 ("the same along it").  An event axis *tied* to a basis axis
carries both: the derivative is block-diagonal over the pair, ``core[.., e, ..] * (t == e)``, and
has no free axis for t.  The identity is all ties and the core 1.  So pointwise operations keep a
derivative diagonal, a per-particle network keeps it block-diagonal, and mixing an axis unties it.

A basis axis can be *near* an event axis: then only the entries in a window of it differ from zero
at each position, and its free axis holds not its entries but their colours (see ``windows``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fxhess import windows
from fxhess.emit import Emitter, Var
from fxhess.errors import InternalError, Origin
from fxhess.kinds import Label, Window

SAME = Window.of(1, 0, 0)
Places = Mapping[int, tuple[int | None, Window]]
"""What becomes of event axes, and which of its positions each one of the result meets."""


@dataclass(frozen=True)
class Near:
    """That basis axis ``basis`` has ``period`` colours, and is near the event axis ``event``: of
    every position of that, only the entries in its window differ from zero.  Without ``event``, it
    is tied still, and will be near what it is untied from."""

    basis: int
    period: int
    event: int | None = None
    window: Window = SAME

    def joined(self, other: Near) -> Near | None:
        """Near the same axis in both windows, if there are colours enough for that."""
        window = self.window.joined(other.window)
        if window is None or window.width > self.period:
            return None
        both = replace(self, window=window)
        return both if both == replace(other, window=window) else None


@dataclass(frozen=True)
class Structured:
    """``ties[e]``: the basis axis that event axis e is tied to, or None.  ``basis``: sizes of the
    basis axes.  ``event``: true sizes of the event axes.  ``near``: of basis axes that are near an
    event axis.  See the module's docstring."""

    core: Var | float
    ties: tuple[int | None, ...]
    basis: tuple[int, ...]
    event: tuple[int, ...]
    near: tuple[Near, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.core, Var):
            return
        sizes = dict(enumerate(self.basis)) | {n.basis: n.period for n in self.near}
        for k, size in zip(self.free, self.core.val.shape, strict=False):
            if size not in (1, sizes[k]):
                raise InternalError(f"a basis axis of {sizes[k]} entries has {size} in the core")

    @property
    def places(self) -> list[Near]:
        """Of the basis axes that are near an event axis and no longer tied to it."""
        return [n for n in self.near if n.event is not None]

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
            near = next((n for n in s.near if n.basis == k), None)
            if self.emitter.role == "tangent" and near is None:
                self.losses.append((self.emitter.origin, s.event[e]))
            ties = tuple(None if i == e else t for i, t in enumerate(s.ties))
            free = tuple(i for i in range(len(s.basis)) if i not in ties)
            position = free.index(k)
            rank = len(free) + self.nb + len(s.event)
            eye = self.eye(s.event[e]) if near is None else self.seeds(s.event[e], near.period)
            at = len(free) + self.nb + e
            index: list[Any] = [None] * rank
            index[position] = slice(None)
            index[at] = slice(None)
            eye = eye[tuple(index)]
            if isinstance(s.core, Var):
                lift = (slice(None),) * position + (None,)
                core: Var | float = s.core[lift] * eye
            else:
                core = eye if s.core == 1.0 else eye * s.core
            others = tuple(n for n in s.near if n.basis != k)
            own = () if near is None else (replace(near, event=e),)
            s = replace(s, core=core, ties=ties, near=(*others, *own))
        return s

    def seeds(self, n: int, period: int) -> Var:
        return self.emitter.call(
            windows.seeds, n, period, dtype=self.like.dtype, device=self.device
        )

    def mix(self, s: Structured, axes: Sequence[int]) -> Structured:
        """Untie these event axes, of which every position is about to meet every other."""
        tied = {s.ties[e] for e in axes} - {None}
        s = replace(s, near=tuple(n for n in s.near if n.basis not in tied))
        return self.untie(self.dense(s, [n for n in s.places if n.event in axes]), axes)

    def dense(self, s: Structured, near: Sequence[Near] | None = None) -> Structured:
        """Basis axes with all their entries in place of the colours: all that are near, or these.
        None of them will ever be near again."""
        given = s.near if near is None else near
        if not given:
            return s
        chosen = [n for n in given if n.event is not None]
        core: Any = s.core
        masks: Any = None
        for n in chosen:
            assert isinstance(n.event, int)
            position, size, count = s.free.index(n.basis), s.basis[n.basis], s.event[n.event]
            if n.period < size:
                places = self.emitter.call(windows.colours, size, n.period, device=self.device)
                core = torch.index_select(core, position, places)
            w = n.window
            pairs = [(f.numerator, f.denominator) for f in (w.step, w.first, w.last)]
            mask: Any = self.emitter.call(windows.mask, size, count, pairs, device=self.device)
            index: list[Any] = [None] * (len(s.free) + self.nb + len(s.event))
            index[position] = index[len(s.free) + self.nb + n.event] = slice(None)
            masks = mask[tuple(index)] if masks is None else masks & mask[tuple(index)]
        if masks is not None:
            core = torch.where(masks, core, 0.0)
            if self.emitter.role == "tangent":
                self.losses += [(self.emitter.origin, s.basis[n.basis]) for n in chosen]
        rest = {n.basis for n in given}
        return replace(s, core=core, near=tuple(n for n in s.near if n.basis not in rest))

    def moved(self, s: Structured, places: Places) -> Structured:
        """Before an operation: dense along what will not be near an event axis any more."""

        def stays(n: Near) -> bool:
            if n.event is None or n.event not in places:
                return False
            return places[n.event][1].then(n.window).width <= n.period

        return self.dense(s, [n for n in s.places if not stays(n)])

    @staticmethod
    def arrived(s: Structured, places: Places, shift: int = 0) -> tuple[Near, ...]:
        """After an operation: what is near which event axis of the result."""
        found = []
        for n in s.near:
            n = replace(n, basis=n.basis + shift)
            if n.event is not None:
                event, window = places[n.event]
                n = replace(n, event=event, window=window.then(n.window))
            found.append(n)
        return tuple(found)

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

    def carried(
        self, s: Structured, source: Sequence[Label], target: Sequence[Label], shift: int = 0
    ) -> tuple[Structured, tuple[Near, ...]]:
        """A derivative ready to go from labels ``source`` to ``target``, and what will be near
        there; ``shift``: of the numbers of its basis axes."""
        if not s.near:
            return s, ()
        places: dict[int, tuple[int | None, Window]] = {
            e: (list(target).index(a), SAME)
            for e, a in enumerate(source)
            if list(target).count(a) == 1
        }
        lost = {s.ties[e] for e in range(len(source)) if e not in places}
        s = replace(s, near=tuple(n for n in s.near if n.event is not None or n.basis not in lost))
        s = self.moved(s, places)
        return s, self.arrived(s, places, shift)

    def unify(self, items: Sequence[Structured]) -> list[Structured]:
        """The same ties on all: those that all have in common, none where ranks differ."""
        alike = len({len(s.ties) for s in items}) == 1
        widest = max(items, key=lambda s: len(s.ties))
        common = [
            first if alike and all(s.ties[e] == first for s in items) else None
            for e, first in enumerate(widest.ties)
        ]
        apart = [
            self.untie(s, [e for e, k in enumerate(s.ties) if k is not None and common[e] is None])
            for s in items
        ]
        return self._together(apart) if any(s.near for s in apart) else apart

    def _together(self, items: Sequence[Structured]) -> list[Structured]:
        """All near the same, in the same windows, or not at all.  Zeros are near anything."""
        some = [s for s in items if isinstance(s.core, Var) or s.core != 0] or items
        joined = []
        for near in some[0].near:
            same: Near | None = near
            for s in some[1:]:
                other = next((n for n in s.near if n.basis == near.basis), None)
                same = same.joined(other) if same and other else None
            if same is not None:
                joined.append(same)
        kept = {n.basis for n in joined}
        return [
            replace(self.dense(s, [n for n in s.near if n.basis not in kept]), near=tuple(joined))
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
        offset = len(items[0].free)
        result = []
        for s, core, mine in zip(items, cores, own, strict=True):
            sizes: list[Any] = [-1] * core.ndim
            for axis in range(core.ndim):
                if axis - offset - self.nb in mine:
                    continue
                full = max(c.val.shape[axis] for c in cores if axis < c.ndim)
                if core.val.shape[axis] != full:
                    batch = offset <= axis < offset + self.nb
                    sizes[axis] = self.batch_size(axis - offset) if batch else int(full)
            if any(not isinstance(n, int) or n != -1 for n in sizes):
                core = core.expand(sizes)
            result.append(replace(s, core=core))
        return result
