"""Tangents near an axis: colours in place of directions, where windows of positions never meet."""

import itertools
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxhess
from fxhess import pipeline
from fxhess.kinds import Window
from fxhess.passes.colours import colours
from fxhess.passes.draft import Draft, Piece
from fxhess.passes.plan import Plan
from tests.reference import check, randn

_PLAIN = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TURNED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_SIZES = {1: (9, 15), 2: (5, 8), 3: (4, 5)}


class Residual(nn.Module):
    """A curved product of a branch with its own input."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return torch.tanh(x + self.inner(x)) * x


class Head(nn.Module):
    """Position by position, then one or several sums."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, x):
        y = F.softplus(x).flatten(1) if x.ndim > 1 else x
        return torch.stack([(y * (k + 1.5)).sin().sum(1) for k in range(self.outputs)], 1)


def drawn(seed):
    """A random net of convolutions, poolings and residuals, and a batch for it."""
    pick = random.Random(seed)
    torch.manual_seed(seed)
    rank = pick.choice([1, 1, 2, 2, 3])

    def convolution():
        options = {
            "stride": pick.randint(1, 3),
            "padding": pick.randint(0, 2),
            "dilation": pick.randint(1, 2),
            "groups": pick.choice([1, 2]),
        }
        if pick.random() < 0.3:
            extra = pick.randint(0, options["stride"] - 1)
            return _TURNED[rank](2, 2, pick.randint(1, 3), **options, output_padding=extra)
        return _PLAIN[rank](2, 2, pick.randint(1, 3), **options)

    def layer():
        kind = pick.choice(["conv", "conv", "conv", "pool", "share", "residual"])
        if kind == "pool" and rank > 1:
            pool = {2: nn.AvgPool2d, 3: nn.AvgPool3d}[rank]
            return [
                pool(2, pick.randint(1, 2), padding=1, ceil_mode=pick.random() < 0.5),
                nn.SiLU(),
            ]
        if kind == "share" and rank == 2:
            return [nn.AdaptiveAvgPool2d(pick.randint(2, 5)), nn.Tanh()]
        if kind == "residual":
            k = pick.choice([1, 3])
            return [Residual(_PLAIN[rank](2, 2, k, padding=k // 2))]
        return [convolution(), nn.Tanh()]

    while True:
        layers = [nn.Tanh()] if pick.random() < 0.5 else []
        for _ in range(pick.randint(1, 3 if rank == 1 else 2)):
            layers += layer()
        net = nn.Sequential(*layers, Head(pick.choice([1, 1, 2]))).double()
        x = randn(2, 2, *(pick.randint(*_SIZES[rank]) for _ in range(rank)), seed=seed)
        try:
            net(x)
        except RuntimeError:  # a kernel larger than the image
            continue
        return net, x


def force(patch, choice):
    """Make plans of one piece from x on, with the numbers of colours at the place ``choice`` of
    those tried (none where there are fewer); returns the list of what was taken."""
    taken = []

    def plan(canonical, strategy, output, given, compiled):
        draft = Draft(canonical, given)
        draft.reverse()
        tried = colours(draft, canonical.x)[choice : choice + 1]
        taken.extend(tried)
        return Plan((Piece(canonical.x, 0, *tried),))

    patch.setattr(pipeline, "make_plan", plan)
    fxhess.cache_clear()
    return taken


def verify(patch, seeds):
    """All numbers of colours tried, of random nets; how many there were."""
    count = 0
    for seed in seeds:
        net, x = drawn(seed)
        for choice in itertools.count():
            taken = force(patch, choice)
            check(net, x, x.ndim - 1)
            count += len(taken)
            if not taken:
                break
    return count


def test_random_nets_with_every_number_of_colours(monkeypatch):
    assert verify(monkeypatch, range(5)) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("block", range(10))
def test_many_random_nets_with_every_number_of_colours(monkeypatch, block):
    assert verify(monkeypatch, range(100 + 20 * block, 120 + 20 * block)) >= 8


def small():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.Tanh(),
        nn.Flatten(-3), nn.Linear(256, 1),
    ).double()  # fmt: skip


def colours_of(net, x):
    """How many colours the planner took for each axis of the image."""
    graph = fxhess.transform(net, event_ndim=3).graph_module(x).graph
    return [n.args[1] for n in graph.nodes if getattr(n.target, "__name__", "") == "seeds"]


def test_the_planner_takes_colours_where_windows_are_small():
    x = randn(3, 1, 20, 20, seed=1)
    assert colours_of(small(), x)
    steps = fxhess.transform(small(), event_ndim=3).explain(x).steps
    assert "near" in {t.structure for o in steps for t in o.step.tangents}
    check(small(), x[:1], 3)
    check(small(), x[:0], 3)


def test_no_colours_where_every_window_covers_the_image():
    net = nn.Sequential(nn.Conv2d(1, 4, 5, padding=2), nn.Tanh(), nn.Flatten(-3), nn.Linear(36, 1))
    x = randn(2, 1, 3, 3, seed=2)
    assert not colours_of(net.double(), x)
    check(net.double(), x, 3)


def test_gradients_flow_through_colours():
    net, x = small(), randn(2, 1, 20, 20, seed=3).requires_grad_()
    weights = randn(1, 20, 20, 1, 20, 20, seed=4)
    hess = fxhess.transform(net, event_ndim=3)
    assert colours_of(net, x)
    inputs = [x, *net.parameters()]
    ours = torch.autograd.grad((hess(x) * weights).sum(), inputs, allow_unused=True)
    batched = torch.func.vmap(torch.func.hessian(lambda v: net(v).sum()))(x)
    theirs = torch.autograd.grad((batched * weights).sum(), inputs, allow_unused=True)
    for got, want in zip(ours, theirs, strict=True):
        if want is not None and want.abs().max() > 0:
            torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


@pytest.mark.slow
def test_compiled_programs_have_colours_too():
    net, x = small().requires_grad_(False), randn(3, 1, 20, 20, seed=5)
    hess = fxhess.transform(net, event_ndim=3, compile=True)
    torch.testing.assert_close(hess(x), fxhess.transform(net, event_ndim=3)(x))


@pytest.mark.parametrize(
    "outer", [Window.of(2, -1, 1), Window.of(1, 0, 2), Window.of(3, -2, 4), Window.of(1, 0, 0)]
)
@pytest.mark.parametrize("inner", [Window.of(1, -1, 1), Window.of(2, 0, 3), Window.of(3, 1, 2)])
def test_windows_of_windows(outer, inner):
    def positions(window, o):
        first, last = window.ends(o)
        return set(range(first, last + 1))

    both = outer.then(inner)
    for o in range(-5, 6):
        reached = set().union(*(positions(inner, i) for i in positions(outer, o)))
        assert reached <= positions(both, o)
        assert len(positions(both, o)) <= both.width
        for i in range(-30, 31):
            assert (i in positions(outer, o)) == (o in positions(outer.reversed(), i))
    joined = outer.joined(inner)
    assert (joined is None) == (outer.step != inner.step)
    if joined is not None:
        assert positions(outer, 3) | positions(inner, 3) <= positions(joined, 3)
