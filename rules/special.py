"""Special functions: ``elementwise(op, f', f'')`` where the textbook formula cancels or overflows
and another has to take its place.

Formulas are of Abramowitz & Stegun, *Handbook of Mathematical Functions* (A&S), where marked.  In
every formula both branches of a ``torch.where`` stay finite, so that gradients through the result
are finite too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from fxhess.errors import UnsupportedOpError
from fxhess.registry import aten, composite, elementwise

ROOT_PI = math.sqrt(math.pi)
ROOT_TWO_PI = math.sqrt(2 * math.pi)


def polynomial(u: Any, *coefficients: float) -> Any:
    """``c0 + c1 u + c2 u^2 ..`` by Horner's rule."""
    total: Any = coefficients[-1]
    for c in reversed(coefficients[:-1]):
        total = total * u + c
    return total


# --- gamma and zeta -----------------------------------------------------------------------------


@composite(aten.mvlgamma.default)
def mvlgamma(self: torch.Tensor, p: int) -> torch.Tensor:
    terms = [torch.lgamma(self - i / 2) for i in range(p)]
    return sum(terms[1:], terms[0]) + p * (p - 1) / 4 * math.log(math.pi)


elementwise(aten.lgamma.default, lambda y, x: torch.digamma(x), lambda y, x: torch.polygamma(1, x))
elementwise(
    aten.digamma.default, lambda y, x: torch.polygamma(1, x), lambda y, x: torch.polygamma(2, x)
)
elementwise(
    aten.polygamma.default,
    lambda y, n, x: torch.polygamma(n + 1, x),
    lambda y, n, x: torch.polygamma(n + 2, x),
)


def _unknown(name: str) -> Callable[..., Any]:
    def refuse(y: Any, *args: Any) -> Any:
        raise UnsupportedOpError(
            f"the derivative of {name} with respect to its first argument has no closed form",
            hint="hold that argument constant: detach it",
        )

    return refuse


def _igamma_slope(a: Any, x: Any) -> Any:
    return torch.exp((a - 1) * torch.log(x) - x - torch.lgamma(a))


for _op, _sign in ((aten.igamma.default, 1.0), (aten.igammac.default, -1.0)):
    elementwise(
        _op,
        (_unknown("igamma"), lambda y, a, x, s=_sign: s * _igamma_slope(a, x)),
        {
            (0, 0): _unknown("igamma"),
            (0, 1): _unknown("igamma"),
            (1, 1): lambda y, a, x, s=_sign: s * _igamma_slope(a, x) * ((a - 1) / x - 1),
        },
    )


def _zeta_slope(y: Any, s: Any, q: Any) -> Any:
    return -s * torch.special.zeta(s + 1, q)


def _zeta_curvature(y: Any, s: Any, q: Any) -> Any:
    return s * (s + 1) * torch.special.zeta(s + 2, q)


elementwise(
    aten.special_zeta.default,
    (_unknown("zeta"), _zeta_slope),
    {(0, 0): _unknown("zeta"), (0, 1): _unknown("zeta"), (1, 1): _zeta_curvature},
)
elementwise(aten.special_zeta.self_scalar, _zeta_slope, _zeta_curvature)
elementwise(aten.special_zeta.other_scalar, _unknown("zeta"), _unknown("zeta"))

# --- error functions ----------------------------------------------------------------------------


def _gauss(x: Any) -> Any:
    return 2 / ROOT_PI * torch.exp(-x * x)


def _gauss_slope(x: Any) -> Any:
    """0 also where 2 x overflows."""
    return -2 * x.clamp(-1e3, 1e3) * _gauss(x)


elementwise(aten.erf.default, lambda y, x: _gauss(x), lambda y, x: _gauss_slope(x))
elementwise(aten.erfc.default, lambda y, x: -_gauss(x), lambda y, x: -_gauss_slope(x))


def _erfinv_slope(y: Any) -> Any:
    return ROOT_PI / 2 * torch.exp(y * y)


def _ndtri_slope(y: Any) -> Any:
    return math.sqrt(2 * math.pi) * torch.exp(y * y / 2)


elementwise(
    aten.erfinv.default,
    lambda y, x: _erfinv_slope(y),
    lambda y, x: 2 * y * torch.square(_erfinv_slope(y)),
)
elementwise(
    aten.special_ndtri.default,
    lambda y, x: _ndtri_slope(y),
    lambda y, x: y * torch.square(_ndtri_slope(y)),
)


def _far(x: Any) -> float:
    """Beyond here erfcx and its derivatives come from the asymptotic series, A&S 7.1.23: where its
    twelve terms are enough for the type.  Before, less than half of the digits cancel."""
    return 12.0 if x.dtype == torch.float64 else 4.5


def _erfcx_series(x: Any, order: int) -> Any:
    """A derivative of ``erfcx(x) ~ 1/sqrt(pi) sum_k (-1)^k (2k-1)!! / 2^k x^(-2k-1)``."""
    coefficients = []
    for k in range(12):
        c = (-1) ** (k + order) * math.prod(range(1, 2 * k, 2)) / 2**k
        coefficients.append(c * math.prod(range(2 * k + 1, 2 * k + 1 + order)) / ROOT_PI)
    u = 1 / (x * x)
    power = u if order == 1 else u / x
    return power * polynomial(u, *coefficients)


def _erfcx_ratio(x: Any, y: Any) -> Any:
    """``erfcx'(x) / erfcx(x)``, which stays finite where erfcx overflows."""
    far = _erfcx_series(x.clamp_min(_far(x)), 1) / y
    return torch.where(x > _far(x), far, 2 * x - 2 / ROOT_PI / y)


def _erfcx_curvature(y: Any, x: Any) -> Any:
    near = x.clamp_max(_far(x))
    return torch.where(
        x > _far(x),
        _erfcx_series(x.clamp_min(_far(x)), 2),
        (2 + 4 * near * near) * y - 4 / ROOT_PI * near,
    )


elementwise(aten.special_erfcx.default, lambda y, x: y * _erfcx_ratio(x, y), _erfcx_curvature)


def _mills(y: Any, x: Any) -> Any:
    """The inverse Mills ratio at -x: the density over its integral, whose logarithm is y."""
    density = torch.exp(-0.5 * torch.square(x.clamp(-1, 1e3)) - y.clamp_min(-2)) / ROOT_TWO_PI
    tail = torch.special.erfcx(x.clamp_max(-1) * -math.sqrt(0.5))
    return torch.where(x > -1, density, math.sqrt(2 / math.pi) / tail)


def _log_ndtr_curvature(y: Any, x: Any) -> Any:
    """``-slope (x + slope)``; far out on the left, where that cancels, by erfcx'/erfcx."""
    slope = _mills(y, x)
    t = (x * -math.sqrt(0.5)).clamp_min(_far(x))
    far = _erfcx_series(t, 1) / torch.special.erfcx(t) * -math.sqrt(0.5)
    near = x.clamp(-2 * _far(x), 1e3) + slope
    return -slope * torch.where(x < -math.sqrt(2) * _far(x), far, near)


elementwise(aten.special_log_ndtr.default, lambda y, x: _mills(y, x), _log_ndtr_curvature)

# --- sinc ---------------------------------------------------------------------------------------


def _sinc_slope(y: Any, z: Any) -> Any:
    """d/dz of sin(z)/z; its series for small z, where the closed form cancels."""
    series = [(-1) ** k * 2 * k / math.factorial(2 * k + 1) for k in range(1, 10)]
    small = z.abs() < 1
    away = torch.where(small, 1.0, z)
    return torch.where(small, z * polynomial(z * z, *series), (torch.cos(z) - y) / away)


def _sinc_curvature(y: Any, z: Any) -> Any:
    series = [(-1) ** k * 2 * k * (2 * k - 1) / math.factorial(2 * k + 1) for k in range(1, 10)]
    small = z.abs() < 1
    away = torch.where(small, 1.0, z)
    return torch.where(
        small, polynomial(z * z, *series), -y - 2 * (torch.cos(z) - y) / (away * away)
    )


elementwise(
    aten.sinc.default,
    lambda y, x: math.pi * _sinc_slope(y, math.pi * x),
    lambda y, x: math.pi**2 * _sinc_curvature(y, math.pi * x),
)

# --- Bessel functions, A&S 9.6 ------------------------------------------------------------------


def _over_x(i1: Any, x: Any) -> Any:
    """I1(x)/x (or its scaled form); 1/2 at 0."""
    return torch.where(x == 0, 0.5, i1 / torch.where(x == 0, 1.0, x))


def _i1_curvature(i1: Any, i0: Any, x: Any, scale: Any = 1.0) -> Any:
    """I1'' = (1 + 2/x^2) I1 - I0/x; its series for small x, where that cancels."""
    series = [
        (2 * k + 1) * k / 2 / math.factorial(k) / math.factorial(k + 1) / 2 / 4 ** (k - 1)
        for k in range(1, 11)
    ]
    small = x.abs() < 1
    away = torch.where(small, 1.0, x)
    return torch.where(
        small,
        scale * x * polynomial(x.clamp(-1, 1) ** 2, *series),
        i1 + (2 * i1 / away - i0) / away,
    )


elementwise(
    aten.i0.default,
    lambda y, x: torch.special.i1(x),
    lambda y, x: y - _over_x(torch.special.i1(x), x),
)
elementwise(
    aten.special_i1.default,
    lambda y, x: torch.special.i0(x) - _over_x(y, x),
    lambda y, x: _i1_curvature(y, torch.special.i0(x), x),
)


def _i1e_slope(y: Any, x: Any) -> Any:
    return torch.special.i0e(x) - _over_x(y, x) - torch.sign(x) * y


# exp(-|x|) I0 and exp(-|x|) I1: at 0, |x| counts as flat.
elementwise(
    aten.special_i0e.default,
    lambda y, x: torch.special.i1e(x) - torch.sign(x) * y,
    lambda y, x: (
        _i1e_slope(torch.special.i1e(x), x)
        - torch.sign(x) * (torch.special.i1e(x) - torch.sign(x) * y)
    ),
)
elementwise(
    aten.special_i1e.default,
    lambda y, x: _i1e_slope(y, x),
    lambda y, x: (
        _i1_curvature(y, torch.special.i0e(x), x, torch.exp(-x.abs()))
        - 2 * torch.sign(x) * _i1e_slope(y, x)
        - y * torch.abs(torch.sign(x))
    ),
)
