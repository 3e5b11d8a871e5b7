"""Axes: renaming, permuting and broadcasting them are equations; cutting, joining, turning and
padding along them are linear; the rest is composed of these."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fxhess.errors import SampleMixingError, SampleStructureError
from fxhess.kinds import Along, Call, Equation, Linear, Reshape, Trailing
from fxhess.registry import Rule, aten, composite, linear, multilinear, register_rule


def event_size(n: Any) -> int:
    """The size of an axis that an operation works along, at capture, where batch axes are
    symbolic."""
    if not isinstance(n, int):
        raise SampleMixingError(
            "samples of the batch see each other: this operation works along the batch axis",
            hint="compute each sample on its own, or name more trailing axes as one sample with"
            " event_ndim=",
        )
    return n


# --- views ----------------------------------------------------------------------------------

for op in (aten.view.default, aten._unsafe_view.default):
    register_rule(Rule(op, Reshape(), Linear(pull=lambda g, c: g)))


def _permuted(rank: int, order: Sequence[int]) -> Equation:
    return Equation((tuple(range(rank)),), tuple(d % rank for d in order))


def _transposed(a: Mapping[str, Any]) -> Equation:
    rank = a["self"].ndim
    order = list(range(rank))
    if rank:
        i, j = a["dim0"], a["dim1"]
        order[i], order[j] = order[j], order[i]
    return _permuted(rank, order)


multilinear(aten.permute.default, lambda a: _permuted(a["self"].ndim, a["dims"]))
multilinear(aten.transpose.int, _transposed)
multilinear(aten.t.default, lambda a: _permuted(a["self"].ndim, range(a["self"].ndim)[::-1]))


def _unsqueezed(a: Mapping[str, Any]) -> Equation:
    rank = a["self"].ndim
    at = a["dim"] % (rank + 1)
    axes = tuple(range(rank))
    return Equation((axes,), (*axes[:at], None, *axes[at:]))


def _squeezed(a: Mapping[str, Any]) -> Equation:
    shape = a["self"].shape
    rank = len(shape)
    dims = a.get("dim")
    given = range(rank) if dims is None else dims if isinstance(dims, (list, tuple)) else [dims]
    gone = {d % rank for d in given if rank and shape[d] == 1}
    return Equation(
        (tuple(None if i in gone else i for i in range(rank)),),
        tuple(i for i in range(rank) if i not in gone),
    )


multilinear(aten.unsqueeze.default, _unsqueezed)
multilinear(aten.squeeze.default, _squeezed)
multilinear(aten.squeeze.dim, _squeezed)
multilinear(aten.squeeze.dims, _squeezed)


def _expanded(a: Mapping[str, Any]) -> Equation:
    shape, size = a["self"].shape, a["size"]
    new = len(size) - len(shape)
    labels = tuple(
        None if s == 1 and not (isinstance(size[new + i], int) and size[new + i] in (1, -1)) else i
        for i, s in enumerate(shape)
    )
    output = [("new", i) for i in range(new)]
    output += [("wide", i) if a is None else a for i, a in enumerate(labels)]  # type: ignore[misc]
    return Equation((labels,), tuple(output))


multilinear(aten.expand.default, _expanded)


def _identity(a: Mapping[str, Any]) -> Equation:
    axes = tuple(range(a["self"].ndim))
    return Equation((axes,), axes)


for op in (aten.clone.default, aten.alias.default, aten.lift_fresh_copy.default):
    multilinear(op, _identity)


@composite(aten.repeat.default)
def repeat(self: torch.Tensor, repeats: Sequence[int]) -> torch.Tensor:
    new = len(repeats) - self.ndim
    shape = [1] * new + list(self.shape)
    y = self
    for _ in range(new):
        y = torch.unsqueeze(y, 0)
    for axis, times in enumerate(repeats):
        if times != 1:
            wide = torch.unsqueeze(y, axis)
            wide = wide.expand([times if i == axis else -1 for i in range(wide.ndim)])
            shape[axis] = times * shape[axis]
            y = wide.reshape(shape)
    return y


# --- parts ----------------------------------------------------------------------------------


def whole(n: Any, start: int | None, end: int | None, step: int) -> bool:
    """Whether a slice takes all of an axis of size n, which may be symbolic."""
    if start not in (None, 0) or step != 1:
        return False
    return end is None or (isinstance(end, int) and end >= sys.maxsize) or bool(end == n)


def _whole_slice(
    self: torch.Tensor,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Any:
    """A slice of a whole axis is the tensor itself, also along the batch."""
    return aten.alias.default(self) if whole(self.shape[dim], start, end, step) else NotImplemented


def along(dim: int, before: int, after: int) -> list[int]:
    """The ``pad`` argument that pads (or crops, where negative) axis ``dim`` < 0 only."""
    return [0, 0] * (-dim - 1) + [before, after]


def spaced(g: Any, dim: int, start: int, step: int, m: int, n: int) -> Any:
    """Zeros of n along ``dim`` with g (m long there) in every step-th place from ``start``."""
    if step > 1:
        g = torch.constant_pad_nd(torch.unsqueeze(g, dim), along(dim, 0, step - 1))
        g = torch.flatten(g, dim - 1, dim)
    start = min(start, n)
    return torch.constant_pad_nd(g, along(dim, start, n - start - m * step))


def _slice_pull(g: Any, c: Call) -> Any:
    dim = c.args[1]
    n = c.operands[0].size(dim)
    start, _, step = slice(*c.args[2:5]).indices(n)
    return spaced(g, dim, start, step, c.y.size(dim), n)


linear(aten.slice.Tensor, Along("dim"), pull=_slice_pull, moves=True, rewrite=_whole_slice)


@composite(aten.select.int)
def select(self: torch.Tensor, dim: int, index: int) -> torch.Tensor:
    start = index + self.shape[dim] if index < 0 else index
    return torch.squeeze(aten.slice.Tensor(self, dim, start, start + 1), dim)


@composite(aten.split_with_sizes.default)
def split_with_sizes(
    self: torch.Tensor, split_sizes: Sequence[int], dim: int = 0
) -> list[torch.Tensor]:
    parts, start = [], 0
    for n in split_sizes:
        parts.append(aten.slice.Tensor(self, dim, start, start + n))
        start += n
    return parts


@composite(aten.split.Tensor)
def split(self: torch.Tensor, split_size: int, dim: int = 0) -> list[torch.Tensor]:
    n = event_size(self.shape[dim])
    starts = range(0, max(n, 1), max(split_size, 1))
    return [aten.slice.Tensor(self, dim, i, min(i + split_size, n)) for i in starts]


@composite(aten.unbind.int)
def unbind(self: torch.Tensor, dim: int = 0) -> list[torch.Tensor]:
    n = self.shape[dim]
    if not isinstance(n, int):
        raise SampleStructureError("the model runs over the samples of the batch in Python")
    return [torch.select(self, dim, i) for i in range(n)]


@composite(aten.unfold.default)
def unfold(self: torch.Tensor, dimension: int, size: int, step: int) -> torch.Tensor:
    dim = dimension % self.ndim if self.ndim else 0
    if not self.ndim:
        self = torch.unsqueeze(self, 0)
    if size == step == 1:
        return torch.unsqueeze(self, -1)
    count = (event_size(self.shape[dim]) - size) // step + 1
    if step == size:  # windows that do not overlap are a view
        windows = torch.narrow(self, dim, 0, count * size)
    else:
        first = torch.arange(0, count * step, step, device=self.device)
        within = torch.arange(size, device=self.device)
        windows = torch.index_select(self, dim, (first[:, None] + within).reshape(-1))
    return torch.unflatten(windows, dim, (count, size)).movedim(dim + 1, -1)


# --- joining --------------------------------------------------------------------------------


def _cat_pull(g: Any, c: Call) -> tuple[Any, ...]:
    dim, start, parts = c.args[1], 0, []
    for operand in c.args[0]:
        n = operand.size(dim)
        parts.append(torch.narrow(g, dim, start, n))
        start += n
    return tuple(parts)


def _cat_rewrite(tensors: Sequence[torch.Tensor], dim: int = 0) -> Any:
    """An empty tensor of shape [0] joins with anything, for historical reasons."""
    kept = [t for t in tensors if t.ndim != 1 or t.shape[0] != 0]
    if 0 < len(kept) < len(tensors):
        return torch.cat(kept, dim)
    return NotImplemented if len(tensors) > 1 else aten.alias.default(tensors[0])


linear(
    aten.cat.default,
    Along("dim"),
    pull=_cat_pull,
    push=lambda c, *t: torch.cat(list(t), c.args[1]),
    moves=True,
    differentiable=("tensors",),
    rewrite=_cat_rewrite,
)


@composite(aten.stack.default)
def stack(tensors: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    return torch.cat([torch.unsqueeze(t, dim) for t in tensors], dim)


@composite(aten.block_diag.default)
def block_diag(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    blocks = [torch.atleast_2d(t) for t in tensors]
    total, start, rows = sum(event_size(t.shape[1]) for t in blocks), 0, []
    for t in blocks:
        n = event_size(t.shape[1])
        rows.append(torch.constant_pad_nd(t, [start, total - start - n]))
        start += n
    return torch.cat(rows, 0)


# --- turning --------------------------------------------------------------------------------

linear(aten.flip.default, Along("dims"), pull=lambda g, c: torch.flip(g, c.args[1]), moves=True)


def _roll_rewrite(self: torch.Tensor, shifts: Sequence[int], dims: Sequence[int] = ()) -> Any:
    if not dims:
        return torch.roll(self.reshape(-1), shifts, [0]).reshape(self.shape)
    moved = [(s, d) for s, d in zip(shifts, dims, strict=True) if s]
    if len(moved) == len(dims):
        return NotImplemented
    return torch.roll(self, *map(list, zip(*moved, strict=True))) if moved else self.clone()


linear(
    aten.roll.default,
    Along("dims"),
    pull=lambda g, c: torch.roll(g, [-s for s in c.args[1]], c.args[2]),
    moves=True,
    rewrite=_roll_rewrite,
)


@composite(aten.rot90.default)
def rot90(self: torch.Tensor, k: int = 1, dims: Sequence[int] = (0, 1)) -> torch.Tensor:
    i, j = dims
    match k % 4:
        case 1:
            return torch.flip(self, [j]).transpose(i, j)
        case 2:
            return torch.flip(self, [i, j])
        case 3:
            return torch.flip(self, [i]).transpose(i, j)
    return aten.alias.default(self)


# --- diagonals and triangles ----------------------------------------------------------------


def diagonal_places(m: int, n: int, offset: int) -> tuple[int, int, int]:
    """Where a diagonal of an m by n matrix lies in the flattened matrix: (start, end, step)."""
    start = offset if offset >= 0 else -offset * n
    length = max(min(m, n - offset) if offset >= 0 else min(m + offset, n), 0)
    return start, start + max((length - 1) * (n + 1) + 1, 0) if length else start, n + 1


@composite(aten.diagonal.default)
def diagonal(self: torch.Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> torch.Tensor:
    y = torch.movedim(self, (dim1, dim2), (-2, -1))
    start, end, step = diagonal_places(event_size(y.shape[-2]), event_size(y.shape[-1]), offset)
    return aten.slice.Tensor(torch.flatten(y, -2, -1), -1, start, end, step)


@composite(aten.diag_embed.default)
def diag_embed(self: torch.Tensor, offset: int = 0, dim1: int = -2, dim2: int = -1) -> torch.Tensor:
    m = event_size(self.shape[-1])
    n = m + abs(offset)
    y = torch.flatten(torch.constant_pad_nd(torch.unsqueeze(self, -1), [0, n]), -2, -1)
    start, _, step = diagonal_places(n, n, offset)
    y = torch.constant_pad_nd(y, [start, n * n - start - m * step])
    return torch.movedim(torch.unflatten(y, -1, (n, n)), (-2, -1), (dim1, dim2))


@composite(aten.trace.default)
def trace(self: torch.Tensor) -> torch.Tensor:
    return torch.sum(torch.diagonal(self))


linear(aten.tril.default, Trailing(2), pull=lambda g, c: torch.tril(g, c.args[1]))
linear(aten.triu.default, Trailing(2), pull=lambda g, c: torch.triu(g, c.args[1]))

# --- padding --------------------------------------------------------------------------------


def _pad_rewrite(self: torch.Tensor, pad: Sequence[int], value: float = 0) -> Any:
    """Cropping is slicing; axes behind the padded ones, which may hold the batch, are moved out
    of the way."""
    for i, n in enumerate(pad):
        if n < 0:
            dim, rest = -1 - i // 2, [*pad[:i], 0, *pad[i + 1 :]]
            start, end = (0, event_size(self.shape[dim]) + n) if i % 2 else (-n, sys.maxsize)
            return torch.constant_pad_nd(aten.slice.Tensor(self, dim, start, end), rest, value)
    touched = [i for i in range(len(pad) // 2) if any(pad[2 * i : 2 * i + 2])]
    if not touched:
        return aten.alias.default(self)
    skip, end = touched[0], touched[-1] + 1
    if (skip, end) == (0, len(pad) // 2):
        return NotImplemented
    last, first = tuple(range(-skip, 0)), tuple(range(skip))
    padded = torch.constant_pad_nd(self.movedim(last, first), pad[2 * skip : 2 * end], value)
    return padded.movedim(first, last)


linear(
    aten.constant_pad_nd.default,
    Trailing(lambda a: len(a["pad"]) // 2),
    pull=lambda g, c: torch.constant_pad_nd(g, [-n for n in c.args[1]]),
    push=lambda c, t: torch.constant_pad_nd(t, c.args[1]),
    rewrite=_pad_rewrite,
)


def _padded(
    self: torch.Tensor, padding: Sequence[int], source: Callable[[torch.Tensor, int], torch.Tensor]
) -> torch.Tensor:
    """Pad with entries of the tensor itself: ``source(position, n)`` says which."""
    for i in range(len(padding) // 2):
        before, after = padding[2 * i : 2 * i + 2]
        if before or after:
            n = event_size(self.shape[-1 - i])
            positions = torch.arange(-before, n + after, device=self.device)
            self = torch.index_select(self, -1 - i, source(positions, n))
    return self


@composite(
    aten.reflection_pad1d.default, aten.reflection_pad2d.default, aten.reflection_pad3d.default
)
def reflection_pad(self: torch.Tensor, padding: Sequence[int]) -> torch.Tensor:
    return _padded(self, padding, lambda i, n: (n - 1) - ((n - 1) - i.abs()).abs())


@composite(
    aten.replication_pad1d.default, aten.replication_pad2d.default, aten.replication_pad3d.default
)
def replication_pad(self: torch.Tensor, padding: Sequence[int]) -> torch.Tensor:
    return _padded(self, padding, lambda i, n: i.clamp(0, n - 1))
