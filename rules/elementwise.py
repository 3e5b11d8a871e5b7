"""Pointwise arithmetic and functions: ``elementwise(op, f', f'')``, in terms of the result y and
the operation's own arguments.

Sections run from linear through simple to tricky.  Formulas are elementary, or of Abramowitz &
Stegun, *Handbook of Mathematical Functions* (A&S), where marked.  In every formula both branches
of a ``torch.where`` stay finite, so that gradients through the result are finite too.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from fxhess.kinds import Call, Pointwise
from fxhess.registry import aten, composite, elementwise, linear
from fxhess.rules.roots import even_power, under_root

LN2 = math.log(2)
LN10 = math.log(10)


def mask(condition: Any, like: Any) -> Any:
    """1 where the condition holds, else 0, as a factor."""
    return condition.to(like.dtype)


# --- linear -------------------------------------------------------------------------------------

elementwise(aten.neg.default, -1)
elementwise(aten.add.Tensor, (1, lambda y, a, b, alpha=1: alpha))
elementwise(aten.add.Scalar, 1)
elementwise(aten.sub.Tensor, (1, lambda y, a, b, alpha=1: -alpha))
elementwise(aten.sub.Scalar, 1)
elementwise(aten.rsub.Tensor, (lambda y, a, b, alpha=1: -alpha, 1))
elementwise(aten.rsub.Scalar, lambda y, a, b, alpha=1: -alpha)
elementwise(aten.lerp.Scalar, (lambda y, a, b, w: 1 - w, lambda y, a, b, w: w))
elementwise(aten.deg2rad.default, math.pi / 180)
elementwise(aten.rad2deg.default, 180 / math.pi)
elementwise(aten.frac.default, 1)


def _without_format(self: torch.Tensor, **options: Any) -> Any:
    """A cast to integers ends the derivative; a memory format means nothing to canonical axes."""
    dtype = options.get("dtype")
    number = dtype is None or dtype.is_floating_point or dtype.is_complex
    if self.is_floating_point() and not number:
        return torch.ops.prims.convert_element_type.default(self, dtype)
    if options.pop("memory_format", None) is not None:
        return torch.ops.aten._to_copy.default(self, **options)
    return NotImplemented


def _cast(t: Any, like: Any, c: Call) -> Any:
    return t.to(like) if "device" in c.kwargs else t.to(like.dtype)


linear(
    aten._to_copy.default,
    Pointwise(),
    pull=lambda g, c: _cast(g, c.operands[0], c),
    push=lambda c, t: _cast(t, c.y, c),
    rewrite=_without_format,
)

# --- products, quotients and powers -------------------------------------------------------------


@composite(aten.addcmul.default)
def addcmul(
    self: torch.Tensor, tensor1: torch.Tensor, tensor2: torch.Tensor, *, value: float = 1
) -> torch.Tensor:
    product = tensor1 * tensor2
    return self + (product if value == 1 else product * value)


@composite(aten.addcdiv.default)
def addcdiv(
    self: torch.Tensor, tensor1: torch.Tensor, tensor2: torch.Tensor, *, value: float = 1
) -> torch.Tensor:
    quotient = tensor1 / tensor2
    return self + (quotient if value == 1 else quotient * value)


@composite(aten.lerp.Tensor)
def lerp(self: torch.Tensor, end: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return self + weight * (end - self)


@composite(aten.ldexp.Tensor)
def ldexp(self: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return self * torch.pow(2.0, other)


elementwise(
    aten.div.Tensor,
    (lambda y, a, b: 1 / b, lambda y, a, b: -y / b),
    {(0, 1): lambda y, a, b: -1 / b / b, (1, 1): lambda y, a, b: 2 * y / b / b},
    by_result={1: lambda y, a, b: -1 / b},
)
elementwise(aten.div.Scalar, lambda y, a, b: 1 / b)
elementwise(aten.reciprocal.default, lambda y, x: -y * y, lambda y, x: 2 * y * y * y)
elementwise(
    aten.sqrt.default, lambda y, x: 0.5 / y, lambda y, x: -0.25 / (x * y), rewrite=under_root
)
elementwise(
    aten.rsqrt.default, lambda y, x: -0.5 * y * y * y, lambda y, x: 0.75 * y * y * y * y * y
)


def _simple_power(self: torch.Tensor, exponent: float) -> Any:
    """Powers that are simpler as other operations, exactly so at 0."""
    if not self.is_floating_point():
        return NotImplemented
    if exponent == 0:
        return torch.ones_like(self)
    if exponent == 1:
        return torch.ops.aten.alias.default(self)
    square = even_power(self, exponent)
    if square is not None:
        return square
    if exponent == 2:
        return self * self
    if exponent == 0.5:
        return torch.sqrt(self)
    if exponent == -0.5:
        return torch.rsqrt(self)
    if exponent == -1:
        return torch.reciprocal(self)
    return NotImplemented


def _power(x: Any, p: float) -> Any:
    """x^p; small powers as products, which cost a tenth of ``pow``."""
    if p == 1:
        return x
    if p == 2:
        return x * x
    return torch.pow(x, p)


elementwise(
    aten.pow.Tensor_Scalar,
    lambda y, x, p: p * _power(x, p - 1),
    lambda y, x, p: p * (p - 1) * _power(x, p - 2),
    rewrite=_simple_power,
)


def _log_positive(x: Any) -> Any:
    """log x, and 0 for x = 0: where 0^p is 0, so are its derivatives by p."""
    return torch.log(torch.where(x == 0, 1.0, x))


def _mixed_power(x: Any, p: Any) -> Any:
    """By x and p; 0 is taken at (0, 0), where both first derivatives are."""
    value = torch.pow(x, p - 1) * (1 + p * _log_positive(x))
    return torch.where((x == 0) & (p == 0), 0.0, value)


def _coefficient_power(c: Any, x: Any, p: Any) -> Any:
    """c x^p, which is 0 for c = 0 whatever the power: x^0 is constant also at x = 0."""
    return torch.where(c == 0, 0.0, c * torch.pow(x, torch.where(c == 0, 1, p)))


elementwise(
    aten.pow.Tensor_Tensor,
    (
        lambda y, x, p: _coefficient_power(p, x, p - 1),
        lambda y, x, p: y * _log_positive(x),
    ),
    {
        (0, 0): lambda y, x, p: _coefficient_power(p * (p - 1), x, p - 2),
        (0, 1): lambda y, x, p: _mixed_power(x, p),
        (1, 1): lambda y, x, p: y * torch.square(_log_positive(x)),
    },
)


def _log_base(base: float) -> float:
    return math.log(base) if base > 0 else (0.0 if base == 0 else math.nan)


elementwise(
    aten.pow.Scalar,
    lambda y, b, p: _log_base(b) * y,
    lambda y, b, p: _log_base(b) ** 2 * y,
)

# --- exponentials and logarithms ----------------------------------------------------------------

elementwise(aten.exp.default, lambda y, x: y, lambda y, x: y)
elementwise(aten.exp2.default, lambda y, x: LN2 * y, lambda y, x: LN2 * LN2 * y)
elementwise(aten.expm1.default, lambda y, x: y + 1, lambda y, x: y + 1)
elementwise(aten.log.default, lambda y, x: 1 / x, lambda y, x: -1 / (x * x))
elementwise(aten.log2.default, lambda y, x: 1 / LN2 / x, lambda y, x: -1 / LN2 / (x * x))
elementwise(aten.log10.default, lambda y, x: 1 / LN10 / x, lambda y, x: -1 / LN10 / (x * x))
elementwise(aten.log1p.default, lambda y, x: 1 / (1 + x), lambda y, x: -1 / torch.square(1 + x))


def _difference(a: Any, b: Any) -> Any:
    """a - b, and 0 where both are the same infinity."""
    return torch.where(a == b, 0.0, a - b)


def _bell(d: Any, scale: float = 1.0) -> Any:
    """``sigmoid'(scale d)``, to full relative accuracy in both tails."""
    return torch.sigmoid(scale * d) * torch.sigmoid(-scale * d)


elementwise(
    aten.logaddexp.default,
    (
        lambda y, a, b: torch.sigmoid(_difference(a, b)),
        lambda y, a, b: torch.sigmoid(_difference(b, a)),
    ),
    {
        (0, 0): lambda y, a, b: _bell(_difference(a, b)),
        (0, 1): lambda y, a, b: -_bell(_difference(a, b)),
        (1, 1): lambda y, a, b: _bell(_difference(a, b)),
    },
)
elementwise(
    aten.logaddexp2.default,
    (
        lambda y, a, b: torch.sigmoid(LN2 * _difference(a, b)),
        lambda y, a, b: torch.sigmoid(LN2 * _difference(b, a)),
    ),
    {
        (0, 0): lambda y, a, b: LN2 * _bell(_difference(a, b), LN2),
        (0, 1): lambda y, a, b: -LN2 * _bell(_difference(a, b), LN2),
        (1, 1): lambda y, a, b: LN2 * _bell(_difference(a, b), LN2),
    },
)


def _register_xlogy(op: Any, number_first: Any, number_second: Any, pole: float) -> None:
    """``a log(b - pole)``, which is 0 by definition for a = 0, also where there is no logarithm."""

    def nowhere(a: Any, b: Any) -> Any:
        return (a == 0) & (b <= pole)

    def argument(a: Any, b: Any) -> Any:
        return torch.where(nowhere(a, b), 1.0, b - pole)

    def logarithm(y: Any, a: Any, b: Any) -> Any:
        log = torch.log if pole == 0 else torch.log1p
        return log(torch.where(nowhere(a, b), pole + 1, b))

    elementwise(
        op,
        (logarithm, lambda y, a, b: a / argument(a, b)),
        {
            (0, 1): lambda y, a, b: torch.where(nowhere(a, b), 0.0, 1 / argument(a, b)),
            (1, 1): lambda y, a, b: -a / torch.square(argument(a, b)),
        },
    )

    @composite(number_first)
    def with_number_first(self: float, other: torch.Tensor) -> torch.Tensor:
        return op(torch.full((), self, dtype=other.dtype, device=other.device), other)

    @composite(number_second)
    def with_number_second(self: torch.Tensor, other: float) -> torch.Tensor:
        return op(self, torch.full((), other, dtype=self.dtype, device=self.device))


_register_xlogy(aten.xlogy.Tensor, aten.xlogy.Scalar_Self, aten.xlogy.Scalar_Other, 0.0)
_register_xlogy(
    aten.special_xlog1py.default,
    aten.special_xlog1py.self_scalar,
    aten.special_xlog1py.other_scalar,
    -1.0,
)
elementwise(aten.special_entr.default, lambda y, x: -torch.log(x) - 1, lambda y, x: -1 / x)


def _logit_slope(x: Any, eps: float | None) -> Any:
    return 1 / (x * (1 - x)) if eps is None else _logit_slope(x.clamp(eps, 1 - eps), None)


def _unclamped(x: Any, eps: float | None) -> Any:
    """logit is constant outside of [eps, 1 - eps]."""
    return 1.0 if eps is None else mask((x >= eps) & (x <= 1 - eps), x)


elementwise(
    aten.logit.default,
    lambda y, x, eps=None: _logit_slope(x, eps) * _unclamped(x, eps),
    lambda y, x, eps=None: (2 * x - 1) * torch.square(_logit_slope(x, eps)) * _unclamped(x, eps),
)

# --- trigonometric and hyperbolic ---------------------------------------------------------------

elementwise(aten.sin.default, lambda y, x: torch.cos(x), lambda y, x: -y)
elementwise(aten.cos.default, lambda y, x: -torch.sin(x), lambda y, x: -y)
elementwise(aten.tan.default, lambda y, x: 1 + y * y, lambda y, x: 2 * y * (1 + y * y))
elementwise(aten.sinh.default, lambda y, x: torch.cosh(x), lambda y, x: y)
elementwise(aten.cosh.default, lambda y, x: torch.sinh(x), lambda y, x: y)
elementwise(aten.tanh.default, lambda y, x: 1 - y * y, lambda y, x: -2 * y * (1 - y * y))


def _cube(x: Any) -> Any:
    return x * x * x


def _asin_slope(x: Any) -> Any:
    return torch.rsqrt((1 - x) * (1 + x))


def _acosh_slope(x: Any) -> Any:
    return torch.rsqrt(x - 1) * torch.rsqrt(x + 1)


elementwise(aten.asin.default, lambda y, x: _asin_slope(x), lambda y, x: x * _cube(_asin_slope(x)))
elementwise(
    aten.acos.default, lambda y, x: -_asin_slope(x), lambda y, x: -x * _cube(_asin_slope(x))
)
elementwise(
    aten.atan.default,
    lambda y, x: 1 / (1 + x * x),
    lambda y, x: -2 * (x * (1 / (1 + x * x))) * (1 / (1 + x * x)),
)
elementwise(
    aten.asinh.default,
    lambda y, x: torch.rsqrt(1 + x * x),
    lambda y, x: -x * _cube(torch.rsqrt(1 + x * x)),
)
elementwise(
    aten.acosh.default, lambda y, x: _acosh_slope(x), lambda y, x: -x * _cube(_acosh_slope(x))
)
elementwise(
    aten.atanh.default,
    lambda y, x: 1 / ((1 - x) * (1 + x)),
    lambda y, x: 2 * x * torch.square(1 / ((1 - x) * (1 + x))),
)


def _unit(a: Any, b: Any) -> Any:
    """a / hypot(a, b) and 0 at the origin, without overflow."""
    h = torch.hypot(a, b)
    return a / torch.where(h == 0, 1.0, h)


def _inverse(h: Any) -> Any:
    return 1 / torch.where(h == 0, 1.0, h)


# d atan2 and d hypot by the sine and cosine of the angle and the radius.
elementwise(
    aten.atan2.default,
    (
        lambda y, a, b: _unit(b, a) * _inverse(torch.hypot(a, b)),
        lambda y, a, b: -_unit(a, b) * _inverse(torch.hypot(a, b)),
    ),
    {
        (0, 0): lambda y, a, b: (
            -2 * (_unit(a, b) * _unit(b, a) * torch.square(_inverse(torch.hypot(a, b))))
        ),
        (0, 1): lambda y, a, b: (
            (torch.square(_unit(a, b)) - torch.square(_unit(b, a)))
            * torch.square(_inverse(torch.hypot(a, b)))
        ),
        (1, 1): lambda y, a, b: (
            2 * (_unit(a, b) * _unit(b, a) * torch.square(_inverse(torch.hypot(a, b))))
        ),
    },
)
elementwise(
    aten.hypot.default,
    (lambda y, a, b: a * _inverse(y), lambda y, a, b: b * _inverse(y)),
    {
        (0, 0): lambda y, a, b: torch.square(b * _inverse(y)) * _inverse(y),
        (0, 1): lambda y, a, b: -(a * _inverse(y)) * (b * _inverse(y)) * _inverse(y),
        (1, 1): lambda y, a, b: torch.square(a * _inverse(y)) * _inverse(y),
    },
)
