"""Values of a program of one sample a lane: how their entries are counted, and where they lie."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxhess.emit import nominal_batch

Index = int | str  # a number, or an expression in C
Indices = tuple[Index, ...]

NOMINAL = nominal_batch(1)[0]  # the size of the batch in stand-ins
_TRIES = 8


class NoLanesError(Exception):
    """The program has no form of one sample a lane."""


@dataclass(frozen=True)
class Joint:
    """An axis made of the batch and what stood ``before`` and ``after`` it."""

    before: int
    after: int


Axis = int | None | Joint  # None: the batch


def size(axis: Axis) -> int:
    """Entries along an axis, the batch apart."""
    if isinstance(axis, Joint):
        return axis.before * axis.after
    return 1 if axis is None else axis


def nominal(axis: Axis) -> int:
    """An axis as stand-ins have it."""
    return axis if isinstance(axis, int) else size(axis) * NOMINAL


def plus(a: Index, b: Index) -> Index:
    """a + b."""
    if isinstance(a, int) and isinstance(b, int):
        return a + b
    if a == 0 or b == 0:
        return b if a == 0 else a
    return f"({a} + {b})"


def times(a: Index, n: int) -> Index:
    """a n."""
    if isinstance(a, int):
        return a * n
    if n in (0, 1):
        return a if n else 0
    return f"{a} * {n}"


def parted(a: Index, n: int) -> tuple[Index, Index]:
    """Quotient and rest of a / n, for a >= 0."""
    if isinstance(a, int):
        return divmod(a, n)
    return (a, 0) if n == 1 else (f"({a}) / {n}", f"({a}) % {n}")


def place(index: Sequence[Index], sizes: Sequence[int]) -> Index:
    """The place of an entry in the order of all."""
    found: Index = 0
    for i, n in zip(index, sizes, strict=True):
        found = plus(times(found, n), i)
    return found


@dataclass(frozen=True)
class Strided:
    """Where entries lie: ``array[offset + sum of index times step]``."""

    array: str
    offset: int
    steps: tuple[int, ...]

    def at(self, index: Sequence[Index]) -> Index:
        """The place of an entry, from the array's start."""
        found: Index = self.offset
        for i, step in zip(index, self.steps, strict=True):
            found = plus(found, times(i, step))
        return found


@dataclass(frozen=True)
class Value:
    """A value: ``at`` gives the expression of an entry (the index along the batch is ignored);
    ``lanes``: it differs from sample to sample, so that entries are vectors; ``work``: entries are
    computed each time that they are read; ``arrays``: what is read then."""

    axes: tuple[Axis, ...]
    at: Callable[[Indices], str]
    lanes: bool
    strided: Strided | None = None
    work: bool = False
    arrays: frozenset[str] = frozenset()

    @property
    def sizes(self) -> tuple[int, ...]:
        """Entries along each axis, the batch apart."""
        return tuple(map(size, self.axes))

    @property
    def count(self) -> int:
        """Entries in all, the batch apart."""
        return math.prod(self.sizes)

    def fits(self, stand_in: Any) -> bool:
        """Whether it has a stand-in's axes."""
        return isinstance(stand_in, torch.Tensor) and list(stand_in.shape) == [
            nominal(axis) for axis in self.axes
        ]


def in_memory(
    name: str, axes: tuple[Axis, ...], strided: Strided, lanes: bool, boolean: bool = False
) -> Value:
    """A value whose entries lie in an array; conditions become numbers."""

    def at(index: Indices) -> str:
        found = strided.at(index)
        if lanes:
            return f"{name}[({found}) * U + u]"
        return f"number({name}[{found}])" if boolean else f"{name}[{found}]"

    return Value(axes, at, lanes, strided, arrays=frozenset({name}))


def dense(sizes: Sequence[int]) -> tuple[int, ...]:
    """Steps of entries one behind the other."""
    steps, step = [], 1
    for n in reversed(sizes):
        steps.append(step if n != 1 else 0)
        step *= n
    return tuple(reversed(steps))


def view(value: Value, axes: Sequence[Axis], way: Callable[[Indices], Sequence[Any]]) -> Value:
    """The value whose entry at an index is that of ``value`` at ``way(index)``."""

    def at(index: Indices) -> str:
        return value.at(tuple(way(index)))

    return Value(
        tuple(axes), at, value.lanes, _steps_of(value.strided, axes, way), value.work, value.arrays
    )


def _steps_of(
    base: Strided | None, axes: Sequence[Axis], way: Callable[[Indices], Sequence[Any]]
) -> Strided | None:
    """Offset and steps of a view, if there are such: tried on indices."""
    sizes = [size(axis) for axis in axes]
    if base is None or 0 in sizes:
        return None

    def found(index: Sequence[int]) -> Any:
        return base.at(tuple(way(tuple(index))))  # type: ignore[union-attr]

    def along(d: int, i: int) -> list[int]:
        return [i if e == d else 0 for e in range(len(sizes))]

    start = found([0] * len(sizes))
    if not isinstance(start, int):  # where an entry lies depends on values
        return None
    steps = tuple(found(along(d, 1)) - start if n > 1 else 0 for d, n in enumerate(sizes))
    guess = Strided(base.array, start, steps)
    draw = random.Random(0)
    tries = [[n - 1 for n in sizes], *(along(d, n - 1) for d, n in enumerate(sizes))]
    tries += [[draw.randrange(n) for n in sizes] for _ in range(_TRIES)]
    return guess if all(guess.at(index) == found(index) for index in tries) else None


def broadcast(several: Sequence[tuple[Axis, ...]]) -> tuple[Axis, ...]:
    """The axes of all, broadcast against each other."""
    ndim = max(map(len, several), default=0)
    result: list[Axis] = [1] * ndim
    for axes in several:
        for i, n in enumerate(axes, ndim - len(axes)):
            if n != 1:
                if result[i] not in (1, n):
                    raise NoLanesError("sizes that do not fit")
                result[i] = n
    return tuple(result)


def narrowed(index: Indices, axes: Sequence[Axis]) -> Indices:
    """The index, in a value with these axes, of an entry of what it is broadcast to."""
    own = index[len(index) - len(axes) :]
    return tuple(0 if n in (1, None) else i for n, i in zip(axes, own, strict=True))


def widened(value: Value, axes: tuple[Axis, ...]) -> Value:
    """The value, broadcast to these axes."""
    return view(value, axes, lambda index: narrowed(index, value.axes))


def number(value: Any) -> str:
    """A number in C."""
    if isinstance(value, bool):
        return f"(T){int(value)}"
    if isinstance(value, (int, float)):
        if math.isnan(value):
            return "std::numeric_limits<T>::quiet_NaN()"
        if math.isinf(value):
            return f"({'-' if value < 0 else ''}std::numeric_limits<T>::infinity())"
        return f"((T){value!r})"
    raise NoLanesError(f"a {type(value).__name__} as a number")
