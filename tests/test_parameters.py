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


def test_newtons_method_by_products_alone():
    """Newton-CG on a loss: products with its Hessian in all parameters, and what they must be."""
    x, y = randn(40, 3, seed=1), torch.randint(0, 3, (40,), generator=_generator(2))
    model = nn.Linear(3, 3).double()

    def loss(x, y):
        each = nn.functional.cross_entropy(model(x), y, reduction="none")
        return each + 0.05 * sum(p.square().sum() for p in model.parameters())

    of = fxhess.transform(
        loss, ("value", "gradient", "hvp", "quadratic"), wrt=fxhess.parameters(), reduce="mean"
    )
    parameters = list(model.parameters())
    v = {f"model.{n}": randn(*p.shape, seed=5) for n, p in model.named_parameters()}
    got = of(x, y, vector=v)
    grads = torch.autograd.grad(loss(x, y).mean(), parameters, create_graph=True)
    along = sum((g * w).sum() for g, w in zip(grads, v.values(), strict=True))
    for a, b, g, w in zip(got.gradient.values(), got.hvp.values(), grads,
                          torch.autograd.grad(along, parameters), strict=True):  # fmt: skip
        assert_close(a.detach(), g.detach())
        assert_close(b.detach(), w)
    assert_close(got.quadratic.detach(), sum((a * v[n]).sum() for n, a in got.hvp.items()).detach())
    with torch.no_grad():
        for _ in range(6):
            _conjugate_gradients(model, of, x, y)
        norms = [g.norm() for g in of(x, y, vector=v).gradient.values()]
    assert max(norms) < 1e-12


def _conjugate_gradients(model, of, x, y):
    """One step of Newton's method."""
    r = {n: -g for n, g in of(x, y, vector=dict(_zeros(model))).gradient.items()}
    step, p = {n: torch.zeros_like(g) for n, g in r.items()}, dict(r)
    norm = sum(g.square().sum() for g in r.values())
    for _ in range(12):
        if norm < 1e-30:
            break
        Hp = of(x, y, vector=p)
        rate = norm / Hp.quadratic
        step = {n: s + rate * p[n] for n, s in step.items()}
        r = {n: g - rate * Hp.hvp[n] for n, g in r.items()}
        before, norm = norm, sum(g.square().sum() for g in r.values())
        p = {n: g + norm / before * p[n] for n, g in r.items()}
    for n, w in model.named_parameters():
        w += step[f"model.{n}"]


def _zeros(model):
    return ((f"model.{n}", torch.zeros_like(w)) for n, w in model.named_parameters())


def _generator(seed):
    return torch.Generator().manual_seed(seed)


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
