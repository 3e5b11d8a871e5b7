"""Load: memory that runs out, interrupts, processes and threads, and nothing that grows.

A representative part runs with the suite; ``python -m tests.faults`` does ten times as much.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import resource
import signal
import threading
import time
import weakref
from pathlib import Path

import psutil
import pytest
import torch
from forked import MORE, times
from reference import assert_close, mlp, randn
from torch import fx, nn

import fxhess
from fxhess import capture, oracle
from fxhess import execute as execution_module
from fxhess.cache import programs

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and limits of POSIX")

# --- runs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, text", [
    (RuntimeError, "DefaultCPUAllocator: can't allocate memory"), (MemoryError, ""),
    (torch.OutOfMemoryError, "out of memory"), (RuntimeError, "could not create a primitive"),
])  # fmt: skip
def test_memory_runs_out_in_the_middle_of_a_tile(kind, text, monkeypatch):
    """The tile is run again, half as large, once what it took is free; a second time it is an
    error, and nothing is left of it."""
    model, x = mlp(6, 32, 1), randn(64, 6)
    plain = fxhess.transform(model)
    fixed, one = plain._found(plain.prepared((x,), {})).program.execution.needs(x)
    limit = fixed + int(16 * one * execution_module._LOOSE)
    hess = fxhess.transform(model, max_memory=limit)
    want = oracle.hessian(model, x)
    with torch.no_grad():
        assert_close(hess(x), want)
    program = hess._found(hess.prepared((x,), {})).program
    assert program.execution.tiles(x, limit) == 4
    body, calls, taken = program.execution.body.forward, [], []
    for failing in ({1}, {3}, {1, 2}):
        calls.clear()

        def flaky(*args, failing=frozenset(failing)):
            calls.append(args[0].shape[0])
            assert all(t() is None for t in taken), "what the failed tile took is free"
            if len(calls) in failing:
                values = args[-1].fill_(float("nan")).clone()  # half a tile is written
                taken.append(weakref.ref(values))
                raise kind(text)
            return body(*args)

        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(program.execution.body, "forward", flaky)
            if len(failing) == 1:
                assert_close(hess(x), want)
                (failed,) = failing
                assert calls[failed] == calls[failed - 1] // 2
            else:
                with pytest.raises(kind, match=text or None):
                    hess(x)
                assert len(calls) == 2
        with torch.no_grad():
            assert_close(hess(x), want)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("at", [1, 3, 99])
def test_interrupts_in_capture(at, monkeypatch):
    """Whenever it comes, the next call captures from the start, and PyTorch's settings are back."""
    model, x = mlp(3, 4, 4, 1), randn(2, 3)
    settings = (
        torch.is_grad_enabled(), torch.backends.mha.get_fastpath_enabled(),
        torch.compiler.is_compiling(), torch.compiler.is_exporting(),
        torch.autograd.Function.__dict__["apply"], len(model[0]._forward_hooks),
        torch._C._get_mkldnn_enabled(), torch._C._len_torch_dispatch_stack(),
        torch._C._len_torch_function_stack(), torch.distributions.Distribution._validate_args,
    )  # fmt: skip
    line, count = capture.calling_line, 0

    def interrupted():
        nonlocal count
        count += 1
        if count == at:
            raise KeyboardInterrupt
        return line()

    hess = fxhess.transform(model)
    with monkeypatch.context() as patch:
        patch.setattr(capture, "calling_line", interrupted)
        if at < 9:
            with pytest.raises(KeyboardInterrupt):
                hess(x)
        else:
            with_signal(hess, x)
    assert settings == (
        torch.is_grad_enabled(), torch.backends.mha.get_fastpath_enabled(),
        torch.compiler.is_compiling(), torch.compiler.is_exporting(),
        torch.autograd.Function.__dict__["apply"], len(model[0]._forward_hooks),
        torch._C._get_mkldnn_enabled(), torch._C._len_torch_dispatch_stack(),
        torch._C._len_torch_function_stack(), torch.distributions.Distribution._validate_args,
    )  # fmt: skip
    assert_close(hess(x), oracle.hessian(model, x))


def with_signal(hess, x):
    """The same by a signal, at any time."""
    timer = threading.Timer(0.01, signal.raise_signal, [signal.SIGINT])
    timer.start()
    with contextlib.suppress(KeyboardInterrupt):
        hess(x)
        timer.join()
        time.sleep(0.01)
    timer.join()


# --- processes and threads ------------------------------------------------------------------------


def _work(hess, x, want):
    torch.set_num_threads(1)
    error = (hess(x) - want).abs().max().item()
    other = (fxhess.transform(nn.Sequential(nn.Linear(3, 2), nn.Tanh()).double())(x)).shape
    os._exit(0 if error < 1e-12 and other == (4, 2, 3, 3) else 1)


@pytest.mark.parametrize("way", ["fork", "spawn"])
def test_workers(way):
    """They go on with the parent's module, and make new ones."""
    context = multiprocessing.get_context(way)
    hess, x = fxhess.transform(mlp(3, 4, 1)), randn(4, 3)
    want = hess(x).detach()
    workers = [context.Process(target=_work, args=(hess, x, want)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0


class _Set(torch.utils.data.Dataset):
    """Samples that are the Hessians at some points."""

    def __init__(self):
        self.hess = fxhess.transform(mlp(3, 4, 1))
        self.x = randn(6, 3)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        with torch.no_grad():
            return self.hess(self.x[i : i + 1])[0]


def test_workers_of_a_data_loader():
    data = _Set()
    want = oracle.hessian(data.hess.model, data.x)
    assert_close(data[0], want[0])
    context = multiprocessing.get_context("fork")
    loader = torch.utils.data.DataLoader(data, 3, num_workers=2, multiprocessing_context=context)
    assert_close(torch.cat(list(loader)), want)


def test_a_fork_while_another_thread_captures():
    """The child has no such thread: it must not wait for it."""
    hess, x = fxhess.transform(mlp(3, 4, 1)), randn(4, 3)
    want, held = hess(x).detach(), threading.Event()

    def capturing(x):
        held.set()
        time.sleep(0.3)
        return x.sin().sum(-1)

    thread = threading.Thread(target=lambda: fxhess.transform(capturing)(randn(2, 3)))
    thread.start()
    held.wait(60)
    worker = multiprocessing.get_context("fork").Process(target=_work, args=(hess, x, want))
    worker.start()
    worker.join(60)
    thread.join()
    if worker.exitcode is None:
        worker.kill()
    assert worker.exitcode == 0


def test_two_threads_never_wait_for_each_other():
    """One captures a model that calls a transformed one, which the other calls for the first time:
    with two locks each would hold one of them."""
    inner = fxhess.transform(lambda x: x.sin().sum(-1))
    x, inside, called = randn(2, 3), threading.Event(), threading.Event()

    def outer(x):
        inside.set()
        called.wait(60)
        time.sleep(0.2)
        return inner(x).sum((-1, -2))

    results = {}

    def first():
        results["outer"] = fxhess.transform(outer)(x)

    def second():
        inside.wait(60)
        called.set()
        results["inner"] = inner(x)

    threads = [threading.Thread(target=work, daemon=True) for work in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert_close(results["inner"], torch.diag_embed(-x.sin()))
    assert_close(results["outer"], torch.diag_embed(x.sin()))


def test_threads_transform_one_model_at_once(disk):
    """Each its own transform of the same modules, with plans on disk."""
    model, x = mlp(3, 6, 6, 1), randn(5, 3)
    want = oracle.hessian(model, x)
    for _ in range(times(2)):
        failures, start = [], threading.Barrier(8)

        def work(start=start, failures=failures):
            try:
                start.wait()
                assert_close(fxhess.transform(model)(x), want)
            except BaseException as error:  # shown by the assertion below
                failures.append(error)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        fxhess.cache_clear()


# --- growth ---------------------------------------------------------------------------------------


def _memory() -> int:
    gc.collect()
    return psutil.Process().memory_info().rss


def test_calls_do_not_grow_memory():
    """10,000 in the long battery."""
    hess, x = fxhess.transform(mlp(8, 64, 1), ("value", "hessian")), randn(64, 8)
    taken = []
    for calls in (200, times(1000)):
        with torch.no_grad():
            for _ in range(calls):
                hess(x)
        taken.append(_memory())
    assert taken[1] - taken[0] < 8 << 20


class Cubed(torch.autograd.Function):
    """x to the third, with a number that is not a tensor."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(x)
        ctx.scale = scale
        return scale * x**3

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.scale * ctx.saved_tensors[0] ** 2 * g, None


def _chosen(x, scale):
    """Its structure depends on a value."""
    return (x * scale).sum(-1) if x.sum() > scale else (x * scale).exp().sum(-1)


DISTINCT = {
    "numbers": lambda n: lambda x: (x * (1 + n / 7)).sin().sum(-1),
    "shapes": lambda n: mlp(3, 5 + n, 1),
    "custom functions": lambda n: lambda x: Cubed.apply(x, 1 + n / 7).sum(-1),
    "structures": lambda n: lambda x: _chosen(x, n + 9),
}
_OURS = ("ShapeEnv", "FakeTensor", "FakeTensorMode", "Program", "Binding", "FunctionCall")


def _held():
    """How many objects there are; those of traces and programs; and sources of generated code."""
    gc.collect()
    every = gc.get_objects()
    names = [type(o).__name__ for o in every]
    ours = sum(map(names.count, _OURS)) + sum(issubclass(type(o), fx.GraphModule) for o in every)
    return len(every), ours, len(fx.graph_module._loader.eval_cache)


@pytest.mark.parametrize("kind", DISTINCT)
def test_distinct_transforms_leave_nothing(kind, monkeypatch):
    """Objects, not bytes: those of a transform whose program is dropped go, all of them.  Shapes
    fill tables of sympy and of contractions, which have a limit."""
    monkeypatch.setattr("fxhess.cache.MAXSIZE", 2)
    x, count = randn(2, 3), times(6)
    fxhess.cache_clear()
    for n in range(8):
        fxhess.transform(DISTINCT[kind](n))(x)
    before = _held()
    for n in range(8, 8 + count):
        fxhess.transform(DISTINCT[kind](n))(x)
    after = _held()
    fxhess.cache_clear()
    assert after[1] <= before[1] + 2 and after[2] <= before[2] + 2
    assert after[0] - before[0] < 60 + count * (100 if kind == "shapes" else 1)


def test_distinct_transforms_do_not_grow_memory(disk):
    """500 in the long battery.  More than are kept make room, in memory and on disk."""
    x, kept = randn(2, 3), programs
    count, most = times(50), 10
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fxhess.cache.MAXSIZE", most)
        patch.setenv("FXHESS_CACHE_SIZE", "40k")
        for n in range(count):
            fxhess.transform(DISTINCT["numbers"](n))(x)
            if n == count // 2:
                before = _memory()
        info = kept.info()
    assert _memory() - before < (3 << 20) + count * 2_000
    assert info.size == most and info.disk.bytes <= 40 << 10 and not info.disk.problem


class DeepSet(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 32))
        self.outer = nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, x):
        return self.outer(self.inner(x).tanh().sum(-2))


# What is transformed, how, the shape of x, and MB that a call may take.
LIMITED = {
    "MLP": (lambda: mlp(96, 96, 96, 1), {}, (3000, 96), 160),
    "vector output": (lambda: mlp(48, 64, 8), {}, (800, 48), 90),
    "deep set": (DeepSet, {"event_ndim": 2}, (4000, 12, 4), 64),
    "PINN": (lambda: mlp(3, 64, 64, 64, 1), {"outputs": ("value", "laplacian")}, (200_000, 3), 40),
    "several outputs": (
        lambda: mlp(64, 64, 1),
        {"outputs": ("value", "gradient", "hessian", "diagonal")}, (3000, 64), 85,
    ),
}  # fmt: skip


def _within(_, name):
    make, how, shape, limit = LIMITED[name]
    limit <<= 20
    model = make().float().requires_grad_(False)
    hess = fxhess.transform(model, max_memory=limit, **how)
    x = torch.randn(shape)
    hess(x[:2])
    want = hess(x[-50:])
    assert hess._found(hess.prepared((x,), {})).program.execution.tiles(x, limit) > 1
    pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (pages + limit, pages + limit))
    results = hess(x)
    pairs = zip(*(r if isinstance(r, tuple) else (r,) for r in (want, results)), strict=True)
    for some, all_ in pairs:
        assert torch.allclose(all_[-50:], some, rtol=1e-4, atol=1e-5)
    del results, all_
    with pytest.raises(RuntimeError, match="memory"):  # the limit is one
        torch.empty(2 * limit, dtype=torch.uint8)


def _limited():
    long = pytest.mark.skipif(MORE <= 1, reason="in the long battery: python -m tests.faults")
    return [n if n in ("MLP", "PINN") else pytest.param(n, marks=long) for n in LIMITED]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize("name", _limited())
def test_memory_stays_under_a_hard_limit(name, monkeypatch):
    """A new process, whose heap has no holes, takes no more than ``max_memory``, results and all
    that PyTorch needs; what a heap of each thread would reserve is no memory."""
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    torch.multiprocessing.spawn(_within, (name,))
