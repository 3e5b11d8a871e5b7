"""Hessians in a model's parameters, of each sample and of a loss."""

from __future__ import annotations

import pytest
import torch
from reference import assert_close, mlp, randn, referee
from torch import nn

import fxhess
from fxhess import InputError, SampleMixingError

net = mlp(3, 4, 2, seed=3)


def with_parameters(names, x):
    def function(*values):
        named = dict(zip(names, values, strict=True))
        return torch.func.functional_call(net, named, (x[None],))[0]

    return function


@pytest.mark.parametrize("names", [("0.weight",), ("0.weight", "2.bias"), ("0", "2.weight")])
def test_per_sample_hessians_in_parameters(names):
    full = [
        n for n, _ in net.named_parameters() if any(n == k or n.startswith(k + ".") for k in names)
    ]
    x = randn(3, 3, seed=1)
    values = [dict(net.named_parameters())[n] for n in full]
    found = [referee(with_parameters(full, sample), *values) for sample in x]
    got = fxhess.transform(net, wrt=fxhess.parameters(*names))(x)
    for a, name in enumerate(full):
        for b, other in enumerate(full):
            block = got if len(full) == 1 else got[name][other]
            assert_close(block.detach(), torch.stack([f[a][b] for f in found]))


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_hessian_of_a_loss_in_all_parameters(reduce):
    x, y = randn(6, 3, seed=1), randn(6, 2, seed=2)

    def loss(x, y):
        return (net(x) - y).square().sum(-1)

    hess = fxhess.transform(loss, ("gradient", "hessian"), wrt=fxhess.parameters(), reduce=reduce)
    got = hess(x, y)
    names = [f"net.{n}" for n, _ in net.named_parameters()]
    assert list(got.gradient) == names

    def total(*values):
        own = {n.removeprefix("net."): v for n, v in zip(names, values, strict=True)}
        out = (torch.func.functional_call(net, own, (x,)) - y).square().sum(-1)
        return out.sum() if reduce == "sum" else out.mean()

    want = referee(total, *net.parameters())
    for row, expected in zip(got.hessian.values(), want, strict=True):
        for block, reference in zip(row.values(), expected, strict=True):
            assert_close(block.detach(), reference)
    hess.verify(x, y)


def test_weights_that_change_and_weights_that_are_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return torch.tanh(self.b(torch.tanh(self.a(x)))).sum(-1)

    torch.manual_seed(0)
    model, x = Tied().double(), randn(2, 3, seed=1)

    def of_one(sample):
        return lambda w: torch.tanh(torch.tanh(sample @ w.T) @ w.T).sum(-1)

    hess = fxhess.transform(model, wrt=fxhess.parameters("a.weight"))
    for _ in range(2):
        want = torch.stack([referee(of_one(s), model.a.weight)[0][0] for s in x])
        assert_close(hess(x).detach(), want)
        with torch.no_grad():
            model.a.weight.mul_(0.5)
    with pytest.raises(InputError, match="twice"):
        fxhess.transform(model, wrt=fxhess.parameters("a.weight", "b.weight"))(x)


def test_an_argument_and_a_parameter():
    x = randn(3, 3, seed=1)
    hess = fxhess.transform(net, wrt=(fxhess.parameters("0.weight"), 0))
    weight = net[0].weight
    blocks = [
        referee(
            lambda w, s: torch.func.functional_call(net, {"0.weight": w}, (s[None],))[0], weight, s
        )
        for s in x
    ]
    got = hess(x)
    for a in range(2):
        for b in range(2):
            assert_close(got[a][b].detach(), torch.stack([f[a][b] for f in blocks]))
    hess.verify(x)
    third = torch.autograd.grad(got[1][1].square().sum(), weight)[0]
    direct = fxhess.transform(net)(x)
    assert_close(third, torch.autograd.grad(direct.square().sum(), weight)[0])


def test_a_shared_argument():
    """Of an argument that all samples share, every sample has its own Hessian."""
    x, cell = randn(4, 3, seed=1), randn(3, 3, seed=2)
    model = lambda x, cell: torch.sin(x @ cell).prod(-1)  # noqa: E731
    got = fxhess.transform(model, wrt="cell", in_dims={"cell": None})(x, cell)
    want = torch.stack([referee(lambda c, s=s: model(s, c), cell)[0][0] for s in x])
    assert_close(got, want)


def test_batch_norm_in_training_is_refused_for_parameters():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    hess = fxhess.transform(model, wrt=fxhess.parameters("0.weight"))
    with pytest.raises(SampleMixingError):
        hess(randn(4, 3))
    model.eval()
    hess.verify(randn(4, 3))
