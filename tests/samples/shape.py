"""Uses of operations on axes: views, parts, joining, turning, diagonals, padding."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from fxhess.testing import Sample

BOX = (3, 4)
SQUARE = (4, 4)
CUBE = (2, 3, 4)


def _constant(*shape: int) -> torch.Tensor:
    return torch.linspace(-1.0, 2.0, math.prod(shape), dtype=torch.float64).reshape(shape)


ROW = _constant(4)
BOX_CONSTANT = _constant(3, 4)

VIEWS = [
    Sample("view merges", lambda x: x.view(-1, 12), BOX),
    Sample("view splits", lambda x: x.view(-1, 2, 2, 3), (12,)),
    Sample("view resplits", lambda x: x.view(-1, 4, 3), BOX),
    Sample("reshape with the batch", lambda x: (x.reshape(-1, 4) * ROW).reshape(-1, 3, 4), BOX),
    Sample("reshape after transposing", lambda x: x.transpose(1, 2).reshape(-1, 12), BOX),
    Sample("flatten", lambda x: x.flatten(1), CUBE),
    Sample("flatten of the last two", lambda x: x.flatten(-2), CUBE),
    Sample("unflatten", lambda x: x.unflatten(1, (2, 2)), (4,)),
    Sample("permute", lambda x: x.permute(0, 3, 1, 2), CUBE),
    Sample("permute, negative", lambda x: x.permute(-4, -1, -2, -3), CUBE),
    Sample("transpose", lambda x: x.transpose(1, 2), BOX),
    Sample("transpose of the batch", lambda x: x.transpose(0, 2).transpose(-1, 0), BOX),
    Sample("t", lambda x: x.t().t(), (4,)),
    Sample("mT", lambda x: x.mT, BOX),
    Sample("movedim", lambda x: x.movedim(1, -1), CUBE),
    Sample("movedim, two", lambda x: x.movedim((1, 2), (3, 1)), CUBE),
    Sample("swapaxes", lambda x: x.swapaxes(1, 2), BOX),
    Sample("squeeze, dim", lambda x: x[:, None].squeeze(1), (4,)),
    Sample("squeeze, dims", lambda x: x[:, None, :, None].squeeze((1, 3)), (4,)),
    Sample("squeeze of nothing", lambda x: x.squeeze(-1), (4,)),
    Sample("unsqueeze", lambda x: x.unsqueeze(1), (4,)),
    Sample("unsqueeze, negative", lambda x: x.unsqueeze(-1) * ROW, (4,)),
    Sample("expand", lambda x: x[:, None].expand(-1, 3, 4) * BOX_CONSTANT, (4,)),
    Sample("expand, leading", lambda x: (x.expand(2, -1, 4) * x).movedim(1, 0), (4,)),
    Sample("expand_as", lambda x: x[:, :1].expand_as(x), (4,)),
    Sample("broadcast_to", lambda x: x[:, :, None].broadcast_to(x.shape[0], 4, 3), (4,)),
    Sample("broadcast_tensors", lambda x: torch.broadcast_tensors(x[:, None], x[:, :, None])[1]),
    Sample("clone", lambda x: x.clone()),
    Sample("contiguous", lambda x: x.mT.contiguous(), BOX),
    Sample("repeat", lambda x: x.repeat(1, 3)),
    Sample("repeat, new axes", lambda x: x.repeat(2, 1, 3).movedim(1, 0)),
    Sample("repeat, two axes", lambda x: x.repeat(1, 2, 3), (2, 3)),
    Sample("tile", lambda x: x.tile((2,))),
    Sample("repeat_interleave", lambda x: x.repeat_interleave(2, 1), BOX),
    Sample("repeat_interleave, last", lambda x: x.repeat_interleave(3, -1), BOX),
    Sample("as_strided, a view", lambda x: x.as_strided((x.shape[0], 2, 2), (4, 2, 1))),
    Sample("atleast_3d", torch.atleast_3d),
    Sample("view_as", lambda x: x.view_as(x)),
    Sample("meshgrid", lambda x: torch.stack(_meshgrid(x), 1)),
]


def _meshgrid(x: torch.Tensor) -> list[torch.Tensor]:
    return [x[:, :, None].expand(-1, 4, 4), x[:, None].expand(-1, 4, 4)]


PARTS = [
    Sample("slice", lambda x: x[:, 1:3]),
    Sample("slice, negative", lambda x: x[..., -3:-1], BOX),
    Sample("slice, steps of 2", lambda x: x[:, ::2]),
    Sample("slice, steps of 3 from 1", lambda x: x[:, 1::3], (7,)),
    Sample("slice, steps of 2, stop", lambda x: x[:, 1:6:2], (8,)),
    Sample("slice of an inner axis", lambda x: x[:, 1:, ::2], CUBE),
    Sample("slice of everything", lambda x: x[:, :]),
    Sample("slice up to the batch size", lambda x: x[: x.shape[0], 1:]),
    Sample("select", lambda x: x[:, 2], BOX),
    Sample("select, negative", lambda x: x[..., -2], BOX),
    Sample("select, all", lambda x: x[:, 0] * x[:, 1] * x[:, -1], (4,)),
    Sample("narrow", lambda x: x.narrow(1, 1, 2)),
    Sample("split", lambda x: _product(x.split(2, 1)), (4,)),
    Sample("split, uneven", lambda x: x.split(3, -1)[1], BOX),
    Sample("split, sizes", lambda x: x.split([1, 2, 1], 1)[1]),
    Sample("chunk", lambda x: _product(x.chunk(2, -1)), BOX),
    Sample("unbind", lambda x: _product(x.unbind(1)), BOX),
    Sample("unbind, last", lambda x: x.unbind(-1)[2], BOX),
    Sample("tensor_split", lambda x: torch.tensor_split(x, 3, 1)[0]),
    Sample("tensor_split, places", lambda x: torch.tensor_split(x, (1, 3), 1)[1]),
    Sample("hsplit", lambda x: _product(torch.hsplit(x, 2))),
    Sample("unfold", lambda x: x.unfold(1, 2, 1)),
    Sample("unfold, steps", lambda x: x.unfold(1, 3, 2), (7, 2)),
    Sample("unfold, disjoint", lambda x: x.unfold(1, 2, 2), (5,)),
    Sample("unfold, last axis of two", lambda x: x.unfold(-1, 3, 1), BOX),
    Sample("diff", lambda x: x.diff(dim=1)),
    Sample("gradient", lambda x: torch.gradient(x, dim=1)[0]),
    Sample("trapezoid", lambda x: torch.trapezoid(x, dim=1)),
]


def _product(parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    result = parts[0]
    for part in parts[1:]:
        result = result * part
    return result


JOINING = [
    Sample("cat", lambda x: torch.cat([x, x.sin()], 1)),
    Sample("cat, last", lambda x: torch.cat([x, x * x, x.cos()], -1), BOX),
    Sample("cat with a constant", lambda x: torch.cat([x, torch.zeros_like(x), x * x], 1)),
    Sample("cat of unequal structure", lambda x: torch.cat([x, x.sum(1, keepdim=True)], 1)),
    Sample("cat of one", lambda x: torch.cat([x], 1)),
    Sample("cat, inner axis", lambda x: torch.cat([x, x[:, :1].sin()], 1), BOX),
    Sample("stack", lambda x: torch.stack([x, x.sin()], 1)),
    Sample("stack, last", lambda x: torch.stack([x, x * x], -1), BOX),
    Sample("stack, first", lambda x: torch.stack([x, x.sin()]).movedim(0, 1)),
    Sample("hstack", lambda x: torch.hstack([x, x.exp()])),
    Sample("dstack", lambda x: torch.dstack([x, x.exp()])),
    Sample("stack of parts", lambda x: torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin()], 1)),
]

TURNING = [
    Sample("flip", lambda x: x.flip(1)),
    Sample("flip, two", lambda x: x.flip((1, -1)), BOX),
    Sample("fliplr", torch.fliplr),
    Sample("roll", lambda x: x * x.roll(1, 1)),
    Sample("roll, two", lambda x: x.roll((1, -2), (1, 2)), BOX),
    Sample("roll, over the axis' size", lambda x: x.roll(7, -1), BOX),
    *[
        Sample(f"rot90, {k} times", lambda x, k=k: torch.rot90(x, k, (1, 2)), BOX)  # type: ignore[misc]
        for k in (0, 1, 2, 3, -1)
    ],
]

DIAGONALS = [
    *[
        Sample(
            f"diagonal, {offset}",
            lambda x, k=offset: x.diagonal(k, 1, 2),  # type: ignore[misc]
            BOX,
        )
        for offset in (-2, -1, 0, 1, 3)
    ],
    Sample("diagonal, other way round", lambda x: x.diagonal(1, -1, 1), BOX),
    Sample("diagonal of a cube", lambda x: x.diagonal(0, 1, 3), CUBE),
    Sample("diagonal, tall", lambda x: x.diagonal(0, 1, 2), (5, 2)),
    *[
        Sample(f"diag_embed, {k}", lambda x, k=k: torch.diag_embed(x, k))  # type: ignore[misc]
        for k in (-2, 0, 1)
    ],
    Sample("diag_embed, other axes", lambda x: torch.diag_embed(x, 1, 1, 2), BOX),
    Sample("diagonal of diag_embed", lambda x: torch.diag_embed(x.sin()).diagonal(0, -2, -1)),
    Sample("trace of each", lambda x: x.diagonal(0, -2, -1).sum(-1), SQUARE),
    *[
        Sample(f"triangles, {k}", lambda x, k=k: x.tril(k) * x.triu(-k), SQUARE)  # type: ignore[misc]
        for k in (-1, 0, 2)
    ],
    Sample("tril, wide", torch.tril, (2, 3, 4)),
    Sample("triu, wide", lambda x: x.sin().triu(1), BOX),
    Sample("einsum diagonal", lambda x: torch.einsum("bii->bi", x), SQUARE),
]

PADDING = [
    Sample("pad", lambda x: F.pad(x, (1, 2))),
    Sample("pad with a number", lambda x: F.pad(x, (0, 2), value=3.0).sin()),
    Sample("pad, crops", lambda x: F.pad(x, (-1, 2)), BOX),
    Sample("pad, two axes", lambda x: F.pad(x, (1, 0, 2, 1)), BOX),
    Sample("pad, inner axis", lambda x: F.pad(x, (0, 0, 2, 1)), CUBE),
    Sample("pad, the batch not", lambda x: F.pad(x, (1, 1, 0, 0)), (4,)),
    Sample("pad of nothing", lambda x: F.pad(x, (0, 0))),
    *[
        Sample(f"{mode} pad, 1-d", lambda x, m=mode: F.pad(x, (1, 2), mode=m), BOX)  # type: ignore[misc]
        for mode in ("reflect", "replicate", "circular")
    ],
    *[
        Sample(
            f"{mode} pad, 2-d",
            lambda x, m=mode: F.pad(x, (1, 1, 2, 0), mode=m),  # type: ignore[misc]
            (1, 3, 4),
        )
        for mode in ("reflect", "replicate", "circular")
    ],
    *[
        Sample(
            f"{mode} pad, 3-d",
            lambda x, m=mode: F.pad(x, (1, 1, 0, 1, 1, 1), mode=m),  # type: ignore[misc]
            (1, 2, 2, 2),
        )
        for mode in ("reflect", "replicate", "circular")
    ],
    Sample("reflect pad, wide", lambda x: F.pad(x, (3, 3), mode="reflect"), BOX),
]

UNBATCHED = [
    Sample("squeeze", lambda x: x.squeeze(), (1, 4, 1), batch=None),
    Sample("trace", torch.trace, SQUARE, batch=None),
    Sample("trace, wide", torch.trace, BOX, batch=None),
    Sample("diag", lambda x: torch.diag(x.sin(), 1), batch=None),
    Sample("block_diag", lambda x: torch.block_diag(x, x[:1].sin(), x[0]), BOX, batch=None),
    Sample(
        "roll by nothing", lambda x: x.sin().roll((0, 1), (0, 1)) * x.roll(0, 0), BOX, batch=None
    ),
    Sample("roll of everything", lambda x: x.roll(2), BOX, batch=None),
    Sample("flip of everything", lambda x: x.flip((0, 1)), BOX, batch=None),
    Sample("0-d", lambda x: x.reshape(()).unsqueeze(0).squeeze(), (1,), batch=None),
    Sample("0-d unfold", lambda x: x.sum().unfold(0, 1, 1), batch=None),
    Sample("0-d transpose", lambda x: x.sum().t() * x, batch=None),
]

SAMPLES = [*UNBATCHED, *VIEWS, *PARTS, *JOINING, *TURNING, *DIAGONALS, *PADDING]
