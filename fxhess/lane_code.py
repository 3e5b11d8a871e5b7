"""Statements, loops and arrays of a program of one sample a lane."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from fxhess.lane_values import Axis, Index, Strided, Value, dense, in_memory, size


@dataclass
class Part:
    """One of the two parts of a program: what is computed once a call, of what all samples share,
    and what is computed for every few samples."""

    lanes: bool
    lines: list[str] = field(default_factory=list)

    @property
    def each(self) -> str:
        """Before a statement about an entry."""
        return "for (int u = 0; u < U; u++) " if self.lanes else ""


@dataclass
class _Array:
    """An array of the second part: its entries, and from when to when it is needed."""

    count: int
    born: int
    died: int | None = None
    readers: int = 0

    def meets(self, other: _Array) -> bool:
        """Whether there is a time at which both are needed."""
        return (other.died is None or self.born < other.died) and (
            self.died is None or other.born < self.died
        )


class Code:
    """A program's code so far.  Arrays of the second part that are not needed at the same time
    share memory."""

    def __init__(self) -> None:
        self.shared, self.block = Part(False), Part(True)
        self.shared_room = 0  # entries of all arrays of the first part
        self.panels = "0"  # entries of all packed matrices
        self._names = itertools.count()
        self._arrays: dict[str, _Array] = {}
        self._time = 0

    def part(self, lanes: bool) -> Part:
        return self.block if lanes else self.shared

    def name(self, kind: str) -> str:
        """A new name."""
        return f"{kind}{next(self._names)}"

    def declare(self, line: str) -> None:
        """A statement for both parts."""
        self.shared.lines.append(line)
        self.block.lines.append(line)

    # --- arrays ---------------------------------------------------------------------------------

    def array(self, axes: Sequence[Axis], lanes: bool) -> Value:
        """A new value in memory, to be written."""
        sizes = tuple(map(size, axes))
        strided = dense(sizes)
        count = 1
        for n in sizes:
            count *= n
        if lanes:
            name = self.name("v")
            self._arrays[name] = _Array(count, self._time)
        else:
            name = self.name("s")
            self.declare(f"T* const {name} = shared + {self.shared_room};")
            self.shared_room += count
        return in_memory(name, tuple(axes), Strided(name, 0, strided), lanes)

    def readers(self, array: str) -> int:
        """How many values read an array of the second part; 0 for others."""
        known = self._arrays.get(array)
        return known.readers if known is not None and known.died is None else 0

    def read(self, arrays: Iterable[str]) -> None:
        """One more value reads these."""
        for name in self._arrays.keys() & set(arrays):
            self._arrays[name].readers += 1

    def unread(self, arrays: Iterable[str]) -> None:
        """One less."""
        for name in self._arrays.keys() & set(arrays):
            self._arrays[name].readers -= 1

    def give_back(self) -> None:
        """From now on, arrays that nobody reads are not needed."""
        self._time += 1
        for array in self._arrays.values():
            if array.died is None and array.readers == 0:
                array.died = self._time

    def places(self) -> tuple[list[str], int]:
        """Declarations of all arrays of the second part, and the entries that they take: the
        largest first, each at the first place that none has that is needed at the same time."""
        starts: dict[str, int] = {}
        for name in sorted(self._arrays, key=lambda n: -self._arrays[n].count):
            array, start = self._arrays[name], 0
            taken = [(starts[n], self._arrays[n]) for n in starts if self._arrays[n].meets(array)]
            for begin, other in sorted(taken, key=lambda t: t[0]):
                if begin - start >= array.count:
                    break
                start = max(start, begin + other.count)
            starts[name] = start
        room = max((starts[n] + self._arrays[n].count for n in starts), default=0)
        return [f"V* const {n} = own + {starts[n]} * U;" for n in self._arrays], room

    # --- loops ----------------------------------------------------------------------------------

    def open(self, part: Part, sizes: Sequence[int]) -> tuple[Index, ...]:
        """Open a loop along every axis of more than one entry."""
        index: list[Index] = []
        for n in sizes:
            if n == 1:
                index.append(0)
                continue
            name = self.name("i")
            part.lines.append(f"for (long {name} = 0; {name} < {n}; {name}++) {{")
            index.append(name)
        return tuple(index)

    @staticmethod
    def close(part: Part, sizes: Sequence[int]) -> None:
        part.lines.append("}" * sum(n != 1 for n in sizes))
