"""Results of a program of one sample a lane: from vectors of samples to rows of memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fxhess.lane_code import Code
from fxhess.lane_products import Products
from fxhess.lane_values import NoLanesError, Value, dense, place

_ROW = 512  # entries of a result that are made before they are stored
SYMMETRIC_ROWS = 24  # of a block of a symmetric result: whole tiles, whole panels


class Results:
    """Writes results into given memory; ``sizes``: their axes, the batch apart, so far."""

    def __init__(self, code: Code, products: Products) -> None:
        self.sizes: list[tuple[int, ...]] = []
        self._code = code
        self._products = products

    def write(self, value: Any, number_of: int) -> None:
        """Store a value as ``[B, *axes]``, row by row where it is large."""
        if not isinstance(value, Value) or value.axes[:1] != (None,):
            raise NoLanesError("a result without a batch in front")
        sizes, part = value.sizes, self._code.block
        self.sizes.append(sizes[1:])
        cut = 1
        if value.strided is None or value.strided.steps != dense(sizes) or not value.lanes:
            while cut < len(sizes) and math.prod(sizes[cut:]) > _ROW:
                cut += 1
        rows, behind = sizes[1:cut], sizes[cut:]
        outer = self._code.open(part, rows)
        source = value
        if not value.lanes or value.strided is None or value.strided.steps[cut:] != dense(behind):
            source = self._code.array((None, *behind), True)
            index = self._code.open(part, behind)
            entry = value.at((0, *outer, *index))
            entry = entry if value.lanes else f"all({entry})"
            part.lines.append(f"{part.each}{source.at((0, *index))} = {entry};")
            self._code.close(part, behind)
        inner = (0,) * len(behind)
        assert source.strided is not None
        start = source.strided.at((0, *(outer if source is value else ()), *inner))
        row = place((*outer, *inner), (*rows, *behind))
        part.lines.append(
            f"store_packs<U>({source.strided.array} + ({start}) * U, {math.prod(behind)},"
            f" (T*)p[{number_of}] + ({row}), {value.count}, first, samples);"
        )
        self._code.close(part, rows)

    def symmetric(self, a: Value, b: Value, number_of: int) -> None:
        """Store ``A + A^T`` for A = a b, symmetric but for rounding, of a ``[B, d, k]`` and b
        ``[k, d]`` or ``[B, k, d]``: the rows are cut into blocks, each multiplied with the columns
        up to its own last one, and stored in both places."""
        d = a.axes[-2]
        if a.axes[:1] != (None,) or not isinstance(d, int) or not a.lanes:
            raise NoLanesError("another symmetric product")
        self.sizes.append((d, d))
        rows = self._code.array((None, SYMMETRIC_ROWS, d), True)
        (name,) = rows.arrays
        self._code.block.lines.append(
            f"store_symmetric<U>([&](long start, long stop, V* c) {{"
            f" {self._products.of_rows(a, b)} }}, {name}, {d}, (T*)p[{number_of}], first, samples);"
        )

    def chosen(self, value: Value, index: Value, sizes: Sequence[int], number_of: int) -> None:
        """Store the entries of ``[B, n]`` at the places ``index`` as ``[B, *sizes]``."""
        at, count = value.strided, index.count
        if value.axes[:1] != (None,) or len(value.axes) != 2 or not value.lanes or at is None:
            raise NoLanesError("entries chosen along the batch")
        self.sizes.append(tuple(sizes))
        entry = f"{at.array}[({at.at((0, index.at(('i',))))}) * U + u]"
        self._code.block.lines.append(
            f"store<U>([&](long i, int u) {{ return {entry}; }}, {count}, (T*)p[{number_of}],"
            f" {count}, first, samples);"
        )
