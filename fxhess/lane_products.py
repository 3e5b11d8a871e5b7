"""Matrix products in a program of one sample a lane.

What all samples share is packed once a call, and its entries are broadcast; two values that differ
from sample to sample are multiplied vector by vector.
"""

from __future__ import annotations

import math
from collections.abc import Container
from typing import Any

from fxhess.lane_code import Code
from fxhess.lane_values import (
    Axis,
    Index,
    Indices,
    NoLanesError,
    Strided,
    Value,
    broadcast,
    narrowed,
    place,
    size,
)


class Products:
    """Writes products into a program's code.  ``kept``: arrays that are often the same as at the
    last call; their matrices are packed where they are not known."""

    def __init__(self, code: Code, kept: Container[str] = ()) -> None:
        self.packs_kept = False
        self._code = code
        self._kept = kept
        self._packed: dict[Any, str] = {}

    def write(self, a: Value, b: Value) -> Value:
        """``torch.matmul`` of values in memory with at least two axes each."""
        lead = broadcast([a.axes[:-2], b.axes[:-2]])
        K = a.axes[-1]
        if not isinstance(K, int) or b.axes[-2] != K:
            raise NoLanesError("a sum over the batch")
        result = self._code.array((*lead, a.axes[-2], b.axes[-1]), a.lanes or b.lanes)
        left, right = _aligned(a, lead), _aligned(b, lead)
        if not result.lanes:
            self._shared(left, right, result, K)
        elif a.lanes and b.lanes:
            self._by_sample(left, right, result, K)
        elif a.lanes:
            self._flat(left, right, result, K, False)
        else:
            self._flat(right, left, result, K, True)
        return result

    def of_rows(self, a: Value, b: Value) -> str:
        """Statements for ``c = a[start:stop] b[:, :stop]``, with c as an array of ``stop`` columns,
        of a ``[B, d, k]`` and b ``[k, d]`` or ``[B, k, d]``; all rows but the last few come in
        whole blocks."""
        K, d = a.axes[-1], a.axes[-2]
        A, ar, ak = _matrix(a, (0,))
        rows, into = f"{A} + start * {ar} * U, {ar}, {ak}", f"c, stop, 1, stop - start, stop, {K}"
        if b.lanes:
            B, bk, bn = _matrix(b, (0,))
            whole, last = "0, 0", f"{d} % ROWS, {d} % COLUMNS"
            name, right = "lane_product", f"{B}, {bn}, {bk}"
        else:
            whole, last, name = "0", f"{d} % PANEL", "flat_product"
            right = self._matrices(b, [], [], K, d, False)(0)  # type: ignore[arg-type]
        whole, last = (f"{name}<U, {n}>({rows}, {right}, {into});" for n in (whole, last))
        return f"if (stop < {d}) {whole} else {last}"

    def _shared(self, a: Value, b: Value, c: Value, K: int) -> None:
        part = self._code.shared
        index = self._code.open(part, c.sizes)
        *lead, r, n = index
        part.lines.append(f"{{ T sum = 0; for (long k = 0; k < {K}; k++)")
        part.lines.append(f"sum += {a.at((*lead, r, 'k'))} * {b.at((*lead, 'k', n))};")
        part.lines.append(f"{c.at(index)} = sum; }}")
        self._code.close(part, c.sizes)

    def _by_sample(self, a: Value, b: Value, c: Value, K: int) -> None:
        part = self._code.block
        *lead, R, N = c.sizes
        index = self._code.open(part, lead)
        (A, ar, ak), (B, bk, bn), (C, cr, cn) = (_matrix(v, index) for v in (a, b, c))
        part.lines.append(
            f"lane_product<U, {R} % ROWS, {N} % COLUMNS>({A}, {ar}, {ak}, {B}, {bn}, {bk},"
            f" {C}, {cr}, {cn}, {R}, {N}, {K});"
        )
        self._code.close(part, lead)

    def _flat(self, a: Value, w: Value, c: Value, K: int, turned: bool) -> None:
        """Of vectors a with w, or with ``turned`` of w with a."""
        part = self._code.block
        *lead, R, N = c.sizes
        if turned:
            R, N = N, R
        assert a.strided is not None and w.strided is not None and c.strided is not None
        many = [d for d, n in enumerate(lead) if n > 1 and w.strided.steps[d] != 0]
        matrices = self._matrices(w, [lead[d] for d in many], many, K, N, turned)
        # A leading axis along which w is the same gives rows as well as R does.
        same = [d for d in range(len(lead)) if d not in many and lead[d] > 1]
        rows = max(same, key=lead.__getitem__) if R == 1 and same else None
        outer = [1 if d == rows else n for d, n in enumerate(lead)]
        index = self._code.open(part, outer)
        W = matrices(place([index[d] for d in many], [lead[d] for d in many]))
        (A, *steps), (C, *own) = _matrix(a, index), _matrix(c, index)
        ar, ak = steps[::-1] if turned else steps
        cr, cn = own[::-1] if turned else own
        if rows is not None:
            R, ar, cr = lead[rows], a.strided.steps[rows], c.strided.steps[rows]
        part.lines.append(
            f"flat_product<U, {N} % PANEL>({A}, {ar}, {ak}, {W}, {C}, {cr}, {cn}, {R}, {N}, {K});"
        )
        self._code.close(part, outer)

    def _matrices(
        self, w: Value, sizes: list[int], many: list[int], K: int, N: int, turned: bool
    ) -> Any:
        """Pack the matrices [K, N] that w holds along the axes ``many``; gives where one of them
        is."""
        code, one = self._code, f"packed_size({K}, {N})"
        at = w.strided
        assert at is not None
        steps = tuple(at.steps[d] for d in (*many, -2, -1))
        key = (at.array, at.offset, steps, tuple(sizes), K, N, turned)
        if key not in self._packed:
            name = self._packed[key] = code.name("w")
            code.declare(f"T* const {name} = packed + ({code.panels});")
            code.panels = f"{code.panels} + {math.prod(sizes)} * {one}"
            if at.array in self._kept:
                self.packs_kept = True
                code.shared.lines.append("if (!known)")
            chosen = code.open(code.shared, sizes)
            index: list[Index] = [0] * (len(w.axes) - 2)
            for d, i in zip(many, chosen, strict=True):
                index[d] = i
            entry = w.at((*index, *(("n", "k") if turned else ("k", "n"))))
            code.shared.lines.append(
                f"pack([&](long k, long n) -> T {{ return {entry}; }},"
                f" {name} + ({place(chosen, sizes)}) * {one}, {K}, {N}, threads);"
            )
            code.close(code.shared, sizes)
        name = self._packed[key]
        return lambda chosen: f"{name} + ({chosen}) * {one}"


def _matrix(value: Value, index: Indices) -> tuple[str, int, int]:
    """Where the last two axes begin, and their steps."""
    assert value.strided is not None
    *_, row, column = value.strided.steps
    return f"{value.strided.array} + ({value.strided.at((*index, 0, 0))}) * U", row, column


def _aligned(value: Value, lead: tuple[Axis, ...]) -> Value:
    """The value with all leading axes of a product: no steps along those that it has not."""
    assert value.strided is not None
    own = value.axes[:-2]
    more = len(lead) - len(own)
    steps = [0 if size(n) == 1 else s for n, s in zip(own, value.strided.steps[:-2], strict=True)]
    strided = Strided(
        value.strided.array, value.strided.offset, (*[0] * more, *steps, *value.strided.steps[-2:])
    )

    def at(index: Indices) -> str:
        return value.at((*narrowed(index[:-2], own), *index[-2:]))

    return Value((*lead, *value.axes[-2:]), at, value.lanes, strided)
