"""The referee itself, against Hessians derived by hand."""

from __future__ import annotations

import pytest
import torch
from reference import assert_close, randn

from fxhess import oracle

REFEREES = {"double backward": (oracle.hessian, 1e-12), "differences": (oracle.differences, 1e-6)}

Q = randn(4, 4, seed=7)


def _quadratic(x):
    return ((x @ Q) * x).sum(-1)


def _norm_hessian(x):
    r = x.norm(dim=-1)[:, None, None]
    n = x / r[:, :, 0]
    return (torch.eye(x.shape[-1], dtype=x.dtype) - n[:, :, None] * n[:, None, :]) / r


def _softplus_ridge(x):
    return torch.nn.functional.softplus(x @ Q[0])


def _softplus_ridge_hessian(x):
    s = torch.sigmoid(x @ Q[0])
    return (s * (1 - s))[:, None, None] * (Q[0][:, None] * Q[0])


# name: model of [B, 4], Hessian [B, 4, 4] by hand
BY_HAND = {
    "quadratic form": (_quadratic, lambda x: (Q + Q.T).expand(len(x), 4, 4)),
    "norm": (lambda x: x.norm(dim=-1), _norm_hessian),
    "ridge": (_softplus_ridge, _softplus_ridge_hessian),
    "sum of sines": (lambda x: x.sin().sum(-1), lambda x: torch.diag_embed(-x.sin())),
    "linear": (lambda x: x.sum(-1), lambda x: x.new_zeros(len(x), 4, 4)),
    "constant": (lambda x: x.new_ones(len(x)), lambda x: x.new_zeros(len(x), 4, 4)),
}


@pytest.mark.parametrize("referee", REFEREES)
@pytest.mark.parametrize("name", BY_HAND)
def test_hessian_by_hand(name, referee):
    model, by_hand = BY_HAND[name]
    hessian, tolerance = REFEREES[referee]
    x = randn(3, 4, seed=1)
    assert_close(hessian(model, x), by_hand(x), tolerance)


@pytest.mark.parametrize("referee", REFEREES)
def test_vector_outputs_get_an_axis_of_their_own(referee):
    hessian, tolerance = REFEREES[referee]
    x = randn(2, 3, seed=2)
    want = torch.stack([torch.diag_embed(x.exp()), torch.diag_embed(-x.cos())], 1)
    model = lambda x: torch.stack([x.exp().sum(-1), x.cos().sum(-1)], -1)  # noqa: E731
    assert_close(hessian(model, x), want, tolerance)


@pytest.mark.parametrize("referee", REFEREES)
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_several_event_and_batch_axes(referee, batch):
    hessian, tolerance = REFEREES[referee]
    x = randn(*batch, 2, 3, seed=3)
    got = hessian(lambda x: (x**3).sum((-1, -2)), x, 2)
    want = torch.diag_embed(6 * x.reshape(*batch, 6)).reshape(*batch, 2, 3, 2, 3)
    assert_close(got, want, 10 * tolerance)


@pytest.mark.parametrize("referee", REFEREES)
def test_scalar_samples(referee):
    hessian, tolerance = REFEREES[referee]
    x = randn(5, seed=4)
    assert_close(hessian(torch.exp, x, 0), x.exp(), tolerance)


def test_gradient_by_hand():
    x = randn(3, 4, seed=5)
    assert_close(oracle.gradient(_quadratic, x), x @ (Q + Q.T), 1e-12)
    assert_close(oracle.gradient(lambda x: x.exp(), x), torch.diag_embed(x.exp()), 1e-12)
    assert_close(oracle.gradient(lambda x: x.new_ones(len(x)), x), torch.zeros_like(x))


def test_samples_are_taken_one_at_a_time():
    sizes = []

    def model(x):
        sizes.append(len(x))
        return x.exp().sum(-1)

    oracle.hessian(model, randn(3, 2))
    oracle.gradient(model, randn(3, 2))
    assert set(sizes) == {1}


def test_referees_tell_wrong_from_right():
    """A derivative that autograd is told wrongly shows as a difference between the two."""

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return g * 2 * x**2  # 3 x^2 is right

    x = randn(2, 3, seed=6).abs() + 1
    model = lambda x: Wrong.apply(x).sum(-1)  # noqa: E731
    assert_close(oracle.differences(model, x), torch.diag_embed(6 * x), 1e-6)
    with pytest.raises(AssertionError, match="off by"):
        assert_close(oracle.hessian(model, x), oracle.differences(model, x), 1e-3)
