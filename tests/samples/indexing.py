"""Uses of indexing: the same index for every sample, and an index that depends on the sample."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from fxhess.testing import Sample

BOX = (3, 4)
CUBE = (2, 3, 4)

INDEX = torch.tensor([2, 0, 2])
NEGATIVE = torch.tensor([-1, 1, -3])
GRID = torch.tensor([[0, 2], [1, 1]])
TABLE = torch.linspace(-1.0, 2.0, 20, dtype=torch.float64).reshape(4, 5)
CUBE_TABLE = torch.linspace(-1.0, 2.0, 24, dtype=torch.float64).reshape(4, 3, 2)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(x.shape[0])


def _ties(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 2, shape, generator=generator).double()


CONSTANT = [
    Sample("index_select", lambda x: x.index_select(1, INDEX)),
    Sample("index_select, inner", lambda x: x.index_select(1, INDEX).sin(), CUBE[1:]),
    Sample("index_select, negative", lambda x: x.index_select(-2, INDEX[:1]), CUBE),
    Sample("index_select of one", lambda x: x.index_select(1, torch.tensor(2))),
    Sample("index", lambda x: x[:, INDEX]),
    Sample("index by a list", lambda x: x[:, [1, 3, 1]]),
    Sample("index, negative", lambda x: x[:, NEGATIVE]),
    Sample("index by a scalar tensor", lambda x: x[:, torch.tensor(2)], BOX),
    Sample("index by a grid", lambda x: x[:, GRID], BOX),
    Sample("index of two axes", lambda x: x[:, INDEX, NEGATIVE], BOX),
    Sample("index of two axes, broadcast", lambda x: x[:, GRID, INDEX[:2]], CUBE[1:]),
    Sample("index of two axes apart", lambda x: x[:, INDEX[1:2], :, INDEX].movedim(0, 1), CUBE),
    Sample("index of an inner axis", lambda x: x[:, :, INDEX], CUBE),
    Sample("index with slices", lambda x: x[:, 1:, INDEX, ::2], CUBE),
    Sample("index with a new axis", lambda x: x[:, None, INDEX], BOX),
    Sample("index with an ellipsis", lambda x: x[..., INDEX], CUBE),
    Sample("index by int32", lambda x: x[:, INDEX.int()]),
    Sample("upper triangle", lambda x: _upper(x[:, :, None] * x[:, None])),
    Sample("take_along_dim, constant", lambda x: torch.take_along_dim(x, INDEX[None], 1)),
    Sample("gather", lambda x: x.gather(1, INDEX.expand(x.shape[0], -1))),
    Sample(
        "gather, short and constant", lambda x: x.gather(2, GRID[:1].expand(x.shape[0], 2, 2)), BOX
    ),
    Sample("repeat_interleave", lambda x: x.repeat_interleave(INDEX + 1, 1, output_size=7), BOX),
]


def _upper(x: torch.Tensor) -> torch.Tensor:
    rows, columns = torch.triu_indices(4, 4)
    return x[:, rows, columns]


PER_SAMPLE = [
    Sample("gather at argmax", lambda x: x.gather(1, x.argmax(1, keepdim=True))),
    Sample("gather nothing", lambda x: torch.cat([x, x.gather(1, x.argsort(1)[:, :0])], 1)),
    Sample("gather in order", lambda x: x.gather(1, x.argsort(1))),
    Sample("gather, inner axis", lambda x: x.gather(1, x.argsort(1)[:, :2]), BOX),
    Sample("gather, short", lambda x: x.gather(1, x.argsort(1)[:, :2, :3]), BOX),
    Sample("gather, repeated", lambda x: x.gather(1, x.argmin(1, keepdim=True).expand(-1, 3))),
    Sample("take_along_dim", lambda x: torch.take_along_dim(x, x.argmax(1, keepdim=True), 1), BOX),
    Sample("index by sample", lambda x: x[_rows(x), x.argmax(1)]),
    Sample("index by sample, rest", lambda x: x[_rows(x), x[:, :, 0].argmax(1)], BOX),
    Sample("index by sample, two", lambda x: x[_rows(x)[:, None], x.argsort(1)[:, :2]]),
    Sample("index by sample, slices", lambda x: x[_rows(x), :, x[:, 0].argmax(-1)], BOX),
    Sample("index by sample, both", lambda x: x[_rows(x), x[:, :, 0].argmax(1), 1], BOX),
    Sample("index by sample and grid", lambda x: x[_rows(x)[:, None, None], GRID], BOX),
    Sample("table at argmax", lambda x: TABLE[x.argmax(1)][:, :4] * x),
    Sample("table at two", lambda x: TABLE[x.argmax(1), x.argmin(1)][:, None] * x),
    Sample("table at all", lambda x: CUBE_TABLE[x.argsort(1)].sum((2, 3)) * x),
    Sample("table, inner axis", lambda x: CUBE_TABLE[:, x.argmax(1) % 3].sum((0, 2))[:, None] * x),
    Sample("table, index_select", lambda x: TABLE.index_select(0, x.argmax(1))[:, 1:] * x),
    Sample("embedding at argmax", lambda x: F.embedding(x.argmax(1), TABLE)[:, :4] * x),
    Sample("embedding of each", lambda x: F.embedding(x.argsort(-1), TABLE)[..., 0] * x, BOX),
    Sample("embedding at constants", lambda x: F.embedding(INDEX, TABLE).sum(0)[:4] * x),
    Sample("one_hot", lambda x: F.one_hot(x.argmax(1), 4) * x),
    Sample("one_hot in a product", lambda x: (F.one_hot(x.argmax(-1), 4) + 1) * x, BOX),
    Sample("bucketize", lambda x: TABLE[0][torch.bucketize(x, TABLE[0, :4])] * x),
    Sample("searchsorted", lambda x: TABLE[0][torch.searchsorted(TABLE[0, :4], x)] * x),
]

ORDER = [
    Sample("sort", lambda x: x.sort(1)[0]),
    Sample("sort, descending, inner", lambda x: x.sort(1, descending=True)[0], BOX),
    Sample("sort, stable", lambda x: x.sort(dim=-1, stable=True)[0], BOX),
    Sample("sort and its order", lambda x: x.sort(1)[0] * x.sort(1)[1]),
    Sample("msort", lambda x: torch.msort(x.movedim(1, 0)).movedim(0, 1), BOX),
    Sample("topk", lambda x: x.topk(2, 1)[0]),
    Sample("topk, smallest, inner", lambda x: x.topk(2, 1, largest=False)[0], BOX),
    Sample("kthvalue", lambda x: x.kthvalue(2, 1)[0]),
    Sample("kthvalue, keepdim", lambda x: x.kthvalue(2, 1, keepdim=True)[0], BOX),
    Sample("median", lambda x: x.median(1)[0], (5,)),
    Sample("median, even, keepdim", lambda x: x.median(-1, keepdim=True)[0], BOX),
    Sample("nanmedian", lambda x: x.nanmedian(1)[0], BOX),
    Sample("mode", lambda x: x.mode(1)[0]),
    Sample("max", lambda x: x.max(1)[0]),
    Sample("max, inner axis", lambda x: x.max(1)[0], CUBE),
    Sample("max, keepdim", lambda x: x - x.max(-1, keepdim=True)[0], BOX),
    Sample("max, ties", lambda x: (x * x).max(1)[0], (4,), make=_ties, twice=False),
    Sample("min", lambda x: x.min(-1)[0], BOX),
    Sample("min and its place", lambda x: x.min(-1)[0] * x.min(-1)[1]),
    Sample("cummax", lambda x: x.cummax(1)[0]),
    Sample("cummax, inner", lambda x: x.cummax(1)[0], BOX),
    Sample("cummin", lambda x: x.cummin(-1)[0], BOX),
    Sample("quantile", lambda x: x.quantile(0.3, 1)),
]

UNBATCHED = [
    Sample("median of all", torch.median, BOX, batch=None),
    Sample("nanmedian of all", torch.nanmedian, BOX, batch=None),
    Sample("take", lambda x: x.take(GRID), BOX, batch=None),
    Sample("index", lambda x: x[INDEX, x.argmax(1)], BOX, batch=None),
    Sample("table", lambda x: TABLE[x.argsort(1)][..., 0] * x, BOX, batch=None),
    Sample("embedding of a value", lambda x: F.embedding(GRID, x), BOX, batch=None),
    Sample("gather of 0-d", lambda x: x.sum().gather(0, torch.tensor(0)), batch=None),
    Sample("index_select of 0-d", lambda x: x.sum().index_select(0, torch.tensor([0])), batch=None),
    Sample("order of 0-d", lambda x: x.sum().max(0)[0] * x.sum().sort()[0], batch=None),
]

SAMPLES = [
    *CONSTANT,
    *PER_SAMPLE,
    *ORDER,
    *[replace(s, name=f"{s.name}, unbatched") for s in UNBATCHED],
]
