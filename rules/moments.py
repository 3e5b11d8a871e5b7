"""Variances, standard deviations and norms: roots of sums of squares or of other powers."""

from __future__ import annotations

import math
from typing import Any

import torch

from fxhess.registry import aten, composite
from fxhess.rules.reductions import Dims, dims_of, squeezed, terms_of
from fxhess.rules.roots import root_of


def sqrt_or_zero(value: torch.Tensor) -> torch.Tensor:
    """The square root, with derivative 0 at 0 as PyTorch's norms have it."""
    return root_of(value, torch.where(value == 0, 0.0, torch.sqrt(value)))


# --- moments ----------------------------------------------------------------------------------


def _moments(
    self: torch.Tensor, dim: Dims, correction: float, keepdim: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Variance and mean."""
    dims = dims_of(self, dim)
    mean = torch.mean(self, dims, True)
    rest = self - mean
    n = terms_of(self, dims) - correction
    var = torch.sum(rest * rest, dims, True) / max(n, 0)
    return squeezed(var, dims, keepdim), squeezed(mean, dims, keepdim)


@composite(aten.var_mean.correction)
def var_mean(
    self: torch.Tensor,
    dim: Dims = None,
    *,
    correction: float | None = None,
    keepdim: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _moments(self, dim, 1 if correction is None else correction, keepdim)


@composite(aten.std_mean.correction)
def std_mean(
    self: torch.Tensor,
    dim: Dims = None,
    *,
    correction: float | None = None,
    keepdim: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    var, mean = var_mean(self, dim, correction=correction, keepdim=keepdim)
    return sqrt_or_zero(var), mean


@composite(aten.var.correction)
def var(self: torch.Tensor, dim: Dims = None, **options: Any) -> torch.Tensor:
    return var_mean(self, dim, **options)[0]


@composite(aten.std.correction)
def std(self: torch.Tensor, dim: Dims = None, **options: Any) -> torch.Tensor:
    return sqrt_or_zero(var_mean(self, dim, **options)[0])


# --- norms ------------------------------------------------------------------------------------


@composite(aten.linalg_vector_norm.default)
def vector_norm(
    self: torch.Tensor,
    ord: float = 2,
    dim: Dims = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """``(sum |x|^p)^(1/p)``.  Where it is not differentiable, the derivatives are 0: at an entry
    that is 0 (p < 2, where |x|^p has a kink) and at the zero vector."""
    x = self if dtype is None else self.to(dtype)
    dims = dims_of(x, dim)
    if ord == 2:
        return sqrt_or_zero(torch.sum(x * x, dims, keepdim))
    if ord == 0:
        return torch.sum((x != 0).to(x.dtype), dims, keepdim)
    size = torch.abs(x)
    if ord == 1:
        return torch.sum(size, dims, keepdim)
    if math.isinf(ord):
        return (torch.amax if ord > 0 else torch.amin)(size, dims, keepdim)
    if ord < 0:
        none = torch.any(x == 0, dims, keepdim)
        return torch.where(
            none, 0.0, torch.pow(torch.sum(torch.pow(size, ord), dims, keepdim), 1 / ord)
        )
    total = torch.sum(_pow_or_zero(size, ord), dims, keepdim)
    return _pow_or_zero(total, 1 / ord)


def _pow_or_zero(value: torch.Tensor, exponent: float) -> torch.Tensor:
    """A positive power of what is not negative, with derivatives 0 at 0."""
    return torch.where(value == 0, 0.0, torch.pow(value, exponent))


@composite(aten.norm.Scalar)
def norm(self: torch.Tensor, p: float = 2) -> torch.Tensor:
    return vector_norm(self, p)


@composite(aten.norm.ScalarOpt_dtype)
def norm_dtype(self: torch.Tensor, p: float | None, *, dtype: torch.dtype) -> torch.Tensor:
    return vector_norm(self, 2 if p is None else p, dtype=dtype)


@composite(aten.norm.ScalarOpt_dim, aten.norm.ScalarOpt_dim_dtype)
def norm_dim(
    self: torch.Tensor,
    p: float | None,
    dim: Dims,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    return vector_norm(self, 2 if p is None else p, dim, keepdim, dtype=dtype)


@composite(aten.dist.default)
def dist(self: torch.Tensor, other: torch.Tensor, p: float = 2) -> torch.Tensor:
    return vector_norm(self - other, p)
