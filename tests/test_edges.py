"""Edges: every row of docs/conventions.md, far tails, and differences where the file names none."""

from __future__ import annotations

import functools
import importlib.util
import math
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from reference import ALL, assert_close, randn
from torch import nn

import fxhess
from fxhess import oracle

ROOT = Path(__file__).resolve().parent.parent


def _load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


edges = _load("edges")
ROWS = [row for rows in edges.SECTIONS.values() for row in rows]
FLOAT = torch.float64


def _same(got, want, tolerance):
    """Equal to ``tolerance`` of the largest finite entry; infinities and NaN in their place."""
    want = torch.tensor(want, dtype=FLOAT).expand_as(got)
    got = got.double()
    finite = want.isfinite()
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got[want.isinf()], want[want.isinf()])
    scale = max(want[finite].abs().max().item(), 1e-6) if finite.any() else 1.0
    error = (got - want)[finite].abs().max().item() if finite.any() else 0.0
    assert error <= tolerance * scale, f"{got.tolist()}, expected {want.tolist()}"


@pytest.mark.parametrize("row", ROWS, ids=[re.sub("[^a-z0-9_]+", "-", r.place) for r in ROWS])
def test_row(row):
    gradient, hessian = edges.derivatives(row)
    _same(gradient, row.gradient, 1e-9)
    _same(hessian, row.hessian, 1e-9)


def test_the_table_says_what_is_tested():
    """All but PyTorch's own column, which depends on its version."""
    text = (ROOT / "docs" / "conventions.md").read_text()
    cells = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    written = [[c.strip("| ") for c in row[:3]] for row in cells if "---" not in row[0]]
    written = [row for row in written if row[0] != "place"]
    assert written == [[r.place, edges.show(r.gradient), edges.show(r.hessian)] for r in ROWS]


def test_pytorch_column_of_the_table():
    text = (ROOT / "docs" / "conventions.md").read_text()
    if f"PyTorch {torch.__version__.split('+')[0]}" not in text:
        pytest.skip("written with another PyTorch")
    assert text == edges.table()


# --- far tails ------------------------------------------------------------------------------------

# name: (function, f' at -infinity, f' at +infinity); f'' is 0 at both
TAILS = {
    "sigmoid": (torch.sigmoid, 0, 0),
    "tanh": (torch.tanh, 0, 0),
    "log-sigmoid": (F.logsigmoid, 1, 0),
    "softplus": (F.softplus, 0, 1),
    "softplus, beta": (lambda x: F.softplus(x, 3, 10), 0, 1),
    "gelu": (F.gelu, 0, 1),
    "gelu, tanh": (lambda x: F.gelu(x, approximate="tanh"), 0, 1),
    "silu": (F.silu, 0, 1),
    "mish": (F.mish, 0, 1),
    "elu": (F.elu, 0, 1),
    "celu": (F.celu, 0, 1),
    "softsign": (F.softsign, 0, 0),
    "tanhshrink": (F.tanhshrink, 1, 1),
    "hardswish": (F.hardswish, 0, 1),
    "erf": (torch.erf, 0, 0),
    "erfc": (torch.erfc, 0, 0),
    "atan": (torch.atan, 0, 0),
    "logaddexp": (lambda x: torch.logaddexp(x, 0 * x), 0, 1),
    "log cosh": (lambda x: torch.logaddexp(x, -x), -1, 1),
    "logsumexp": (lambda x: torch.logsumexp(torch.stack([x, 0 * x], -1), -1), 0, 1),
    "softmax": (lambda x: torch.softmax(torch.stack([x, 0 * x], -1), -1)[..., 0], 0, 0),
    "log-softmax": (lambda x: torch.log_softmax(torch.stack([x, 0 * x], -1), -1)[..., 0], 1, 0),
    "cross entropy with logits": (
        lambda x: F.binary_cross_entropy_with_logits(x, 0 * x, reduction="none"), 0, 1,
    ),
    "hypot": (lambda x: torch.hypot(x, torch.ones_like(x)), -1, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", TAILS)
def test_tails(name):
    """Limits at 1e3, and up to the largest numbers of each type, negative and positive."""
    f, left, right = TAILS[name]
    hess = fxhess.transform(lambda x: f(x).sum(1), ("gradient", "hessian"))
    for dtype in (torch.float64, torch.float32):
        sizes = torch.tensor([1e6, 1e18, torch.finfo(dtype).max / 4], dtype=dtype)
        x = torch.cat([-sizes, sizes])[:, None]
        got = hess(x)
        want = torch.tensor([left] * 3 + [right] * 3, dtype=dtype)
        torch.testing.assert_close(got.gradient[:, 0], want, rtol=0, atol=1e-11)
        assert (got.hessian.abs() < 1e-11).all(), got.hessian


def _decay(x, rate=1.0):
    return math.exp(-rate * abs(x))


# f'' by hand in terms that do not cancel: sigmoid' = e / (1 + e)^2 with e = exp(-|x|)
SECOND = {
    "softplus": lambda x: _decay(x) / (1 + _decay(x)) ** 2 if x < 20 else 0.0,
    "log-sigmoid": lambda x: -_decay(x) / (1 + _decay(x)) ** 2,
    "logaddexp": lambda x: _decay(x) / (1 + _decay(x)) ** 2,
    "log cosh": lambda x: 4 * _decay(x, 2) / (1 + _decay(x, 2)) ** 2,
    "gelu": lambda x: math.exp(-x * x / 2) / math.sqrt(2 * math.pi) * (2 - x * x),
    "erf": lambda x: -4 * x / math.sqrt(math.pi) * math.exp(-x * x),
    "erfc": lambda x: 4 * x / math.sqrt(math.pi) * math.exp(-x * x),
    "cross entropy with logits": lambda x: _decay(x) / (1 + _decay(x)) ** 2,
}


@pytest.mark.parametrize("name", SECOND)
def test_second_derivatives_in_the_tails_have_all_their_digits(name):
    """Relative to themselves, not to the largest: 1e-13 is as exact as 1."""
    far = 20.0 if name not in ("gelu", "erf", "erfc") else 8.0
    x = torch.linspace(-far, far, 33, dtype=FLOAT)[:, None]
    hessian = fxhess.transform(lambda x: TAILS[name][0](x).sum(1))(x).flatten()
    want = torch.tensor([SECOND[name](t) for t in x.flatten().tolist()], dtype=FLOAT)
    torch.testing.assert_close(hessian, want, rtol=1e-9, atol=0)


# --- against central differences ------------------------------------------------------------------


def _recurrent(kind):
    torch.manual_seed(0)
    net = kind(2, 3, batch_first=True).double()
    return lambda x: net(x.reshape(-1, 2, 2))[0].square().sum((1, 2))


def _batch_norm_twice(x):
    norm = functools.partial(F.batch_norm, running_mean=BASE[0], running_var=BASE[1].square())
    return norm(norm(x) * x).prod(1)


def _written(x):
    out = torch.zeros_like(x)
    out[:, 0] = x[:, 1].sin()
    out[:, 1:3] = x[:, :2] * out[:, :1]
    out[:, 3] += x.prod(1)
    return out.square().sum(1)


def _inner_gradient(x):
    """The squared force of an energy, by autograd inside the model."""
    with torch.enable_grad():
        p = x if x.requires_grad else x.detach().requires_grad_()
        energy = (p.sin() * p.roll(1, 1).exp()).sum()
        (force,) = torch.autograd.grad(energy, p, create_graph=True)
    return force.square().sum(1)


def _noted(x):
    """By a value that is read, and a branch on a tensor."""
    scale = BASE.max().item()
    return (x * scale).tanh().prod(1) if (BASE > 0).any() else x.sum(1)


BASE = torch.tensor([[0.4, -0.3, 0.8, 1.2], [0.9, 1.1, -0.7, 0.5]], dtype=FLOAT)
STEEP = torch.tensor([[0.3, -0.7, 1.1, 0.4], [1.5, 0.2, -0.6, -0.9]], dtype=FLOAT)
DIFFERENCES = {
    "slogdet": lambda x: torch.linalg.slogdet(x.reshape(-1, 2, 2))[1],
    "logdet of a product": lambda x: torch.logdet(
        x.reshape(-1, 2, 2) @ x.reshape(-1, 2, 2).mT + torch.eye(2, dtype=x.dtype)
    ),
    "PReLU": lambda x: (F.prelu(x, torch.tensor([0.2], dtype=x.dtype)) * x.sin()).sum(1),
    "max-unpool": lambda x: F.max_unpool1d(*F.max_pool1d(x[:, None], 2, return_indices=True), 2)
    .square().flatten(1).sum(1) * x.sum(1),
    "index_reduce": lambda x: torch.ones_like(x).index_reduce(
        1, torch.tensor([0, 0, 2, 1]), x, "prod"
    ).sin().sum(1),
    "scatter_reduce": lambda x: torch.ones_like(x).scatter_reduce(
        1, torch.tensor([[0, 0, 0, 2]]).expand(x.shape[0], 4), x, "prod"
    ).sin().sum(1),
    "cdist": lambda x: torch.cdist(x.reshape(-1, 2, 2), x.reshape(-1, 2, 2).sin()).sum((1, 2)),
    "spectral norm": lambda x: torch.linalg.svdvals(x.reshape(-1, 2, 2))[:, 0],
    "layer norm twice": lambda x: F.layer_norm(F.layer_norm(x, (4,)) * x, (4,)).prod(1),
    "renorm": lambda x: torch.renorm(x[:, None], 2, 0, 0.5).flatten(1).prod(1),
    "batch norm twice": _batch_norm_twice,
    "det": lambda x: torch.linalg.det(x.reshape(-1, 2, 2)).sin(),
    "grid_sample": lambda x: F.grid_sample(
        x.reshape(-1, 1, 2, 2), x.tanh().reshape(-1, 1, 2, 2) / 2, align_corners=True
    ).square().sum((1, 2, 3)),
    "fused attention": lambda x: F.scaled_dot_product_attention(
        *(f(x).reshape(-1, 1, 2, 2) for f in (torch.sin, torch.tanh, torch.exp)), is_causal=True
    ).square().sum((1, 2, 3)),
    "LSTM": _recurrent(nn.LSTM),
    "GRU": _recurrent(nn.GRU),
    "written in place": _written,
    "gradient inside": _inner_gradient,
    "item and if": _noted,
    "cumprod, a zero": lambda x: (x * torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=x.dtype))
    .cumprod(1).sum(1),
    "prod, a zero": lambda x: (x - STEEP[0, 2]).prod(1),
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENCES)
def test_differences(name):
    model = DIFFERENCES[name]
    want = oracle.differences(model, STEEP)
    torch.testing.assert_close(fxhess.transform(model)(STEEP), want, rtol=2e-5, atol=2e-5)


# --- shapes, piecewise linear models, randomness --------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 3), (3, 1), (1, 1), (2, 0)])
def test_empty_and_single(shape):
    x = randn(*shape)
    got = fxhess.transform(lambda x: (x.exp().sum(1) * x.sin().sum(1)).tanh(), ALL)(x)
    assert got.hessian.shape == (*shape, shape[1])
    if x.numel():
        want = oracle.hessian(lambda x: (x.exp().sum(1) * x.sin().sum(1)).tanh(), x)
        assert_close(got.hessian, want)


def test_relu_networks_are_said_to_be_piecewise_linear():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    hess = fxhess.transform(net)
    assert not hess(randn(2, 3)).any()
    assert "piecewise linear" in str(hess.explain(randn(2, 3)))


@pytest.mark.parametrize(
    "noise",
    [
        lambda x: F.dropout(x, 0.5, True),
        lambda x: x * torch.rand_like(x),
        lambda x: x * torch.bernoulli(torch.full_like(x, 0.5)),
        lambda x: F.rrelu(x, 0.1, 0.9, True),
    ],
)
def test_value_gradient_and_hessian_see_the_same_noise(noise):
    """Of ``noise(x)^2 / 2`` with noise linear: value = x g / 2 and g = x h."""
    x = randn(4, 6)
    got = fxhess.transform(lambda x: noise(x).square().sum(1) / 2, ALL)(x)
    curvature = got.hessian.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(got.gradient, curvature * x)
    torch.testing.assert_close(got.value, (curvature * x * x).sum(1) / 2)
    assert curvature.unique().numel() > 1
