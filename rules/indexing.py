"""Reading and choosing entries: an index is a constant of the derivative, so all of these are
linear: what is gathered going forward is scattered, added up, going back.

Advanced indexing is composed of one ``index_select`` (the same index for every sample), one
``gather`` (an index for each sample) or one ``embedding`` (entries of a constant table).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxhess import _torch, _traced
from fxhess.emit import sibling
from fxhess.kinds import Along, Call, Trailing
from fxhess.registry import aten, composite, linear, substitute, zero
from fxhess.rules.shape import event_size

# --- gathering ------------------------------------------------------------------------------


def leading(constant: Any, like: Any) -> Any:
    """A canonical constant with the leading axes of a tangent or adjoint."""
    new = like.ndim - constant.ndim
    return constant[(None,) * new] if new > 0 else constant


def taken(t: Any, dim: int, index: Any) -> Any:
    """The entries of t at ``index`` along ``dim``; other axes broadcast."""
    return torch.take_along_dim(t, leading(index, t), dim)


def returned(g: Any, dim: int, index: Any, n: int) -> Any:
    """The transpose of :func:`taken`: zeros of n along ``dim``, with g added at ``index``."""
    spread = torch.broadcast_tensors(g, leading(index, g))
    zeros = torch.zeros_like(torch.narrow(spread[0], dim, 0, 1))
    zeros = zeros.expand([n if i == zeros.ndim + dim else -1 for i in range(zeros.ndim)])
    return torch.scatter_add(zeros, dim, spread[1], spread[0])


def _gather_rewrite(
    self: torch.Tensor, dim: int, index: torch.Tensor, *, sparse_grad: bool = False
) -> Any:
    """An index shorter than the tensor, along other axes, reads only the front of it."""
    if any(isinstance(n, int) and n == 0 for n in index.shape):
        return self.new_zeros(index.shape)
    if self.ndim == 0 or index.ndim == 0:
        return torch.gather(self.reshape(-1), 0, index.reshape(-1)).reshape(index.shape)
    front = fronted(self, dim, index)
    return NotImplemented if front is self else torch.gather(front, dim, index)


def fronted(self: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that an index along ``dim`` can reach."""
    for axis in range(self.ndim):
        if axis != dim % self.ndim and self.shape[axis] != index.shape[axis]:
            self = torch.narrow(self, axis, 0, index.shape[axis])
    return self


linear(
    aten.gather.default,
    Along("dim", aligned=("index",)),
    pull=lambda g, c: returned(g, c.args[1], c.args[2], c.operands[0].size(c.args[1])),
    push=lambda c, t: taken(t, c.args[1], c.args[2]),
    rewrite=_gather_rewrite,
)


def _index_select_rewrite(self: torch.Tensor, dim: int, index: torch.Tensor) -> Any:
    """A table read at an index for each sample is an embedding."""
    if self.ndim == 0:
        return torch.index_select(self.reshape(1), 0, index.reshape(1)).reshape(())
    if index.ndim == 0:
        return torch.index_select(self, dim, index.reshape(1))
    if _traced.varies_alone(index) and _traced.varies_alone(self):
        dim = dim % self.ndim
        shape = [index.shape[0] if i == dim else 1 for i in range(self.ndim)]
        sizes = [-1 if i == dim else n for i, n in enumerate(self.shape)]
        return torch.gather(self, dim, index.reshape(shape).expand(sizes))
    if not _own(index) or symbolic(self):
        return NotImplemented
    table = torch.movedim(self, dim, 0)
    read = aten.embedding.default(table.reshape(table.shape[0], -1), index)
    return torch.movedim(read.reshape([index.shape[0], *table.shape[1:]]), 0, dim)


@substitute(torch.take_along_dim, torch.Tensor.take_along_dim)
def take_along_dim(
    input: torch.Tensor, indices: torch.Tensor, dim: int | None = None
) -> torch.Tensor:
    """PyTorch's own reads sizes as numbers."""
    if dim is None:
        return take_along_dim(input.reshape(-1), indices.reshape(-1), 0)
    n = input.shape[dim]
    shape = list(torch.broadcast_shapes(_without(input, dim), _without(indices, dim)))
    own, theirs = shape.copy(), shape.copy()
    own[dim], theirs[dim] = n, indices.shape[dim]
    index = torch.where(indices < 0, indices + n, indices).expand(theirs)
    return torch.gather(input.expand(own), dim, index)


def _without(t: torch.Tensor, dim: int) -> list[Any]:
    return [1 if axis == dim % t.ndim else n for axis, n in enumerate(t.shape)]


def symbolic(t: torch.Tensor) -> bool:
    """Whether an axis of a tensor, at capture, is as long as the batch."""
    return any(not isinstance(n, int) for n in t.shape)


def _own(index: torch.Tensor) -> bool:
    """Whether each sample has an index of its own."""
    return symbolic(index) or _traced.varies_alone(index)


def _index_select_pull(g: Any, c: Call) -> Any:
    _, dim, index = c.args
    return returned(g, dim, index[(slice(None),) + (None,) * (-dim - 1)], c.operands[0].size(dim))


linear(
    aten.index_select.default,
    Along("dim"),
    pull=_index_select_pull,
    rewrite=_index_select_rewrite,
)


def _embedding_rewrite(
    weight: torch.Tensor,
    indices: torch.Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """At indices that all samples share, the table may depend on x."""
    if _own(indices) and not _traced.varies_alone(weight):
        return NotImplemented
    read = torch.index_select(weight, 0, indices.reshape(-1))
    return read.reshape([*indices.shape, weight.shape[1]])


zero(aten.embedding.default, Trailing(0, of="indices"), rewrite=_embedding_rewrite)
zero(aten.bucketize.Tensor, Trailing(0))


def _searchsorted_rewrite(
    sorted_sequence: torch.Tensor,
    self: torch.Tensor,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: torch.Tensor | None = None,
) -> Any:
    """In a sequence for each row, by counting."""
    if sorted_sequence.ndim < 2:
        return NotImplemented
    if sorter is not None:
        sorted_sequence = torch.gather(sorted_sequence, -1, sorter)
    edges, at = torch.unsqueeze(sorted_sequence, -2), torch.unsqueeze(self, -1)
    after = edges > at if right or side == "right" else edges >= at
    dtype = torch.int32 if out_int32 else torch.int64
    return torch.sum(torch.logical_not(after), -1, dtype=dtype)


zero(aten.searchsorted.Tensor, Trailing(0, of="self"), rewrite=_searchsorted_rewrite)

# --- order ----------------------------------------------------------------------------------


def _order(dim: Callable[[Call], int]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """pull and push of an operation that returns (values, indices) along an axis, which it may
    drop: the values are gathered at the indices, which are piecewise constant."""

    def pull(g: Any, c: Call) -> Any:
        (x,) = c.operands
        index: Any = sibling(c.y, 1)
        if c.y.ndim < x.ndim:
            g, index = torch.unsqueeze(g, dim(c)), torch.unsqueeze(index, dim(c))
        return returned(g, dim(c), index, x.size(dim(c)))

    def push(c: Call, t: Any) -> Any:
        (x,) = c.operands
        index: Any = sibling(c.y, 1)
        if c.y.ndim == x.ndim:
            return taken(t, dim(c), index)
        return torch.squeeze(taken(t, dim(c), torch.unsqueeze(index, dim(c))), dim(c))

    return pull, push


for op, place in (
    (aten.sort.default, 1),
    (aten.cummax.default, 1),
    (aten.cummin.default, 1),
    (aten.max.dim, 1),
    (aten.min.dim, 1),
    (aten.median.dim, 1),
    (aten.nanmedian.dim, 1),
    (aten.mode.default, 1),
    (aten.topk.default, 2),
    (aten.kthvalue.default, 2),
):
    pull, push = _order(lambda c, place=place: c.args[place])  # type: ignore[misc]
    linear(op, Along("dim"), pull=pull, push=push, output=0)

pull, push = _order(lambda c: c.kwargs["dim"])
linear(aten.sort.stable, Along("dim"), pull=pull, push=push, output=0)


@composite(aten.median.default)
def median(self: torch.Tensor) -> torch.Tensor:
    return torch.median(self.reshape(-1), 0)[0]


@composite(aten.nanmedian.default)
def nanmedian(self: torch.Tensor) -> torch.Tensor:
    return torch.nanmedian(self.reshape(-1), 0)[0]


# --- advanced indexing ----------------------------------------------------------------------


@dataclass(frozen=True)
class Addressed:
    """``x[indices]`` as entries of one axis.  The axes of x are taken in the order ``order``:
    ``batches`` axes at which every sample reads its own entry, those that are indexed
    (``wide``, flattened into one), the ``rest``.  ``flat`` says where in the flattened axis:
    ``[*batches, K]``, or ``[K]`` where all samples read the same.  ``shape`` is the broadcast
    shape of the indices, with the batch at the axes ``homes``; ``at`` is where these axes stand
    in the result."""

    order: tuple[int, ...]
    batches: int
    wide: tuple[int, ...]
    rest: tuple[Any, ...]
    flat: torch.Tensor
    shape: tuple[Any, ...]
    homes: tuple[int, ...]
    at: int

    def flatten(self, x: torch.Tensor) -> torch.Tensor:
        """x as ``[*batches, N, *rest]``."""
        x = torch.permute(x, self.order)
        if not self.wide:
            return torch.unsqueeze(x, self.batches)
        return torch.flatten(x, self.batches, self.batches + len(self.wide) - 1)

    def restore(self, y: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`flatten`."""
        if self.wide:
            y = torch.unflatten(y, self.batches, self.wide)
        else:
            y = torch.squeeze(y, self.batches)
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return torch.permute(y, inverse)

    def _moves(self) -> tuple[list[int], list[int]]:
        """Where the index axes stand in the result: first the batch, then the others."""
        others = [i for i in range(len(self.shape)) if i not in self.homes]
        return [*self.homes, *others], others

    def outward(self, read: torch.Tensor) -> torch.Tensor:
        """Entries ``[*batches, K, *rest]`` with the axes of the result."""
        axes, others = self._moves()
        nb, sizes = self.batches, [self.shape[i] for i in others]
        if others:
            read = torch.unflatten(read, nb, sizes)
        else:
            read = torch.squeeze(read, nb)
        read = torch.movedim(read, tuple(range(len(axes))), tuple(axes))
        return torch.movedim(
            read, tuple(range(len(axes))), tuple(range(self.at, self.at + len(axes)))
        )

    def inward(self, values: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`outward`, for values that broadcast to the result."""
        before, after = self.rest[: self.at], self.rest[self.at :]
        values = values.expand([*before, *self.shape, *after])
        axes, others = self._moves()
        values = torch.movedim(values, tuple(self.at + a for a in axes), tuple(range(len(axes))))
        if not others:
            return torch.unsqueeze(values, self.batches)
        return torch.flatten(values, self.batches, len(axes) - 1)

    def each(self) -> torch.Tensor:
        """``flat`` with an axis for each of the entries' axes, for gather and scatter."""
        shape = self.flat.shape
        index = self.flat.reshape([*shape, *(1 for _ in self.rest)])
        return index.expand([*shape, *self.rest])


def address(x: torch.Tensor, indices: Sequence[torch.Tensor | None]) -> Addressed:
    """Turn the index tensors of ``x[indices]`` (None for a whole axis) into one flat index."""
    given = [(axis, _integers(t)) for axis, t in enumerate(_positions(indices)) if t is not None]
    axes = [axis for axis, _ in given]
    shape = torch.broadcast_shapes(*(t.shape for _, t in given))
    homes = {axis: _batch_home(t, x.shape[axis], shape) for axis, t in given}
    batch_axes = [axis for axis in axes if homes[axis] is not None]
    wide_axes = [axis for axis in axes if homes[axis] is None]
    rest = [axis for axis in range(x.ndim) if axis not in axes]
    wide = tuple(event_size(x.shape[axis]) for axis in wide_axes)
    flat = torch.zeros((), dtype=torch.int64, device=x.device)
    stride = 1
    for axis, n in zip(reversed(wide_axes), reversed(wide), strict=True):
        index = dict(given)[axis]
        index = torch.where(index < 0, index + n, index)
        flat = index if stride == 1 else flat + index * stride
        stride *= n
    front = [int(homes[axis]) for axis in batch_axes]  # type: ignore[arg-type]
    others = [i for i in range(len(shape)) if i not in front]
    count = math.prod(shape[i] for i in others)
    if batch_axes:
        flat = torch.permute(flat.expand(shape), [*front, *others])
        flat = flat.reshape([*(shape[i] for i in front), count])
    else:
        flat = flat.expand(shape).reshape(-1)
    adjacent = axes == list(range(axes[0], axes[0] + len(axes)))
    return Addressed(
        order=(*batch_axes, *wide_axes, *rest),
        batches=len(batch_axes),
        wide=wide,
        rest=tuple(x.shape[axis] for axis in rest),
        flat=flat,
        shape=tuple(shape),
        homes=tuple(front),
        at=axes[0] if adjacent else 0,
    )


def _positions(indices: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Masks as the positions at which they are true, an index for each of their axes."""
    found: list[torch.Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype in (torch.bool, torch.uint8):
            found += torch.nonzero(index).unbind(1)
        else:
            found.append(index)
    return found


def _integers(index: torch.Tensor) -> torch.Tensor:
    return index if index.dtype == torch.int64 else index.to(torch.int64)


def _batch_home(index: torch.Tensor, n: Any, shape: Sequence[Any]) -> int | None:
    """The axis of the indices along which ``index`` counts the samples (``arange(B)``), or None:
    there ``x[arange(B), k]`` reads for each sample its own entry."""
    if isinstance(n, int):
        return None
    axes = [i for i, size in enumerate(index.shape) if not isinstance(size, int) and size == n]
    if len(axes) != 1 or not _torch.is_counting(index):
        return None
    return axes[0] + len(shape) - index.ndim


@composite(aten.index.Tensor)
def index(self: torch.Tensor, indices: Sequence[torch.Tensor | None]) -> torch.Tensor:
    where = address(self, indices)
    if any(n == 0 for n in where.shape if isinstance(n, int)):
        sizes = [*where.rest[: where.at], *where.shape, *where.rest[where.at :]]
        return torch.zeros(sizes, dtype=self.dtype, device=self.device)
    entries = where.flatten(self)
    if where.batches:
        read = torch.gather(entries, where.batches, where.each())
        return where.outward(read)
    return where.outward(torch.index_select(entries, 0, where.flat))
