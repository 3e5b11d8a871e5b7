"""Uses of operations without a derivative: their results still take part in the value.

Noise is multiplied by 0: the referee draws other numbers.  What PyTorch refuses to differentiate
at all is detached.
"""

from __future__ import annotations

import math

import torch

from fxhess.testing import Sample

aten = torch.ops.aten
W = torch.tensor([-0.5, 0.3, 1.0, 0.0], dtype=torch.float64)
N = torch.tensor([1, 2, 3, 0])


def _with_specials(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x[..., 0], x[..., 1], x[..., 2] = math.nan, math.inf, -math.inf
    return x


def _integers(x: torch.Tensor) -> torch.Tensor:
    return (4 * x).to(torch.int64)


TESTS = {
    "eq": lambda x: x == x.round(),
    "ne": lambda x: x != W,
    "lt": lambda x: x < W,
    "le": lambda x: x <= x.flip(-1),
    "gt": lambda x: x > W,
    "ge": lambda x: x >= W,
    "eq number": lambda x: x == 0.5,
    "ne number": lambda x: x != 0.5,
    "lt number": lambda x: x < 0.5,
    "le number": lambda x: x <= 0.5,
    "gt number": lambda x: x > 0.5,
    "ge number": lambda x: x >= 0.5,
    "logical_and": lambda x: torch.logical_and(x > 0, x < 1),
    "logical_or": lambda x: torch.logical_or(x < 0, x > 1),
    "logical_xor": lambda x: torch.logical_xor(x < 1, x > 0),
    "logical_not": lambda x: torch.logical_not(x > 0),
    "and": lambda x: (x > 0) & (x < 1),
    "or": lambda x: (x < 0) | (x > 1),
    "xor": lambda x: (x < 1) ^ (x > 0),
    "not": lambda x: ~(x > 0),
    "isclose": lambda x: torch.isclose(x, W, atol=0.5),
    "isclose nan": lambda x: torch.isclose(x, W, equal_nan=True),
    "isin": lambda x: torch.isin(_integers(x), N),
    "not isin": lambda x: torch.isin(_integers(x), N, invert=True),
    "signbit": torch.signbit,
}
SPECIALS = {
    "isnan": torch.isnan,
    "isinf": torch.isinf,
    "isposinf": torch.isposinf,
    "isneginf": torch.isneginf,
    "isfinite": lambda x: ~torch.isfinite(x),
}
STEPS = {
    "ceil": torch.ceil,
    "floor": torch.floor,
    "trunc": torch.trunc,
    "round": torch.round,
    "round decimals": lambda x: torch.round(x, decimals=1),
    "sign": torch.sign,
    "sgn": torch.sgn,
    "angle": torch.angle,
    "heaviside": lambda x: torch.heaviside(x.detach(), W),
    "floor_divide": lambda x: x.detach() // 0.5,
    "floor_divide tensor": lambda x: torch.floor_divide(x.detach(), W + 0.7),
    "floor_divide Scalar": lambda x: aten.floor_divide.Scalar(x.detach(), 0.5),
    "div floor": lambda x: torch.div(x, W + 0.7, rounding_mode="floor"),
    "div trunc": lambda x: torch.div(x, 0.3, rounding_mode="trunc"),
    "div Scalar_mode": lambda x: aten.div.Scalar_mode(x, 0.3, rounding_mode="trunc"),
    "detach": lambda x: x.detach(),
    "zeros_like": lambda x: torch.zeros_like(x) + 1,
    "ones_like": torch.ones_like,
    "ones_like integers": lambda x: torch.ones_like(x, dtype=torch.int64),
    "full_like": lambda x: torch.full_like(x, 2.5),
    "empty_like filled": lambda x: torch.empty_like(x).fill_(2.0),
    "zero_": lambda x: x.clone().zero_() + 1,
    "fill": lambda x: aten.fill.Scalar(x, 3.0),
    "new_zeros": lambda x: x.new_zeros(x.shape) + 1,
    "new_ones": lambda x: x.new_ones(x.shape),
    "new_full": lambda x: x.new_full((4,), 2.0),
    "new_empty": lambda x: x.new_empty(x.shape, dtype=torch.float32).fill_(2.0).double(),
    "new_empty_strided": lambda x: x.new_empty_strided((4,), (1,)).zero_() + 1,
    "bits": lambda x: (_integers(x) & 3) | (_integers(x) ^ 1),
    "bits of tensors": lambda x: (_integers(x) & N) + (_integers(x) ^ N) + (_integers(x) | N),
    "bits of numbers": lambda x: (1 & _integers(x)) + (5 | _integers(x)) + (3 ^ _integers(x)),
    "bits Scalar": lambda x: (
        aten.bitwise_and.Scalar(_integers(x), 3)
        + aten.bitwise_or.Scalar(_integers(x), 3)
        + aten.bitwise_xor.Scalar(_integers(x), 3)
    ),
    "bits Scalar_Tensor": lambda x: (
        aten.bitwise_and.Scalar_Tensor(3, _integers(x))
        + aten.bitwise_or.Scalar_Tensor(3, _integers(x))
        + aten.bitwise_xor.Scalar_Tensor(3, _integers(x))
    ),
    "shifts": lambda x: (
        torch.bitwise_left_shift(_integers(x), N) + torch.bitwise_right_shift(_integers(x), N)
    ),
    "shift operators": lambda x: (_integers(x) << N) + (_integers(x) >> N),
    "shift operators by number": lambda x: (_integers(x) << 1) + (_integers(x) >> 1),
    "shifts by number": lambda x: (
        aten.bitwise_left_shift.Tensor_Scalar(_integers(x), 1)
        + aten.bitwise_right_shift.Tensor_Scalar(_integers(x), 1)
    ),
}
NOISE = {
    "rand_like": torch.rand_like,
    "randn_like": torch.randn_like,
    "randint_like": lambda x: torch.randint_like(x, 5),
    "randint_like low": lambda x: torch.randint_like(x, 1, 5),
    "bernoulli": lambda x: torch.bernoulli(torch.sigmoid(x)),
    "bernoulli p": lambda x: torch.bernoulli(x.detach(), 0.5),
    "bernoulli tensor": lambda x: aten.bernoulli.Tensor(x, torch.sigmoid(W)),
    "multinomial": lambda x: torch.multinomial(torch.sigmoid(x), 4, True),
    "normal": lambda x: torch.normal(x, 1.0),
    "normal std": lambda x: torch.normal(0.0, torch.exp(x)),
    "normal both": lambda x: torch.normal(x, torch.exp(x)),
    "poisson": lambda x: torch.poisson(torch.exp(x)),
    "normal_": lambda x: x.clone().normal_(),
    "uniform_": lambda x: torch.empty_like(x).uniform_(),
    "exponential_": lambda x: torch.empty_like(x).exponential_(),
    "geometric_": lambda x: torch.empty_like(x).geometric_(0.5),
    "log_normal_": lambda x: torch.empty_like(x).log_normal_(),
    "cauchy_": lambda x: torch.empty_like(x).cauchy_(),
    "random_": lambda x: torch.empty_like(x).random_(),
    "random_ to": lambda x: torch.empty_like(x).random_(5),
}

SAMPLES = [
    *(Sample(name, lambda x, f=f: f(x) * x + x) for name, f in TESTS.items()),
    *(
        Sample(
            name,
            lambda x, f=f: torch.where(f(x), 2.0, torch.nan_to_num(x, 0.0, 0.0, 0.0)) ** 2,
            make=_with_specials,
            twice=False,
        )
        for name, f in SPECIALS.items()
    ),
    *(Sample(name, lambda x, f=f: f(x) * x) for name, f in STEPS.items()),
    *(Sample(name, lambda x, f=f: 0 * f(x) + x) for name, f in NOISE.items()),
]
