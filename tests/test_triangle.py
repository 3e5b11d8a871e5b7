"""Packed symmetric forms: only a triangle is computed, and H equals its transpose bit for bit."""

from __future__ import annotations

import pytest
import torch
from reference import assert_close, check, randn
from torch import nn
from torch.nn import functional as F

import fxhess
from fxhess import oracle, triangle


@pytest.mark.parametrize("n", [1, 2, 5, 12])
@pytest.mark.parametrize("contiguous", [True, False])
def test_unpack_undoes_pack(n, contiguous):
    full = randn(3, 2, n, n)
    full = full + full.mT
    rows, columns = triangle.ends(n, device=full.device)
    packed = full[..., rows, columns]
    assert packed.shape[-1] == triangle.length(n)
    places = triangle.positions(n, device=full.device)
    assert torch.equal(triangle.unpack(packed, places, (n,)), full)
    out = torch.empty(3, 2, n, n, dtype=full.dtype)
    out = out if contiguous else torch.empty(3, 2, n, 2 * n, dtype=full.dtype)[..., ::2]
    assert triangle.unpack(packed, places, (n,), out=out) is out
    assert torch.equal(out, full)


class Linear(nn.Module):
    """A generalized linear model: many curved terms, each in its own direction."""

    def __init__(self, d: int, terms: int, outputs: int = 0, seed: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(randn(terms, d, seed=seed) / d**0.5)
        self.mix = nn.Parameter(randn(outputs, terms, seed=seed + 1)) if outputs else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.softplus(x.flatten(-self.event_ndim) @ self.weight.mT)
        return y.sum(-1) if self.mix is None else y @ self.mix.mT

    event_ndim = 1


@pytest.mark.parametrize("outputs", [0, 3])
@pytest.mark.parametrize("event", [(7,), (3, 4), (1,)])
def test_generalized_linear_models(event, outputs):
    x = randn(4, *event, seed=5)
    model = Linear(x[0].numel(), 120, outputs)
    model.event_ndim = len(event)
    hess = fxhess.transform(model, event_ndim=len(event))
    check(model, x, len(event))
    code = hess.graph_module(x).code
    assert ("unpack" in code) == (x[0].numel() > 1)  # the packed form, not the full one
    H = hess(x)
    k = len(event)
    order = [*range(H.ndim - 2 * k), *range(H.ndim - k, H.ndim), *range(H.ndim - 2 * k, H.ndim - k)]
    assert torch.equal(H, H.permute(order))
    out = torch.empty_like(H)
    assert_close(hess(x, out=out), H.detach())


def test_a_packed_form_is_carried_on_from_a_base():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(9, 6), nn.Tanh(), nn.Linear(6, 128), nn.Tanh(), nn.Linear(128, 1)
    ).double()
    x = randn(5, 9)
    for strategy in ("close", "rebase"):
        hess = fxhess.transform(model, strategy=strategy)
        got = hess(x)
        assert_close(got, oracle.hessian(model, x, 1))
        assert torch.equal(got, got.mT)
    assert "unpack" in hess.graph_module(x).code


def test_gradients_flow_through_the_packed_form():
    model = Linear(5, 100)
    x = randn(3, 5).requires_grad_()
    weights = randn(3, 5, 5, seed=9)
    hess = fxhess.transform(model)
    got = torch.autograd.grad((hess(x) * weights).sum(), [x, model.weight])
    H = torch.stack([torch.func.hessian(model)(row) for row in x])
    want = torch.autograd.grad((H * weights).sum(), [x, model.weight])
    for a, b in zip(got, want, strict=True):
        assert_close(a, b)
