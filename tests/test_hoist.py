"""What depends on weights alone: divided into what is kept from call to call and what is not, and
never stale."""

from __future__ import annotations

import pytest
import torch
from reference import assert_close, mlp, randn
from torch import fx

import fxhess
from fxhess import execute, oracle
from fxhess.passes.hoist import divide


def _prologue(results, **sizes):
    """A prologue of tensors of these sizes; ``results`` writes it."""
    graph = fx.Graph()
    places = {}
    for name, size in sizes.items():
        places[name] = graph.placeholder(name)
        places[name].meta["val"] = torch.empty(size)

    def call(target, *args):
        node = graph.call_function(target, args)
        node.meta["val"] = target(*(a.meta["val"] if isinstance(a, fx.Node) else a for a in args))
        return node

    graph.output(tuple(results(call, **places)))
    return graph


def _names(graph):
    return [n.name for n in graph.nodes if n.op == "placeholder"]


def test_what_is_worth_keeping():
    def results(call, a, b, c):
        square = call(torch.mul, call(torch.unsqueeze, a, 0), call(torch.unsqueeze, a, 1))
        return [
            call(torch.t, b),  # a view
            square,  # 100 operations for each entry of a
            call(torch.mul, c, c),  # one for each entry of c
            call(torch.add, a, a),  # little, of what is compared anyway
            call(torch.mul, square, c),  # much, but of c as well
            b,
        ]

    graph = _prologue(results, b=(100, 100), a=(100,), c=(100, 100))
    kept, rest, taken, which = divide(graph, 8)
    assert which == [False, True, False, True, False, False]
    assert taken == [1] and _names(kept) == ["a"] and _names(rest) == ["b", "a", "c"]
    inputs = [torch.randn(100, 100), torch.randn(100), torch.randn(100, 100)]
    want = fx.GraphModule({}, graph)(*inputs)
    old = iter(fx.GraphModule({}, kept)(inputs[1]))
    new = iter(fx.GraphModule({}, rest)(*inputs))
    for keep, result in zip(which, want, strict=True):
        assert torch.equal(next(old if keep else new), result)


def test_nothing_worth_keeping():
    graph = _prologue(lambda call, a: [call(torch.t, a), a], a=(5, 5))
    kept, rest, taken, which = divide(graph, 8)
    assert not taken and which == [False, False]
    assert fx.GraphModule({}, kept)() == () and len(fx.GraphModule({}, rest)(torch.ones(5, 5))) == 2


@pytest.mark.parametrize("change", ["in place", "through .data", "replaced"])
def test_never_stale(change, monkeypatch):
    monkeypatch.setattr(execute, "_WORTHWHILE", 0)
    model = mlp(20, 100, 40, 1).requires_grad_(False)
    hess = fxhess.transform(model)
    x = randn(3, 20)
    hess(x)
    call = hess._read((x,), {})
    keeping = hess._found(call).program.execution.keeping
    assert any(keeping.which) and not all(keeping.which)
    for i, parameter in enumerate(model.parameters()):
        fresh = randn(*parameter.shape, seed=i)
        if change == "in place":
            parameter.copy_(fresh)
        elif change == "through .data":
            parameter.data[...] = fresh
        else:
            parameter.data = fresh
        assert_close(hess(x), oracle.hessian(model, x))
