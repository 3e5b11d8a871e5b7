"""Writing into parts of a tensor, as functionalized in-place code does: linear in what is kept
and in what is written.  Masks of constant positions are pointwise choices (``torch.where``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fxhess import _traced
from fxhess.kinds import Along, Call
from fxhess.registry import aten, composite, linear
from fxhess.rules.indexing import address, leading, returned, taken
from fxhess.rules.shape import diagonal_places, event_size, whole

# --- slices ---------------------------------------------------------------------------------


@composite(aten.copy.default)
def copy(self: torch.Tensor, src: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    src = src if src.dtype == self.dtype else src.to(self.dtype)
    return torch.ops.aten.expand.default(src, self.shape)


@composite(aten.fill.Tensor)
def fill(self: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return copy(self, value)


def _slice_scatter_rewrite(
    self: torch.Tensor,
    src: torch.Tensor,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Any:
    """Writing all of an axis, of the batch too, leaves nothing of what was there.  PyTorch cannot
    differentiate writing complex numbers, but pairs of real ones."""
    if self.is_complex():
        pairs, parts = torch.view_as_real(self), torch.view_as_real(src.to(self.dtype))
        written = torch.slice_scatter(pairs, parts, dim % self.ndim, start, end, step)
        return torch.view_as_complex(written)
    shape = list(self.shape)
    if whole(shape[dim], start, end, step):
        return copy(self, src)
    begin, stop, step = slice(start, end, step).indices(event_size(shape[dim]))
    shape[dim] = len(range(begin, stop, step))
    if src.dtype != self.dtype or list(src.shape) != shape:
        src = src.to(self.dtype).expand(shape)
        return aten.slice_scatter.default(self, src, dim, start, end, step)
    return NotImplemented


def _slice_scatter_pull(g: Any, c: Call) -> tuple[Any, Any]:
    dim, start, end, step = c.args[2:6]
    part = aten.slice.Tensor(g, dim, start, end, step)
    return aten.slice_scatter.default(g, torch.zeros_like(part), dim, start, end, step), part


linear(
    aten.slice_scatter.default,
    Along("dim", aligned=("src",)),
    pull=_slice_scatter_pull,
    push=lambda c, t, s: aten.slice_scatter.default(t, s, *c.args[2:6]),
    differentiable=("self", "src"),
    rewrite=_slice_scatter_rewrite,
)


@composite(aten.select_scatter.default)
def select_scatter(self: torch.Tensor, src: torch.Tensor, dim: int, index: int) -> torch.Tensor:
    index = index + self.shape[dim] if index < 0 else index
    return torch.slice_scatter(self, torch.unsqueeze(src, dim), dim, index, index + 1)


@composite(aten.diagonal_scatter.default)
def diagonal_scatter(
    self: torch.Tensor, src: torch.Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1
) -> torch.Tensor:
    y = torch.movedim(self, (dim1, dim2), (-2, -1))
    m, n = event_size(y.shape[-2]), event_size(y.shape[-1])
    start, end, step = diagonal_places(m, n, offset)
    flat = torch.slice_scatter(torch.flatten(y, -2, -1), src, -1, start, end, step)
    return torch.movedim(torch.unflatten(flat, -1, (m, n)), (-2, -1), (dim1, dim2))


# --- at the same positions for every sample ---------------------------------------------------


def _index_add_rewrite(
    self: torch.Tensor, dim: int, index: torch.Tensor, source: torch.Tensor, *, alpha: Any = 1
) -> Any:
    if alpha != 1:
        return torch.index_add(self, dim, index, source * alpha)
    if self.ndim == 0 or index.ndim == 0:
        rank = max(self.ndim, 1)
        whole = self if self.ndim else self.reshape(1)
        source = source if source.ndim == rank else source.reshape([1] * rank)
        return torch.index_add(whole, dim, index.reshape(1), source).reshape(self.shape)
    if _traced.varies_alone(index):
        return torch.scatter_add(self, dim, _along(index, dim, source), source)
    return NotImplemented


def _along(index: torch.Tensor, dim: int, source: torch.Tensor) -> torch.Tensor:
    """An index along one axis as one for each entry of ``source``."""
    shape = [-1 if i == dim % source.ndim else 1 for i in range(source.ndim)]
    return index.reshape(shape).expand(source.shape)


def _index_copy_rewrite(
    self: torch.Tensor, dim: int, index: torch.Tensor, source: torch.Tensor
) -> Any:
    if self.ndim == 0 or index.ndim == 0:
        rank = max(self.ndim, 1)
        whole = self if self.ndim else self.reshape(1)
        source = source if source.ndim == rank else torch.unsqueeze(source, dim)
        return torch.index_copy(whole, dim, index.reshape(1), source).reshape(self.shape)
    if _traced.varies_alone(index):
        return torch.scatter(self, dim, _along(index, dim, source), source)
    return NotImplemented


linear(
    aten.index_add.default,
    Along("dim", aligned=("source",)),
    pull=lambda g, c: (g, torch.index_select(g, c.args[1], c.args[2])),
    push=lambda c, t, s: torch.index_add(t, c.args[1], c.args[2], s),
    differentiable=("self", "source"),
    rewrite=_index_add_rewrite,
)
linear(
    aten.index_copy.default,
    Along("dim", aligned=("source",)),
    pull=lambda g, c: (
        torch.index_fill(g, c.args[1], c.args[2], 0),
        torch.index_select(g, c.args[1], c.args[2]),
    ),
    push=lambda c, t, s: torch.index_copy(t, c.args[1], c.args[2], s),
    differentiable=("self", "source"),
    rewrite=_index_copy_rewrite,
)


@composite(aten.index_fill.int_Scalar, aten.index_fill.int_Tensor)
def index_fill(
    self: torch.Tensor, dim: int, index: torch.Tensor, value: float | torch.Tensor
) -> torch.Tensor:
    n = event_size(self.shape[dim]) if self.ndim else 1
    places = torch.arange(n, device=self.device)
    hit = (places[:, None] == torch.where(index < 0, index + n, index).reshape(-1)).any(1)
    shape = [n if i == dim % self.ndim else 1 for i in range(self.ndim)]
    return _filled(self, hit.reshape(shape), value)


def _filled(self: torch.Tensor, hit: torch.Tensor, value: float | torch.Tensor) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        value = torch.full((), value, dtype=self.dtype, device=self.device)
    return torch.where(hit, value.to(self.dtype), self)


@composite(aten.index_put.default)
def index_put(
    self: torch.Tensor,
    indices: Sequence[torch.Tensor | None],
    values: torch.Tensor,
    accumulate: bool = False,
) -> torch.Tensor:
    chosen = _put_at_mask(self, indices, values, accumulate)
    if chosen is not None:
        return chosen
    where = address(self, indices)
    if any(n == 0 for n in where.shape if isinstance(n, int)):
        return aten.alias.default(self)
    entries = where.flatten(self)
    source = where.inward(values.to(self.dtype))
    at = where.batches
    if at:
        scatter = torch.scatter_add if accumulate else torch.scatter
        entries = scatter(entries, at, where.each(), source)
    else:
        write: Callable[..., torch.Tensor] = torch.index_add if accumulate else torch.index_copy
        entries = write(entries, 0, where.flat, source)
    return where.restore(entries)


def _put_at_mask(
    self: torch.Tensor,
    indices: Sequence[torch.Tensor | None],
    values: torch.Tensor,
    accumulate: bool,
) -> torch.Tensor | None:
    """``x[mask] = number``: the mask may differ between samples.  None if it is not that."""
    given = [(i, t) for i, t in enumerate(indices) if t is not None]
    if len(given) != 1 or any(n != 1 for n in values.shape):
        return None
    before, mask = given[0]
    if mask.dtype not in (torch.bool, torch.uint8):
        return None
    after = self.ndim - before - mask.ndim
    hit = mask.to(torch.bool).reshape([*mask.shape, *[1] * after])
    value = values.to(self.dtype).reshape(())
    return torch.where(hit, self + value if accumulate else value, self)


# --- at positions that may differ between samples -----------------------------------------------


def _fitted(op: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    """The rewrite of a scatter: where the index is shorter than the source along an axis, only
    the front of that is read; where it is shorter than the tensor along another axis than
    ``dim``, only the front of that is written."""

    def rewrite(self: torch.Tensor, dim: int, index: torch.Tensor, src: Any, **options: Any) -> Any:
        if self.ndim == 0 or index.ndim == 0:
            src = src.reshape(-1) if isinstance(src, torch.Tensor) else src
            return op(self.reshape(-1), 0, index.reshape(-1), src, **options).reshape(self.shape)
        for axis, n in enumerate(index.shape):
            if isinstance(src, torch.Tensor) and src.shape[axis] != n:
                return op(self, dim, index, torch.narrow(src, axis, 0, n), **options)
            if axis != dim % self.ndim and self.shape[axis] != n:
                front = op(torch.narrow(self, axis, 0, n), dim, index, src, **options)
                return torch.slice_scatter(self, front, axis, 0, n)
        return NotImplemented

    return rewrite


def _overwritten(c: Call, t: Any) -> Any:
    """t with zeros where the operation writes."""
    dim, index = c.args[1:3]
    y: Any = c.y
    none = torch.zeros_like(y, dtype=torch.bool)
    return torch.where(leading(torch.scatter(none, dim, index, True), t), 0.0, t)


def _sent(c: Call, t: Any) -> Any:
    """Zeros, with the tangent of the source added where it goes."""
    return returned(t, c.args[1], c.args[2], c.y.size(c.args[1]))


linear(
    aten.scatter.src,
    Along("dim", aligned=("index", "src")),
    pull=lambda g, c: (_overwritten(c, g), taken(g, c.args[1], c.args[2])),
    push=lambda c, t, s: _overwritten(c, t) + _sent(c, s),
    differentiable=("self", "src"),
    rewrite=_fitted(torch.scatter),
)
linear(
    aten.scatter.value,
    Along("dim", aligned=("index",)),
    pull=lambda g, c: _overwritten(c, g),
    push=lambda c, t: _overwritten(c, t),
    rewrite=_fitted(torch.scatter),
)
linear(
    aten.scatter_add.default,
    Along("dim", aligned=("index", "src")),
    pull=lambda g, c: (g, taken(g, c.args[1], c.args[2])),
    push=lambda c, t, s: t + _sent(c, s),
    differentiable=("self", "src"),
    rewrite=_fitted(torch.scatter_add),
)


@composite(aten.masked_scatter.default)
def masked_scatter(self: torch.Tensor, mask: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Each entry of the mask takes what its number among them names."""
    self, mask = torch.broadcast_tensors(self, mask)
    if not source.numel():
        return self.clone()
    number = torch.cumsum(mask.reshape(-1).to(torch.long), 0) - 1
    written = torch.gather(source.reshape(-1), 0, number.clamp(min=0))
    return torch.where(mask, written.reshape(self.shape), self)


@composite(aten.scatter.reduce, aten.scatter.value_reduce)
def scatter_with(
    self: torch.Tensor,
    dim: int,
    index: torch.Tensor,
    src: torch.Tensor | float,
    *,
    reduce: str,
) -> torch.Tensor:
    if not isinstance(src, torch.Tensor):
        src = torch.full(index.shape, src, dtype=self.dtype, device=self.device)
    reduce = {"add": "sum", "multiply": "prod"}[reduce]
    return torch.scatter_reduce(self, dim, index, src, reduce)


@composite(aten.scatter_reduce.two)
def scatter_reduce(
    self: torch.Tensor,
    dim: int,
    index: torch.Tensor,
    src: torch.Tensor,
    reduce: str,
    *,
    include_self: bool = True,
) -> torch.Tensor:
    short = _fitted(torch.scatter_reduce)(
        self, dim, index, src, reduce=reduce, include_self=include_self
    )
    if short is not NotImplemented:
        return short  # type: ignore[no-any-return]
    if reduce in ("sum", "mean"):
        start = self if include_self else torch.scatter(self, dim, index, 0.0)
        total = torch.scatter_add(start, dim, index, src)
        if reduce == "sum":
            return total
        ones = torch.full(self.shape, float(include_self), dtype=self.dtype, device=self.device)
        one = torch.ones(index.shape, dtype=self.dtype, device=self.device)
        return total / torch.scatter_add(ones, dim, index, one).clamp(min=1)
    # The products and extremes of few entries: each position chooses its own from all of them.
    dim = dim % self.ndim
    places = torch.arange(event_size(self.shape[dim]), device=self.device)
    places = places.reshape([-1, *[1] * (self.ndim - dim)])
    hit = torch.unsqueeze(index, dim) == places
    neutral = {"prod": 1.0, "amax": -torch.inf, "amin": torch.inf}[reduce]
    entries = torch.where(hit, torch.unsqueeze(src, dim), neutral)
    own = torch.unsqueeze(self, dim + 1)
    if not include_self:
        own = torch.where(hit.any(dim + 1, keepdim=True), neutral, own)
    entries = torch.cat([own, entries], dim + 1)
    if reduce == "prod":
        return torch.prod(entries, dim + 1)
    return torch.amax(entries, dim + 1) if reduce == "amax" else torch.amin(entries, dim + 1)


@composite(aten.index_reduce.default)
def index_reduce(
    self: torch.Tensor,
    dim: int,
    index: torch.Tensor,
    source: torch.Tensor,
    reduce: str,
    *,
    include_self: bool = True,
) -> torch.Tensor:
    shape = [-1 if i == dim % self.ndim else 1 for i in range(self.ndim)]
    where = index.reshape(shape).expand(source.shape)
    return torch.scatter_reduce(self, dim, where, source, reduce, include_self=include_self)
