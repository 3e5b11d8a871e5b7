"""No infinite derivative leaks from what is not chosen; nothing is paid where nothing is chosen."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from reference import ALL, assert_close, mlp
from torch import nn

import fxhess
from fxhess import oracle

FLOAT = torch.float64
MIXED = torch.tensor(
    [[-1.0, -0.5, -2.0], [0.0, 0.0, 0.0], [0.0, 1.0, -1.0], [0.5, 1.2, 2.2], [0.3, 2.0, 1.0]],
    dtype=FLOAT,
)
SOME = torch.tensor([[0.0, 1.0, -1.0], [0.5, 1.2, 2.2], [1.0, 0.0, 3.0]], dtype=FLOAT)
W = torch.tensor([[0.3, -1.0, 0.5], [0.2, 0.7, -0.4], [1.0, 0.1, 0.6]], dtype=FLOAT)
P = torch.tensor([0.5, 1.5, -1.0], dtype=FLOAT)


MASK = torch.tensor([[0, 0, -torch.inf], [-torch.inf] * 3, [0, 0, 0]], dtype=FLOAT)
ROW = torch.tensor([[True], [False], [True]])


def _scores(x):
    return x[:, :, None] * x[:, None].sin()


def _or(x, other=1.0):
    """x where it is positive: what the referees compute with."""
    return torch.where(x > 0, x, other)


def _finite_log(x):
    l = torch.log(x)  # noqa: E741
    return torch.where(torch.isfinite(l), l, x**3).sum(1)


def _whole(x, f, g):
    total = x.sum(1, keepdim=True)
    return torch.where(total > 0, f(x, total), g(x)).sum(1)


# name: (the model, the same written so that double backward is finite, x)
CASES = {
    "log of a clamp": (
        lambda x: torch.where(x > 0, torch.log(x.clamp_min(0)), x).sum(1),
        lambda x: torch.where(x > 0, torch.log(_or(x)), x).sum(1),
        MIXED,
    ),
    "square root": (
        lambda x: torch.where(x > 0, torch.sqrt(x), 0).sum(1),
        lambda x: torch.where(x > 0, torch.sqrt(_or(x)), 0).sum(1),
        MIXED,
    ),
    "masked_fill": (
        lambda x: torch.log(x).masked_fill(x <= 0, 0).sum(1) + (x**2).sum(1),
        lambda x: torch.log(_or(x)).sum(1) + (x**2).sum(1),
        MIXED,
    ),
    "gather": (
        lambda x: torch.log(x).gather(1, x.argmax(1, keepdim=True)).sum(1),
        lambda x: x.amax(1).log(),
        SOME,
    ),
    "slices": (
        lambda x: torch.log(x)[:, 1:].sin().sum(1) + x.square().sum(1),
        lambda x: torch.log(x[:, 1:]).sin().sum(1) + x.square().sum(1),
        torch.tensor([[0.0, 1.0, 2.0], [-1.0, 2.0, 3.0]], dtype=FLOAT),
    ),
    "index": (
        lambda x: torch.rsqrt(x)[:, [2, 1]].sin().sum(1),
        lambda x: torch.rsqrt(x[:, 1:]).sin().sum(1),
        torch.tensor([[0.0, 1.0, 2.0], [-1.0, 2.0, 3.0]], dtype=FLOAT),
    ),
    "a chain": (
        lambda x: torch.where(x > 0, torch.sin(x * torch.log(x)), x * x).sum(1),
        lambda x: torch.where(x > 0, torch.sin(_or(x) * torch.log(_or(x))), x * x).sum(1),
        MIXED,
    ),
    "chosen by the value itself": (
        _finite_log,
        lambda x: torch.where(x > 0, torch.log(_or(x)), x**3).sum(1),
        MIXED,
    ),
    "nan_to_num": (
        lambda x: torch.log(x).nan_to_num(0, 0, 0).sum(1) + (x**2).sum(1),
        lambda x: torch.log(_or(x)).sum(1) + (x**2).sum(1),
        MIXED,
    ),
    "clamp": (
        lambda x: torch.log(x * x).clamp_min(-5).square().sum(1),
        lambda x: torch.where(x == 0, 25.0, torch.log(_or(x * x)).square()).sum(1),
        MIXED,
    ),
    "relu": (
        lambda x: F.relu(torch.log(x.clamp_min(0))).square().sum(1) + x.square().sum(1),
        lambda x: F.relu(torch.log(_or(x))).square().sum(1) + x.square().sum(1),
        MIXED,
    ),
    "maximum": (
        lambda x: torch.maximum(torch.log(x.relu()), x).sum(1) + x.square().sum(1),
        lambda x: x.sum(1) + x.square().sum(1),
        MIXED,
    ),
    "amax": (
        lambda x: torch.amax(torch.log(x.relu()), 1) ** 2 + x.square().sum(1),
        lambda x: x.amax(1).log() ** 2 + x.square().sum(1),
        SOME,
    ),
    "max pooling": (
        lambda x: F.max_pool1d(torch.log(x.relu())[:, None], 3)[:, 0, 0].sin(),
        lambda x: x.amax(1).log().sin(),
        SOME,
    ),
    "division": (
        lambda x: torch.where(x != 0, x.sin() / x, 1).sum(1) + (x**4).sum(1),
        lambda x: (
            torch.where(x != 0, x.sin() / torch.where(x != 0, x, 1), 1).sum(1) + (x**4).sum(1)
        ),
        MIXED,
    ),
    "softmax of a masked row": (
        lambda x: (torch.where(ROW, torch.softmax(_scores(x) + MASK, -1), 0) @ x[..., None]).sum(
            (1, 2)
        ),
        lambda x: (torch.softmax(_scores(x)[:, [0, 2]] + MASK[[0, 2]], -1) @ x[..., None]).sum(
            (1, 2)
        ),
        MIXED,
    ),
    "log-softmax of a masked row": (
        lambda x: torch.log_softmax(_scores(x) + MASK, -1)[:, [2, 0], 1].sin().sum(1),
        lambda x: torch.log_softmax(_scores(x)[:, [2, 0]] + MASK[[2, 0]], -1)[..., 1].sin().sum(1),
        MIXED,
    ),
    "division by a constant": (
        lambda x: torch.where(P > 0, x.sin() / P.clamp_min(0), x**3).sum(1),
        lambda x: torch.where(P > 0, x.sin() / _or(P), x**3).sum(1),
        MIXED,
    ),
    "pow with a tensor": (
        lambda x: torch.where(x > 0, x**P, x * x).sum(1),
        lambda x: torch.where(x > 0, _or(x) ** P, x * x).sum(1),
        MIXED,
    ),
    "xlogy": (
        lambda x: torch.where(x > 0, torch.xlogy(x, x) ** 2, x * x).sum(1),
        lambda x: torch.where(x > 0, torch.xlogy(_or(x), _or(x)) ** 2, x * x).sum(1),
        MIXED,
    ),
    "overflow": (
        lambda x: torch.where(x < 50, torch.expm1(x), x * x).sum(1),
        lambda x: torch.where(x < 50, torch.expm1(x.clamp_max(50)), x * x).sum(1),
        torch.tensor([[1.0, 2.0, 2.0], [-2.0, 0.0, 1000.0]], dtype=FLOAT),
    ),
    "samples": (
        lambda x: _whole(x, lambda x, s: torch.log(s.clamp_min(0)) * x, torch.square),
        lambda x: _whole(x, lambda x, s: torch.log(_or(s)) * x, torch.square),
        MIXED,
    ),
    "samples through a layer": (
        lambda x: _whole(
            x, lambda x, s: torch.log(s) * torch.sin(torch.sqrt(s) @ W[:1]), torch.sin
        ),
        lambda x: _whole(
            x, lambda x, s: torch.log(_or(s)) * torch.sin(torch.sqrt(_or(s)) @ W[:1]), torch.sin
        ),
        MIXED,
    ),
    "nested": (
        lambda x: torch.where(x > 0, torch.where(x > 1, torch.log(x - 1), x.sqrt()), x**3).sum(1),
        lambda x: torch.where(
            x > 0, torch.where(x > 1, torch.log(_or(x - 1)), _or(x).sqrt()), x**3
        ).sum(1),
        torch.tensor([[-1.0, 0.5, 2.0], [0.2, 1.5, -3.0]], dtype=FLOAT),
    ),
    "determinants": (
        lambda x: torch.where(x[:, 0] > 0, 1 / torch.linalg.det(torch.diag_embed(x)), x[:, 1] ** 2),
        lambda x: torch.where(
            x[:, 0] > 0, 1 / torch.where(x[:, 0] > 0, x.prod(1), 1), x[:, 1] ** 2
        ),
        torch.tensor([[1.0, 2.0, 2.0], [0.0, 0.0, 1.0]], dtype=FLOAT),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_not_chosen_does_not_leak(name):
    model, referee, x = CASES[name]
    point = x.clone().requires_grad_()
    got = fxhess.transform(model, ALL)(point)
    assert_close(got.value, referee(x), what="value")
    assert_close(got.gradient, oracle.gradient(referee, x), what="gradient")
    assert_close(got.hessian, oracle.hessian(referee, x), what="hessian")
    # and a loss of them can be trained through
    (got.gradient.sum() + got.hessian.square().sum()).backward()
    plain = x.clone().requires_grad_()

    def loss(x):
        first = torch.autograd.functional.jacobian(lambda x: referee(x).sum(), x, True)
        second = torch.autograd.functional.hessian(lambda x: referee(x).sum(), x, True)
        return first.sum() + second.square().sum()

    loss(plain).backward()
    assert_close(point.grad, plain.grad, what="gradient of the result")


def test_a_value_used_twice_is_guarded_only_if_no_use_needs_it():
    """The logarithm is chosen at positive numbers, and used at all."""
    x = torch.tensor([[0.5, 2.0, -1.0]], dtype=FLOAT)

    def model(x):
        l = torch.log(x)  # noqa: E741
        return (torch.where(x > 1, l, 0.0) + l * l)[:, :2].sum(1)

    def plain(x):
        l = torch.log(x[:, :2])  # noqa: E741
        return (torch.where(x[:, :2] > 1, l, 0.0) + l * l).sum(1)

    assert_close(fxhess.transform(model)(x), oracle.hessian(plain, x))


def test_true_infinities_stay():
    hessian = fxhess.transform(lambda x: torch.where(x >= 0, x.sqrt(), x).sum(1))(
        torch.tensor([[0.0, 1.0]], dtype=FLOAT)
    )
    assert hessian[0, 0, 0] == -torch.inf and hessian[0, 1, 1] == -0.25


@pytest.mark.parametrize(
    "model",
    [
        mlp(4, 8, 8, 1),
        mlp(4, 8, 8, 1, activation=nn.ReLU),
        nn.Sequential(
            nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)
        ),
        lambda x: torch.exp(x).sum(1),
        lambda x: torch.logsumexp(x, 1),
        lambda x: torch.log_softmax(x, 1)[:, 0],
        lambda x: torch.cat([a.exp() for a in x.chunk(2, 1)], 1).sum(1),
        lambda x: torch.stack(x.exp().unbind(1)).prod(0),
    ],
)
def test_nothing_is_paid_where_nothing_singular_is_left_out(model, monkeypatch):
    from fxhess.passes import draft

    x = torch.randn(3, 4, dtype=FLOAT)
    model = model.double() if isinstance(model, nn.Module) else model
    fxhess.cache_clear()
    code = fxhess.transform(model, ALL).graph_module(x).code
    monkeypatch.setattr(draft, "guard", lambda *args: ({}, {}))
    fxhess.cache_clear()
    assert fxhess.transform(model, ALL).graph_module(x).code == code
    fxhess.cache_clear()
