"""Ctrl-C at any moment, while a program is made, kept, read or run: whatever it interrupts, PyTorch
and the module are as they were, and the next call is right.

Python raises ``KeyboardInterrupt`` where a function begins and where one written in C has ended.
Here it is raised at one such place, chosen at random among all that an activity comes by (every
second one: among those in this package, or in a context manager), each in a process of its own.  A
few with the suite; ``python -m tests.faults`` does ten times as many.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import random
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch
from forked import MORE, answers, finished, forked, times
from reference import assert_close, mlp, randn
from torch import nn

import fxhess
from fxhess import oracle
from fxhess.cache import programs
from fxhess.locks import making

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="needs fork"),
    pytest.mark.usefixtures("interruptible"),
]


OWN = (str(Path(fxhess.__file__).parent.parent), contextlib.__file__)


class Interrupt:
    """Send what Ctrl-C does at the ``at``-th place that comes by (0: nowhere, only count); with
    ``own``: of those in this package and in context managers."""

    def __init__(self, at=0, own=False):
        self.at, self.own, self.count, self.where = at, own, 0, ""

    def __call__(self, frame, event, _):
        if event in ("call", "c_return") and not (
            self.own and not frame.f_code.co_filename.startswith(OWN)
        ):
            self.count += 1
            if self.count == self.at:
                sys.setprofile(None)
                self.where = f"{event} {frame.f_code.co_filename}:{frame.f_lineno}"
                signal.raise_signal(signal.SIGINT)

    def __enter__(self):
        sys.setprofile(self)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


class Model(nn.Module):
    """Further ways through capture: an attention, a custom function."""

    def __init__(self):
        super().__init__()
        self.layer = nn.MultiheadAttention(2, 1, batch_first=True)

    def forward(self, x):
        y = x.view(-1, 2, 2)
        y = y + self.layer(y, y, y, need_weights=False)[0]
        return Scaled.apply(y).sum((-1, -2))


def _chosen(x):
    return x.sin().sum(-1) if x.sum() > 0 else x.exp().sum(-1)


class Activity:
    """Something to interrupt: ``before`` it is prepared, and afterwards all has to be right."""

    def __init__(self, path):
        torch.manual_seed(0)
        self.path = path
        self.model, self.x = self.made()
        self.hess = self.transform()
        self.want = oracle.hessian(self.model, self.x)

    def made(self):
        return mlp(4, 5, 5, 1), randn(6, 4)

    def transform(self):
        return fxhess.transform(self.model)

    def before(self):
        pass

    def run(self):
        self.hess(self.x)


class Making(Activity):
    """A first call: capture, plan, write to disk, run."""


class MakingMore(Activity):
    def made(self):
        return Model().double(), randn(3, 4)


class OfSamples(Activity):
    def made(self):
        return _chosen, randn(4, 4).abs()


class Reading(Activity):
    """A first call where an earlier process kept the program."""

    def before(self):
        self.transform()(self.x)
        fxhess.cache_clear()


class Running(Activity):
    """Calls in tiles; with a result given; along autograd."""

    def transform(self):
        return fxhess.transform(self.model, max_memory=6_380_000)

    def made(self):
        return mlp(4, 5, 1).requires_grad_(False), randn(400, 4)

    def before(self):
        self.hess(self.x)

    def run(self):
        self.hess(self.x)
        self.hess(self.x, progress=True)
        self.hess(self.x, out=torch.empty(400, 4, 4, dtype=torch.float64))


class Looking(Activity):
    def run(self):
        self.hess.verify(self.x)
        str(self.hess.explain(self.x))


class Saving(Activity):
    def run(self):
        fxhess.save(self.hess, self.path / "saved", self.x)
        assert_close(fxhess.load(self.path / "saved")(self.x), self.want)


class Exporting(Activity):
    def before(self):
        self.hess(self.x)

    def run(self):
        torch.export.export(self.hess, (self.x,))


ACTIVITIES = {
    kind.__name__: kind
    for kind in (Making, MakingMore, OfSamples, Reading, Running, Looking, Saving, Exporting)
}


def _settings(activity):
    """What a call may change and has to put back."""
    model = activity.model
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    return {
        "grad": torch.is_grad_enabled(),
        "fastpath": torch.backends.mha.get_fastpath_enabled(),
        "mkldnn": torch._C._get_mkldnn_enabled(),
        "compiling": (torch.compiler.is_compiling(), torch.compiler.is_exporting()),
        "dynamo": torch.compiler.is_dynamo_compiling,
        "stance": torch._dynamo.eval_frame._stance.stance,
        "apply": torch.autograd.Function.__dict__["apply"],
        "mask": torch.nn.modules.transformer._detect_is_causal_mask,
        "kernels": torch.backends.cuda.flash_sdp_enabled(),
        "validate": torch.distributions.Distribution._validate_args,
        "modes": (torch._C._len_torch_dispatch_stack(), torch._C._len_torch_function_stack()),
        "functorch": torch._C._functorch.peek_interpreter_stack(),
        "proxies": torch.fx.experimental.proxy_tensor.get_proxy_mode(),
        "context": torch._guards.TracingContext.try_get(),
        "dispatcher": torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.Python),
        "collector": gc.isenabled(),
        "log": logging.getLogger("torch._subclasses.fake_tensor").level,
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules],
        "weights": [(k, id(v)) for m in modules for k, v in m._parameters.items()],
        "profile": sys.getprofile(),
        "handler": signal.getsignal(signal.SIGINT),
    }


def _free(lock):
    """Whether another thread could take the lock."""
    found = []

    def take():
        found.append(lock.acquire(timeout=1))
        if found[0]:
            lock.release()

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    return found[0]


def _interrupted(kind, path, at, own, tell):
    """In a child: interrupt the activity; say what is wrong then."""
    activity = ACTIVITIES[kind](path)
    activity.before()
    before = _settings(activity)
    interrupt = Interrupt(at, own)
    raised = False
    try:
        with interrupt:
            activity.run()
    except KeyboardInterrupt:
        raised = True
    if not at:
        tell(str(interrupt.count))
        return
    wrong = []
    after = _settings(activity)
    wrong += [f"{k}: {v} -> {after[k]}" for k, v in before.items() if v != after[k]]
    if not _free(making):
        wrong.append("the lock is held")
    for name, again in (("same", activity.hess), ("fresh", activity.transform())):
        try:
            assert_close(again(activity.x), activity.want)
            assert_close(again(activity.x[:2]), activity.want[:2])
        except BaseException as error:
            wrong.append(f"{name}: {type(error).__name__} {error}"[:300])
    if not programs.disk.put(f"program-{9:064x}", "9"):
        wrong.append("nothing can be written")
    fxhess.cache_clear()
    try:
        assert_close(activity.transform()(activity.x), activity.want)
    except BaseException as error:
        wrong.append(f"read again: {type(error).__name__} {error}"[:300])
    wrong += [f"left: {p.name}" for p in path.rglob(".new-*")]
    wrong += [f"left: {p.name}" for p in path.iterdir() if p.name not in ("kept", "saved")]
    for line in wrong:
        tell(f"at {at} {own}, raised {raised}, {interrupt.where}: {line}".replace("\n", " "))


OFTEN = ("Making", "OfSamples", "Reading", "Running")


def _kinds():
    long = pytest.mark.skipif(MORE <= 1, reason="in the long battery: python -m tests.faults")
    return [k if k in OFTEN else pytest.param(k, marks=long) for k in ACTIVITIES]


@pytest.mark.parametrize("kind", _kinds())
def test_interrupts_at_any_place(kind, disk, tmp_path):
    def child(at, own):
        with answers() as (tell, told):
            assert finished(forked(_interrupted, kind, tmp_path, at, own, tell)) == 0, (kind, at)
            return told()

    first = ACTIVITIES[kind](tmp_path)  # what is imported or kept at a first time, is
    first.before()
    first.run()
    fxhess.cache_clear(disk=True)
    counts = [int(*child(0, own)) for own in (False, True)]
    chosen = random.Random(SEED)
    failures = []
    for i in range(times(2)):
        fxhess.cache_clear(disk=True)
        failures += child(chosen.randrange(counts[i % 2]) + 1, bool(i % 2))
    assert not failures, "\n".join([f"seed {SEED}", *failures])


SEED = int(os.environ.get("FXHESS_SEED", random.SystemRandom().randrange(10**6)))


class Waits(nn.Module):
    """Sends Ctrl-C while it is captured, so many times, between two operations or within one."""

    def __init__(self, often):
        super().__init__()
        self.often, self.after = often, []

    def forward(self, x):
        x = x.sin()
        for _ in range(self.often):
            signal.raise_signal(signal.SIGINT)
        self.after.append("no operation")
        x = x.cos()
        self.after.append("an operation")
        return x.sum(-1)


@pytest.mark.parametrize("often, after", [(1, ["no operation"]), (2, [])])
def test_one_interrupt_waits_for_the_next_operation_and_two_do_not(often, after):
    model, x = Waits(often), randn(2, 3)
    hess = fxhess.transform(model)
    with pytest.raises(KeyboardInterrupt):
        hess(x)
    assert model.after == after
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    model.often = 0
    assert_close(hess(x), oracle.hessian(model, x))


def test_a_handler_of_the_users_own_is_called(monkeypatch):
    calls, model, x = [], Waits(1), randn(2, 3)
    before = signal.signal(signal.SIGINT, lambda *args: calls.append(args))
    try:
        hess = fxhess.transform(model)(x)
        assert len(calls) == len(model.after) // 2 and calls[0][0] == signal.SIGINT
    finally:
        signal.signal(signal.SIGINT, before)
    model.often = 0
    assert_close(hess, oracle.hessian(model, x))
