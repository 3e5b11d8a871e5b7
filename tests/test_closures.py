"""What a function reaches through other functions, objects and containers stays live."""

from __future__ import annotations

import functools
import sys
import types
from dataclasses import dataclass, field

import pytest
import torch
from reference import ALL, assert_close, mlp, randn
from torch import nn

import fxhess
from fxhess import oracle
from fxhess.closures import FunctionModule, reached

X = randn(3, 4)


@dataclass
class Parts:
    """What all the models below are made of; each reaches them in another way."""

    net: nn.Module = field(default_factory=lambda: mlp(4, 3, 1))
    w: torch.Tensor = field(default_factory=lambda: randn(4, seed=2).requires_grad_())

    def __call__(self, x):
        return torch.tanh(x * self.w).sum(-1) * self.net(x).squeeze(-1)

    def energy(self, x):
        return self(x)


class Slots:
    __slots__ = ("parts",)

    def __init__(self, parts):
        self.parts = parts


class Indirect:
    def __init__(self, parts):
        self.inner = parts

    @property
    def twice(self):
        return self.inner.energy

    def by_property(self, x):
        return self.twice(x)

    @staticmethod
    def apply(parts, x):
        return parts.energy(x)

    def by_static(self, x):
        return self.apply(self.inner, x)


PARTS = Parts()
library = types.ModuleType("a_library_of_the_user")
library.PARTS = PARTS
exec("def energy(x):\n    return PARTS(x)", library.__dict__)


def _through_global(x):
    return PARTS.energy(x)


def _two_functions(x):
    return _through_global(x).sin()


def _closures(parts):
    net, w = parts.net, parts.w

    def inner(x):
        return torch.tanh(x * w).sum(-1) * net(x).squeeze(-1)

    return lambda x: inner(x)


def _containers(parts):
    table = {"nets": [(parts.net,)], 3: {"w": parts.w}}
    return lambda x: torch.tanh(x * table[3]["w"]).sum(-1) * table["nets"][0][0](x).squeeze(-1)


def _wrapped(parts):
    @functools.wraps(parts.energy)
    def function(*args):
        return parts.energy(*args)

    return function


def _slots(parts):
    held = Slots(parts)
    return lambda x: held.parts.energy(x)


def _default(parts):
    def function(x, *, parts=parts):
        return parts(x)

    return function


WAYS = {
    "an object": lambda p: p,
    "a bound method": lambda p: p.energy,
    "a global": lambda p: _through_global,
    "two functions": lambda p: _two_functions,
    "two closures": _closures,
    "containers": _containers,
    "a partial of a function": lambda p: functools.partial(lambda f, x: f(x), p.energy),
    "a keyword of a partial": lambda p: functools.partial(lambda x, f: f(x), f=p),
    "wraps": _wrapped,
    "slots": _slots,
    "a default": _default,
    "a property": lambda p: Indirect(p).by_property,
    "a static method": lambda p: Indirect(p).by_static,
    "a Python module": lambda p: lambda x: library.energy(x),
}


@pytest.mark.parametrize("name", WAYS)
def test_reached_tensors_and_modules_are_live(name):
    parts = PARTS
    net, w = parts.net, parts.w
    model = WAYS[name](parts)
    hess = fxhess.transform(model, ALL)
    got = hess(X)
    assert_close(got.hessian.detach(), oracle.hessian(model, X))
    wanted = [w, *net.parameters()]
    grads = torch.autograd.grad(got.hessian.square().sum(), wanted)
    assert all(g.abs().max() > 0 for g in (grads[0], grads[1]))
    assert {id(p) for p in hess.parameters()} >= {id(p) for p in net.parameters()}
    with torch.no_grad():
        w.neg_()
        net[0].weight.neg_()
    assert_close(hess(X).hessian.detach(), oracle.hessian(model, X))
    values = {id(v) for _, _, v in reached(model)}
    assert {id(net), id(w)} <= values


def test_what_is_put_in_place_is_followed():
    parts = Parts()
    model = lambda x: parts.energy(x)  # noqa: E731
    hess = fxhess.transform(model, ALL)
    hess(X)
    parts.net, parts.w = mlp(4, 3, 1, seed=9), randn(4, seed=8).requires_grad_()
    got = hess(X).hessian
    assert_close(got.detach(), oracle.hessian(model, X))
    assert torch.autograd.grad(got.square().sum(), parts.w)[0].abs().max() > 0


class Net(nn.Module):
    """A module with parameters that it does not know of."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4).double()
        self.hidden = [randn(4).requires_grad_()]

    def forward(self, x):
        return (self.linear(x) * self.hidden[0]).tanh().sum(-1)


def test_a_parameter_in_a_list_of_a_module_has_its_gradient():
    """Held where no path leads: by the tensor itself."""
    net = Net()
    H = fxhess.transform(net)(X)
    H.square().sum().backward()
    plain = net.hidden[0].detach().clone().requires_grad_()
    whole = torch.autograd.functional.hessian(
        lambda x: (net.linear(x) * plain).tanh().sum(), X, create_graph=True
    )
    whole.square().sum().backward()
    assert_close(net.hidden[0].grad, plain.grad)


def test_only_what_code_names_is_reached():
    class Holder:
        def __init__(self):
            self.used, self.spare = mlp(4, 1), mlp(4, 1)

        def run(self, x):
            return self.used(x)

    holder = Holder()
    names = [name for name, _, _ in reached(holder.run)]
    assert names == ["self/used"]
    assert [m for m in fxhess.transform(holder.run).modules() if m is holder.spare] == []


def test_large_containers_and_cycles_end():
    loop: list = [randn(2)]
    loop += [loop, *range(50_000)]
    model = lambda x: (x * loop[0]).sum(-1)  # noqa: E731
    assert [name for name, _, _ in reached(model)] == ["loop/item0"]


def test_libraries_are_not_looked_into():
    model = lambda x: torch.nn.functional.softplus(x).sum(-1) + len(sys.path)  # noqa: E731
    assert list(reached(model)) == []


@pytest.mark.parametrize("name", ["function", "training", "forward", "discover"])
def test_names_that_a_module_has_itself(name):
    net = nn.Linear(2, 2)
    scope = {name: net}
    exec(f"def outer({name}):\n  return lambda x: {name}(x).tanh().sum(-1)", scope)
    module = FunctionModule(scope["outer"](net))
    assert {id(p) for p in module.parameters()} == {id(p) for p in net.parameters()}
    x = torch.randn(3, 2)
    assert fxhess.transform(scope["outer"](net))(x).shape == (3, 2, 2)
    partial = functools.partial(nn.Sequential(net, nn.Tanh()))
    assert next(n for n, _ in FunctionModule(partial).named_parameters()).endswith("0.weight")
