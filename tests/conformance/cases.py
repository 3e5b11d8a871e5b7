"""A use of an operator or module as a function with one result a sample.

All real (or complex) results are brought to one number: ``sum w * sin(y / s)``, with w fixed random
weights and s the size of the results, so that first and second derivatives both count; entries that
are infinite or not numbers (masked ones) are left out.  In a batch this is done sample by sample;
a single number for the whole batch stays as it is, which is legal (a plain sum over the batch)
exactly if it is a sum over samples.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ._pytorch import SEED, Use, reseed

BATCH = 3
Function = Callable[[torch.Tensor], torch.Tensor]


class NoResultError(Exception):
    """The call has no result that can be differentiated."""


@dataclass(frozen=True)
class Case:
    """``function``: of one sample x (``batched`` False), or of a batch ``x: [B, *event]`` with one
    result a sample, or one for all.  ``alone``: of one sample of a batch, where there is such a
    function.  ``others``: x with other values, to see who depends on whom.  ``in_place``:
    what happens to a sample depends on its place in the batch, or the results have no batch axis;
    then samples may be refused though they are independent.  ``tolerance``: of the largest
    entry."""

    label: str
    function: Function
    x: torch.Tensor
    batched: bool = False
    alone: Function | None = None
    others: torch.Tensor | None = None
    in_place: bool = False
    tolerance: float = 1e-8
    modules: tuple[nn.Module, ...] = ()

    @property
    def event_ndim(self) -> int:
        return self.x.ndim - self.batched


def is_symmetric(x: torch.Tensor) -> bool:
    """Whether x is of symmetric matrices."""
    return x.ndim >= 2 and x.shape[-1] == x.shape[-2] > 1 and torch.allclose(x, x.mT)


def seeded(function: Function) -> Function:
    """The function with the same random numbers at every call."""

    def run(x: torch.Tensor) -> torch.Tensor:
        reseed()
        return function(x)

    return run


class Reduce:
    """Results to one number, or to one for each of ``batch`` samples; made for results like
    ``example``."""

    def __init__(self, example: Any, batch: int | None = None) -> None:
        ys = _real(example)
        if not ys:
            raise NoResultError
        self.batch = batch
        self.rows = batch is not None and all(y.ndim and y.shape[0] == batch for y in ys)
        self.in_place = batch is not None and not self.rows and any(y.ndim for y in ys)
        # Results of lower precision than float64 are rounded to it.
        self.tolerance = max(1e-8, *(16 * torch.finfo(y.dtype).eps for y in ys))
        generator = torch.Generator().manual_seed(SEED)
        self.weights, self.scales, self.kept = [], [], []
        for y in ys:
            shape = y.shape[1:] if self.rows else y.shape
            finite = y.isfinite()
            kept = finite.all(0) if self.rows else finite
            largest = float(y[finite].abs().max()) if finite.any() else 1.0
            self.weights.append(torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5)
            self.scales.append(max(1.0, largest))
            self.kept.append(None if kept.all() else kept)

    def __call__(self, results: Any) -> torch.Tensor:
        total: Any = 0.0
        for part in self._parts(results):
            if not self.rows:
                total = total + part.sum()
            else:
                total = total + (part.sum(list(range(1, part.ndim))) if part.ndim > 1 else part)
        return total

    def of_one(self, results: Any) -> torch.Tensor:
        """The same number of one sample alone, whose results have no batch axis."""
        return sum(part.sum() for part in self._parts(results))  # type: ignore[return-value]

    def _parts(self, results: Any) -> Iterator[torch.Tensor]:
        for y, w, s, kept in zip(_real(results), self.weights, self.scales, self.kept, strict=True):
            if kept is not None:
                y = torch.where(kept, y, 0.0)
            summed = self.batch is not None and not self.rows and y.ndim == 0
            yield w * (y if summed else torch.sin(y / s))


def _real(results: Any) -> list[torch.Tensor]:
    """All results that derivatives are defined for, as real strided tensors."""
    found = []
    for y in tree_leaves(results):
        if not isinstance(y, torch.Tensor) or not (y.is_floating_point() or y.is_complex()):
            continue
        if y.layout != torch.strided:
            y = y.to_dense()
        found.append(torch.view_as_real(y.resolve_conj()) if y.is_complex() else y)
    return found


def unbatched(use: Use) -> Case:
    """x is one sample."""
    with torch.no_grad():
        reseed()
        reduce = Reduce(use.call(use.x, None))
    return Case(
        use.label,
        lambda x: reduce(use.call(x, None)),
        use.x,
        tolerance=reduce.tolerance,
        modules=use.modules,
    )


def batched(use: Use) -> Iterator[Case]:
    """All ways to run the use on a batch: several samples along a new first axis, and x's own
    first axis as the batch.  Samples may be independent in them or not."""
    with torch.no_grad():
        rows, others = _neighbours(use, BATCH), _neighbours(use, BATCH, SEED + 1)
        for way in use.ways:
            case = _own_axis(use) if way == "own axis" else _lifted(use, way, rows, others)
            if case is not None:
                yield case


def _lifted(use: Use, lift: str, rows: torch.Tensor, others: torch.Tensor) -> Case | None:
    reseed()
    try:
        reduce = Reduce(use.call(rows, lift), BATCH)
    except Exception:
        return None  # it takes no further axis

    def alone(x: torch.Tensor) -> torch.Tensor:
        return reduce.of_one(use.call(x, None))

    def function(x: torch.Tensor) -> torch.Tensor:
        return reduce(use.call(x, lift))

    label = f"{use.label}; new axis" + ("" if lift == "none" else f", {lift} operands")
    own = _fitting(alone, function, rows)
    in_place = reduce.in_place or (reduce.rows and own is None)
    return Case(label, function, rows, True, own, others, in_place, reduce.tolerance, use.modules)


def _own_axis(use: Use) -> Case | None:
    if use.embedded or not use.x.ndim or use.x.shape[0] < 2:
        return None
    reseed()
    try:
        reduce = Reduce(use.call(use.x, None), use.x.shape[0])
    except Exception:
        return None

    def function(x: torch.Tensor) -> torch.Tensor:
        return reduce(use.call(x, None))

    def alone(x: torch.Tensor) -> torch.Tensor:
        return function(x[None]).reshape(())

    label = f"{use.label}; own first axis"
    others = _neighbours(use, 1, SEED + 2)[0]
    own = _fitting(alone, function, use.x)
    in_place = reduce.in_place or (reduce.rows and own is None)
    return Case(label, function, use.x, True, own, others, in_place, reduce.tolerance, use.modules)


def _fitting(alone: Function, function: Function, x: torch.Tensor) -> Function | None:
    """``alone`` if it says of every sample what ``function`` says of it in the batch."""
    try:
        values = seeded(function)(x)
        if values.ndim != 1:
            return None
        own = torch.stack([seeded(alone)(s) for s in x])
    except Exception:
        return None
    return alone if torch.allclose(own, values, rtol=1e-9, atol=1e-12, equal_nan=True) else None


def _neighbours(use: Use, count: int, seed: int = SEED) -> torch.Tensor:
    """``[count, *x.shape]``: samples near x at which the function is as finite as at x."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand((count, *use.x.shape), generator=generator, dtype=use.x.dtype)
    if is_symmetric(use.x):
        noise = (noise + noise.mT) / 2
    reseed()
    usual = _finite(use.call(use.x, None))
    rows = use.x * (1 - 1e-6 * noise)
    for factor in (-0.1, 0.1, 1e-3):
        rows = use.x * (1 + factor * noise)
        if all(_same(usual, _finite(use.call(row, None))) for row in rows):
            return rows
    return rows


def _finite(results: Any) -> list[torch.Tensor]:
    return [y.isfinite() for y in _real(results)]


def _same(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> bool:
    pairs = itertools.zip_longest(a, b)
    return all(p is not None and q is not None and torch.equal(p, q) for p, q in pairs)
