"""Functions and operators whose second derivative is missing: errors that say so."""

from __future__ import annotations

import pytest
import torch
from reference import assert_close, randn
from torch.autograd.function import once_differentiable

import fxhess
from fxhess import UnsupportedOpError, oracle


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.exp()


@torch.library.custom_op("fxhess_tests::plain", mutates_args=())
def plain(x: torch.Tensor) -> torch.Tensor:
    return x.exp()


@plain.register_fake
def _(x):
    return torch.empty_like(x)


@pytest.mark.parametrize("inner", [torch.sin, torch.clone], ids=["curved", "plain"])
def test_missing_second_derivative(inner):
    with pytest.raises(UnsupportedOpError, match=r"second[\s\S]*Once[\s\S]*once_differentiable"):
        fxhess.transform(lambda x: Once.apply(inner(x)).sum(-1))(randn(4, 3))


class Layer(torch.nn.Module):
    def forward(self, x):
        return Once.apply(x)


def test_missing_second_derivative_names_the_module():
    model = torch.nn.Sequential(torch.nn.Linear(3, 1), Layer()).double()
    with pytest.raises(UnsupportedOpError, match=r"in module '1'"):
        fxhess.transform(model)(randn(4, 3))


class Ungraphed(torch.autograd.Function):
    """Its backward computes the right numbers, and autograd sees none of it."""

    @staticmethod
    def forward(ctx, x, how):
        ctx.save_for_backward(x)
        ctx.how = how
        return x.exp()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        if ctx.how == "detached":
            return g.detach() * x.detach().exp(), None
        with torch.no_grad():
            return g * x.exp(), None


@pytest.mark.parametrize("how", ["detached", "no_grad"])
def test_backward_without_a_graph(how):
    with pytest.raises(UnsupportedOpError, match=r"second[\s\S]*Ungraphed[\s\S]*no graph"):
        fxhess.transform(lambda x: Ungraphed.apply(x.sin(), how).sum(-1))(randn(4, 3))


class Stopped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.exp()

    @staticmethod
    def backward(ctx, g):
        return torch.zeros(g.shape, dtype=g.dtype)


def test_backward_of_zeros():
    def model(x: torch.Tensor) -> torch.Tensor:
        return (Stopped.apply(x) * x.sin()).sum(-1)

    x = randn(4, 3)
    assert_close(fxhess.transform(model)(x), oracle.hessian(model, x))


@torch.library.custom_op("fxhess_tests::halfway", mutates_args=())
def halfway(x: torch.Tensor) -> torch.Tensor:
    return x.exp()


@halfway.register_fake
def _(x):
    return torch.empty_like(x)


halfway.register_autograd(
    lambda ctx, g: g * plain(ctx.saved_tensors[0]),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)


def test_custom_op_whose_backward_has_no_derivative():
    with pytest.raises(UnsupportedOpError, match=r"second[\s\S]*halfway[\s\S]*plain"):
        fxhess.transform(lambda x: torch.ops.fxhess_tests.halfway(x).sum(-1))(randn(4, 3))


def test_custom_operator_without_derivative():
    with pytest.raises(UnsupportedOpError, match=r"first derivative of fxhess_tests\.plain"):
        fxhess.transform(lambda x: plain(x).sum(-1))(randn(4, 3))
