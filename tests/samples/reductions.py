"""Uses of every reduction: whole, along one axis, several, kept and dropped."""

from __future__ import annotations

import math

import torch

from fxhess.testing import Sample, uniform

BOX = (3, 4)
D = torch.float64
aten = torch.ops.aten


def _ties(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Few distinct values: extrema are taken in several places."""
    return torch.randint(0, 2, shape, generator=generator).double()


def _with_zeros(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return torch.where(torch.rand(shape, generator=generator) < 0.4, 0.0, x)


def _with_nan(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x[..., 0] = math.nan
    return x


WHOLE = {
    "sum": lambda x: x.sin().sum(),
    "mean": lambda x: x.sin().mean(),
    "norm": lambda x: aten.norm.Scalar(x, 3),
    "dist": lambda x: torch.dist(x[0], x[1] * 2, 3),
    "max": lambda x: x.sin().max(),
    "min": lambda x: x.sin().min(),
    "prod": torch.prod,
    "any, all": lambda x: torch.where((x > 0).any(), x.sin(), x.cos()) * (x > -9).all(),
}

SAMPLES = [
    Sample("sum", lambda x: torch.sum(x.sin(), 1)),
    Sample("sum dims", lambda x: torch.sum(x.sin(), (1, -1)), BOX),
    Sample("sum keepdim", lambda x: torch.sum(x.sin(), -2, keepdim=True), BOX),
    Sample(
        "sum dtype", lambda x: torch.sum(x.sin(), 1, dtype=torch.float32).double(), tolerance=1e-5
    ),
    Sample("sum of tests", lambda x: torch.sum(x > 0, 1, keepdim=True) * x),
    Sample("mean", lambda x: torch.mean(x.sin(), 1)),
    Sample("mean dims", lambda x: torch.mean(x.sin(), (-1, 1)), BOX),
    Sample("mean keepdim", lambda x: x.sin() - torch.mean(x.sin(), -1, keepdim=True), BOX),
    Sample("nansum", lambda x: torch.nansum(x[:, 1:], 1)),
    Sample("nansum keepdim", lambda x: torch.nansum(x, -1, True).tanh(), BOX),
    Sample("var", lambda x: torch.var(x, 1)),
    Sample("var dims", lambda x: torch.var(x, (1, 2), unbiased=False), BOX),
    Sample("var correction", lambda x: torch.var(x, -1, correction=2, keepdim=True), BOX),
    Sample("std", lambda x: torch.std(x, 1)),
    Sample("std correction", lambda x: torch.std(x, (-2,), correction=0, keepdim=True), BOX),
    Sample("var_mean", lambda x: torch.cat(torch.var_mean(x, 1, keepdim=True), 1)),
    Sample(
        "std_mean",
        lambda x: torch.cat(torch.std_mean(x, (1, 2), unbiased=False, keepdim=True), 1),
        BOX,
    ),
    Sample("norm", lambda x: torch.norm(x, dim=1)),
    Sample("norm keepdim", lambda x: torch.linalg.norm(x, dim=-1, keepdim=True), BOX),
    Sample("norm fro", lambda x: torch.linalg.matrix_norm(x), BOX),
    *(
        Sample(f"vector_norm {p}", lambda x, p=p: torch.linalg.vector_norm(x, p, dim=1))
        for p in (0, 0.5, 1, 1.5, 2, 2.5, 3, 4, math.inf, -math.inf, -1.5)
    ),
    Sample("vector_norm dims", lambda x: torch.linalg.vector_norm(x, 3, dim=(1, 2)), BOX),
    Sample("norm p", lambda x: x.norm(4, -1, True) * x, BOX),
    Sample("norm 1 at zeros", lambda x: torch.norm(x, 1, dim=1), make=_with_zeros, twice=False),
    Sample("norm 3 at zeros", lambda x: torch.norm(x, 3, dim=1), make=_with_zeros, twice=False),
    Sample("norm inf at ties", lambda x: torch.norm(x, math.inf, dim=1), make=_ties, twice=False),
    Sample("logsumexp", lambda x: torch.logsumexp(x, 1)),
    Sample("logsumexp dims", lambda x: torch.logsumexp(3 * x, (1, 2), keepdim=True), BOX),
    Sample("logsumexp far", lambda x: torch.logsumexp(1000 * x, -1), BOX, tolerance=1e-8),
    Sample("logcumsumexp", lambda x: torch.logcumsumexp(x, 1)),
    Sample("logcumsumexp far", lambda x: torch.logcumsumexp(300 * x, -2), BOX, tolerance=1e-8),
    Sample("amax", lambda x: torch.amax(x.sin(), 1)),
    Sample("amax dims", lambda x: torch.amax(x, (1, -1), keepdim=True), BOX),
    Sample("amax ties", lambda x: torch.amax(x, 1).exp(), make=_ties, twice=False),
    Sample("amin", lambda x: torch.amin(x * x, -1), BOX),
    Sample("amin ties", lambda x: torch.amin(x, (2, 1)).exp(), BOX, make=_ties, twice=False),
    Sample("aminmax", lambda x: torch.mul(*torch.aminmax(x, dim=1))),
    Sample("aminmax keepdim", lambda x: torch.aminmax(x.sin(), dim=-1, keepdim=True).max, BOX),
    Sample("prod", lambda x: torch.prod(x, 1), (5,)),
    Sample("prod keepdim", lambda x: torch.prod(x, -2, keepdim=True), (7, 2)),
    Sample("prod at zeros", lambda x: torch.prod(x, 1), (4,), make=_with_zeros, twice=False),
    Sample("prod of one", lambda x: torch.prod(x, -1), (3, 1)),
    Sample("cumsum", lambda x: torch.cumsum(x.sin(), 1)),
    Sample("cumsum inner", lambda x: torch.cumsum(x.sin(), -2), BOX),
    Sample("cumprod", lambda x: torch.cumprod(x, 1), (5,)),
    Sample("cumprod inner", lambda x: torch.cumprod(x, -2), (3, 2)),
    Sample("cumprod at zeros", lambda x: torch.cumprod(x, 1), make=_with_zeros, twice=False),
    Sample(
        "count_nonzero",
        lambda x: torch.count_nonzero(x, 1).unsqueeze(1) * x,
        make=_with_zeros,
        twice=False,
    ),
    Sample(
        "any, all",
        lambda x: torch.where(
            (x > 0).any(-1, keepdim=True), x.sin(), torch.where((x > 0).all(-2, True), x, x * x)
        ),
        BOX,
    ),
    Sample(
        "any, all of axes",
        lambda x: (
            torch.where((x > 0).any((1, 2), True), x.sin(), x)
            * torch.where((x > -1).all((-1, -2), True), x.cos(), x)
        ),
        BOX,
    ),
    Sample("argmin", lambda x: torch.argmin(x, -1, keepdim=True) * x.sin(), BOX),
    Sample("argmax", lambda x: torch.argmax(x, 1, keepdim=True) * x.sin()),
    *(
        Sample(f"{name} of a whole sample", function, (2, 3), batch=None)
        for name, function in WHOLE.items()
    ),
    Sample("norm by dtype", lambda x: aten.norm.ScalarOpt_dtype(x, 3, dtype=D), batch=None),
    Sample(
        "norm by axis and dtype",
        lambda x: aten.norm.ScalarOpt_dim_dtype(x, 3, [1], True, dtype=D),
        BOX,
        reference=lambda x: torch.linalg.vector_norm(x, 3, 1, True),
    ),
    Sample(
        "sqrt of a sum", lambda x: torch.sqrt(torch.sum(x, -1)), make=uniform(0.5, 2), twice=False
    ),
]
