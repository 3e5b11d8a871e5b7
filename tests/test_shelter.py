"""No infinite derivative by what does not depend on x; nothing is paid where all of it does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from reference import ALL, assert_close, mlp
from torch import nn

import fxhess
from fxhess import oracle

FLOAT = torch.float64
X = torch.tensor([[0.8, 1.2, 0.5], [0.3, 0.9, 1.4]], dtype=FLOAT)
M = torch.tensor([True, False, True])
PLACES = torch.tensor([0, 2])
HALF = 0.7


def _outer(x):
    return x[:, :, None] * x[:, None] + torch.eye(3, dtype=x.dtype)


def _put(x):
    z = torch.zeros_like(x)
    z[:, PLACES] = x[:, :2]
    return z


def _put_by_mask(x):
    z = torch.zeros_like(x)
    z[:, M] = x[:, 1:]
    return z


def _slice_assign(x):
    z = x * 1
    z[:, 1] = 0.0
    return z


def _root_above(x):
    """sqrt(x - 0.7) where that is positive, else 0, so that double backward is finite."""
    return torch.where(x > HALF, torch.where(x > HALF, x - HALF, 1.0).sqrt(), 0.0)


def _first(x, a, b):
    """By sample: where the first entry is large."""
    return torch.where(x[:, :1, None] > HALF, a, b)


# name: (the model, the same written so that double backward is finite)
CASES = {
    "where": (lambda x: torch.where(M, x, 0.0).sqrt().sum(1), lambda x: x[:, M].sqrt().sum(1)),
    "where, in a chain": (
        lambda x: torch.where(M, x.sin(), 0.0).sqrt().sin().sum(1) * x.sum(1),
        lambda x: x[:, M].sin().sqrt().sin().sum(1) * x.sum(1),
    ),
    "where x is large": (
        lambda x: torch.where(x > HALF, x - HALF, 0.0).sqrt().sum(1) * x.sum(1),
        lambda x: _root_above(x).sum(1) * x.sum(1),
    ),
    "masked_fill, a power": (
        lambda x: x.masked_fill(~M, 0.0).pow(1.5).sum(1),
        lambda x: x[:, M].pow(1.5).sum(1),
    ),
    "index_put": (lambda x: _put(x).sqrt().sum(1), lambda x: x[:, :2].sqrt().sum(1)),
    "index_put by a mask": (
        lambda x: _put_by_mask(x).log1p().sqrt().sum(1),
        lambda x: x[:, 1:].log1p().sqrt().sum(1),
    ),
    "slice assigned": (
        lambda x: _slice_assign(x).sqrt().sum(1), lambda x: x[:, M].sqrt().sum(1),
    ),
    "scatter": (
        lambda x: torch.zeros_like(x).scatter(1, PLACES.expand(len(x), 2), x[:, :2]).sqrt().sum(1),
        lambda x: x[:, :2].sqrt().sum(1),
    ),
    "index_add": (
        lambda x: x.new_zeros(len(x), 5).index_add(1, torch.tensor([0, 2, 2]), x).sqrt().sum(1),
        lambda x: x[:, 0].sqrt() + (x[:, 1] + x[:, 2]).sqrt(),
    ),
    "pad, cut": (lambda x: F.pad(x, (0, 2))[:, 2:].sqrt().sum(1), lambda x: x[:, 2].sqrt()),
    "cat": (
        lambda x: torch.cat([x, torch.zeros_like(x)], 1).sqrt().sum(1),
        lambda x: x.sqrt().sum(1),
    ),
    "diagonal": (lambda x: x.diag_embed().sqrt().sum((1, 2)), lambda x: x.sqrt().sum(1)),
    "triangle": (
        lambda x: _outer(x).tril().sqrt().sum((1, 2)),
        lambda x: _outer(x)[:, *torch.tril_indices(3, 3)].sqrt().sum(1),
    ),
    "exp of log 0": (
        lambda x: torch.where(M, x, 0.0).log().exp().pow(2).sum(1) * x.sum(1),
        lambda x: x[:, M].pow(2).sum(1) * x.sum(1),
    ),
    "rows, a root of squares": (
        lambda x: torch.where(M[:, None], _outer(x), 0.0).square().sum(-1).sqrt().sum(1),
        lambda x: _outer(x)[:, M].norm(dim=-1).sum(1),
    ),
    "rows, a power of a sum": (
        lambda x: torch.where(M[:, None], _outer(x).tanh(), 0.0).sum(-1).pow(1.5).sum(1),
        lambda x: _outer(x).tanh()[:, M].sum(-1).pow(1.5).sum(1),
    ),
    "relu": (
        lambda x: F.relu(x - HALF).sqrt().sum(1) * x.sum(1),
        lambda x: _root_above(x).sum(1) * x.sum(1),
    ),
    "clamp": (
        lambda x: (x - HALF).clamp_min(0).sqrt().sum(1) * x.sum(1),
        lambda x: _root_above(x).sum(1) * x.sum(1),
    ),
    "maximum": (
        lambda x: torch.maximum(x - HALF, torch.zeros(3, dtype=FLOAT)).sqrt().sum(1),
        lambda x: _root_above(x).sum(1),
    ),
    "multiplied by a mask": (
        lambda x: (x * M.double()).sqrt().sum(1), lambda x: x[:, M].sqrt().sum(1),
    ),
    "entropy": (
        lambda x: torch.special.entr(torch.where(M, x, 0.0)).sum(1),
        lambda x: torch.special.entr(x[:, M]).sum(1),
    ),
    "xlogy": (
        lambda x: torch.xlogy(torch.where(M, x, 0.0), torch.where(M, x, 0.0)).sum(1),
        lambda x: torch.xlogy(x[:, M], x[:, M]).sum(1),
    ),
    "infinite": (
        lambda x: torch.where(M, x, torch.inf).reciprocal().sqrt().sum(1),
        lambda x: x[:, M].rsqrt().sum(1),
    ),
    "matrices of some samples": (
        lambda x: torch.linalg.svdvals(_first(x, _outer(x), 0 * torch.eye(3, dtype=FLOAT))).sum(1),
        lambda x: torch.where(x[:, 0] > HALF, torch.linalg.svdvals(_outer(x)).sum(1), 0),
    ),
    "left out and put in": (
        lambda x: torch.where(M, torch.where(M, x, 0.0).log(), x * x).sum(1),
        lambda x: torch.where(M, x.log(), x * x).sum(1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_constants_put_in_do_not_leak(name):
    model, referee = CASES[name]
    point = X.clone().requires_grad_()
    got = fxhess.transform(model, ALL)(point)
    assert_close(got.value, referee(X), what="value")
    assert_close(got.gradient, oracle.gradient(referee, X), what="gradient")
    assert_close(got.hessian, oracle.hessian(referee, X), what="hessian")
    (got.gradient.sum() + got.hessian.square().sum()).backward()
    assert point.grad.isfinite().all()


@pytest.mark.parametrize("outputs", ["hvp", "laplacian", ("blocks", 0)])
def test_all_outputs_are_sheltered(outputs):
    model, referee = CASES["where, in a chain"]
    hess = fxhess.transform(model, outputs)
    want = oracle.hessian(referee, X)
    if outputs == "hvp":
        assert_close(hess(X, vector=X), (want @ X[..., None])[..., 0])
    else:
        diagonal = want.diagonal(dim1=1, dim2=2)
        assert_close(hess(X), diagonal.sum(1) if outputs == "laplacian" else diagonal)


def test_a_filled_in_parameter_keeps_its_gradient():
    """The value is made of the true constant; so is its gradient."""
    fill = torch.tensor(0.25, dtype=FLOAT, requires_grad=True)
    got = fxhess.transform(lambda x: torch.where(M, x, fill).sqrt().sum(1), ALL)(X)
    got.value.sum().backward()
    assert fill.grad.item() == pytest.approx(2 * 0.5 / 0.5)


def test_true_infinities_stay():
    """0 is an entry of x there, not a constant."""
    x = torch.tensor([[0.0, 0.0, 1.0]], dtype=FLOAT)
    hessian = fxhess.transform(lambda x: torch.where(M, x, 0.0).sqrt().sum(1))(x)
    assert hessian[0].diagonal().tolist() == [-torch.inf, 0.0, -0.25]


@pytest.mark.parametrize(
    "model",
    [
        mlp(3, 8, 8, 1, activation=nn.ReLU),
        nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 4), nn.Softmax(-1)),
        lambda x: x.norm(dim=1),
        lambda x: torch.where(M, torch.where(M, x, 1.0).log(), x).sum(1),
        lambda x: torch.cat([x.log(), x.sqrt()], 1).cumsum(1).log().sum(1),
        lambda x: (x[:, [2, 1]].gather(1, x.argsort(1)[:, :1] % 2)).sqrt().sum(1),
        lambda x: x.amax(1).sqrt() + x.sort(1).values.log().sum(1),
        lambda x: (torch.maximum(x, x.sin()) * 2.0).sqrt().sum(1),
        lambda x: (F.relu(x) @ torch.ones(3, 3, dtype=FLOAT)).sqrt().sum(1),
    ],
)
def test_nothing_is_paid_where_no_singular_operation_sees_a_constant(model, monkeypatch):
    from fxhess.passes import draft

    model = model.double() if isinstance(model, nn.Module) else model
    fxhess.cache_clear()
    code = fxhess.transform(model, ALL).graph_module(X).code
    monkeypatch.setattr(draft, "shelter", lambda *args: {})
    fxhess.cache_clear()
    assert fxhess.transform(model, ALL).graph_module(X).code == code
    fxhess.cache_clear()


@pytest.mark.parametrize("operation", [torch.remainder, torch.fmod])
def test_quotients_of_zero_decide_by_the_true_values(operation):
    c = torch.tensor([5.5, -7.2, 0.3, -0.4, 1.0], dtype=torch.float64)

    def model(x):
        return torch.sin(operation(c, x)).sum(-1) + torch.sin(operation(x, c)).sum(-1)

    x = torch.tensor([[1.3, 2.1, 2.2, 1.7, 3.1], [9.0, 8.5, 0.11, 0.13, 0.7]], dtype=torch.float64)
    assert_close(fxhess.transform(model)(x), oracle.hessian(model, x), 1e-12)
