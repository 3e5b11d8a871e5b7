"""Tangents that are local: only those of a window of positions differ from zero at each position.

Directions whose windows never meet share one tangent (a *colour*: Curtis, Powell & Reid 1974;
Coleman & Moré 1984).  With windows of at most p positions along an axis of n, direction t has the
colour ``t % p``, and p tangents stand for n.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch

from fxhess.kinds import Window


def seeds(n: int, period: int, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """``[period, n]``: the sum of the directions of each colour."""
    return torch.eye(period, dtype=dtype, device=device).repeat(1, -(-n // period))[:, :n]


def colours(n: int, period: int, *, device: torch.device) -> torch.Tensor:
    """``[n]``: the colour of each direction."""
    return torch.arange(n, device=device) % period


def mask(
    n: int, count: int, window: Sequence[tuple[int, int]], *, device: torch.device
) -> torch.Tensor:
    """``[n, count]``: whether direction t is in the window of position e; ``window``: step, first
    and last as numerators and denominators."""
    inside = Window(*(Fraction(*pair) for pair in window))
    rows = torch.zeros(count, n, dtype=torch.bool)
    for e in range(count):
        first, last = inside.ends(e)
        rows[e, max(first, 0) : max(last + 1, 0)] = True
    return rows.t().to(device)


# --- the form that is left, with few of its entries --------------------------------------------

Band = tuple[tuple[int, int, int], ...]
"""For each axis of n entries: how many colours it has, and the first and the last position, beside
its own, of the window of each entry; n, -n and n where there is no window."""


def pairs(sizes: Sequence[int], band: Band, *, device: torch.device) -> torch.Tensor:
    """``[2, u + 1]``: where both halves of each entry lie that may differ from zero, of the upper
    triangle only, in a half laid out as ``[*colours, *sizes]`` with a zero behind; the last entry
    is that zero."""
    at, inside = _layout(sizes, band)
    rows, columns = torch.triu(inside | inside.t()).nonzero().t()
    found = torch.stack((at[columns, rows], at[rows, columns]))
    zero = at.new_full((2, 1), _length(sizes, band))
    return torch.cat((found, zero), 1).to(device)


def places(sizes: Sequence[int], band: Band, *, device: torch.device) -> torch.Tensor:
    """``[n n]``: which of the ``pairs`` each entry of the whole form is."""
    _, inside = _layout(sizes, band)
    rows, columns = torch.triu(inside | inside.t()).nonzero().t()
    number = torch.arange(len(rows), dtype=torch.int32)
    whole = torch.full(inside.shape, len(rows), dtype=torch.int32)
    whole[rows, columns] = number
    whole[columns, rows] = number
    return whole.flatten().to(device)


def _length(sizes: Sequence[int], band: Band) -> int:
    return math.prod(sizes) * math.prod(period for period, _, _ in band)


def _layout(sizes: Sequence[int], band: Band) -> tuple[torch.Tensor, torch.Tensor]:
    """``[n, n]``, of direction and position: where that entry of a half lies, and whether it is
    one."""
    rank = len(sizes)
    shape = [*(period for period, _, _ in band), *sizes]
    steps = [math.prod(shape[k + 1 :]) for k in range(2 * rank)]
    at = torch.zeros([1] * 2 * rank, dtype=torch.int64)
    inside = torch.ones([1] * 2 * rank, dtype=torch.bool)
    for k, (n, (period, first, last)) in enumerate(zip(sizes, band, strict=True)):
        axis = torch.arange(n)
        directions, positions = ([1] * 2 * rank for _ in range(2))
        directions[k] = positions[rank + k] = n
        t, e = axis.reshape(directions), axis.reshape(positions)
        at = at + t % period * steps[k] + e * steps[rank + k]
        inside = inside & (t - e >= first) & (t - e <= last)
    n = math.prod(sizes)
    at = torch.where(inside, at, _length(sizes, band))
    return at.expand(*sizes, *sizes).reshape(n, n), inside.expand(*sizes, *sizes).reshape(n, n)
