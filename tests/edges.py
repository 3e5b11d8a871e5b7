"""What fxhess returns where derivatives are a matter of convention: docs/conventions.md.

``python -m tests.edges --write docs/conventions.md`` writes the table; test_edges.py checks every
row and that the file is what this list gives.  A row states what has to come out, by hand.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

import fxhess
from fxhess import oracle
from tests.conventions import INTRODUCTION, SMOOTH, Z4, Z9, D, Row, one, show, total
from tests.squares import ROOTS

INF, NAN = math.inf, math.nan


def matrix(f: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function of the symmetric part of a 2 by 2 matrix."""

    def function(x: torch.Tensor) -> torch.Tensor:
        m = x.reshape(-1, 2, 2)
        return total(f)((m + m.mT) / 2)

    return function


SUB = "0 is taken: the subgradient that PyTorch documents, for both orders"
LEAK = "what is not chosen does not count; 0·inf there"
PUT = "what is constant has no derivative; inf·0 there"
PRODUCT = "0·inf there"
W3 = torch.tensor([1.0, -2.0, 0.5], dtype=D)
SECOND = torch.tensor([False, True])


def _written(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y[:, 1] = 0.0
    return y.sqrt().sum(1)


def _beside(x: torch.Tensor) -> torch.Tensor:
    """x with an entry -inf behind it."""
    return torch.cat([x, torch.full_like(x[:, :1], -INF)], 1)


def _apart(x: torch.Tensor) -> torch.Tensor:
    """Sum of the distances of each sample's points ``[B, n, d]``."""
    return torch.stack([torch.pdist(points).sum() for points in x])


KINKS = [
    one("`relu` at 0", F.relu, 0.0, 0, 0),
    one("`relu(x)²` at 0", lambda x: F.relu(x) ** 2, 0.0, 0, 0),
    one("`abs` at 0", torch.abs, 0.0, 0, 0),
    one("`x·abs(x)` at 0", lambda x: x * x.abs(), 0.0, 0, 0),
    one("`leaky_relu` at 0", F.leaky_relu, 0.0, 0.01, 0),
    one("`hardtanh` at 1", F.hardtanh, 1.0, 0, 0),
    one("`relu6` at 6", F.relu6, 6.0, 0, 0),
    one("`elu` at 0", F.elu, 0.0, 1, 0),
    one("`softshrink` at 1/2", F.softshrink, 0.5, 0, 0),
    one("`hardswish` at 3", F.hardswish, 3.0, 1, 0),
    one("`hardsigmoid` at 0", F.hardsigmoid, 0.0, 1 / 6, 0, "PyTorch has no second derivative"),
    one("`clamp(0, 1)²` at 1", lambda x: x.clamp(0, 1) ** 2, 1.0, 2, 2),
    one("`x·prelu(x)`, weight 1/4, at 0", lambda x: x * F.prelu(x, torch.tensor([0.25], dtype=D)),
        0.0, 0, 0.5, "PyTorch takes the slope 1/4 in one order and 1 in the other"),
    one("`floor` at 1", torch.floor, 1.0, 0, 0),
    one("`round` at 1/2", torch.round, 0.5, 0, 0),
    one("`trunc` at 1", torch.trunc, 1.0, 0, 0),
    one("`frac` at 1", torch.frac, 1.0, 1, 0),
    one("`sign` at 0", torch.sign, 0.0, 0, 0),
    one("`x·fmod(x, 1)` at 1", lambda x: x * torch.fmod(x, 1.0), 1.0, 1, 2),
    one("`remainder(x, 1)·x` at 1", lambda x: x * torch.remainder(x, 1.0), 1.0, 1, 2),
    one("`huber_loss` at its edge", lambda x: F.huber_loss(x, 0 * x, reduction="none"), 1.0, 1, 0),
    one("`smooth_l1_loss` at its edge", lambda x: F.smooth_l1_loss(x, 0 * x, reduction="none"),
        1.0, 1, 0),
    one("`l1_loss` at 0", lambda x: F.l1_loss(x, 0 * x, reduction="none"), 0.0, 0, 0),
]  # fmt: skip

TIES = [
    Row("`maximum(a, b)²`, a = b: half each",
        lambda x: torch.maximum(x[:, 0], x[:, 1]) ** 2, (1.0, 1.0), (1, 1), (0.5, 0.5, 0.5, 0.5)),
    Row("`amax²`, two equal: half each", lambda x: x.amax(1) ** 2, (1.0, 1.0, 0.0), (1, 1, 0),
        (0.5, 0.5, 0, 0.5, 0.5, 0, 0, 0, 0)),
    Row("`max(dim)²`, two equal: the one whose index is returned", lambda x: x.max(1).values ** 2,
        (1.0, 1.0, 0.0), (2, 0, 0), (2, 0, 0, 0, 0, 0, 0, 0, 0)),
    Row("`median²`, two equal: the index returned", lambda x: x.median(1).values ** 2,
        (1.0, 1.0, 2.0), (0, 2, 0), (0, 0, 0, 0, 2, 0, 0, 0, 0)),
    Row("`mode²`: the index returned", lambda x: x.mode(1).values ** 2, (1.0, 1.0, 2.0),
        (0, 2, 0), (0, 0, 0, 0, 2, 0, 0, 0, 0)),
    Row("`kthvalue(2)²`, two equal: the index returned", lambda x: x.kthvalue(2, 1).values ** 2,
        (1.0, 1.0, 2.0), (2, 0, 0), (2, 0, 0, 0, 0, 0, 0, 0, 0)),
    Row("`cummax²`, two equal: the later one", total(lambda x: x.cummax(1).values ** 2),
        (1.0, 1.0, 2.0), (2, 2, 4), (2, 0, 0, 0, 2, 0, 0, 0, 2)),
    Row("`sort`, two equal, weighted 1, 2, 3 times x", total(lambda x: x.sort(1).values
        * torch.tensor([1.0, 2.0, 3.0], dtype=D) * x), (1.0, 1.0, 0.0), (2, 2, 4),
        (0, 2, 1, 2, 0, 3, 1, 3, 0)),
    Row("`scatter_reduce` `amax`, two equal: half each",
        lambda x: torch.zeros_like(x[:, :1]).scatter_reduce(
            1, torch.zeros_like(x, dtype=torch.int64), x, "amax", include_self=False
        ).square().sum(1), (1.0, 1.0), (1, 1), (0.5, 0.5, 0.5, 0.5)),
]  # fmt: skip

ENDS = [
    one("`sqrt` at 0: infinite", torch.sqrt, 0.0, INF, -INF),
    one("`rsqrt` at 0: infinite", torch.rsqrt, 0.0, -INF, INF),
    one("`log` at 0: infinite", torch.log, 0.0, INF, -INF),
    one("`acos` at 1: infinite", torch.acos, 1.0, -INF, -INF),
    one("`asin` at 1: infinite", torch.asin, 1.0, INF, INF),
    one("`where(x > 0, sqrt(x), x²)` at 0", lambda x: torch.where(x > 0, x.sqrt(), x * x), 0.0,
        0, 2, LEAK),
    one("`where(x > 0, log(clamp(x, 0)), x)` at -1",
        lambda x: torch.where(x > 0, torch.log(x.clamp_min(0)), x), -1.0, 1, 0),
    one("`log(x).masked_fill(x <= 0, 0) + x²` at 0",
        lambda x: torch.log(x).masked_fill(x <= 0, 0) + x * x, 0.0, 0, 2,
        LEAK),
    Row("`log(x)[1:].sum() + x²` at (0, 1)", lambda x: torch.log(x)[:, 1:].sum(1) + (x * x).sum(1),
        (0.0, 1.0), (0, 3), (2, 0, 0, 1), LEAK),
    Row("`sqrt(where(m, x, 0))`, m = (1, 0), at (1, 5)",
        lambda x: torch.where(torch.tensor([True, False]), x, 0.0).sqrt().sum(1), (1.0, 5.0),
        (0.5, 0), (-0.25, 0, 0, 0)),
    one("`sqrt(relu(x))` at -1", lambda x: F.relu(x).sqrt(), -1.0, 0, 0),
    Row("`sqrt(x · m)`, m = (1, 0), at (1, 5)",
        lambda x: (x * torch.tensor([1.0, 0.0], dtype=D)).sqrt().sum(1), (1.0, 5.0), (0.5, 0),
        (-0.25, 0, 0, 0), PUT),
    Row("`rsqrt(masked_fill(x, m, 0))`, m = (0, 1), then filled with 0, at (1, 5)",
        lambda x: x.masked_fill(SECOND, 0.0).rsqrt().masked_fill(SECOND, 0.0).sum(1), (1.0, 5.0),
        (-0.5, 0), (0.75, 0, 0, 0)),
    Row("`y = x.clone(); y[:, 1] = 0; y.sqrt()` at (1, 5)", _written, (1.0, 5.0), (0.5, 0),
        (-0.25, 0, 0, 0)),
    one("`sqrt(clamp(x, 0)) + x²` at -1", lambda x: x.clamp_min(0).sqrt() + x * x, -1.0, -2, 2),
    one("`x · sqrt(0 · x) + x²` at 1", lambda x: x * (0 * x).sqrt() + x * x, 1.0, 2, 2, PUT),
    Row("`atan2` at the origin", lambda x: torch.atan2(x[:, 0], x[:, 1]), (0.0, 0.0), (0, 0), Z4,
        "0 is taken for both orders, as PyTorch does for the first"),
    Row("`hypot` at the origin", lambda x: torch.hypot(x[:, 0], x[:, 1]), (0.0, 0.0), (0, 0),
        Z4, SUB),
    one("`x**0` at 0", lambda x: x**0, 0.0, 0, 0),
    one("`x**p`, p a tensor 0, at 0", lambda x: x ** torch.zeros(1, dtype=D), 0.0, 0, 0, SMOOTH),
    one("`x**1` at 0", lambda x: x**1, 0.0, 1, 0),
    one("`x**2` at 0", lambda x: x**2, 0.0, 0, 2),
    one("`x**3` at 0", lambda x: x**3, 0.0, 0, 0),
    one("`x**7` at 0", lambda x: x**7, 0.0, 0, 0),
    one("`float_power(x, 2)` at 0", lambda x: torch.float_power(x, 2), 0.0, 0, 2),
    one("`x**p`, p a tensor 1, at 0", lambda x: x ** torch.ones(1, dtype=D), 0.0, 1, 0),
    one("`x**p`, p a tensor 2, at 0", lambda x: x ** torch.full((1,), 2.0, dtype=D), 0.0, 0, 2),
    one("`x**1.5` at 0: infinite", lambda x: x**1.5, 0.0, 0, INF),
    one("`x**-1` at 0: infinite", lambda x: x**-1, 0.0, -INF, INF),
    Row("`pow(x, p)` at (0, 2)", lambda x: torch.pow(x[:, 0], x[:, 1]), (0.0, 2.0), (0, 0),
        (2, 0, 0, 0), "where 0^p is 0, its derivatives by p are 0"),
    Row("`pow(x, p)` at (0, 0)", lambda x: torch.pow(x[:, 0], x[:, 1]), (0.0, 0.0), (0, 0), Z4,
        "0 is taken for both orders, as PyTorch does for the first"),
    one("`pow(0, x)` at 1", lambda x: torch.pow(torch.zeros(1, dtype=D), x), 1.0, 0, 0, SMOOTH),
    one("`sinc` at 0", torch.sinc, 0.0, 0, -(math.pi**2) / 3, SMOOTH),
    Row("`xlogy` at (0, 0)", lambda x: torch.xlogy(x[:, 0], x[:, 1]), (0.0, 0.0), (0, 0), Z4,
        "xlogy(0, ·) is 0 by definition, and so are its derivatives"),
    one("`xlogy(x, 2)` at 0", lambda x: torch.xlogy(x, 2.0), 0.0, math.log(2), 0),
    Row("`xlog1py` at (0, -1)", lambda x: torch.special.xlog1py(x[:, 0], x[:, 1]), (0.0, -1.0),
        (0, 0), Z4, "xlog1py(0, ·) is 0 by definition, and so are its derivatives"),
    Row("`logsumexp` of x and -inf", lambda x: torch.logsumexp(_beside(x), 1), (0.0, 0.0),
        (0.5, 0.5), (0.25, -0.25, -0.25, 0.25)),
    Row("`softmax` of x and -inf, first entry", lambda x: torch.softmax(_beside(x), 1)[:, 0],
        (0.0, math.log(3)), (0.1875, -0.1875), (0.09375, -0.09375, -0.09375, 0.09375)),
    Row("`log_softmax` of x and -inf, first entry",
        lambda x: torch.log_softmax(_beside(x), 1)[:, 0], (0.0, 0.0), (0.5, -0.5),
        (-0.25, 0.25, 0.25, -0.25)),
    Row("`logaddexp(a, b)`, b filled with -inf", lambda x: torch.logaddexp(
        x, x.masked_fill(SECOND, -INF))[:, 1], (1.0, 1.0), (0, 1), Z4, PRODUCT),
    Row("`logcumsumexp` of -inf and x, last entry",
        lambda x: _beside(x).flip(1).logcumsumexp(1)[:, -1], (0.0, 0.0), (0.5, 0.5),
        (0.25, -0.25, -0.25, 0.25)),
    one("`entr` at 0: infinite", torch.special.entr, 0.0, INF, -INF),
]  # fmt: skip

NORMS = [
    Row("2-norm at 0", lambda x: torch.linalg.vector_norm(x, dim=1), (0.0, 0.0), (0, 0), Z4, SUB),
    Row("2-norm of one entry only, at 0 in the other", lambda x: torch.linalg.vector_norm(x, dim=1),
        (0.0, 2.0), (0, 1), (0.5, 0, 0, 0)),
    Row("1-norm at 0", lambda x: torch.linalg.vector_norm(x, 1, dim=1), (0.0, 0.0), (0, 0), Z4),
    Row("3-norm at 0", lambda x: torch.linalg.vector_norm(x, 3, dim=1), (0.0, 0.0), (0, 0), Z4),
    Row("1.5-norm at an entry 0", lambda x: torch.linalg.vector_norm(x, 1.5, dim=1), (0.0, 3.0),
        (0, 1), Z4, SUB),
    Row("maximum norm at 0", lambda x: torch.linalg.vector_norm(x, INF, dim=1), (0.0, 0.0), (0, 0),
        Z4),
    Row("norm of order -1 at an entry 0", lambda x: torch.linalg.vector_norm(x, -1, dim=1),
        (0.0, 3.0), (0, 0), Z4, SUB),
    Row("Frobenius norm at 0", lambda x: torch.linalg.matrix_norm(x.reshape(-1, 2, 2)), Z4, Z4,
        (0,) * 16, SUB),
    Row("`pairwise_distance` of equal points (its eps 1e-6 is the difference)",
        lambda x: 1e-6 * F.pairwise_distance(x[:, :1], x[:, 1:]), (1.0, 1.0), (1e-6, -1e-6), Z4),
    Row("`cdist` of equal points",
        lambda x: torch.cdist(x.reshape(-1, 2, 1), x.reshape(-1, 2, 1)).sum((1, 2)), (1.0, 1.0),
        (0, 0), Z4, "PyTorch has no second derivative; as a norm at 0"),
    Row("`1e-12·normalize` at 0: x / eps", lambda x: 1e-12 * F.normalize(x, dim=1).sum(1),
        (0.0, 0.0), (1, 1), Z4, SMOOTH),
    Row("`pdist` of equal points", lambda x: _apart(x.reshape(-1, 2, 1)), (1.0, 1.0), (0, 0), Z4,
        "PyTorch has no second derivative; as a norm at 0"),
    Row("`1e-8·cosine_similarity` with (3, 4), at 0: x·y / (eps |y|)",
        lambda x: 1e-8 * F.cosine_similarity(x, torch.tensor([[3.0, 4.0]], dtype=D), 1),
        (0.0, 0.0), (0.6, 0.8), Z4, SMOOTH),
    Row("`var` of equal entries", lambda x: x.var(1), (1.0, 1.0), (0, 0), (1, -1, -1, 1)),
    Row("`sqrt(var + 1/4)` of equal entries", lambda x: (x.var(1) + 0.25).sqrt(), (1.0, 1.0),
        (0, 0), (1, -1, -1, 1)),
    Row("`rms_norm`, weights 1, -2, 1/2, at 0",
        lambda x: (F.rms_norm(x, (3,), eps=0.25) * W3).sum(1), (0.0, 0.0, 0.0), (2, -4, 1), Z9),
    Row("`group_norm`, weights 1, -2, 1/2, of equal entries",
        lambda x: (F.group_norm(x[..., None], 1, eps=0.25)[..., 0] * W3).sum(1), (1.0, 1.0, 1.0),
        (7 / 3, -11 / 3, 4 / 3), Z9),
    Row("absolute value of the complex number a + bi at 0",
        lambda x: torch.complex(x[:, 0], x[:, 1]).abs(), (0.0, 0.0), (0, 0), Z4),
    Row("`std` of equal entries", lambda x: x.std(1), (1.0, 1.0), (0, 0), Z4),
    Row("`layer_norm`, weights 1, -2, 1/2, of equal entries",
        lambda x: (F.layer_norm(x, (3,), eps=0.25) * W3).sum(1), (1.0, 1.0, 1.0),
        (7 / 3, -11 / 3, 4 / 3), Z9),
    Row("`prod`, one zero", lambda x: x.prod(1), (0.0, 2.0, 3.0), (6, 0, 0),
        (0, 3, 2, 3, 0, 0, 2, 0, 0)),
    Row("`prod`, two zeros", lambda x: x.prod(1), (0.0, 0.0, 3.0), (0, 0, 0),
        (0, 3, 0, 3, 0, 0, 0, 0, 0)),
    Row("`prod`, three zeros", lambda x: x.prod(1), (0.0, 0.0, 0.0), (0, 0, 0), Z9),
    Row("`cumprod`, two zeros", total(lambda x: x.cumprod(1)), (0.0, 0.0, 3.0), (1, 0, 0),
        (0, 4, 0, 4, 0, 0, 0, 0, 0)),
    Row("`cumprod`, one zero", total(lambda x: x.cumprod(1)), (0.0, 2.0, 3.0), (9, 0, 0),
        (0, 4, 2, 4, 0, 0, 2, 0, 0)),
    Row("`cumprod`, three zeros", total(lambda x: x.cumprod(1)), (0.0, 0.0, 0.0), (1, 0, 0),
        (0, 1, 0, 1, 0, 0, 0, 0, 0)),
    Row("`scatter_reduce` `prod`, two zeros", lambda x: torch.ones_like(x[:, :1]).scatter_reduce(
        1, torch.zeros_like(x, dtype=torch.int64), x, "prod").sum(1), (0.0, 0.0, 3.0), (0, 0, 0),
        (0, 3, 0, 3, 0, 0, 0, 0, 0), "PyTorch's second derivative is 0"),
]  # fmt: skip

TAILS = [
    one("`logsigmoid` at -1e4", F.logsigmoid, -1e4, 1, 0),
    one("`softplus` at 1e4", F.softplus, 1e4, 1, 0),
    one("`mish` at 1e3", F.mish, 1e3, 1, 0, PRODUCT),
    one("`gelu` at -1e300", F.gelu, -1e300, 0, 0, PRODUCT),
    one("`gelu`, tanh form, at 1e300", lambda x: F.gelu(x, approximate="tanh"), 1e300, 1, 0,
        PRODUCT),
    one("`silu` at 1e300", F.silu, 1e300, 1, 0),
    one("`erf` at 1e300", torch.erf, 1e300, 0, 0),
    one("`atan` at 1e300", torch.atan, 1e300, 0, 0),
    one("`logaddexp(x, -x)` at 1e3", lambda x: torch.logaddexp(x, -x), 1e3, 1, 0, PRODUCT),
    one("`log_ndtr` at -1e5", torch.special.log_ndtr, -1e5, 1e5, -1, "cancellation there"),
    Row("`logsumexp` at (1e308, -1e308)", lambda x: torch.logsumexp(x, 1), (1e308, -1e308), (1, 0),
        Z4),
    Row("`softmax[0]` at (1e308, -1e308)", lambda x: torch.softmax(x, 1)[:, 0], (1e308, -1e308),
        (0, 0), Z4),
]  # fmt: skip


def _exponential(m: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(m)
    return vectors * values.exp()[:, None] @ vectors.mT


SQUARES = (2, 0, 0, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 2)  # of |M|^2, M the symmetric part
MATRICES = [
    Row("`det` of rank 1", matrix(torch.linalg.det), (1.0, 2.0, 2.0, 4.0), (4, -2, -2, 1),
        (0, 0, 0, 1, 0, -0.5, -0.5, 0, 0, -0.5, -0.5, 0, 1, 0, 0, 0),
        "smooth everywhere; PyTorch divides by the determinant"),
    Row("`det` at 0", matrix(torch.linalg.det), Z4, Z4,
        (0, 0, 0, 1, 0, -0.5, -0.5, 0, 0, -0.5, -0.5, 0, 1, 0, 0, 0),
        "smooth everywhere; PyTorch divides by the determinant"),
    Row("`slogdet` (forward mode is silently wrong in PyTorch)",
        matrix(lambda m: torch.linalg.slogdet(m)[1]), (1.0, 0.0, 0.0, 2.0), (1, 0, 0, 0.5),
        (-1, 0, 0, 0, 0, -0.25, -0.25, 0, 0, -0.25, -0.25, 0, 0, 0, 0, -0.25)),
    Row("`cholesky`, nearly singular", matrix(torch.linalg.cholesky), (1.0, 0.0, 0.0, 1e-8),
        (0.5, 0.5, 0.5, 5e3), (-0.25, -0.25, -0.25, 0, -0.25, -2.5e3, -2.5e3, 0, -0.25, -2.5e3,
        -2.5e3, 0, 0, 0, 0, -2.5e11)),
    Row("`eigvalsh`, largest, simple", matrix(lambda m: torch.linalg.eigvalsh(m)[:, -1]),
        (1.0, 0.0, 0.0, 2.0), (0, 0, 0, 1),
        (0, 0, 0, 0, 0, 0.5, 0.5, 0, 0, 0.5, 0.5, 0, 0, 0, 0, 0)),
    Row("`eigvalsh`, largest of two equal", matrix(lambda m: torch.linalg.eigvalsh(m)[:, -1]),
        (1.0, 0.0, 0.0, 1.0), (0, 0, 0, 1), (0,) * 16,
        "0 is taken for the kink between them, as for a norm at 0"),
    Row("sum of squares of `eigvalsh` at the identity",
        matrix(lambda m: torch.linalg.eigvalsh(m) ** 2), (1.0, 0.0, 0.0, 1.0), (2, 0, 0, 2),
        SQUARES, SMOOTH),
    Row("sum of logarithms of `eigvalsh` at the identity",
        matrix(lambda m: torch.linalg.eigvalsh(m).log()), (1.0, 0.0, 0.0, 1.0), (1, 0, 0, 1),
        tuple(-h / 2 for h in SQUARES), SMOOTH),
    Row("sum of `sqrt(1 + s²)`, s by `svdvals`, at 0",
        matrix(lambda m: (1 + torch.linalg.svdvals(m) ** 2).sqrt()), Z4, Z4,
        tuple(h / 2 for h in SQUARES), SMOOTH),
    Row("sum of squares of `svdvals` at 0", matrix(lambda m: torch.linalg.svdvals(m) ** 2),
        Z4, Z4, SQUARES, SMOOTH),
    Row("sum of V exp(l) Vᵀ, by the vectors of `eigh`, at the identity (write `matrix_exp`)",
        matrix(_exponential), (1.0, 0.0, 0.0, 1.0), (NAN,) * 4, (NAN,) * 16),
    Row("`matrix_exp` at 0", matrix(torch.linalg.matrix_exp), Z4, (1, 1, 1, 1),
        (1, 0.5, 0.5, 0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0, 0.5, 0.5, 1)),
]  # fmt: skip

SECTIONS = {
    "Kinks": KINKS,
    "Ties": TIES,
    "Ends of domains, and what is not chosen": ENDS,
    "Norms, normalizations and products": NORMS,
    "Squares of roots": ROOTS,
    "Far tails": TAILS,
    "Matrices": MATRICES,
}


# --- the table ------------------------------------------------------------------------------------


def pytorch(row: Row) -> tuple[str, str]:
    """What double backward gives, as text."""
    x = torch.tensor([row.x], dtype=D)
    found = []
    for referee in (oracle.gradient, oracle.hessian):
        try:
            found.append(show(referee(row.function, x).flatten().tolist()))
        except RuntimeError:
            found.append("error")
    return found[0], found[1]


def table() -> str:
    version = f", here with PyTorch {torch.__version__.split('+')[0]}"
    lines = [INTRODUCTION.format(version=version)]
    for name, rows in SECTIONS.items():
        lines += [f"## {name}", "", "| place | gradient | Hessian | PyTorch | why |"]
        lines += ["| --- | --- | --- | --- | --- |"]
        for row in rows:
            first, second = pytorch(row)
            ours = show(row.gradient), show(row.hessian)
            theirs = "the same"
            if (first, second) != ours:
                assert row.why, f"{row.place}: {first}; {second}"
                theirs = second if first == ours[0] else f"{first}; {second}"
            else:
                assert not row.why, f"{row.place}: PyTorch gives the same"
            lines.append(f"| {row.place} | {ours[0]} | {ours[1]} | {theirs} | {row.why} |")
        lines.append("")
    return "\n".join(lines)


def derivatives(row: Row, dtype: torch.dtype = D) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient and Hessian by fxhess, two samples at once."""
    x = torch.tensor([row.x, row.x], dtype=dtype)
    got = fxhess.transform(row.function, ("gradient", "hessian"))(x)
    return got.gradient, got.hessian.flatten(1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="keep the table as Markdown")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    text = table()
    if options.write:
        options.write.parent.mkdir(exist_ok=True)
        options.write.write_text(text)
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
