"""Uses of activation functions, of their options, at kinks and far out."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fxhess.testing import Sample

BOX = (4, 3)
W = torch.tensor([0.2, -0.3, 0.1, 0.5], dtype=torch.float64)


def _halves(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Multiples of 1/2, many of them at kinks."""
    return torch.randint(-7, 8, shape, generator=generator).double() / 2


def _far(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Points far out on both sides."""
    return 30 * torch.randn(shape, generator=generator, dtype=torch.float64)


FUNCTIONS = {
    "relu": F.relu,
    "relu6": lambda x: F.relu6(4 * x),
    "leaky_relu": F.leaky_relu,
    "leaky_relu 0.2": lambda x: F.leaky_relu(x, 0.2),
    "prelu one": lambda x: F.prelu(x, W[:1]),
    "rrelu": F.rrelu,
    "elu": F.elu,
    "elu 0.7": lambda x: F.elu(x, 0.7),
    "selu": F.selu,
    "celu": F.celu,
    "celu 0.5": lambda x: F.celu(x, 0.5),  # a power of 2: PyTorch rounds 1/alpha to float32
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "softplus": F.softplus,
    "softplus 2 3": lambda x: F.softplus(x, 2.0, 3.0),
    "softsign": F.softsign,
    "softshrink": F.softshrink,
    "softshrink 1": lambda x: F.softshrink(x, 1.0),
    "hardshrink": F.hardshrink,
    "tanhshrink": F.tanhshrink,
    "hardswish": lambda x: F.hardswish(3 * x),
    "hardtanh": F.hardtanh,
    "hardtanh -0.5 2": lambda x: F.hardtanh(x, -0.5, 2.0),
    "logsigmoid": F.logsigmoid,
    "sigmoid": torch.sigmoid,
    "threshold": lambda x: F.threshold(x, 0.5, 0.1),
}

SAMPLES = [
    *(Sample(name, f) for name, f in FUNCTIONS.items()),
    *(
        Sample(f"{name} at kinks", f, BOX, make=_halves, twice=False)
        for name, f in FUNCTIONS.items()
    ),
    *(Sample(f"{name} far", f, make=_far, twice=False) for name, f in FUNCTIONS.items()),
    Sample("relu in place", lambda x: F.relu_(x.sin()) * x),
    Sample("prelu", lambda x: F.prelu(x, W)),
    Sample("prelu channels", lambda x: F.prelu(x, W) * x, BOX),
    Sample("prelu of x", lambda x: torch.ops.aten._prelu_kernel(x.sin(), x)),
    Sample("glu", lambda x: F.glu(x, -1), (6,)),
    Sample("glu channels", lambda x: F.glu(x, 1), BOX),
    # With lower = upper nothing is random.
    Sample("rrelu train", lambda x: F.rrelu(x, 0.25, 0.25, training=True)),
    Sample("dropout eval", lambda x: F.dropout(x.sin(), 0.5, False)),
    Sample("dropout of none", lambda x: F.dropout(x.sin(), 0.0, True)),
    Sample("native_dropout", lambda x: torch.native_dropout(x.sin(), 0.0, True)[0]),
]
