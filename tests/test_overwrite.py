"""Programs that overwrite what they need no more, and the order that holds least."""

from __future__ import annotations

import operator
import random

import pytest
import torch
from reference import assert_close, mlp, randn
from torch import fx, nn

import fxhess
from fxhess import _lanes, cost, lanes, oracle, overwrite
from fxhess.emit import VAL, Emitter, nominal_batch
from fxhess.execute import Execution
from fxhess.passes.order import order

aten = torch.ops.aten
SHAPES = [(5, 4), (4, 5), (5, 1), (1, 4)]
FUNCTIONS = [torch.sin, aten.tanh.default, torch.square, aten.sigmoid.default, operator.neg]
ARITHMETIC = [operator.add, operator.sub, operator.mul, torch.mul, aten.add.Tensor]


def random_graph(seed: int) -> tuple[fx.Graph, list[torch.Tensor]]:
    """A program of pointwise operations, views and products, and inputs for it."""
    rng = random.Random(seed)
    emitter = Emitter()
    inputs = [randn(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    values = [emitter.placeholder(f"p{i}", t, True) for i, t in enumerate(inputs)]
    for _ in range(40):
        a = rng.choice(values[-8:])
        match rng.randrange(8):
            case 0:
                made = emitter.call(rng.choice(FUNCTIONS), a)
            case 1:
                made = emitter.call(rng.choice(ARITHMETIC[:3]), rng.choice([2.0, -0.5]), a)
            case 2:
                made = emitter.call(torch.permute, a, [1, 0])
            case 3:
                made = emitter.call(torch.unsqueeze, a, 0)[0]
            case 4:
                made = emitter.call(torch.reshape, a, tuple(reversed(a.val.shape)))
            case 5:
                inner = [b for b in values if b.val.shape[0] == a.val.shape[1]]
                made = emitter.call(torch.matmul, a, rng.choice(inner)) if inner else a
            case _:
                fitting = [b for b in values[-12:] if _broadcast(a, b)]
                made = emitter.call(rng.choice(ARITHMETIC), a, rng.choice(fitting))
        if made is not a:
            values.append(made)
    results = rng.sample(values[-10:], 3)
    emitter.graph.output(tuple(v.node for v in results))
    return emitter.graph, inputs


def _broadcast(a, b) -> bool:
    return all(m == n or 1 in (m, n) for m, n in zip(a.val.shape, b.val.shape, strict=True))


def written(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if "out" in n.kwargs]


@pytest.mark.parametrize("block", range(5))
def test_random_programs_give_the_same(block):
    """But for rounding: products of operands that lie otherwise add up in another order."""
    found = 0
    for seed in range(60 * block, 60 * (block + 1)):
        graph, inputs = random_graph(seed)
        plain = overwrite.overwrite(graph)
        found += len(written(plain))
        own = [t.clone() for t in inputs]
        want = fx.Interpreter(fx.GraphModule(nn.Module(), graph)).run(*inputs)
        got = fx.GraphModule(nn.Module(), plain)(*own)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, equal_nan=True)
        assert all(map(torch.equal, own, inputs)), (seed, plain)
    assert found > 60


def test_what_is_read_later_is_not_overwritten_even_through_a_view():
    emitter = Emitter()
    x = emitter.placeholder("x", randn(4, 4), True)
    a = emitter.call(operator.mul, x, x)
    turned = emitter.call(torch.permute, a, [1, 0])
    b = emitter.call(operator.mul, a, x)  # `turned` is read after
    c = emitter.call(operator.add, b, turned)  # may overwrite b
    d = emitter.call(operator.add, c, emitter.call(torch.permute, c, [1, 0]))  # reads both ways
    emitter.graph.output(d.node)
    plain = overwrite.overwrite(emitter.graph)
    assert [n.name for n in written(plain)] == [c.node.name]


def test_numbers_are_no_memory():
    """Sizes are computed with, too."""
    emitter = Emitter()
    x = emitter.placeholder("x", randn(4, 4), True)
    size = emitter.create_proxy("call_method", "size", (x, 0), {})
    twice = emitter.call(operator.add, emitter.call(operator.mul, size, 2), size)
    a = emitter.call(operator.mul, x, 3.0)
    b = emitter.call(operator.mul, a, twice)
    emitter.graph.output(b.node)
    plain = overwrite.overwrite(emitter.graph)
    assert [n.name for n in written(plain)] == [b.node.name]
    given = randn(4, 4)
    assert torch.equal(fx.GraphModule(nn.Module(), plain)(given), given * 3 * 12)


POINTWISE = [
    f
    for name, f in sorted(vars(torch).items())
    if callable(f) and isinstance(getattr(f, "__name__", None), str)
    and getattr(torch, f.__name__, None) is f and overwrite._pointwise(f) is not None
]  # fmt: skip


def test_there_are_many_pointwise_functions():
    assert {torch.exp, torch.sin, torch.sigmoid, torch.square} <= set(POINTWISE)
    assert torch.positive not in POINTWISE and torch.sum not in POINTWISE


@pytest.mark.parametrize("function", POINTWISE, ids=lambda f: f.__name__)
def test_functions_taken_for_pointwise_give_memory_of_their_own(function):
    op = overwrite._pointwise(function)
    required = [a for a in op._schema.arguments if not a.has_default_value()]
    if any(str(a.type) != "Tensor" for a in required) or function in (torch.clamp, torch.clip):
        pytest.skip("takes more than tensors")
    args = [randn(3, 4, seed=i).abs() + 0.1 for i in range(len(required))]
    integral = "bitwise" in function.__name__ or function in (torch.gcd, torch.lcm)
    args = [(8 * a).long() for a in args] if integral else args
    want = function(*args)
    if isinstance(want, bool):
        return
    assert all(want.data_ptr() != a.data_ptr() for a in args)
    form = overwrite._form(function)
    if form is not None and want.dtype == args[0].dtype:
        got = form(*args, out=args[0])
        assert got is args[0] and torch.equal(got.nan_to_num(), want.nan_to_num())


# --- order ----------------------------------------------------------------------------------------


def calls(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op.startswith("call")]


def two_large() -> tuple[Emitter, list[fx.Node]]:
    """Two large values, one made of the other, both made before either is used up."""
    emitter = Emitter()
    x = emitter.placeholder("x", randn(4, 100), True)
    first = emitter.call(operator.mul, emitter.call(torch.unsqueeze, x, 1), 0.3)
    first = emitter.call(torch.matmul, emitter.call(torch.permute, first, [0, 2, 1]), first)
    second = emitter.call(torch.tanh, first)
    third = emitter.call(torch.tanh, second)
    sums = [emitter.call(torch.sum, v, [1, 2]) for v in (first, second, third)]
    return emitter, [s.node for s in sums]


def test_a_large_value_meets_its_last_use_before_the_next_is_made():
    emitter, results = two_large()
    before = cost.held_bytes(calls(emitter.graph))
    order(emitter.graph, results)
    emitter.graph.output(tuple(results))
    emitter.graph.lint()
    assert cost.held_bytes(calls(emitter.graph)) < before
    names = [n.name for n in calls(emitter.graph)]
    assert names.index("sum_1") < names.index("tanh_1")


def test_what_draws_numbers_keeps_its_order():
    emitter, results = two_large()
    x = next(iter(emitter.graph.nodes))
    x = fxhess.emit.Var(x, emitter)
    noise = [emitter.call(aten.bernoulli.p, x, p).node for p in (0.1, 0.2, 0.3)]
    order(emitter.graph, [*results, *reversed(noise)])
    emitter.graph.lint()
    found = [n.args[1] for n in calls(emitter.graph) if n.target is aten.bernoulli.p]
    assert found == [0.1, 0.2, 0.3]
    names = [n.name for n in calls(emitter.graph)]
    assert names.index("sum_1") < names.index("tanh_1")  # and yet it was changed


def test_a_program_that_writes_stays_as_it_is():
    emitter, results = two_large()
    x = fxhess.emit.Var(next(iter(emitter.graph.nodes)), emitter)
    emitter.create_proxy("call_method", "mul_", (x, 2.0), {})
    before = [n.name for n in calls(emitter.graph)]
    order(emitter.graph, results)
    assert [n.name for n in calls(emitter.graph)] == before


def test_programs_of_deep_nets_hold_no_more_than_a_few_tangents():
    """Layer by layer: its tangents, those before or their scaled copy, and the result."""
    width, d = 96, 12
    model = mlp(d, *[width] * 8, 1).requires_grad_(False)
    hess = fxhess.transform(model, strategy="close")
    x = randn(5, d)
    assert_close(hess(x), oracle.hessian(model, x))
    execution = Execution.of(hess.graph_module(x), 1, False)
    assert execution is not None
    tangents = d * width * 8
    assert execution.per_sample < 2 * tangents + 8 * 2 * width * 8 + 6 * d * d * 8
    body = execution.body.graph
    assert len(written(body)) > 20
    assert all(n.kwargs["out"].meta[VAL].shape == n.meta[VAL].shape
               for n in written(body) if n.kwargs["out"].op != "placeholder")  # fmt: skip


# --- the same in programs of one sample a lane ----------------------------------------------------


def random_program(seed: int) -> fx.Graph:
    """Of x ``[B, 6, 6]`` and two matrices: values read once or often, turned or not, by pointwise
    operations and by products, some with themselves."""
    rng, n = random.Random(seed), 6
    emitter = Emitter()
    x = emitter.placeholder("x", torch.empty(*nominal_batch(1), n, n, dtype=torch.float64))
    shared = [emitter.placeholder(f"w{i}", randn(n, n)) for i in range(2)]
    values = [x]
    for _ in range(60):
        a, b = rng.choice(values[-5:]), rng.choice(values[-9:])
        match rng.randrange(7):
            case 0:
                made = emitter.call(rng.choice(FUNCTIONS[:2]), a)
            case 1:
                made = emitter.call(operator.mul, a, rng.choice([-0.5, *shared]))
            case 2:
                made = emitter.call(torch.permute, a, [0, 2, 1])
            case 3:
                made = emitter.call(torch.matmul, a, rng.choice(shared))
            case 4:
                made = emitter.call(torch.matmul, a, b)
            case _:
                made = emitter.call(rng.choice(ARITHMETIC[:3]), a, b)
        values.append(emitter.call(aten.tanh.default, made) if rng.random() < 0.3 else made)
    results = [v.node for v in rng.sample(values[-12:], 3)]
    emitter.graph.output(tuple(results))
    emitter.graph.eliminate_dead_code()
    return emitter.graph


@pytest.mark.parametrize("seed", range(6))
def test_arrays_of_lanes_are_overwritten_only_where_nothing_reads_them(seed, monkeypatch):
    over, stored = [], lanes.Lanes.stored

    def watched(self, value, free=frozenset()):
        result = stored(self, value, free)
        over.append(bool(result.arrays & free))
        return result

    monkeypatch.setattr(lanes.Lanes, "stored", watched)
    graph = random_program(seed)
    inputs = [randn(21, 6, 6, seed=seed) / 2, randn(6, 6, seed=1) / 3, randn(6, 6, seed=2) / 3]
    code = _lanes.compiled(graph, inputs, 1, 0)
    want = fx.Interpreter(fx.GraphModule(nn.Module(), graph)).run(*inputs)
    assert any(over)
    for a, b in zip(code(inputs), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
