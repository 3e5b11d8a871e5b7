"""Resizing and sampling of images: interpolation along one axis after another, by a constant
matrix; sampling at points that may depend on x."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from fxhess.registry import aten, composite, substitute

Ints = Sequence[int]
Taps = list[tuple[int, float]]  # (index, weight) of the entries that make one new entry


# --- where new entries come from --------------------------------------------------------------


def _scale(n: int, out: int, align: bool, given: float | None) -> float:
    if align:
        return (n - 1) / (out - 1) if out > 1 else 0.0
    return 1 / given if given else n / out


def _source(i: int, scale: float, align: bool) -> float:
    return scale * i if align else scale * (i + 0.5) - 0.5


def _linear(i: int, n: int, scale: float, align: bool) -> Taps:
    at = max(_source(i, scale, align), 0.0)
    low = min(int(at), n - 1)
    part = at - low
    return [(low, 1 - part), (min(low + 1, n - 1), part)]


def _cubic_weight(x: Any, a: float) -> Any:
    """Keys' cubic convolution kernel at a distance below 1 (Keys 1981, eq. 15)."""
    return ((a + 2) * x - (a + 3)) * x * x + 1


def _cubic_tail(x: Any, a: float) -> Any:
    """The same kernel at a distance from 1 to 2."""
    return ((x - 5) * x + 8) * x * a - 4 * a


def _cubic(i: int, n: int, scale: float, align: bool) -> Taps:
    at = _source(i, scale, align)
    low = math.floor(at)
    weights = _cubic_weights(at - low)
    return [(min(max(low - 1 + k, 0), n - 1), w) for k, w in enumerate(weights)]


def _cubic_weights(part: Any, a: float = -0.75) -> list[Any]:
    """Weights of the entries at -1, 0, 1 and 2 for a point at ``part`` between 0 and 1."""
    return [
        _cubic_tail(part + 1, a),
        _cubic_weight(part, a),
        _cubic_weight(1 - part, a),
        _cubic_tail(2 - part, a),
    ]


def _antialiased(width: float, kernel: Callable[[float], float]) -> Callable[..., Taps]:
    """A kernel stretched by the scale where the image shrinks."""

    def taps(i: int, n: int, scale: float, align: bool) -> Taps:
        stretch = max(scale, 1.0)
        centre, reach = scale * (i + 0.5), width * stretch
        first = max(int(centre - reach + 0.5), 0)
        last = min(int(centre + reach + 0.5), n)
        weights = [kernel(abs(k - centre + 0.5) / stretch) for k in range(first, last)]
        return [(first + k, w / sum(weights)) for k, w in enumerate(weights)]

    return taps


def _keys(x: float) -> float:
    return _cubic_weight(x, -0.5) if x < 1 else _cubic_tail(x, -0.5) if x < 2 else 0.0


# --- along one axis -----------------------------------------------------------------------------


def _interpolated(
    x: torch.Tensor, dim: int, out: int, taps: Callable[..., Taps], align: bool, given: float | None
) -> torch.Tensor:
    n = x.shape[dim]
    if n == out and taps is not _cubic:  # whatever scale is given
        return x
    scale = _scale(n, out, align, given)
    matrix = [[0.0] * out for _ in range(n)]
    for i in range(out):
        for k, weight in taps(i, n, scale, align):
            matrix[k][i] += weight
    constant = torch.tensor(matrix, dtype=x.dtype, device=x.device)
    return torch.movedim(torch.matmul(torch.movedim(x, dim, -1), constant), -1, dim)


def _nearest(
    x: torch.Tensor,
    dim: int,
    out: int,
    half: float,
    given: float | None,
    plane: bool,
    halves: bool,
) -> torch.Tensor:
    """Rounds as the operators do: in two dimensions (``plane``) always in single precision, else
    first in x's own; ``halves``: sizes decide before scales."""
    n = x.shape[dim]
    if halves and out in (n, 2 * n):
        given = None
    number = np.float64 if x.dtype == torch.float64 and not plane else np.float32
    scale = number(1 / given) if given else number(n) / number(out)
    places = [min(int(np.float32((number(i) + number(half)) * scale)), n - 1) for i in range(out)]
    return torch.index_select(x, dim, torch.tensor(places, device=x.device))


Resize = Callable[[torch.Tensor, int, int, bool, float | None], torch.Tensor]


def _by_nearest(half: float, rank: int) -> Resize:
    plane = rank == 2
    halves = plane and half == 0
    return lambda x, dim, out, align, given: _nearest(x, dim, out, half, given, plane, halves)


def _by_matrix(taps: Callable[..., Taps]) -> Resize:
    return lambda x, dim, out, align, given: _interpolated(x, dim, out, taps, align, given)


def _resize(
    x: torch.Tensor, resize: Resize, sizes: Ints, align: bool, given: Sequence[float | None]
) -> torch.Tensor:
    for dim, (out, scale) in enumerate(zip(sizes, given, strict=True), -len(sizes)):
        x = resize(x, dim, int(out), align, scale)
    return x


def _register(name: str, rank: int, resize: Resize, aligned: bool) -> None:
    """Sizes are given, and for each axis a scale or None."""

    def rewrite(self: torch.Tensor, output_size: Ints, *rest: Any, **named: Any) -> torch.Tensor:
        given = [*rest, *named.values()]
        align = bool(given.pop(0)) if aligned else False
        return _resize(self, resize, output_size, align, [*given, *[None] * (rank - len(given))])

    composite(getattr(aten, name).default)(rewrite)


for rank in (1, 2, 3):
    _register(f"upsample_nearest{rank}d", rank, _by_nearest(0.0, rank), False)
    _register(f"_upsample_nearest_exact{rank}d", rank, _by_nearest(0.5, rank), False)
_register("upsample_linear1d", 1, _by_matrix(_linear), True)
_register("upsample_bilinear2d", 2, _by_matrix(_linear), True)
_register("upsample_trilinear3d", 3, _by_matrix(_linear), True)
_register("upsample_bicubic2d", 2, _by_matrix(_cubic), True)
_register(
    "_upsample_bilinear2d_aa",
    2,
    _by_matrix(_antialiased(1.0, lambda x: max(1.0 - x, 0.0))),
    True,
)
_register("_upsample_bicubic2d_aa", 2, _by_matrix(_antialiased(2.0, _keys)), True)


# --- channels into pixels and back ----------------------------------------------------------------


@composite(aten.pixel_shuffle.default)
def pixel_shuffle(self: torch.Tensor, upscale_factor: int) -> torch.Tensor:
    r = upscale_factor
    x = torch.unflatten(self, -3, (-1, r, r))  # .. c r s h w
    x = torch.movedim(x, (-4, -3), (-3, -1))  # .. c h r w s
    return torch.flatten(torch.flatten(x, -2), -3, -2)


@composite(aten.pixel_unshuffle.default)
def pixel_unshuffle(self: torch.Tensor, downscale_factor: int) -> torch.Tensor:
    r = downscale_factor
    x = torch.unflatten(torch.unflatten(self, -1, (-1, r)), -3, (-1, r))  # .. c h r w s
    x = torch.movedim(x, (-3, -1), (-4, -3))  # .. c r s h w
    return torch.flatten(x, -5, -3)


@composite(aten.channel_shuffle.default)
def channel_shuffle(self: torch.Tensor, groups: int) -> torch.Tensor:
    return torch.flatten(torch.unflatten(self, 1, (groups, -1)).transpose(1, 2), 1, 2)


# --- sampling at given points ---------------------------------------------------------------------

BILINEAR, NEAREST, BICUBIC = 0, 1, 2
ZEROS, BORDER, REFLECTION = 0, 1, 2


def _padded(at: torch.Tensor, n: int, padding: int, align: bool) -> torch.Tensor:
    """A position moved into the image, as the padding mode says."""
    if padding == REFLECTION:
        low, span = (0.0, n - 1) if align else (-0.5, n)
        if span == 0:
            return torch.zeros_like(at)
        away = torch.abs(at - low)
        turns = torch.floor(away.detach() / span)
        rest = away - turns * span
        at = torch.where(turns % 2 == 0, rest, span - rest) + low
    return at if padding == ZEROS else torch.clamp(at, 0, n - 1)


def _axis_taps(
    c: torch.Tensor, n: int, mode: int, padding: int, align: bool
) -> list[tuple[torch.Tensor, Any]]:
    """Integral positions along an axis and their weights, for coordinates from -1 to 1."""
    at = (c + 1) / 2 * (n - 1) if align else ((c + 1) * n - 1) / 2
    if mode == BICUBIC:
        base = torch.floor(at.detach())
        weights = _cubic_weights(at - base)
        return [(_padded(base + k - 1, n, padding, align), w) for k, w in enumerate(weights)]
    at = _padded(at, n, padding, align)
    if mode == NEAREST:
        return [(torch.round(at.detach()), 1.0)]
    base = torch.floor(at.detach())
    return [(base, 1 - (at - base)), (base + 1, at - base)]


@composite(aten.grid_sampler_2d.default, aten.grid_sampler_3d.default)
def grid_sampler(
    input: torch.Tensor,
    grid: torch.Tensor,
    interpolation_mode: int,
    padding_mode: int,
    align_corners: bool,
) -> torch.Tensor:
    """One gather for each neighbour of the points; grid holds x, y(, z) on its last axis."""
    sizes = input.shape[2:]
    taps = [
        _axis_taps(grid[..., k], n, interpolation_mode, padding_mode, align_corners)
        for k, n in enumerate(reversed(sizes))
    ]
    image = torch.flatten(input, 2)
    total: Any = None
    for corner in itertools.product(*taps):
        inside = [
            (p >= 0) & (p <= n - 1) for (p, _), n in zip(corner, reversed(sizes), strict=True)
        ]
        index: Any = 0
        for (place, _), n in reversed(list(zip(corner, reversed(sizes), strict=True))):
            index = index * n + torch.clamp(place, 0, n - 1).to(torch.int64)
        weight = functools.reduce(lambda a, b: a * b, [w for _, w in corner])
        places = torch.flatten(index, 1).unsqueeze(1).expand(-1, image.shape[1], -1)
        value = torch.unflatten(torch.gather(image, 2, places), 2, tuple(grid.shape[1:-1]))
        value = value * weight.unsqueeze(1) if isinstance(weight, torch.Tensor) else value
        valid = functools.reduce(lambda a, b: a & b, inside).unsqueeze(1)
        term = torch.where(valid, value, 0.0)
        total = term if total is None else total + term
    return total


# --- sizes from scales --------------------------------------------------------------------------

_OPERATORS = {
    ("nearest", 1): aten.upsample_nearest1d.default,
    ("nearest", 2): aten.upsample_nearest2d.default,
    ("nearest", 3): aten.upsample_nearest3d.default,
    ("nearest-exact", 1): aten._upsample_nearest_exact1d.default,
    ("nearest-exact", 2): aten._upsample_nearest_exact2d.default,
    ("nearest-exact", 3): aten._upsample_nearest_exact3d.default,
    ("linear", 1): aten.upsample_linear1d.default,
    ("bilinear", 2): aten.upsample_bilinear2d.default,
    ("trilinear", 3): aten.upsample_trilinear3d.default,
    ("bicubic", 2): aten.upsample_bicubic2d.default,
}


@substitute(torch.nn.functional.interpolate)
def interpolate(
    input: torch.Tensor,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> torch.Tensor:
    """PyTorch finds the size that a scale asks for by reading all sizes as numbers, the batch's
    too; and its own rewriting of that call is off by a rounding.  So the size is found here."""
    rank = input.ndim - 2
    operator = _OPERATORS.get((mode, rank))
    if size is not None or scale_factor is None or recompute_scale_factor or antialias:
        operator = None
    if operator is None:
        return torch.nn.functional.interpolate(
            input, size, scale_factor, mode, align_corners, recompute_scale_factor, antialias
        )
    many = isinstance(scale_factor, (list, tuple))
    scales = [float(s) for s in (scale_factor if many else [scale_factor] * rank)]
    sizes = [int(n * s) for n, s in zip(input.shape[2:], scales, strict=True)]
    align = [] if mode.startswith("nearest") else [bool(align_corners)]
    return operator(input, sizes, *align, *scales)  # type: ignore[no-any-return]
