"""Rules are data: one line an operator, a file a family.  Importing this package registers all."""

from __future__ import annotations

from fxhess.rules import (
    attention,
    convolution,
    elementwise,
    normalize,
    pooling,
    products,
    recurrent,
    reductions,
    resampling,
    shape,
)

__all__ = [
    "activations",
    "elementwise",
    "losses",
    "products",
    "reductions",
    "shape",
    "special",
    "zero",
]
    "attention",
    "convolution",
    "elementwise",
    "normalize",
    "pooling",
    "products",
    "recurrent",
    "reductions",
    "resampling",
    "shape",
]
