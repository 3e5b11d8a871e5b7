"""Tangents that are local: only those of a window of positions differ from zero at each position.

Directions whose windows never meet share one tangent (a *colour*: Curtis, Powell & Reid 1974;
Coleman & Moré 1984).  With windows of at most p positions along an axis of n, direction t has the
colour ``t % p``, and p tangents stand for n.
"""

from __future__ import annotations

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
