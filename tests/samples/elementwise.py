"""Uses of pointwise arithmetic and functions: with numbers, with tensors, broadcast."""

from __future__ import annotations

import torch

from fxhess.testing import Sample, uniform

BOX = (3, 4)
W = torch.tensor([0.7, 1.3, 2.1, 0.4], dtype=torch.float64)
N = torch.tensor([0, 1, 2, 3])
COLUMN = torch.tensor([[0.5], [1.5], [2.5]], dtype=torch.float64)
POSITIVE = uniform(0.2, 3)
UNIT = uniform(-0.9, 0.9)


def _with_zeros(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return torch.where(torch.rand(shape, generator=generator) < 0.4, 0.0, x)


def _far(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Points far out on both sides."""
    return 300 * torch.randn(shape, generator=generator, dtype=torch.float64)


def _shift(x: torch.Tensor) -> torch.Tensor:
    """Another positive function of x, mixing nothing."""
    return 1.5 + torch.tanh(x)


# Functions of the whole line, of a half line and of an interval.
EVERYWHERE = {
    "neg": torch.neg,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "expm1": torch.expm1,
    "sin": torch.sin,
    "cos": torch.cos,
    "sinh": torch.sinh,
    "cosh": torch.cosh,
    "tanh": torch.tanh,
    "atan": torch.atan,
    "asinh": torch.asinh,
    "deg2rad": torch.deg2rad,
    "rad2deg": lambda x: torch.rad2deg(x) / 50,
    "frac": torch.frac,
    "square": torch.square,
}
HALF_LINE = {
    "log": torch.log,
    "log2": torch.log2,
    "log10": torch.log10,
    "log1p": torch.log1p,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal,
    "entr": torch.special.entr,
    "acosh": lambda x: torch.acosh(1 + x),
    "logit": lambda x: torch.logit(x / 4),
    "logit clamped": lambda x: torch.logit(x / 4, 0.2),
}
INTERVAL = {"tan": torch.tan, "asin": torch.asin, "acos": torch.acos, "atanh": torch.atanh}

SAMPLES = [
    *(Sample(name, f, event) for event in (BOX,) for name, f in EVERYWHERE.items()),
    *(Sample(name, f, make=POSITIVE, twice=False) for name, f in HALF_LINE.items()),
    *(Sample(name, f, make=UNIT, twice=False) for name, f in INTERVAL.items()),
    *(
        Sample(f"{name}, no axes", lambda x, f=f: f(x)[:, None], (), twice=False)
        for name, f in (("sin", torch.sin), ("exp", torch.exp))
    ),
    Sample("add", lambda x: torch.add(x, W, alpha=2) * x),
    Sample("add number", lambda x: (x + 2) * x),
    Sample("add itself", lambda x: torch.add(x, x.sin(), alpha=3)),
    Sample("add column", lambda x: x.sin() + COLUMN, BOX),
    Sample("add broadcast", lambda x: x.sin() + x.sum(1, keepdim=True), BOX),
    Sample("add broadcast axis", lambda x: x.sin()[:, None] + x.cos()[:, :, None]),
    Sample("add Scalar", lambda x: torch.ops.aten.add.Scalar(x.sin(), 2, 3)),
    Sample("sub", lambda x: torch.sub(W, x.sin(), alpha=2)),
    Sample("sub Scalar", lambda x: torch.ops.aten.sub.Scalar(x.sin(), 2, 3)),
    Sample("rsub", lambda x: torch.rsub(x, x.sin(), alpha=2)),
    Sample("rsub number", lambda x: (1 - x) * x),
    Sample("in place", lambda x: x.sin().mul_(2).add_(1).sub_(x).div_(3).pow_(2)),
    Sample("div", lambda x: x / _shift(x.flip(-1))),
    Sample("div number", lambda x: x.sin() / 3),
    Sample("div constant", lambda x: x.sin() / COLUMN, BOX),
    Sample("div broadcast", lambda x: x / _shift(x).sum(1, keepdim=True), BOX),
    Sample("div of number", lambda x: 2 / _shift(x)),
    Sample("div of constant", lambda x: W / _shift(x)),
    Sample("div Scalar", lambda x: torch.ops.aten.div.Scalar(x.sin(), 3)),
    Sample("div rounding None", lambda x: torch.div(x, W, rounding_mode=None) * x),
    Sample("lerp number", lambda x: torch.lerp(x.sin(), x.cos(), 0.3)),
    Sample("lerp", lambda x: torch.lerp(x.sin(), x.cos(), torch.tanh(x))),
    Sample("lerp constants", lambda x: torch.lerp(W, x.cos(), W)),
    Sample("addcmul", lambda x: torch.addcmul(x, x.sin(), x.cos(), value=2)),
    Sample("addcmul 1", lambda x: torch.addcmul(W, x, COLUMN), BOX),
    Sample("addcdiv", lambda x: torch.addcdiv(x, x.sin(), _shift(x), value=2)),
    Sample("addcdiv 1", lambda x: torch.addcdiv(W, x, COLUMN), BOX),
    Sample("ldexp", lambda x: torch.ldexp(x.sin(), N)),
    *(
        Sample(f"pow {p}", lambda x, p=p: torch.pow(x, p))
        for p in (0, 1, 2, 3, 4, 5, 0.0, 1.0, 2.0, 3.0)
    ),
    *(
        Sample(f"pow {p}", lambda x, p=p: torch.pow(x, p), make=POSITIVE, twice=False)
        for p in (0.5, -0.5, 1.5, 2.5, -1, -2, -1.3)
    ),
    *(
        Sample(f"pow {p} at zeros", lambda x, p=p: torch.pow(x, p), make=_with_zeros, twice=False)
        for p in (0, 1, 2, 3, 4, 2.0)
    ),
    Sample(
        "pow 2.5 at zero",
        lambda x: torch.pow(x, 2.5),
        make=lambda s, g: _with_zeros(s, g).abs(),
        twice=False,
    ),
    Sample("float_power", lambda x: torch.float_power(x, 3)),
    Sample("pow of number", lambda x: 2.5**x),
    Sample("pow of 1", lambda x: torch.pow(1, x) * x),
    Sample("pow constant", lambda x: x**N),
    Sample("pow constant at zeros", lambda x: x ** (N + 1), make=_with_zeros, twice=False),
    Sample("pow real constants", lambda x: x**W, make=POSITIVE, twice=False),
    Sample("pow of constant", lambda x: W**x),
    Sample("pow of itself", lambda x: _shift(x) ** x.sin()),
    Sample("logaddexp", lambda x: torch.logaddexp(x, x.sin())),
    Sample("logaddexp constant", lambda x: torch.logaddexp(x, COLUMN), BOX),
    Sample("logaddexp far", lambda x: torch.logaddexp(x, -x), make=uniform(-99, 99), twice=False),
    Sample("logaddexp2", lambda x: torch.logaddexp2(x, x.sin())),
    Sample("xlogy", lambda x: torch.xlogy(x, _shift(x.flip(-1)))),
    Sample("xlogy itself", lambda x: torch.xlogy(x, x), make=POSITIVE, twice=False),
    Sample("xlogy number", lambda x: torch.xlogy(2, _shift(x))),
    Sample("xlogy of 0", lambda x: torch.xlogy(0, x - 5) + x),
    Sample("xlogy by number", lambda x: torch.xlogy(x.sin(), 2)),
    Sample("xlog1py", lambda x: torch.special.xlog1py(x, _shift(x))),
    Sample("xlog1py number", lambda x: torch.special.xlog1py(2, _shift(x))),
    Sample("xlog1py by number", lambda x: torch.special.xlog1py(x.sin(), 2)),
    Sample("atan2", lambda x: torch.atan2(x, _shift(x.flip(-1)))),
    Sample("atan2 constant", lambda x: torch.atan2(W, x)),
    Sample("hypot", lambda x: torch.hypot(x, _shift(x.flip(-1)))),
    Sample("hypot constant", lambda x: torch.hypot(x, COLUMN), BOX),
    Sample("to float32", lambda x: x.sin().float().cos().double(), tolerance=1e-5),
    Sample("to its own type", lambda x: x.sin().to(torch.float64)),
    Sample(
        "to a memory format", lambda x: x.sin().to(memory_format=torch.channels_last), (2, 2, 3)
    ),
    Sample("type_as", lambda x: x.sin().type_as(W)),
    Sample("double of float", lambda x: (x.float() * 2).double() * x, tolerance=1e-5),
    Sample("to integers", lambda x: x.long() * x + x.to(torch.int32)),
    Sample("to integers and back", lambda x: (2 * x).long().double() * x),
    Sample("no batch shape", lambda x: (x - W).sin() * x, (4,), batch=1),
]
