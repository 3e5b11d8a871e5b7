"""Programs of one sample a lane: the same numbers as the plain ones, for any batch."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from reference import assert_close, mlp, randn
from torch import nn

import fxhess
from benchmarks import models
from fxhess import _lanes, _running, execute, oracle
from fxhess._direct import Direct
from fxhess.execute import Execution

SHAPES = (1, 2, 7, 8, 9, 33, 130)  # lanes are left over, and several threads have blocks
FUNCTIONS = {
    "tanh": torch.tanh, "exp": torch.exp, "exp2": torch.exp2, "expm1": torch.expm1,
    "log": lambda x: torch.log(x.abs() + 0.01), "log1p": lambda x: torch.log1p(x.abs()),
    "log2": lambda x: torch.log2(x.abs() + 0.01), "sin": torch.sin, "cos": torch.cos,
    "tan": lambda x: torch.tan(x / 9), "asin": lambda x: torch.asin(x / 9),
    "acos": lambda x: torch.acos(x / 9), "atan": torch.atan, "sinh": torch.sinh,
    "cosh": torch.cosh, "asinh": torch.asinh, "acosh": lambda x: torch.acosh(x.abs() + 1.5),
    "atanh": lambda x: torch.atanh(x / 9), "erf": torch.erf, "erfc": torch.erfc,
    "sqrt": lambda x: x.abs().sqrt(), "rsqrt": lambda x: (x.abs() + 0.1).rsqrt(),
    "sigmoid": torch.sigmoid, "silu": nn.functional.silu, "gelu": nn.functional.gelu,
    "gelu, tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "reciprocal": lambda x: (x.abs() + 0.1).reciprocal(), "square": torch.square,
    "where": lambda x: torch.where(x > 0.3, x.sin(), x * 3), "relu": torch.relu,
    "clamp": lambda x: x.clamp(-1, 2), "maximum": lambda x: torch.maximum(x, x.cos()),
    "softmax": lambda x: x.softmax(-1), "log_softmax": lambda x: x.log_softmax(-1),
    "sums": lambda x: x.sum(-1, keepdim=True) * x + x.mean() * 0 + x.amax(-1, keepdim=True),
}  # fmt: skip


def lanes_of(hess, x, event_ndim=1):
    """The program of one sample a lane, and its inputs behind x."""
    rest = list(hess.tensors(x).values())
    graph = hess.graph_module(x).graph
    return _lanes.compiled(graph, [x, *rest], x.ndim - event_ndim, 0), rest


def values(functions):
    # The mean over the batch of "sums" would mix samples: one sample is what is looked at.
    return lambda x: torch.cat([f(x) for f in functions], -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_functions(dtype):
    functions = {k: f for k, f in FUNCTIONS.items() if k != "sums"}
    hess = fxhess.transform(values(functions.values()), "value")
    x = torch.cat([torch.linspace(-8, 8, 53, dtype=dtype), torch.tensor([0.0, -0.0, 1e-20])])
    x = x.to(dtype).expand(3, -1) * torch.tensor([[1.0], [0.07], [-1.0]], dtype=dtype)
    code, rest = lanes_of(hess, x)
    (got,) = code([x, *rest])
    want = values(functions.values())(x.double())
    eps = torch.finfo(dtype).eps
    for name, a, b in zip(
        functions, got.chunk(len(functions), -1), want.chunk(len(functions), -1), strict=True
    ):
        # What PyTorch itself does in this type, and a few units in the last place.
        plain = functions[name](x).double()
        limit = 2 * (plain - b).abs().amax() + 8 * eps * b.abs().clamp_min(1e-3)
        assert bool(((a.double() - b).abs() <= limit).all()), name


def test_tanh_everywhere():
    hess = fxhess.transform(torch.tanh, "value")
    for dtype, units in ((torch.float32, 3), (torch.float64, 3)):
        x = torch.cat([randn(4000) * s for s in (1e-6, 0.1, 1, 3, 30)]).to(dtype)[None]
        code, rest = lanes_of(hess, x)
        (got,) = code([x, *rest])
        # In float64 the C library's, by way of numpy, is as near to the truth as can be had.
        want = torch.from_numpy(__import__("numpy").tanh(x.double().numpy()))
        error = (got.double() - want).abs() / want.abs().clamp_min(1e-300)
        assert float(error.max()) <= units * torch.finfo(dtype).eps
        special = torch.tensor([[math.inf, -math.inf, math.nan, 0.0]], dtype=dtype)
        relu = fxhess.transform(torch.relu, "value")
        (got,) = lanes_of(relu, special)[0]([special])
        assert torch.equal(got.nan_to_num(7, 8, 9), torch.relu(special).nan_to_num(7, 8, 9))
        (got,) = lanes_of(hess, special)[0]([special])
        assert torch.equal(got[0, [0, 1, 3]], torch.tensor([1.0, -1.0, 0.0], dtype=dtype))
        assert bool(got[0, 2].isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [(5, 13, 25, 3), (3, 1, 2, 1), (26, 12, 24, 1)])
def test_products(dtype, sizes):
    net = models.tanh_net(*sizes).to(dtype).requires_grad_(False)
    hess = fxhess.transform(net)
    code, rest = lanes_of(hess, randn(9, sizes[0]).to(dtype))
    for batch in SHAPES:
        x = randn(batch, sizes[0], seed=batch).to(dtype)
        (got,) = code([x, *rest])
        want = fxhess.transform(net.double())(x.double())
        net.to(dtype)
        limit = 50 * torch.finfo(dtype).eps * float(want.abs().max())
        assert float((got.double() - want).abs().max()) <= limit
        assert torch.equal(got, got.mT)


def moving(x):  # [*, 4, 6]
    """Slices, transposes, padding, joined and chosen parts."""
    y = torch.nn.functional.pad(x, (1, 2)).transpose(-1, -2).flatten(-2).unflatten(-1, (6, 6))
    z = torch.cat([x[..., 1:3, ::2], x.narrow(-1, 1, 4)[..., :2, 1:]], -1).sin()
    w = x.index_select(-1, torch.tensor([5, 0, 3, 3])) * x[..., :1, 2:].movedim(-1, -2)
    return (
        (y @ y.mT).tanh().sum((-1, -2))
        + (z[..., 0] / (2 + z[..., 5])).sum(-1)
        + (w @ x).square().sum((-1, -2))
    )


@pytest.mark.parametrize(
    "model, event",
    [
        (moving, (4, 6)),
        (models.DeepSet(4, 8), (6, 4)),
        (models.AttentionBlock(8), (3, 8)),
        (models.Glm(20, 30), (20,)),
        (models.EncoderLayer(8, 2, 8), (3, 8)),
    ],
    ids=["moving", "deep set", "attention", "sums of squares", "encoder layer"],
)
def test_models(model, event):
    if isinstance(model, nn.Module):
        model = model.double().eval().requires_grad_(False)
    n = len(event)
    hess = fxhess.transform(model, event_ndim=n)
    code, rest = lanes_of(hess, randn(5, *event), n)
    assert code is not None
    for batch in (1, 5, 37):
        x = randn(batch, *event, seed=batch)
        (got,) = code([x, *rest])
        want = hess(x)
        assert torch.allclose(got, want, 0, 1e-11 * float(want.abs().max()))
        flat = got.flatten(1, n).flatten(2)
        assert torch.equal(flat, flat.mT)


def test_an_index_of_the_model(monkeypatch):
    taken = []
    compiled = _lanes.compiled
    monkeypatch.setattr(_lanes, "compiled", lambda *a: taken.append(compiled(*a)) or taken[-1])
    model = models.PairwiseEnergy(10, 32).double().requires_grad_(False)
    hess = fxhess.transform(model, event_ndim=2, compile=True)
    x = randn(64, 10, 3)
    want = fxhess.transform(model, event_ndim=2)(x)
    assert torch.allclose(hess(x), want, 0, 1e-11 * float(want.abs().max()))
    assert taken[0] is not None


def test_what_has_no_such_form():
    conv = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Tanh(), nn.Flatten()).double()
    hess = fxhess.transform(conv, event_ndim=2)
    assert lanes_of(hess, randn(2, 1, 8), 2)[0] is None
    net = models.tanh_net(3, 4, 1).double()
    hess = fxhess.transform(net)
    assert lanes_of(hess, randn(2, 2, 3))[0] is None  # two axes of the batch
    assert lanes_of(hess, randn(3))[0] is None


def test_a_module_compiled_by_itself_takes_it_and_follows_the_weights():
    net = models.tanh_net(3, 32, 32, 1).double().requires_grad_(False)
    hess, plain = fxhess.transform(net, compile=True), fxhess.transform(net)
    x = randn(300, 3)
    hess(x)
    assert hess(x[:1]).shape == (1, 3, 3)
    with torch.no_grad():
        net[0].weight.mul_(1.5)
    for batch in (300, 40, 1):
        assert torch.allclose(hess(x[:batch]), plain(x[:batch]), atol=1e-12)
    out = torch.empty(300, 3, 3, dtype=torch.float64)
    assert torch.allclose(hess(x, out=out), plain(x), atol=1e-12)


class Pick(nn.Module):
    """A model that chooses entries."""

    def __init__(self):
        super().__init__()
        self.register_buffer("index", torch.tensor([2, 0, 2]))

    def forward(self, x):
        return (x.index_select(-1, self.index).sin() * x).sum(-1)


def test_indices_are_checked_at_each_call():
    model = Pick()
    hess = fxhess.transform(model)
    x = randn(4, 3)
    code, rest = lanes_of(hess, x)
    (got,) = code([x, *rest])
    assert torch.allclose(got, hess(x), atol=1e-12)
    model.index[1] = 3
    with pytest.raises(IndexError, match="out of range"):
        code([x, *rest])


def test_within_a_given_memory_tiles_are_compiled(monkeypatch):
    monkeypatch.setattr(_lanes, "compiled", lambda *_: pytest.fail("takes memory of its own"))
    net = models.tanh_net(6, 41, 40, 1).double().requires_grad_(False)
    x = randn(40, 6)
    got = fxhess.transform(net, compile=True, max_memory=12_000_000)(x)
    assert torch.allclose(got, fxhess.transform(net)(x), atol=1e-12)


def test_explain_says_how_it_was_compiled(monkeypatch):
    monkeypatch.setattr(_running, "_HALF", math.inf)  # fast enough, whatever the machine does
    monkeypatch.setattr(_running, "_CLEARLY", 0.0)
    net = models.tanh_net(3, 32, 32, 1).double().requires_grad_(False)
    notes = fxhess.transform(net, compile=True).explain(randn(300, 3)).notes
    assert "compiled as one function, one sample a lane" in notes


def test_code_that_does_not_agree_is_not_used(monkeypatch):
    said = []
    monkeypatch.setattr("fxhess._direct._log.warning", lambda *words: said.append(words))
    net = models.tanh_net(3, 4, 1).double().requires_grad_(False)
    hess = fxhess.transform(net)
    x = randn(4, 3)
    module, rest = hess.graph_module(x), list(hess.tensors(x).values())
    wrong = Direct(module, 1, module.forward, 0, lambda inputs: lambda args: (args[0] * 2,))
    assert torch.allclose(wrong(x, *rest), hess(x), atol=1e-12)
    assert not wrong.has(x, *rest)
    assert "does not agree" in said[0][0]


def test_the_fastest_way_is_chosen_for_each_size_of_batch():
    calls = []

    def work(n):
        torch.randn(n, n) @ torch.randn(n, n)

    def way(name, costs, can=True):
        def run(x):
            calls.append(name)
            work(costs(len(x)))
            return x + 1

        return _running.Way(name, run, lambda x: can)

    fastest = _running.Fastest(
        way("plain", lambda n: 700),
        way("impossible", lambda n: 1, can=False),
        way("for one", lambda n: 1 if n == 1 else 1000),
        way("for many", lambda n: 1000 if n == 1 else 10),
    )
    for n, name in ((1, "for one"), (200, "for many")):
        x = torch.zeros(n)
        state = torch.get_rng_state()
        first = fastest(x)
        after = torch.get_rng_state()
        assert ("for many" in calls) == (n > 1)  # half of the plain way's time is good enough
        calls.clear()
        assert torch.equal(fastest(x), first)
        assert calls == [name]
        assert fastest.name == name
        # Trials draw no numbers that the call itself does not draw.
        torch.set_rng_state(state)
        work(1 if n == 1 else 10)
        assert torch.equal(torch.get_rng_state(), after)
    assert "impossible" not in calls


def test_what_is_kept_is_packed_again_only_where_it_is_another_tensor():
    model = models.Glm(20, 120).double().requires_grad_(False)
    hess = fxhess.transform(model)
    x = randn(40, 20)
    execution = Execution.of(hess.graph_module(x), 1, False)
    kept = [i for i, keep in enumerate(execution.keeping.which, 1) if keep]
    assert kept

    def hoisted():
        return list(execution.prologue.forward(*hess.tensors(x).values()))

    first, out = hoisted(), torch.empty(40, 20, 20, dtype=x.dtype)
    code = _lanes.compiled(execution.functional, [x, *first, out], 1, 1, kept)

    def call(tensors, batch=40):
        given = randn(batch, 20, seed=batch)
        result = torch.empty(batch, 20, 20, dtype=x.dtype)
        code([given, *tensors, result])
        return result, fxhess.transform(model)(given)

    for batch in (40, 3, 200):
        got, want = call(first, batch)
        assert torch.allclose(got, want, 0, 1e-12 * float(want.abs().max()))
    squares = next(t for t in first if t.ndim == 2 and t.shape == (120, 210))
    squares.mul_(2)
    assert torch.equal(call(first, 200)[0], got)  # what is packed is known
    squares.div_(2)
    with torch.no_grad():
        model.linear.weight.mul_(0.7)
    second = hoisted()
    own, want = call(second)
    assert torch.allclose(own, want, 0, 1e-12 * float(want.abs().max()))
    known = {0: call(first)[0], 1: own}
    with ThreadPoolExecutor(4) as pool:
        for i, (got, _) in enumerate(pool.map(lambda i: call((first, second)[i % 2]), range(40))):
            assert torch.equal(got, known[i % 2])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("d", [16, 23])
def test_triangles_are_written_whole(d, dtype, tolerance, monkeypatch):
    sources, load = [], _lanes._load
    monkeypatch.setattr(_lanes, "_load", lambda source: sources.append(source) or load(source))
    model = models.Glm(d, 400).to(dtype).requires_grad_(False)
    hess = fxhess.transform(model)
    x = randn(3, d).to(dtype)
    execution = Execution.of(hess.graph_module(x), 1, False)
    rest = list(execution.prologue.forward(*hess.tensors(x).values()))
    code = _lanes.compiled(execution.functional, [x, *rest, x.new_empty(3, d, d)], 1, 1)
    assert "return v" in sources[0].split("block(void")[1]  # straight from where it lies
    for batch in (1, 8, 16, 37, 300):
        x = randn(batch, d, seed=batch).to(dtype)
        out = x.new_full((batch, d, d), torch.nan)
        code([x, *rest, out])
        assert torch.allclose(out, oracle.hessian(model, x), 0, tolerance * d)
        assert torch.equal(out, out.mT)


@pytest.mark.parametrize(
    "shape, most, parts",
    [
        ((60, 40), None, [60]),
        ((60, 40), 25, [20, 20, 20]),
        ((4, 10, 40), None, [4]),
        ((4, 10, 40), 21, [2, 2]),
    ],
)
def test_large_calls_are_not_cut_into_tiles(shape, most, parts, monkeypatch):
    """Into equal parts only where one would take too long."""
    model = mlp(40, 30, 1).requires_grad_(False)
    hess, x = fxhess.transform(model), randn(*shape)
    execution = Execution.of(hess.graph_module(x), x.ndim - 1, False)
    if most is not None:
        monkeypatch.setattr(execute, "_AT_ONCE", most * execution.flops)
    monkeypatch.setitem(execute.cost.TILE_BYTES, "cpu", 1)
    given, lanes = [], execution.compiled.ways[1]
    rest = list(execution.prologue.forward(*hess.tensors(x).values()))
    out = x.new_empty(*shape, 40)

    def called(self, x, *rest):
        given.append(x.shape[0])
        return self._public(x, *rest)

    monkeypatch.setattr(Direct, "__call__", called)
    lanes.run(x, (), 1, rest, [out])
    assert given == parts
    assert_close(out, oracle.hessian(model, x))


def test_blocks_of_several_vectors():
    net = models.tanh_net(16, 700, 500, 1).requires_grad_(False)
    hess = fxhess.transform(net, "value")
    code, rest = lanes_of(hess, randn(4, 16).float())
    for batch in (1, 40, 300):
        x = randn(batch, 16, seed=batch).float()
        (got,) = code([x, *rest])
        assert torch.allclose(got, net(x).flatten(), rtol=1e-5, atol=1e-5)
