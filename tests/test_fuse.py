"""Fusion for compilers: products of tiny matrices, written entry by entry, before and after."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from reference import assert_close, mlp, randn
from torch import fx

import fxhess
from fxhess import cost, rates
from fxhess.passes.fuse import fuse, fusible


def _sized(module, *inputs):
    """The module with every value's stand-in on its node."""
    values = {}

    class Keep(fx.Interpreter):
        def run_node(self, node):
            values[node] = super().run_node(node)
            return values[node]

    Keep(module).run(*inputs)
    for node in module.graph.nodes:
        if isinstance(values.get(node), torch.Tensor):
            node.meta["val"] = values[node]
    return module


def _square(J, c):
    return torch.matmul(J.permute(1, 0, 2), (J * c).permute(1, 2, 0))


def _functional(function):
    """With ``torch.permute`` as a function, as generated programs have it."""
    module = fx.symbolic_trace(function)
    for node in module.graph.nodes:
        if node.op == "call_method" and node.target == "permute":
            node.op, node.target = "call_function", torch.permute
            node.args = (node.args[0], list(node.args[1:]))
    return module


J, C = randn(3, 7, 5), randn(7, 5, seed=1)
K, D = randn(3, 7, 6, seed=2), randn(7, 6, seed=3)
M = randn(7, 3, 3, seed=4)
A, B = randn(7, 2, 5, seed=5), randn(7, 5, 3, seed=6)


def plain(a, b):
    return torch.matmul(a, b)


def symmetric(J, c):
    A = _square(J, c)
    return A + A.permute(0, 2, 1)


def layers(J, c, K, d, m):
    A = m.permute(0, 2, 1) + _square(J, c) + _square(J, c * c) + _square(K, d)
    return A + A.permute(0, 2, 1)


def general(J, c, K, m):
    A = torch.matmul(J.permute(1, 0, 2), (K[..., :5] * c).permute(1, 2, 0)) + m
    A = A + _square(J, c)
    return A + A.permute(0, 2, 1)


def one_sided(J, c, m):
    return _square(J, c).permute(0, 2, 1) + m


def used_twice(J, c):
    A = _square(J, c)
    H = A + A.permute(0, 2, 1)
    return H + 2.0 * A


def doubled(J, c):
    A = _square(J, c)
    return A + A


def by_rows(J):  # c differs from row to row: not symmetric
    c = torch.arange(1.0, 4.0, dtype=torch.float64)[:, None, None]
    A = torch.matmul(J.permute(1, 0, 2), (J * c).permute(1, 2, 0))
    return A + A.permute(0, 2, 1)


# Function, its inputs, the sums that are left (None: any), whether the result is symmetric.
CASES = {
    "plain": (plain, (A, B), 1, False),
    "symmetric": (symmetric, (J, C), 6, True),
    "layers": (layers, (J, C, K, D, M), 12, True),  # one sum for each width
    "general": (general, (J, C, K, M), 6, True),
    "one_sided": (one_sided, (J, C, M), 9, False),
    "used_twice": (used_twice, (J, C), 10, False),
    "doubled": (doubled, (J, C), 9, False),
    "by_rows": (by_rows, (J,), 6, True),
}


@pytest.mark.parametrize("name", CASES)
def test_the_same_numbers(name):
    function, inputs, sums, is_symmetric = CASES[name]
    module = _functional(function)
    before = _sized(module, *inputs)
    assert fusible(before.graph)
    after = fx.GraphModule(before, fuse(before.graph))
    got = after(*inputs)
    assert_close(got, function(*inputs), 1e-13)
    targets = [node.target for node in after.graph.nodes]
    assert torch.matmul not in targets
    assert targets.count(torch.sum) == sums
    assert not is_symmetric or torch.equal(got, got.mT)


def test_what_is_not_tiny_stays():
    for function, inputs in (
        (plain, (randn(7, 5, 6), randn(7, 6, 4))),  # 20 entries
        (plain, (randn(3, 5), randn(5, 3))),  # one matrix
        (lambda a: a + a.permute(0, 2, 1), (M,)),
    ):
        module = _sized(_functional(function), *inputs)
        assert not fusible(module.graph)
        copy = fx.GraphModule(module, fuse(module.graph))
        assert [n.target for n in copy.graph.nodes] == [n.target for n in module.graph.nodes]


def test_written_into_a_given_tensor():
    def function(J, c, out):
        A = _square(J, c)
        return torch.add(A, A.permute(0, 2, 1), out=out)

    out = torch.zeros(7, 3, 3, dtype=torch.float64)
    module = _sized(_functional(function), J, C, out)
    (result,) = next(n for n in module.graph.nodes if n.op == "output").args
    next(n for n in module.graph.nodes if n.op == "output").args = (None,)
    assert result.kwargs
    after = fx.GraphModule(module, fuse(module.graph))
    out.zero_()
    after(J, C, out)
    assert_close(out, symmetric(J, C), 1e-13)


def test_tiny_products_are_free_of_calls_where_they_are_compiled():
    """Batched products of tiny results are summed within other passes; others cost as before."""
    graph = fx.Graph()
    known = {}
    for name, rows in (("tiny", 2), ("large", 40)):
        operands = [graph.placeholder(f"{name}_{i}") for i in range(2)]
        operands[0].meta["val"] = randn(500, rows, 64)
        operands[1].meta["val"] = randn(500, 64, rows)
        node = graph.call_function(torch.matmul, tuple(operands))
        node.meta["val"] = randn(500, rows, rows)
        table = rates.BUILT_IN["cpu", 8]
        known[name] = cost.seconds(node, table), cost.seconds(node, table, compiled=True)
    assert 0 < 2 * known["tiny"][1] < known["tiny"][0]
    assert known["large"][0] == known["large"][1]


def test_a_compiled_module_is_planned_as_compiled(monkeypatch):
    """Two tangents of a net of width 64: run eagerly the tiny closings cost more than to pull
    them back, where flat products are fast; compiled they do not."""
    flat = ((2, 5e9), (8, 3.4e10), (16, 1.3e11), (32, 2.9e11), (64, 4.3e11), (256, 4.5e11))
    fast = replace(rates.BUILT_IN["cpu", 4], flat=flat)
    monkeypatch.setitem(rates.BUILT_IN, ("cpu", 4), fast)
    assert rates.rates_for(torch.device("cpu"), torch.float32) is fast
    model = mlp(2, 64, 64, 64, 64, 1).float()
    x = randn(5, 2).float()
    endings = {}
    for compiled in (False, True):
        hess = fxhess.transform(model, compile=compiled)
        program = hess._specialized(hess.prepared((x,), {})).program
        endings[compiled] = {term[1] for term in program.terms}
    assert endings == {False: {"pull"}, True: {"close"}}
