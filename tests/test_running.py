"""How programs run: compiled, within a given memory, and on when memory runs out."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from reference import assert_close, mlp, randn
from torch import nn

import fxhess
from fxhess import _direct, _lanes, execute, oracle
from fxhess.errors import InputError


def frozen(*widths: int, seed: int = 0) -> nn.Sequential:
    return mlp(*widths, seed=seed).requires_grad_(False)


class Counter:
    """Counts compilations, and runs what it is given as it is."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph, example_inputs):
        self.graphs.append(graph)
        return graph.forward


@pytest.fixture
def counter(monkeypatch):
    """Replaces the compiler by one that counts."""
    counts = Counter()
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kw: original(f, **{**kw, "backend": counts}))
    torch._dynamo.reset()
    yield counts
    torch._dynamo.reset()


# --- compiled -------------------------------------------------------------------------------------


@pytest.mark.parametrize("work", ["small", "large"])
def test_one_compilation_serves_all_batch_sizes(work, counter, monkeypatch):
    if work == "large":
        monkeypatch.setattr(execute, "_WORTHWHILE", 0)
    monkeypatch.setattr(_direct, "_compiled", lambda *_: None)  # the public way
    monkeypatch.setattr(_lanes, "compiled", lambda *_: None)
    model = frozen(5, 9, 1)
    hess = fxhess.transform(model, compile=True)
    for n in (3, 7, 4, 12):
        x = randn(n, 5, seed=n)
        assert_close(hess(x), oracle.hessian(model, x))
    assert len(counter.graphs) == 1
    assert_close(hess(randn(1, 5)), oracle.hessian(model, randn(1, 5)))
    assert hess(randn(0, 5)).shape == (0, 5, 5)


def test_tiles_and_their_remainder_share_a_compilation(counter, monkeypatch):
    monkeypatch.setattr(_direct, "_compiled", lambda *_: None)  # the public way
    monkeypatch.setattr(_lanes, "compiled", lambda *_: None)
    model = frozen(6, 40, 40, 1)
    hess = fxhess.transform(model, compile=True, max_memory=12_000_000)
    monkeypatch.setitem(execute.cost.TILE_BYTES, "cpu", 100_000)
    x = randn(53, 6)
    assert_close(hess(x), oracle.hessian(model, x))
    assert len(counter.graphs) == 1


def test_gradients_flow_through_a_compiled_module(counter):
    model = mlp(4, 6, 1)
    hess = fxhess.transform(model, compile=True)
    x = randn(5, 4)
    hess(x).square().sum().backward()
    got = model[0].weight.grad.clone()
    model.zero_grad()
    fxhess.transform(model)(x).square().sum().backward()
    assert_close(got, model[0].weight.grad)


def test_a_traced_module_with_much_work_is_one_operator(counter):
    model = frozen(8, 64, 64, 1)
    hess = fxhess.transform(model).specialize(randn(2, 8))

    def trace(x):
        return hess(x).diagonal(dim1=-2, dim2=-1).sum(-1)

    compiled = torch.compile(trace, fullgraph=True)
    for n in (5, 9):
        x = randn(n, 8, seed=n)
        want = oracle.hessian(model, x).diagonal(dim1=-2, dim2=-1).sum(-1)
        assert_close(compiled(x), want)
    assert sum("derivatives" in str(n.target) for n in counter.graphs[0].graph.nodes) == 1
    model[0].weight.data.mul_(1.5)  # and nothing in it is stale
    assert_close(compiled(x), trace(x))


def test_a_traced_module_with_little_work_is_seen_whole(counter):
    model = frozen(3, 4, 1)
    hess = fxhess.transform(model).specialize(randn(2, 3))
    compiled = torch.compile(hess, fullgraph=True)
    assert_close(compiled(randn(5, 3)), oracle.hessian(model, randn(5, 3)))
    assert not any("derivatives" in str(n.target) for n in counter.graphs[0].graph.nodes)


def test_the_compiler_itself_agrees():
    model = nn.Sequential(
        nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)
    )
    model.requires_grad_(False)
    x = torch.randn(40, 6)
    with torch.no_grad():
        got = fxhess.transform(model, compile=True)(x)
    want = oracle.hessian(model, x)
    assert_close(got.double(), want, 1e-5)


# --- memory ---------------------------------------------------------------------------------------


def test_too_little_memory_is_an_error_that_says_how_much_is_needed():
    model = frozen(30, 200, 1)
    hess = fxhess.transform(model, max_memory=1000)
    with pytest.raises(InputError, match=r"max_memory .* about \d+"):
        hess(randn(4, 30))
    with pytest.raises(InputError, match="counts bytes"):
        fxhess.transform(model, max_memory=0)


def test_an_empty_batch_needs_no_memory():
    model = frozen(5, 8, 1)
    assert fxhess.transform(model, max_memory=1 << 20)(randn(0, 5)).shape == (0, 5, 5)


def test_memory_for_gradients_is_refused_not_exceeded():
    hess = fxhess.transform(mlp(30, 64, 64, 1), max_memory=16_000_000)
    x = randn(500, 30)
    with pytest.raises(InputError, match="gradients"):
        hess(x)
    with torch.no_grad():
        assert hess(x).shape == (500, 30, 30)


def test_one_sample_without_batch_axes_runs_in_the_same_way():
    model = frozen(40, 256, 256, 1)
    x = randn(40)
    got = fxhess.transform(model)(x)
    assert_close(got, oracle.hessian(model, x[None])[0])
    out = torch.empty(40, 40, dtype=x.dtype)
    assert fxhess.transform(model)(x, out=out) is out
    assert torch.equal(out, got)


_MEASURE = """
    import resource, sys, threading, time
    import torch, psutil
    import fxhess
    from torch import nn

    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(60, 300), nn.Tanh(), nn.Linear(300, 300), nn.Tanh(),
                          nn.Linear(300, 1)).requires_grad_(False)
    limit = int(sys.argv[1])
    hess = fxhess.transform(model, max_memory=limit or None)
    hess(torch.randn(2, 60))
    x = torch.randn(2000, 60)
    process = psutil.Process()
    before, peak, done = process.memory_info().rss, 0, False

    def watch():
        global peak
        while not done:
            peak = max(peak, process.memory_info().rss)
            time.sleep(0.0005)

    thread = threading.Thread(target=watch)
    thread.start()
    H = hess(x)
    done = True
    thread.join()
    print(peak - before, H.numel() * 4)
"""


@pytest.mark.parametrize("limit", [36 << 20, 64 << 20])
def test_a_call_stays_within_its_memory(limit):
    command = [sys.executable, "-c", textwrap.dedent(_MEASURE), str(limit)]
    taken, result = map(int, subprocess.check_output(command, text=True).split())
    assert result < taken <= limit


@pytest.mark.parametrize("failures", [1, 2])
def test_out_of_memory_halves_the_tiles_once(failures, monkeypatch):
    model = frozen(6, 40, 40, 1)
    hess = fxhess.transform(model, max_memory=12_000_000)
    monkeypatch.setitem(execute.cost.TILE_BYTES, "cpu", 60_000)
    x = randn(60, 6)
    want = hess(x).clone()
    execution = next(iter(hess.programs.bindings.values()))[0].program.execution
    sizes: list[int] = []
    left = failures
    original = execution.body.forward

    def failing(x, *rest):
        nonlocal left
        sizes.append(len(x))
        if len(sizes) > 2 and left:
            left -= 1
            rest[-1].fill_(float("nan"))  # it got half way
            raise torch.OutOfMemoryError("injected")
        return original(x, *rest)

    monkeypatch.setattr(execution.body, "forward", failing)
    if failures == 2:
        with pytest.raises(torch.OutOfMemoryError, match="injected"):
            hess(x)
    else:
        assert_close(hess(x), want)
        assert sizes[3] == sizes[0] // 2
    monkeypatch.setattr(execution.body, "forward", original)
    assert_close(hess(x), want)  # and the module is as good as before


def test_other_errors_in_a_tile_are_not_retried(monkeypatch):
    model = frozen(6, 40, 40, 1)
    hess = fxhess.transform(model, max_memory=12_000_000)
    hess(randn(3, 6))
    execution = next(iter(hess.programs.bindings.values()))[0].program.execution
    calls = []

    def failing(*args):
        calls.append(1)
        raise RuntimeError("something else")

    monkeypatch.setattr(execution.body, "forward", failing)
    with pytest.raises(RuntimeError, match="something else"):
        hess(randn(3, 6))
    assert len(calls) == 1


# --- rows -----------------------------------------------------------------------------------------


def _fails_to_fit(hess, x):
    binding = next(iter(hess.programs.bindings.values()))[0]
    return not binding.program.execution.fits(x, True, hess.running.max_memory)


@pytest.mark.parametrize("given", [False, True], ids=["fresh", "out"])
@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("batch", [(3,), (), (2, 2)])
def test_a_sample_that_does_not_fit_is_done_row_by_row(batch, outputs, given, monkeypatch):
    monkeypatch.setattr(execute, "_UNSEEN", 0)
    d = 60
    model = frozen(d, 50, 40, outputs)
    x = randn(*batch, d)
    want = oracle.hessian(model, x)
    limit = (0 if given else want.numel() * 8) + 30_000
    hess = fxhess.transform(model, max_memory=limit)
    out = torch.full_like(want, float("nan")) if given else None
    got = hess(x, out=out)
    assert _fails_to_fit(hess, x) or given
    assert hess._products  # that way indeed
    assert got is out or not given
    assert_close(got, want)
    assert torch.equal(got, got.mT)
    assert not [name for name, _ in hess.named_modules() if "products" in name]
    with pytest.raises(InputError, match="one row"):
        fxhess.transform(model, max_memory=limit - 29_000)(x, out=out)


def test_rows_of_samples_with_several_axes(monkeypatch):
    monkeypatch.setattr(execute, "_UNSEEN", 0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(216, 1)).double()
    model.requires_grad_(False)
    x = randn(2, 1, 8, 8)
    want = oracle.hessian(model, x, 3)
    hess = fxhess.transform(model, event_ndim=3, max_memory=want.numel() * 8 + 60_000)
    got = hess(x)
    assert hess._products
    assert_close(got, want)
    assert torch.equal(got, got.permute(0, 4, 5, 6, 1, 2, 3))
