"""Uses of kinks and choices, also at the kinks, where PyTorch's double backward is followed."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from fxhess.testing import Sample

BOX = (3, 4)
W = torch.tensor([-0.5, 0.3, 1.0, 0.0], dtype=torch.float64)
COLUMN = torch.tensor([[0.5], [-0.5], [0.0]], dtype=torch.float64)


def _halves(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Multiples of 1/2, many of them at kinks."""
    return torch.randint(-3, 4, shape, generator=generator).double() / 2


def _with_specials(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x[..., 0], x[..., 1], x[..., 2] = math.nan, math.inf, -math.inf
    return x


def _both(name: str, f: object, event: tuple[int, ...] = (4,)) -> list[Sample]:
    """At random points, and at kinks."""
    return [
        Sample(name, f, event),  # type: ignore[arg-type]
        Sample(f"{name} at kinks", f, event, make=_halves, twice=False),  # type: ignore[arg-type]
    ]


SAMPLES = [
    *_both("abs", lambda x: torch.abs(x) * x),
    Sample("copysign", lambda x: torch.copysign(x.sin(), x - 0.25) * x),
    Sample("copysign constant", lambda x: torch.copysign(x.sin(), W) * x),
    Sample("copysign number", lambda x: torch.copysign(x.sin(), -1.0) * x),
    Sample("nan_to_num", lambda x: torch.nan_to_num(x.sin()) * 2),
    Sample(
        "nan_to_num specials",
        lambda x: torch.nan_to_num(x, 0.0, 1.0, -1.0) ** 2,
        make=_with_specials,
        twice=False,
    ),
    *_both("maximum", lambda x: torch.maximum(x, x * x)),
    *_both("maximum constant", lambda x: torch.maximum(x, W) * x),
    Sample("maximum broadcast", lambda x: torch.maximum(x, x[:, :1]) * x, BOX),
    *_both("max of two", lambda x: torch.max(x.sin(), COLUMN), BOX),
    *_both("minimum", lambda x: torch.minimum(x, x * x)),
    *_both("fmax", lambda x: torch.fmax(x, x * x)),
    *_both("fmin", lambda x: torch.fmin(x, x * x)),
    *_both("clamp", lambda x: torch.clamp(x, -0.5, 0.5) * x),
    *_both("clamp min", lambda x: torch.clamp(x, min=-0.5) * x),
    *_both("clamp max", lambda x: torch.clamp(x, max=0.5) * x),
    *_both("clamp crossed", lambda x: torch.clamp(x, 0.5, -0.5) + x * x),
    *_both("clamp_min", lambda x: torch.clamp_min(x, 0.5) * x),
    *_both("clamp_max", lambda x: torch.clamp_max(x, 0.5) * x),
    *_both("clamp tensors", lambda x: torch.clamp(x, W - 0.5, W) * x),
    *_both("clamp its own bounds", lambda x: torch.clamp(x * x, x - 1, x + 1)),
    *_both("clamp tensor min", lambda x: torch.clamp(x, min=W) * x),
    *_both("clamp tensor max", lambda x: torch.clamp(x, max=x * x)),
    *_both("clamp_min tensor", lambda x: torch.clamp_min(x, x * x)),
    *_both("clamp_max tensor", lambda x: torch.clamp_max(x, COLUMN) * x, BOX),
    Sample("clamp in place", lambda x: x.sin().clamp_(-0.5, 0.5) * x),
    *_both("remainder", lambda x: torch.remainder(x, 0.7 + x * x) * x),
    Sample("remainder number", lambda x: (x % 0.7) * x),
    Sample("fmod", lambda x: torch.fmod(3 * x, W + 1) * x),
    Sample("fmod itself", lambda x: torch.fmod(3 * x, 1 + x * x)),
    Sample("fmod number", lambda x: torch.fmod(3 * x, 0.7) * x),
    Sample("where", lambda x: torch.where(x > 0, x.sin(), x * x)),
    Sample("where number", lambda x: torch.where(x > 0, x * x, 0.5)),
    Sample("where of number", lambda x: torch.where(x > 0, 0.1, x * x)),
    Sample("where of numbers", lambda x: torch.where(x > 0, 1.0, -1.0) * x),
    Sample("where constant", lambda x: torch.where(W > 0, x * x, W)),
    Sample("where rows", lambda x: torch.where(COLUMN > 0, x * x, x.sin()), BOX),
    Sample(
        "where broadcast", lambda x: torch.where(x > 0, x[:, :1].sin(), x.sum((1, 2), True)), BOX
    ),
    Sample("where one row", lambda x: torch.where(x[:, :1] > 0, x.sin(), W), BOX),
    Sample("where grown", lambda x: torch.where(x[:, :, None] > x[:, None], x[:, None].sin(), 0.0)),
    Sample("where constants", lambda x: torch.where(x > 0, W, 0.0) * x),
    Sample("one of all", lambda x: x.log_softmax(1) * F.one_hot(x.argmax(1), 4)),
    Sample("where inside", lambda x: torch.where(x > 0, torch.log(torch.where(x > 0, x, 1.0)), x)),
    Sample("masked_fill", lambda x: x.sin().masked_fill(x > 0, 0.1)),
    Sample("masked_fill constant", lambda x: x.sin().masked_fill(W > 0, -math.inf).exp()),
    Sample("masked_fill tensor", lambda x: x.sin().masked_fill(x > 0, W[1])),
    Sample("masked_fill in place", lambda x: x.sin().masked_fill_(x > 0, 0.1) * x),
    Sample("masked_fill rows", lambda x: x.sin().masked_fill(x[:, :1] > 0, 0.1), BOX),
]
