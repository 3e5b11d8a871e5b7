"""Operations that are other ways to count the same entries, in a program of one sample a lane."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fxhess.lane_values import (
    NOMINAL,
    Axis,
    Index,
    Indices,
    Joint,
    NoLanesError,
    Value,
    nominal,
    parted,
    place,
    plus,
    size,
    times,
    view,
)
from fxhess.lanes import Lanes


def _same(lanes: Lanes, value: Value, *args: Any, **kwargs: Any) -> Value:
    return value


def _converted(lanes: Lanes, value: Value, to: Any = None, *args: Any, **kwargs: Any) -> Value:
    to = kwargs.get("dtype", to)
    if to is not lanes.dtype or args:
        raise NoLanesError(f"a conversion to {to}")
    return value


def _permute(lanes: Lanes, value: Value, *order: Any) -> Value:
    axes = [d % len(value.axes) for d in numbers(order)]
    place = [axes.index(d) for d in range(len(axes))]
    return view(value, [value.axes[d] for d in axes], lambda i: tuple(i[p] for p in place))


def transpose(lanes: Lanes, value: Value, a: int = 0, b: int = 1) -> Value:
    order = list(range(len(value.axes)))
    if order:
        order[a], order[b] = order[b], order[a]
    return _permute(lanes, value, *order)


def _movedim(lanes: Lanes, value: Value, source: int, to: int) -> Value:
    n = len(value.axes)
    order = [d for d in range(n) if d != source % n]
    order.insert(to % n, source % n)
    return _permute(lanes, value, *order)


def unsqueeze(lanes: Lanes, value: Value, dim: int) -> Value:
    d = dim % (len(value.axes) + 1)
    axes = (*value.axes[:d], 1, *value.axes[d:])
    return view(value, axes, lambda i: (*i[:d], *i[d + 1 :]))


def _squeeze(lanes: Lanes, value: Value, dims: Any = None) -> Value:
    n = len(value.axes)
    chosen = range(n) if dims is None else [d % n for d in numbers([dims])]
    gone = [d for d in chosen if value.axes[d] == 1]
    return dropped(value, dict.fromkeys(gone, 0))


def dropped(value: Value, at: dict[int, Index]) -> Value:
    """Without some axes, of which one entry each is taken."""
    if any(not isinstance(value.axes[d], int) for d in at):
        raise NoLanesError("one sample of the batch")
    n = len(value.axes)
    kept = [d for d in range(n) if d not in at]
    place = {d: k for k, d in enumerate(kept)}
    return view(
        value, [value.axes[d] for d in kept],
        lambda i: tuple(i[place[d]] if d in place else at[d] for d in range(n)),
    )  # fmt: skip


def _expand(lanes: Lanes, value: Value, *sizes: Any, **kwargs: Any) -> Value:
    wanted = [None if n == NOMINAL else n for n in numbers(sizes)]
    more = len(wanted) - len(value.axes)
    own: list[Axis] = [*[1] * more, *value.axes]
    axes = [o if n == -1 or o != 1 else n for n, o in zip(wanted, own, strict=True)]
    return view(
        value, axes,
        lambda i: [0 if n in (1, None) else k for n, k in zip(own, i, strict=True)][more:],
    )  # fmt: skip


def _reshape(lanes: Lanes, value: Value, *sizes: Any) -> Value:
    return _reshaped(lanes, value, numbers(sizes))


def _reshaped(lanes: Lanes, value: Value, sizes: list[int]) -> Value:
    """The same entries in the same order, with axes of these sizes in stand-ins."""
    whole = math.prod(map(nominal, value.axes))
    sizes = [whole // math.prod(n for n in sizes if n != -1) if n == -1 else n for n in sizes]
    if math.prod(sizes) != whole:
        raise NoLanesError("other entries")
    before = _before_batch(value.axes)
    axes: list[Axis] = []
    for n in sizes:
        axes.append(n if n % NOMINAL or before is None else _with_batch(n, before, axes))
    if value.work:
        value = lanes.stored(value)
    old = value.sizes
    reshaped = Value(tuple(axes), value.at, value.lanes)

    def way(index: Indices) -> Sequence[Index]:
        flat = place(index, reshaped.sizes)
        found: list[Index] = []
        for n in reversed(old[1:]):
            flat, rest = parted(flat, n)
            found.append(rest)
        return [flat, *reversed(found)] if old else []

    return view(value, axes, way)


def _before_batch(axes: Sequence[Axis]) -> int | None:
    """Entries before the batch, in the order of all; None where there is no batch."""
    found = 1
    for axis in axes:
        if isinstance(axis, int):
            found *= axis
        else:
            return found * axis.before if axis is not None else found
    return None


def _with_batch(n: int, before: int, axes: Sequence[Axis]) -> Axis:
    """The axis of size n after ``axes`` that the batch is part of."""
    outer = math.prod(a for a in axes if isinstance(a, int))
    own, rest = divmod(before, outer)
    if rest or (n // NOMINAL) % own or not all(isinstance(a, int) for a in axes):
        raise NoLanesError("a batch that is cut")
    return None if n == NOMINAL else Joint(own, n // NOMINAL // own)


def _flatten(lanes: Lanes, value: Value, start: int = 0, end: int = -1) -> Value:
    sizes = [nominal(axis) for axis in value.axes]
    start, end = start % len(sizes), end % len(sizes) + 1
    return _reshaped(lanes, value, [*sizes[:start], math.prod(sizes[start:end]), *sizes[end:]])


def _unflatten(lanes: Lanes, value: Value, dim: int, parts: Sequence[int]) -> Value:
    sizes = [nominal(axis) for axis in value.axes]
    d = dim % len(sizes)
    rest = math.prod(n for n in parts if n != -1)
    found = [sizes[d] // rest if n == -1 else n for n in parts]
    return _reshaped(lanes, value, [*sizes[:d], *found, *sizes[d + 1 :]])


def _select(lanes: Lanes, value: Value, dim: int, index: int) -> Value:
    d = dim % len(value.axes)
    return dropped(value, {d: index % nominal(value.axes[d])})


def _slice(
    lanes: Lanes, value: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Value:
    d = dim % len(value.axes)
    n = value.axes[d]
    if not isinstance(n, int):
        if start in (None, 0) and step == 1 and (end is None or end > 1 << 40):
            return value
        raise NoLanesError("some samples of the batch")
    places = range(n)[slice(start, end, step)]
    axes = [*value.axes[:d], len(places), *value.axes[d + 1 :]]
    return view(
        value, axes,
        lambda i: (*i[:d], plus(times(i[d], places.step), places.start), *i[d + 1 :]),
    )  # fmt: skip


def _narrow(lanes: Lanes, value: Value, dim: int, start: int, length: int) -> Value:
    return _slice(lanes, value, dim, start, start + length)


def _getitem(lanes: Lanes, value: Any, index: Any) -> Value:
    if not isinstance(value, Value):
        raise NoLanesError("an entry of a list")
    whole = index if isinstance(index, tuple) else (index,)
    if any(isinstance(i, (Value, list)) for i in whole):
        raise NoLanesError("an index that is a tensor")
    if Ellipsis in whole:
        at = whole.index(Ellipsis)
        named = sum(i is not None for i in whole) - 1
        more = (slice(None),) * (len(value.axes) - named)
        whole = (*whole[:at], *more, *whole[at + 1 :])
    d = 0
    for i in whole:
        if i is None:
            value, d = unsqueeze(lanes, value, d), d + 1
        elif isinstance(i, slice):
            value = _slice(lanes, value, d, i.start, i.stop, 1 if i.step is None else i.step)
            d += 1
        else:
            value = _select(lanes, value, d, i)
    return value


def checked(lanes: Lanes, value: Value, dim: int, index: Value) -> int:
    """The axis along which an index is the same for all samples, and within its limits."""
    d = dim % len(value.axes)
    if not isinstance(value.axes[d], int) or index.lanes or index.work:
        raise NoLanesError("an index along the batch, or of each sample")
    lanes.check(index, size(value.axes[d]))
    return d


def _index_select(lanes: Lanes, value: Value, dim: int, index: Value) -> Value:
    d = checked(lanes, value, dim, index)
    value = lanes.stored(value) if value.work else value
    axes = [*value.axes[:d], index.count, *value.axes[d + 1 :]]
    return view(value, axes, lambda i: [*i[:d], index.at((i[d],)), *i[d + 1 :]])


def _unpack(lanes: Lanes, packed: Value, positions: Value, sizes: Sequence[int]) -> Value:
    chosen = _index_select(lanes, packed, -1, positions)
    return _unflatten(lanes, chosen, -1, [*sizes, *sizes])


def _pad(lanes: Lanes, value: Value, pad: Sequence[int], *args: Any, **kwargs: Any) -> Value:
    mode = [a for a in (*args, kwargs.get("mode", "constant")) if isinstance(a, str)]
    fill = [a for a in (*args, kwargs.get("value")) if isinstance(a, (int, float))]
    if mode[0] != "constant" or min(pad) < 0:
        raise NoLanesError("padding other than by a number")
    n = len(value.axes)
    before = {n - 1 - k: pad[2 * k] for k in range(len(pad) // 2)}
    after = {n - 1 - k: pad[2 * k + 1] for k in range(len(pad) // 2)}
    if any(not isinstance(value.axes[d], int) and (before[d] or after[d]) for d in before):
        raise NoLanesError("padding of the batch")
    value = lanes.stored(value) if value.work else value
    axes = [
        a + before.get(d, 0) + after.get(d, 0) if isinstance(a, int) else a
        for d, a in enumerate(value.axes)
    ]
    number = f"(T){float(fill[0] if fill else 0)!r}"

    def at(index: Indices) -> str:
        inside = tuple(plus(i, -before.get(d, 0)) for d, i in enumerate(index))
        limits = [f"{i} >= 0 && {i} < {value.axes[d]}" for d, i in enumerate(inside)
                  if before.get(d, 0) or after.get(d, 0)]  # fmt: skip
        entry = value.at(inside)
        if not limits:
            return entry
        other = f"all({number})" if value.lanes else number
        return f"({' && '.join(limits)} ? {entry} : {other})"

    return Value(tuple(axes), at, value.lanes, None, True, value.arrays)


def numbers(values: Any) -> list[Any]:
    """Numbers given one by one, or as one list."""
    if len(values) == 1 and isinstance(values[0], (list, tuple, torch.Size)):
        return list(values[0])
    return list(values)


VIEWS: dict[str, Callable[..., Value]] = {
    "alias": _same,
    "detach": _same,
    "lift_fresh_copy": _same,
    "contiguous": _same,
    "clone": _same,
    "to": _converted,
    "_to_copy": _converted,
    "permute": _permute,
    "t": transpose,
    "transpose": transpose,
    "movedim": _movedim,
    "unsqueeze": unsqueeze,
    "squeeze": _squeeze,
    "expand": _expand,
    "view": _reshape,
    "reshape": _reshape,
    "_unsafe_view": _reshape,
    "flatten": _flatten,
    "unflatten": _unflatten,
    "select": _select,
    "slice": _slice,
    "narrow": _narrow,
    "getitem": _getitem,
    "index_select": _index_select,
    "unpack": _unpack,
    "constant_pad_nd": _pad,
    "pad": _pad,
}
