"""Uses of products: every one with an operand that depends on x once, and twice."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from fxhess.testing import Sample

BOX = (3, 4)
SQUARE = (3, 3)


def _constant(*shape: int) -> torch.Tensor:
    return torch.sin(torch.arange(1, 1 + math.prod(shape), dtype=torch.float64) * 1.7).reshape(
        shape
    )


ROW = _constant(4)
ROW_3 = _constant(3)
MATRIX = _constant(4, 3)
WIDE = _constant(3, 4)
BLOCKS = _constant(2, 4, 3)
FORM = _constant(3, 4, 4)


def _distances(x: torch.Tensor, y: torch.Tensor, p: float = 2.0) -> torch.Tensor:
    return torch.linalg.vector_norm(x.unsqueeze(-2) - y.unsqueeze(-3), p, -1)


def _safe_distances(x: torch.Tensor) -> torch.Tensor:
    """Zero, with zero derivatives, from each point to itself."""
    square = ((x.unsqueeze(-2) - x.unsqueeze(-3)) ** 2).sum(-1)
    return torch.where(square == 0, 0.0, torch.where(square == 0, 1.0, square).sqrt())


ELEMENTS = [
    Sample("mul", lambda x: x * x.sin()),
    Sample("square", lambda x: x * x),
    Sample("mul by a number", lambda x: -2.5 * x),
    Sample("mul by a constant", lambda x: x * ROW),
    Sample("mul by a constant of higher rank", lambda x: x[:, None] * WIDE),
    Sample("mul, broadcast", lambda x: x[:, :, None] * x[:, None].sin()),
    Sample("mul, broadcast by size 1", lambda x: x * x[:, :1] * x[..., -1:], BOX),
    Sample("mul by the size", lambda x: x * x.shape[1]),
    Sample("mul by a scalar of the sample", lambda x: x * x.sum(1, keepdim=True)),
    Sample("mul of three", lambda x: x * x.sin() * x.cos()),
]

# Their derivatives have all digits of the result, not those of the integers' own quotients.
COUNT = torch.tensor([3, 7, 11, 13])
COUNTS = [
    Sample("div by integers", lambda x: x.sin() / COUNT),
    Sample("div by a count", lambda x: x.sin().sum(-1) / (x > -10).sum(-1) / COUNT[:1]),
    Sample("div of integers", lambda x: COUNT / (2 + x.sin())),
    Sample("div by floats of fewer bits", lambda x: x.sin() / (COUNT / 3).float()),
    Sample("power of integers", lambda x: COUNT ** x.sin()),
    Sample("atan2 of integers", lambda x: torch.atan2(x.sin(), COUNT)),
]

MATRICES = [
    Sample("mm", lambda x: x @ MATRIX),
    Sample("mm of higher rank", lambda x: x @ MATRIX, BOX),
    Sample("constant on the left", lambda x: _constant(2, 3) @ x, BOX),
    Sample("mv", lambda x: x @ ROW),
    Sample("mv of higher rank", lambda x: x @ ROW, BOX),
    Sample("vector on the left", lambda x: ROW_3 @ x, BOX),
    Sample("bmm", lambda x: torch.bmm(x, x.mT.sin()), BOX),
    Sample("gram", lambda x: x @ x.mT, BOX),
    Sample("matmul, broadcast", lambda x: x[:, None] @ BLOCKS, BOX),
    Sample("matmul, broadcast by the sample", lambda x: x.sum(1, keepdim=True) @ x.mT, BOX),
    Sample("matmul of rank 4", lambda x: x @ x.mT, (2, 3, 2)),
    Sample("matrix power", lambda x: torch.linalg.matrix_power(x, 3), SQUARE),
    Sample("multi_dot", lambda x: torch.linalg.multi_dot([x, MATRIX, WIDE, ROW])),
    Sample("linear", lambda x: F.linear(x, WIDE, ROW_3)),
    Sample("linear of higher rank", lambda x: F.linear(x, WIDE, ROW_3), BOX),
    Sample("linear without bias", lambda x: F.linear(x, WIDE), BOX),
    Sample("addmm", lambda x: torch.addmm(ROW_3, x, MATRIX, beta=0.5, alpha=2.0)),
    Sample("addmm to a value", lambda x: torch.addmm(x[:, :3].sin(), x, MATRIX)),
    Sample("addmm, beta 0", lambda x: torch.addmm(ROW_3 * torch.nan, x, MATRIX, beta=0)),
    Sample("addmv", lambda x: torch.addmv(x[:, 0].sin(), x, ROW, beta=0.5, alpha=2.0)),
    Sample("addr", lambda x: torch.addr(torch.zeros(1, 4).double(), x[:, 0].sin(), ROW)),
    Sample(
        "baddbmm", lambda x: torch.baddbmm(x[:, :1].sin(), x, x.mT @ WIDE, beta=0.3, alpha=2.0), BOX
    ),
    Sample("baddbmm, beta 0", lambda x: torch.baddbmm(x[:, :, :3], x, x.mT, beta=0), BOX),
    Sample(
        "addbmm over an event axis",
        lambda x: torch.addbmm(ROW_3, x.movedim(1, 0), _constant(3, 4, 3), beta=0.5, alpha=2.0),
        BOX,
    ),
]

EQUATIONS = [
    Sample("quadratic form", lambda x: torch.einsum("bi,ij,bj->b", x, _constant(4, 4), x)),
    Sample("einsum, sum", lambda x: torch.einsum("bij->bj", x), BOX),
    Sample("einsum, ellipsis", lambda x: torch.einsum("...i,ij->...j", x, MATRIX), BOX),
    Sample("einsum, outer", lambda x: torch.einsum("bi,bj->bij", x, x.sin())),
    Sample("einsum, trace", lambda x: torch.einsum("bii->b", x), SQUARE),
    Sample("einsum, attention", lambda x: torch.einsum("bik,bjk->bij", x, x.cos()), BOX),
    Sample(
        "einsum, three", lambda x: torch.einsum("bi,bj,ijk->bk", x, x.sin(), _constant(4, 4, 3))
    ),
    Sample("tensordot", lambda x: torch.tensordot(x, MATRIX, dims=([1], [0]))),
    Sample("tensordot of two axes", lambda x: torch.tensordot(x, _constant(3, 4, 2), dims=2), BOX),
    Sample("inner", lambda x: torch.inner(x, WIDE)),
    Sample("vecdot", lambda x: torch.linalg.vecdot(x, x.sin())),
    Sample("bilinear", lambda x: F.bilinear(x, x.sin(), FORM, ROW_3)),
    Sample(
        "bilinear with a constant",
        lambda x: F.bilinear(x, WIDE.expand(x.shape[0], 3, 4), FORM),
        BOX,
    ),
    Sample("bilinear of higher rank", lambda x: F.bilinear(x, x.cos(), FORM), BOX),
    Sample("kron", lambda x: torch.kron(x, ROW_3[None])),
    Sample("kron of matrices", lambda x: torch.kron(x, torch.ones(1, 2, 2).double()), SQUARE),
    Sample("cross", lambda x: torch.cross(x[:, :3], x[:, 1:].sin(), dim=1)),
    Sample("cross, last", lambda x: torch.linalg.cross(x[..., :3], ROW_3[None, None]), BOX),
    Sample("cross, inner axis", lambda x: torch.linalg.cross(x, x.exp(), dim=1), BOX),
]

DISTANCES = [
    Sample(
        "cdist",
        lambda x: torch.cdist(x, x.sin() + 1),
        BOX,
        reference=lambda x: _distances(x, x.sin() + 1),
    ),
    *[
        Sample(
            f"cdist, p = {p}",
            lambda x, p=p: torch.cdist(x, WIDE + 1, p=p),  # type: ignore[misc]
            BOX,
            reference=lambda x, p=p: _distances(x, WIDE + 1, p),  # type: ignore[misc]
        )
        for p in (1.0, 3.0, torch.inf)
    ],
    Sample(
        "cdist to itself",
        lambda x: torch.cdist(x, x),
        BOX,
        reference=_safe_distances,
    ),
    Sample(
        "cdist, by matrix products",
        lambda x: torch.cdist(x, _constant(30, 4), compute_mode="use_mm_for_euclid_dist"),
        (2, 4),
        reference=lambda x: _distances(x, _constant(30, 4)),
    ),
    Sample("cosine_similarity", lambda x: F.cosine_similarity(x, x.sin() + ROW, dim=1)),
    Sample("cosine_similarity, inner", lambda x: F.cosine_similarity(x, x.exp(), dim=1), BOX),
    Sample("cosine_similarity, broadcast", lambda x: F.cosine_similarity(x, ROW, dim=-1), BOX),
    Sample("pairwise_distance", lambda x: F.pairwise_distance(x, x.sin() + ROW)),
    Sample("pairwise_distance, p = 1", lambda x: F.pairwise_distance(x, ROW, p=1, keepdim=True)),
    Sample("pairwise_distance, p = 3", lambda x: F.pairwise_distance(x, WIDE, p=3), BOX),
]

UNBATCHED = [
    Sample("dot", lambda x: torch.dot(x, x.sin()), batch=None),
    Sample("vdot", lambda x: torch.vdot(x, ROW), batch=None),
    Sample("outer", lambda x: torch.outer(x, x.exp()), batch=None),
    Sample("ger", lambda x: torch.ger(x, ROW_3), batch=None),
    Sample("mv of one", lambda x: torch.mv(x, x[0].sin()), BOX, batch=None),
    Sample("addr of one", lambda x: torch.addr(x, x[:, 0].sin(), x[0], alpha=0.5), BOX, batch=None),
    Sample("kron of vectors", lambda x: torch.kron(x, x.cos()), batch=None),
    Sample(
        "pdist",
        F.pdist,
        BOX,
        batch=None,
        reference=lambda x: _safe_distances(x)[torch.triu(torch.ones(3, 3), 1).bool()],
    ),
]

REPEATED = [
    Sample("linear, not contiguous", lambda x: F.linear(x.sin().mT, WIDE), (4, 3)),
    Sample(
        "bmm of a repeated matrix",
        lambda x: torch.bmm(WIDE.expand(x.shape[0], 3, 4), x.sin()),
        (4, 2),
    ),
]

SAMPLES = [*UNBATCHED, *ELEMENTS, *COUNTS, *MATRICES, *EQUATIONS, *DISTANCES, *REPEATED]
