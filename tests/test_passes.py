"""Passes as plain functions, before and after; contraction against ``torch.einsum``."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from reference import assert_close, mlp, randn
from torch import fx

import fxhess
from fxhess.capture import capture
from fxhess.closures import as_module
from fxhess.contraction import contract, evaluate
from fxhess.emit import VAL, Emitter
from fxhess.errors import InternalError
from fxhess.facts import Canonical, fact, is_active
from fxhess.passes.activity import mark_activity
from fxhess.passes.canonicalize import canonicalize
from fxhess.passes.check import check_canonical, check_graph
from fxhess.passes.plan import candidates
from fxhess.passes.simplify import simplify

aten = torch.ops.aten


def traced(function, *shapes) -> fx.GraphModule:
    """A function over tensors as a graph with stand-ins, the form that passes see."""
    emitter = Emitter()
    inputs = [emitter.placeholder(f"x{i}", torch.empty(s)) for i, s in enumerate(shapes)]
    out = function(*inputs)
    emitter.graph.output(out.node)
    return fx.GraphModule(torch.nn.Module(), emitter.graph)


def calls(graph: fx.Graph) -> list[str]:
    return [str(n.target) for n in graph.nodes if n.op == "call_function"]


# --- simplify: (before, after) --------------------------------------------------------------------


def _f(x, y):
    return torch.tanh(x) * torch.tanh(x) + y


def _f_after(x, y):
    t = torch.tanh(x)
    return t * t + y


def _unused(x, y):
    torch.exp(y)
    return torch.sin(x)


def _nested(x, y):
    return (x + y).exp() + (x + y).exp() * (y + x)


def _nested_after(x, y):
    e = (x + y).exp()
    return e + e * (y + x)


def _indexed(x, y):
    return x[:, 0:2] * x[:, 0:2] + x[:, 0:3][:, 1:]


def _indexed_after(x, y):
    a = x[:, 0:2]
    return a * a + x[:, 0:3][:, 1:]


REWRITTEN = {
    "equal operations are joined": (_f, _f_after),
    "unused ones are dropped": (_unused, lambda x, y: torch.sin(x)),
    "joined operands make equal operations": (_nested, _nested_after),
    "slices": (_indexed, _indexed_after),
    "a product with 1 is its other factor": (lambda x, y: 1 * x + y * 1.0, lambda x, y: x + y),
}
KEPT = {
    "numbers of another type": lambda x, y: x * 2 + x * 2.0,
    "random numbers": lambda x, y: aten.rand_like.default(x) + aten.rand_like.default(x),
    "dropout": lambda x, y: aten.bernoulli.p(x, 0.5) + aten.bernoulli.p(x, 0.5),
    "other arguments": lambda x, y: torch.sum(x, 0) + torch.sum(x, 1),
    "other keywords": lambda x, y: aten.add.Tensor(x, y, alpha=2) + aten.add.Tensor(x, y, alpha=3),
    "operands exchanged": lambda x, y: torch.sub(x, y) * torch.sub(y, x),
}


@pytest.mark.parametrize("name", REWRITTEN)
def test_simplify(name):
    before, after = (traced(f, (3, 3), (3, 3)) for f in REWRITTEN[name])
    x, y = randn(3, 3, seed=1), randn(3, 3, seed=2)
    want = before(x, y) if name != "slices" else None
    graph = simplify(before.graph)
    assert calls(graph) == calls(after.graph)
    check_graph(graph, "simplify")
    if want is not None:
        before.recompile()
        assert torch.equal(before(x, y), want)


@pytest.mark.parametrize("name", KEPT)
def test_simplify_does_not_fire(name):
    module = traced(KEPT[name], (3, 3), (3, 3))
    before = calls(module.graph)
    assert calls(simplify(module.graph)) == before


@pytest.mark.parametrize("name", ["_f", "_nested", "_indexed"])
def test_simplify_twice_is_once(name):
    graph = simplify(traced(globals()[name], (3, 3), (3, 3)).graph)
    once = calls(graph)
    assert calls(simplify(graph)) == once


# --- canonicalize ---------------------------------------------------------------------------------


def canonical(model, x: torch.Tensor, event_ndim: int = 1) -> Canonical:
    captured = capture(as_module(model), x, x.ndim - event_ndim)
    return mark_activity(canonicalize(captured, x))


W = randn(4, 6, seed=3)
LAYOUTS = {  # name: model of [B, 3, 4], event shapes that have to appear
    "views cost nothing": (
        lambda x: torch.tanh(x.reshape(-1, 4) @ W).view(-1, 3, 6).sum((1, 2)), [(3, 6)],
    ),
    "batch in the middle": (
        lambda x: torch.tanh(x.transpose(0, 1) @ W).sum(0).sum(-1), [(3, 6)],
    ),
    "batch last": (lambda x: torch.tanh(x.permute(1, 2, 0)).sum((0, 1)), [(3, 4)]),
    "an axis cut in two": (lambda x: x.view(-1, 3, 2, 2).exp().sum((1, 2, 3)), [(3, 2, 2)]),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_canonical_values_have_the_batch_in_front(name):
    model, shapes = LAYOUTS[name]
    got = canonical(model, randn(5, 3, 4), 2)
    check_canonical(got, "the test")
    full = got.x.meta[VAL].shape[0]
    events = set()
    for node in got.nodes():
        if fact(node) is not None:
            assert node.meta[VAL].shape[0] in (1, full)
            events.add(got.event(node))
    assert set(shapes) <= events


@pytest.mark.parametrize("name", LAYOUTS)
def test_canonical_graph_computes_the_model(name):
    model, _ = LAYOUTS[name]
    x = randn(5, 3, 4)
    value = fxhess.transform(model, "value", event_ndim=2)(x)
    assert_close(value, model(x), 1e-14)


def test_views_leave_no_operation():
    model = lambda x: torch.sin(x.view(-1, 4)).view(-1, 12).view(-1, 3, 4).sum((1, 2))  # noqa: E731
    got = canonical(model, randn(5, 3, 4), 2)
    operators = [fact(n).operator for n in got.nodes() if n.op == "call_function" and fact(n)]
    assert operators == [aten.sin.default, evaluate]


def test_activity_ends_where_derivatives_end():
    model = lambda x: (x.detach().exp() * x + (x > 0) * 2.0 + x.round()).sum(-1)  # noqa: E731
    active = {
        str(fact(n).operator): is_active(n)
        for n in canonical(model, randn(5, 4)).nodes()
        if n.op == "call_function" and fact(n)
    }
    assert not active["aten.exp.default"] and not active["aten.round.default"]
    assert not active["aten.gt.Scalar"]
    assert any(active.values())


def test_bases_are_narrow_and_on_every_path():
    deep = canonical(mlp(6, 9, 2, 9, 1), randn(5, 6))
    widths = [math.prod(deep.event(n)) for n in candidates(deep)]
    assert 2 in widths and all(w <= 9 for w in widths)
    skip = canonical(lambda x: (torch.tanh(x @ W) ** 2).sum(-1) + x.exp().sum(-1), randn(5, 4))
    assert all(math.prod(skip.event(n)) == 1 for n in candidates(skip))


def test_the_checker_of_graphs_finds_a_use_before_its_definition():
    module = traced(lambda x: torch.exp(torch.sin(x)), (3,))
    sin, exp = (n for n in module.graph.nodes if n.op == "call_function")
    sin.append(exp)
    exp.append(sin)
    with pytest.raises(InternalError, match="after shuffling"):
        check_graph(module.graph, "shuffling")


def test_the_checker_of_graphs_finds_a_missing_stand_in():
    module = traced(lambda x: torch.exp(torch.sin(x)), (3,))
    del next(n for n in module.graph.nodes if n.op == "call_function").meta[VAL]
    with pytest.raises(InternalError, match="no stand-in"):
        check_graph(module.graph, "a pass")


# --- contraction ----------------------------------------------------------------------------------


@st.composite
def equations(draw):
    """Up to five factors over letters of sizes 1 to 4; axes of size 1 broadcast."""
    letters = "abcdef"[: draw(st.integers(1, 6))]
    sizes = {a: draw(st.integers(1, 4)) for a in letters}
    terms = draw(
        st.lists(
            st.lists(st.sampled_from(letters), unique=True, max_size=4), min_size=1, max_size=5
        )
    )
    shapes = [tuple(draw(st.sampled_from([1, sizes[a]])) for a in term) for term in terms]
    used = [a for a in letters if any(a in t for t in terms)]
    output = draw(st.lists(st.sampled_from(used), unique=True)) if used else []
    scale = draw(st.sampled_from([1.0, -2.5]))
    return terms, shapes, output, scale


def _reference(terms, operands, output, scale):
    """The meaning: expand every axis to the size of its label, and let torch.einsum sum.  A label
    that nothing varies along is one entry long."""
    sizes = {}
    for term, t in zip(terms, operands, strict=True):
        for a, n in zip(term, t.shape, strict=True):
            sizes[a] = max(sizes.get(a, 1), n)
    full = [t.expand([sizes[a] for a in term]) for term, t in zip(terms, operands, strict=True)]
    equation = ",".join(map("".join, terms)) + "->" + "".join(output)
    return scale * torch.einsum(equation, *full)


def _contracted(terms, shapes, output, scale):
    emitter = Emitter()
    inputs = [emitter.placeholder(f"x{i}", torch.empty(s).double()) for i, s in enumerate(shapes)]
    out = contract(emitter, [*zip(inputs, terms, strict=True), (scale, ())], output)
    emitter.graph.output(out.node)
    return fx.GraphModule(torch.nn.Module(), emitter.graph), out


@settings(max_examples=150)
@given(equations(), st.integers(0, 9))
def test_contract_is_einsum(equation, seed):
    terms, shapes, output, scale = equation
    operands = [randn(*s, seed=seed + i) for i, s in enumerate(shapes)]
    module, out = _contracted(terms, shapes, output, scale)
    got, want = module(*operands), _reference(terms, operands, output, scale)
    assert tuple(out.val.shape) == got.shape
    assert_close(got.expand(want.shape), want, 1e-12)


@settings(max_examples=100)
@given(equations())
def test_evaluate_is_einsum(equation):
    terms, shapes, output, scale = equation
    operands = [randn(*s, seed=i) for i, s in enumerate(shapes)]
    got = evaluate(terms, output, {}, scale, *operands)
    assert_close(got, _reference(terms, operands, output, scale), 1e-12)


def test_contract_of_numbers_is_a_number():
    assert contract(Emitter(), [(2.0, ()), (3.0, ())], []) == 6.0
    assert contract(Emitter(), [(2.0, ())], [], universe={"a": 5}) == 10.0


def test_contract_counts_labels_that_nothing_varies_along():
    emitter = Emitter()
    x = emitter.placeholder("x", torch.empty(3, 1).double())
    out = contract(emitter, [(x, ("a", "b"))], ("a",), universe={"a": 3, "b": 4})
    emitter.graph.output(out.node)
    module = fx.GraphModule(torch.nn.Module(), emitter.graph)
    value = randn(3, 1)
    assert_close(module(value), 4 * value[:, 0])


def test_many_factors_are_ordered_by_cost():
    """A chain of matrices and a vector: products from the vector on, never matrix by matrix."""
    n = 30
    module, _ = _contracted(["ab", "bc", "cd", "d"], [(n, n)] * 3 + [(n,)], ["a"], 1.0)
    assert all(
        len(node.meta[VAL].shape) <= 2 and node.meta[VAL].numel() <= n
        for node in module.graph.nodes
        if node.op == "call_function" and node.target is torch.matmul
    )
