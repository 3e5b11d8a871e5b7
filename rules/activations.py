"""Activation functions of ``torch.nn``: ``elementwise(op, f', f'')``.

At kinks the derivatives are those of PyTorch's double backward.  Exponentials are taken of what
cannot overflow, so that gradients through the result are finite too.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from fxhess.registry import aten, composite, elementwise
from fxhess.rules.elementwise import mask

# --- piecewise linear: the second derivative is zero --------------------------------------------

elementwise(aten.relu.default, lambda y, x: mask(x > 0, x))
elementwise(aten.threshold.default, lambda y, x, threshold, value: mask(x > threshold, x))
elementwise(aten.hardtanh.default, lambda y, x, low=-1, high=1: mask((x > low) & (x < high), x))
elementwise(aten.hardsigmoid.default, lambda y, x: mask((x > -3) & (x < 3), x) / 6)
elementwise(aten.hardshrink.default, lambda y, x, bound=0.5: mask(x.abs() > bound, x))
elementwise(aten.softshrink.default, lambda y, x, bound=0.5: mask(x.abs() > bound, x))


def _leak(x: Any, slope: Any) -> Any:
    return torch.where(x > 0, 1.0, slope)


elementwise(
    aten.leaky_relu.default,
    lambda y, x, slope=0.01: mask(x > 0, x) + slope * mask(x <= 0, x),
)
elementwise(
    aten._prelu_kernel.default,
    (lambda y, x, weight: _leak(x, weight), lambda y, x, weight: x.clamp_max(0)),
    {(0, 1): lambda y, x, weight: mask(x < 0, x)},
)


@composite(aten.rrelu_with_noise.default)
def rrelu_with_noise(
    self: torch.Tensor,
    noise: torch.Tensor,
    lower: float = 0.125,
    upper: float = 1 / 3,
    training: bool = False,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """One random slope a call, shared by all orders."""
    if not training:
        return F.leaky_relu(self, (lower + upper) / 2)
    slope = torch.rand_like(self) * (upper - lower) + lower
    return torch.where(self <= 0, self * slope, self)


@composite(aten.rrelu_with_noise_functional.default)
def rrelu_with_noise_functional(
    self: torch.Tensor, noise: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return rrelu_with_noise(self, noise, *args, **kwargs), noise


# --- exponential on the left --------------------------------------------------------------------


def _decay(x: Any, rate: float) -> Any:
    return torch.exp(rate * x.clamp_max(0))


elementwise(
    aten.elu.default,
    lambda y, x, alpha=1, scale=1, rate=1: torch.where(
        x > 0, scale, scale * alpha * rate * _decay(x, rate)
    ),
    lambda y, x, alpha=1, scale=1, rate=1: (
        scale * alpha * rate**2 * _decay(x, rate) * mask(x < 0, x)
    ),
)


@composite(aten.celu.default)
def celu(self: torch.Tensor, alpha: float = 1.0) -> torch.Tensor:
    return torch.ops.aten.elu.default(self, alpha, 1.0, 1.0 / alpha)


# --- smooth -------------------------------------------------------------------------------------


def _bell(z: Any) -> Any:
    """The derivative of sigmoid, to full relative accuracy in both tails."""
    return torch.sigmoid(z) * torch.sigmoid(-z)


elementwise(aten.sigmoid.default, lambda y, x: y * (1 - y), lambda y, x: y * (1 - y) * (1 - 2 * y))
elementwise(
    aten.silu.default,
    lambda y, x: torch.sigmoid(x) + x * _bell(x),
    lambda y, x: _bell(x) * (2 + x * (1 - 2 * torch.sigmoid(x))),
)
elementwise(
    aten.softplus.default,
    lambda y, x, beta=1, threshold=20: torch.where(
        beta * x > threshold, 1.0, torch.sigmoid(beta * x)
    ),
    lambda y, x, beta=1, threshold=20: beta * _bell(beta * x) * mask(beta * x < threshold, x),
)


@composite(aten.log_sigmoid_forward.default)
def log_sigmoid_forward(self: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-log(1 + exp(-x)); beyond 40 that is x to every digit of a double."""
    return -F.softplus(-self, threshold=40), torch.empty_like(self)


def _mish_parts(x: Any) -> tuple[Any, Any, Any]:
    """tanh(softplus(x)) and its first two derivatives."""
    t, s = torch.tanh(F.softplus(x)), torch.sigmoid(x)
    w = 1 - t * t
    return t, w * s, w * (_bell(x) - 2 * t * s * s)


def _mish_slope(y: Any, x: Any) -> Any:
    t, t1, _ = _mish_parts(x)
    return t + x * t1


def _mish_curvature(y: Any, x: Any) -> Any:
    _, t1, t2 = _mish_parts(x)
    return 2 * t1 + x * t2


elementwise(aten.mish.default, _mish_slope, _mish_curvature)


def _density(x: Any) -> Any:
    return torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


_ALL = 40.0  # beyond, gelu' is 0 or 1 to every digit, and x^2 times its tail would be inf * 0
_TANH_SCALE, _TANH_CUBE = math.sqrt(2 / math.pi), 0.044715


def _gelu_tanh_parts(x: Any) -> tuple[Any, Any, Any]:
    """The tanh of ``u = sqrt(2/pi) (x + 0.044715 x^3)``, u' and u''."""
    u = _TANH_SCALE * (x + _TANH_CUBE * x * x * x)
    return (
        torch.tanh(u),
        _TANH_SCALE * (1 + 3 * _TANH_CUBE * x * x),
        6 * _TANH_SCALE * _TANH_CUBE * x,
    )


def _gelu_slope(y: Any, x: Any, approximate: str = "none") -> Any:
    x = x.clamp(-_ALL, _ALL)
    if approximate == "none":
        return 0.5 * (1 + torch.erf(x * math.sqrt(0.5))) + x * _density(x)
    t, u1, _ = _gelu_tanh_parts(x)
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * u1


def _gelu_curvature(y: Any, x: Any, approximate: str = "none") -> Any:
    x = x.clamp(-_ALL, _ALL)
    if approximate == "none":
        return _density(x) * (2 - x * x)
    t, u1, u2 = _gelu_tanh_parts(x)
    return (1 - t * t) * (u1 + 0.5 * x * (u2 - 2 * t * u1 * u1))


elementwise(aten.gelu.default, _gelu_slope, _gelu_curvature)
elementwise(
    aten.hardswish.default,
    lambda y, x: torch.where(x >= 3, 1.0, (x / 3 + 0.5) * mask(x > -3, x)),
    lambda y, x: mask((x > -3) & (x < 3), x) / 3,
)


@composite(aten.glu.default)
def glu(self: torch.Tensor, dim: int = -1) -> torch.Tensor:
    half = self.shape[dim] // 2
    return torch.narrow(self, dim, 0, half) * torch.sigmoid(torch.narrow(self, dim, half, half))
