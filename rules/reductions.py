"""Sums, means, moments, norms, extrema, products and running forms of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fxhess.kinds import Along, Call, Equation
from fxhess.registry import aten, composite, linear, multilinear, smooth, substitute, zero
from fxhess.rules.shape import event_size

Dims = int | Sequence[int] | None


def dims_of(self: torch.Tensor, dim: Dims) -> list[int]:
    """The axes that ``dim`` names: all where it names none."""
    if isinstance(dim, int):
        return [dim]
    return list(dim) if dim else list(range(self.ndim))


def terms_of(self: torch.Tensor, dims: Sequence[int]) -> int:
    return math.prod(self.shape[d] for d in dims) if self.ndim else 1


def squeezed(value: torch.Tensor, dims: Sequence[int], keepdim: bool) -> torch.Tensor:
    return value if keepdim or not value.ndim else torch.squeeze(value, tuple(dims))


# --- sums and means ---------------------------------------------------------------------------


def _reduce(a: Mapping[str, Any], mean: bool) -> Equation:
    rank = a["self"].ndim
    dims = {d % max(rank, 1) for d in (a.get("dim") or range(rank))}
    keep = a.get("keepdim", False)
    output = tuple(None if i in dims else i for i in range(rank) if keep or i not in dims)
    return Equation((tuple(range(rank)),), output, mean=mean)


def _cast_first(op: Callable[..., Any]) -> Callable[..., Any]:
    """An equation computes in the dtype of its operand: cast where the result is of another."""

    def rewrite(self: torch.Tensor, *args: Any, dtype: torch.dtype | None = None) -> Any:
        own = self.dtype
        exact = own.is_floating_point or own.is_complex or own == torch.int64
        wanted = dtype or (own if exact else torch.int64)
        return NotImplemented if wanted == own else op(self.to(wanted), *args)

    return rewrite


for op in (aten.sum.default, aten.sum.dim_IntList):
    multilinear(op, lambda a: _reduce(a, mean=False), rewrite=_cast_first(op))
for op in (aten.mean.default, aten.mean.dim):
    multilinear(op, lambda a: _reduce(a, mean=True), rewrite=_cast_first(op))


@composite(aten.nansum.default)
def nansum(
    self: torch.Tensor,
    dim: Dims = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    zeros = torch.zeros_like(self)
    return torch.sum(
        torch.where(torch.isnan(self), zeros, self), dims_of(self, dim), keepdim, dtype=dtype
    )


@substitute(torch.nanmean, torch.Tensor.nanmean)
def nanmean(
    self: torch.Tensor,
    dim: Dims = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """A mean over samples is a sum of theirs over how many there are, but for entries that are NaN,
    which make every sample's share depend on the others: a decision by values."""
    dims = dims_of(self, dim)
    over_samples = any(isinstance(self.shape[d], torch.SymInt) for d in dims if self.ndim)
    if over_samples and not bool(torch.isnan(self).any()):
        return torch.mean(self, dims, keepdim, dtype=dtype)
    total = torch.nansum(self, dims, keepdim, dtype=dtype)
    return total / torch.sum(~torch.isnan(self.detach()), dims, keepdim)


# --- logarithms of sums -----------------------------------------------------------------------


def finite_peak(self: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    """The largest entry along ``dims``, kept as axes of size 1, as a constant: what exponents are
    shifted by.  0 where it is infinite, so that exp(-inf) stays 0."""
    peak = torch.amax(self.detach(), tuple(dims), True)
    return torch.where(torch.isinf(peak), 0.0, peak)


def from_mean(shares: Any, values: Any, dims: list[int]) -> Any:
    """What is left of values without their mean, of which each has a share."""
    return values - torch.sum(shares * values, dims, True)


def centred(shares: Any, values: Any, dims: list[int]) -> Any:
    """The same, to full precision where one share is nearly all: its value differs from the mean
    by a small part of itself, which the rounding of shares and sum would cover.  The mean of what
    is left, 0 but for that rounding, is taken off too."""
    return from_mean(shares, from_mean(shares, values, dims), dims)


def logsumexp(self: torch.Tensor, dim: Dims, keepdim: bool = False) -> Any:
    """One axis after the other, and kept; of complex numbers by exponentials."""
    dims = dims_of(self, dim)
    if self.is_complex():
        peak = finite_peak(self, dims)
        total = torch.sum(torch.exp(self - peak), dims, True)
        return squeezed(torch.log(total) + peak, dims, keepdim)
    if len(dims) == 1 and keepdim and self.ndim and self.is_floating_point():
        return NotImplemented
    y = self if self.is_floating_point() else self.to(torch.get_default_dtype())
    for k in dims if self.ndim else ():
        y = torch.logsumexp(y, [k], True)
    return squeezed(y, dims, keepdim)


def _shares(call: Call) -> Any:
    """What each term is of the sum; 0 where there is no term but 0."""
    shares = torch.softmax(call.operands[0], call.args[1][0])
    return torch.where(torch.isneginf(call.y), 0.0, shares)


def _logsumexp_curve(call: Call, g: Any, i: int, j: int, t: Any) -> Any:
    """By the differences of tangents from their mean: E[t u] - E[t] E[u] would cancel."""
    shares = _shares(call)
    return g * shares * centred(shares, t, call.args[1])


smooth(
    aten.logsumexp.default,
    Along("dim"),
    push=lambda call, t: torch.sum(_shares(call) * t, call.args[1], True),
    pull=lambda g, call: g * _shares(call),
    curve=_logsumexp_curve,
    rewrite=logsumexp,
    finite=True,
)


@composite(aten.logcumsumexp.default)
def logcumsumexp(self: torch.Tensor, dim: int) -> torch.Tensor:
    """Each result has a shift of its own, for terms that differ by orders of magnitude: n^2
    exponentials."""
    if not self.ndim:
        return self.clone()
    n = self.shape[dim]
    x = torch.movedim(self, dim, -1).unsqueeze(-2)
    late = torch.ones(n, n, dtype=torch.bool, device=self.device).triu(1)
    terms = torch.where(late, -math.inf, x)
    return torch.movedim(torch.logsumexp(terms, [-1]), -1, dim)


# --- extrema ----------------------------------------------------------------------------------


def _ties(call: Call) -> tuple[Any, Any]:
    """Where the extremum is taken, and in how many places (kept as axes of size 1)."""
    dims = tuple(call.args[1])
    y = call.y if call.args[2] else _restored(call.y, dims)
    taken = torch.eq(call.operands[0], y)
    return taken, torch.sum(taken, dims, True)


def _restored(value: Any, dims: Sequence[int]) -> Any:
    """Put back, with size 1, the axes (negative numbers) that a reduction dropped."""
    for dim in sorted(dims, reverse=True):
        value = torch.unsqueeze(value, dim)
    return value


def _extremum_pull(g: Any, call: Call) -> Any:
    taken, count = _ties(call)
    g = g if call.args[2] else _restored(g, tuple(call.args[1]))
    return torch.where(taken, g / count, 0.0)


def _extremum_push(call: Call, t: Any) -> Any:
    taken, count = _ties(call)
    kept = torch.where(taken, t / count, 0.0)
    return torch.sum(kept, tuple(call.args[1]), call.args[2])


for op in (aten.amax.default, aten.amin.default):
    linear(op, Along("dim"), pull=_extremum_pull, push=_extremum_push)


@composite(aten.max.default)
def max_all(self: torch.Tensor) -> torch.Tensor:
    return torch.amax(self)


@composite(aten.min.default)
def min_all(self: torch.Tensor) -> torch.Tensor:
    return torch.amin(self)


@composite(aten.aminmax.default)
def aminmax(
    self: torch.Tensor, *, dim: int | None = None, keepdim: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    dims = dims_of(self, dim)
    return torch.amin(self, dims, keepdim), torch.amax(self, dims, keepdim)


# --- products ---------------------------------------------------------------------------------
# By halves, so that no factor is ever divided out: exact also where factors are 0.


@composite(aten.prod.dim_int)
def prod_dim(
    self: torch.Tensor, dim: int, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> torch.Tensor:
    x = _numeric(self, dtype)
    if not x.ndim:
        return x.clone()
    n = event_size(x.shape[dim])
    if n == 0:
        return torch.sum(x, [dim], keepdim) + 1
    while n > 1:
        half = n // 2
        pairs = torch.narrow(x, dim, 0, half) * torch.narrow(x, dim, half, half)
        x = torch.cat([pairs, torch.narrow(x, dim, n - 1, 1)], dim) if n % 2 else pairs
        n -= half
    return squeezed(x, [dim], keepdim)


@composite(aten.prod.default)
def prod(self: torch.Tensor, *, dtype: torch.dtype | None = None) -> torch.Tensor:
    return prod_dim(self.reshape(-1), 0, dtype=dtype)


@composite(aten.cumprod.default)
def cumprod(self: torch.Tensor, dim: int, *, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Products of 1, 2, 4 .. neighbours (Hillis and Steele 1986)."""
    x = _numeric(self, dtype)
    if not x.ndim:
        return x.clone()
    n, done = event_size(x.shape[dim]), 1
    while done < n:
        head = torch.narrow(x, dim, 0, done)
        tail = torch.narrow(x, dim, done, n - done) * torch.narrow(x, dim, 0, n - done)
        x = torch.cat([head, tail], dim)
        done *= 2
    return x


def _numeric(self: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    if dtype is None and not (self.dtype.is_floating_point or self.dtype.is_complex):
        dtype = torch.int64
    return self if dtype is None else self.to(dtype)


linear(
    aten.cumsum.default,
    Along("dim"),
    pull=lambda g, c: torch.flip(
        torch.cumsum(torch.flip(g, (c.args[1],)), c.args[1]), (c.args[1],)
    ),
    rewrite=_cast_first(aten.cumsum.default),
)

# --- counts and tests: no derivative ------------------------------------------------------------

for op in (
    aten.count_nonzero.dim_IntList,
    aten.any.dim,
    aten.any.dims,
    aten.all.dim,
    aten.all.dims,
    aten.argmax.default,
    aten.argmin.default,
):
    zero(op, Along("dim"))


@composite(aten.count_nonzero.default)
def count_nonzero(self: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    return aten.count_nonzero.dim_IntList(self, dims_of(self, dim))


@composite(aten.any.default)
def any_all_axes(self: torch.Tensor) -> torch.Tensor:
    return aten.any.dims(self, list(range(self.ndim)))


@composite(aten.all.default)
def all_all_axes(self: torch.Tensor) -> torch.Tensor:
    return aten.all.dims(self, list(range(self.ndim)))
