"""Rules are data: one line an operator, a file a family.  Importing this package registers all."""

from __future__ import annotations

from fxhess.rules import (
    activations,
    attention,
    choices,
    convolution,
    dropout,
    elementwise,
    indexing,
    linalg,
    losses,
    normalize,
    pooling,
    products,
    recurrent,
    reductions,
    resampling,
    shape,
    special,
    writing,
    zero,
)

__all__ = [
    "activations",
    "attention",
    "choices",
    "convolution",
    "dropout",
    "elementwise",
    "indexing",
    "linalg",
    "losses",
    "normalize",
    "pooling",
    "products",
    "recurrent",
    "reductions",
    "resampling",
    "shape",
    "special",
    "writing",
    "zero",
]
