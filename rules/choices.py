"""Kinks and choices: pointwise operations that are piecewise smooth.

At kinks the derivatives are those of PyTorch's double backward.  What is chosen is selected, never
multiplied by a mask, wherever what is not chosen may be infinite.
"""

from __future__ import annotations

from typing import Any

import torch

from fxhess.kinds import Pointwise
from fxhess.registry import aten, composite, elementwise, linear
from fxhess.rules.elementwise import mask

elementwise(aten.abs.default, lambda y, x: torch.sign(x))
elementwise(aten.copysign.Tensor, (lambda y, a, b: torch.sign(y) * torch.sign(a), 0))
elementwise(aten.copysign.Scalar, lambda y, a, b: torch.sign(y) * torch.sign(a))
elementwise(
    aten.nan_to_num.default,
    lambda y, x, nan=None, posinf=None, neginf=None: mask(torch.isfinite(x), x),
)


def _larger(a: Any, b: Any) -> Any:
    """1 where a > b; both sides get half of a tie."""
    return (mask(a > b, a) + mask(a >= b, a)) / 2


def _first_wins(a: Any, b: Any, better: Any) -> Any:
    return mask(better | torch.isnan(b), a)


elementwise(aten.maximum.default, (lambda y, a, b: _larger(a, b), lambda y, a, b: _larger(b, a)))
elementwise(aten.minimum.default, (lambda y, a, b: _larger(b, a), lambda y, a, b: _larger(a, b)))
elementwise(
    aten.fmax.default,
    (
        lambda y, a, b: _first_wins(a, b, a >= b),
        lambda y, a, b: 1 - _first_wins(a, b, a >= b),
    ),
)
elementwise(
    aten.fmin.default,
    (
        lambda y, a, b: _first_wins(a, b, a <= b),
        lambda y, a, b: 1 - _first_wins(a, b, a <= b),
    ),
)


def _within(y: Any, x: Any, low: float | None = None, high: float | None = None) -> Any:
    if low is None:
        return mask(x <= high, x)
    return mask(x >= low if high is None else (x >= low) & (x <= high), x)


elementwise(aten.clamp.default, _within)
elementwise(aten.clamp_min.default, _within)
elementwise(aten.clamp_max.default, lambda y, x, high: mask(x <= high, x))
elementwise(
    aten.clamp_min.Tensor,
    (lambda y, x, low: mask(x >= low, x), lambda y, x, low: mask(x < low, x)),
)
elementwise(
    aten.clamp_max.Tensor,
    (lambda y, x, high: mask(x <= high, x), lambda y, x, high: mask(x > high, x)),
)


def _one_bound(
    self: torch.Tensor, min: torch.Tensor | None = None, max: torch.Tensor | None = None
) -> Any:
    if min is not None and max is not None:
        return NotImplemented
    if min is not None:
        return aten.clamp_min.Tensor(self, min)
    return aten.clamp_max.Tensor(self, max)


elementwise(
    aten.clamp.Tensor,
    (
        lambda y, x, low, high: mask((x >= low) & (x <= high), x),
        lambda y, x, low, high: mask((x < low) & (low < high), x),
        lambda y, x, low, high: mask((x > high) | (high < low), x),
    ),
    rewrite=_one_bound,
)


def _quotient(a: Any, b: Any, rounding: str) -> Any:
    return -torch.div(a, b, rounding_mode=rounding)


elementwise(aten.remainder.Tensor, (1, lambda y, a, b: _quotient(a, b, "floor")))
elementwise(aten.remainder.Scalar, 1)
elementwise(aten.remainder.Scalar_Tensor, lambda y, a, b: _quotient(a, b, "floor"))
elementwise(aten.fmod.Tensor, (1, lambda y, a, b: _quotient(a, b, "trunc")))
elementwise(aten.fmod.Scalar, 1)

# --- chosen by a condition ----------------------------------------------------------------------

linear(
    aten.where.self,
    Pointwise(),
    push=lambda c, s, t: torch.where(c.args[0], s, t),
    pull=lambda g, c: (torch.where(c.args[0], g, 0.0), torch.where(c.args[0], 0.0, g)),
    differentiable=("self", "other"),
)


@composite(aten.masked_fill.Scalar)
def masked_fill(self: torch.Tensor, mask: torch.Tensor, value: float) -> torch.Tensor:
    return torch.where(mask, torch.full((), value, dtype=self.dtype, device=self.device), self)


@composite(aten.masked_fill.Tensor)
def masked_fill_tensor(self: torch.Tensor, mask: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.where(mask, value.to(self.dtype), self)
