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
    room: int = 0  # entries of all its arrays

    @property
    def each(self) -> str:
        """Before a statement about an entry."""
        return "for (int u = 0; u < U; u++) " if self.lanes else ""


class Code:
    """A program's code so far.  Arrays of the second part share memory: the one given back last by
    those that read it is the next to be written."""

    def __init__(self) -> None:
        self.shared, self.block = Part(False), Part(True)
        self.panels = "0"  # entries of all packed matrices
        self._names = itertools.count()
        self._free: list[tuple[int, int]] = []  # start and length
        self._arrays: dict[str, tuple[int, int]] = {}
        self._readers: dict[str, int] = {}

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
            name, start = self.name("v"), self._take(count)
            self._arrays[name] = (start, count)
            self._readers[name] = 0
            self.block.lines.append(f"V* const {name} = own + {start} * U;")
        else:
            name = self.name("s")
            self.declare(f"T* const {name} = shared + {self.shared.room};")
            self.shared.room += count
        return in_memory(name, tuple(axes), Strided(name, 0, strided), lanes)

    def read(self, arrays: Iterable[str]) -> None:
        """One more value reads these."""
        for name in self._arrays.keys() & set(arrays):
            self._readers[name] += 1

    def unread(self, arrays: Iterable[str]) -> None:
        """One less."""
        for name in self._arrays.keys() & set(arrays):
            self._readers[name] -= 1

    def give_back(self) -> None:
        """Free the arrays that nobody reads."""
        for name in [n for n in self._arrays if self._readers[n] == 0]:
            pieces = sorted([*self._free, self._arrays.pop(name)])
            self._free = pieces[:1]
            for start, count in pieces[1:]:
                last, length = self._free[-1]
                if last + length == start:
                    self._free[-1] = (last, length + count)
                else:
                    self._free.append((start, count))

    def _take(self, count: int) -> int:
        for i, (start, length) in enumerate(self._free):
            if length >= count:
                rest = [(start + count, length - count)] if length > count else []
                self._free[i : i + 1] = rest
                return start
        start = self.block.room
        self.block.room += count
        return start

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
