"""Small calls: the short way of a call like the last one, and code called without torch.compile;
neither may miss a change."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from reference import ALL, assert_close, mlp, randn
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fxhess
from fxhess import _direct, _lanes, execute, oracle


def _net(grad=False, dtype=torch.float64):
    return mlp(4, 6, 5, 1).to(dtype).requires_grad_(grad)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "compiled"])
def hess(request):
    return fxhess.transform(_net(), ALL, compile=request.param)


@pytest.fixture
def warm(hess):
    """A transform that has the short way ready, of a model with weights of its own."""
    own = copy.deepcopy(hess)
    _check(own, 3)
    _check(own, 3)
    assert own._last is not None
    return own


def _check(hess, *batch, seed=0, x=None):
    x = randn(*batch, 4, seed=seed) if x is None else x
    got = hess(x)
    model = copy.deepcopy(hess.model).requires_grad_(False)
    assert_close(got.hessian, oracle.hessian(model, x))
    assert_close(got.gradient, oracle.gradient(model, x))
    return got


def test_batch_sizes(warm):
    for size in (5, 3, 1, 2, 9, 1):
        _check(warm, size, seed=size)
    assert warm(randn(0, 4)).hessian.shape == (0, 4, 4)
    _check(warm, 3)
    _check(warm, 2, 3)
    _check(warm, 3, 3)
    _check(warm, 1, 4)
    _check(warm)


def test_strides(warm):
    _check(warm, x=randn(4, 3).t())
    _check(warm, x=randn(6, 8)[::2, 1::2])
    _check(warm, x=randn(4).expand(3, 4))
    weight = warm.model[2].weight
    weight.data = weight.data.t().contiguous().t()
    _check(warm, 3)
    weight.data = randn(5, 12)[:, ::2]
    _check(warm, 3)


def test_weights(warm):
    before = warm(randn(3, 4)).hessian
    with torch.no_grad():
        warm.model[0].weight.mul_(2)
    assert not torch.equal(_check(warm, 3).hessian, before)
    warm.model[0].weight.data.mul_(0.5)
    _check(warm, 3)
    warm.model[0].weight = nn.Parameter(randn(6, 4), requires_grad=False)
    _check(warm, 3)


def test_modules(warm):
    warm.model[1] = nn.Softplus()
    _check(warm, 3)
    if warm.running.compile:
        return  # a matter of finding the program, the same for both
    warm.model.append(nn.Tanh())
    _check(warm, 3)
    del warm.model[-1]
    _check(warm, 3)
    warm.model[1].beta = 1.0
    warm.model[3] = nn.Sequential(nn.Tanh(), nn.Dropout(0.5)).eval()
    _check(warm, 3)
    other = warm.model[3][1].train()
    assert not torch.equal(warm(randn(3, 4)).hessian, warm(randn(3, 4)).hessian)
    other.eval()
    _check(warm, 3)
    warm.model[0] = nn.Linear(4, 6, bias=False).double().requires_grad_(False)
    _check(warm, 3)


def test_gradients(warm):
    x = randn(3, 4).requires_grad_()
    H = warm(x).hessian
    (g,) = torch.autograd.grad(H.square().sum(), x)
    assert g.abs().max() > 0
    with torch.no_grad():
        assert not warm(x).hessian.requires_grad
    warm.model.requires_grad_(True)
    assert warm(randn(3, 4)).hessian.requires_grad
    with torch.no_grad():
        assert not warm(randn(3, 4)).hessian.requires_grad
    assert warm(randn(3, 4)).hessian.requires_grad
    with torch.inference_mode():
        assert warm(randn(3, 4)).hessian.is_inference()


def test_types_and_modes(warm):
    assert warm.model.float() is warm.model
    x = randn(3, 4, dtype=torch.float32)
    want = warm(x).hessian
    assert want.dtype == torch.float32
    if not warm.running.compile:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = warm(x).hessian
        assert not torch.equal(cast.float(), want)
        assert torch.equal(warm(x).hessian, want)
    for wrong in (x.double(), [1.0, 2.0], None):
        with pytest.raises(fxhess.InputError):
            warm(wrong)
    warm.model.double()
    _check(warm, 3)
    mapped = torch.func.vmap(lambda x: warm(x).hessian)(randn(2, 3, 4))
    assert_close(mapped, oracle.hessian(warm.model, randn(2, 3, 4)))
    assert torch.vmap(warm)(randn(3, 4)).hessian.shape == (3, 4, 4)


class _Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += 1
        return func(*args, **(kwargs or {}))


def test_modes_see_operators(warm):
    with _Count() as count:
        _ = warm(randn(3, 4))
    assert count.seen > 10


def test_threads(warm):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        _check(warm, 3)
    finally:
        torch.set_num_threads(threads)
    _check(warm, 3)


def test_copies(warm):
    twin = copy.deepcopy(warm)
    with torch.no_grad():
        twin.model[0].weight.mul_(3)
    _check(twin, 3)
    _check(warm, 3)
    file = io.BytesIO()
    torch.save(warm, file)
    file.seek(0)
    _check(torch.load(file, weights_only=False), 3)
    fxhess.cache_clear()
    _check(warm, 3)


def test_functions_follow_their_names():
    scale = randn(4)

    def model(x):
        return (x * scale).sin().sum(-1)

    hess = fxhess.transform(model)
    x = randn(3, 4)
    for seed in (1, 2, 3, 3):
        scale = randn(4, seed=seed)
        assert_close(hess(x), oracle.hessian(model, x))


@pytest.mark.parametrize("work", ["small", "large"])
def test_compiled_without_torch_compile(work, monkeypatch):
    """One compilation serves all batch sizes but 1, and all tiles, and dynamo is not asked."""
    if work == "large":
        monkeypatch.setattr(execute, "_WORTHWHILE", 0)
        monkeypatch.setitem(execute.cost.TILE_BYTES, "cpu", 1500)
    fxhess.cache_clear()
    monkeypatch.setattr(_lanes, "compiled", lambda *_: None)  # the other way, tests/test_lanes.py
    compilations = []
    compiled = _direct._compiled
    monkeypatch.setattr(
        _direct, "_compiled", lambda *args: compilations.append(args) or compiled(*args)
    )
    taken = []
    for place in (fxhess.pipeline, fxhess._running):  # the public way, not taken
        monkeypatch.setattr(place, "compiled", lambda m, *_: lambda *a: taken.append(1) or m(*a))
    model = mlp(3, 7, 2).requires_grad_(False)
    hess = fxhess.transform(model, compile=True)
    for size in (4, 9, 2, 4):
        x = randn(size, 3, seed=size)
        assert_close(hess(x), oracle.hessian(model, x))
    x = randn(3, 5, seed=1).t()
    assert_close(hess(x), oracle.hessian(model, x))
    out = torch.empty(5, 2, 3, 3, dtype=torch.float64)
    assert_close(hess(x, out=out), oracle.hessian(model, x))
    assert len(compilations) == 1 and not taken
    if work == "large":  # what is not contiguous cannot be written in place
        wide = torch.empty(5, 2, 3, 6, dtype=torch.float64)
        assert_close(hess(x, out=wide[..., ::2]), oracle.hessian(model, x))
        assert taken


def test_what_cannot_be_compiled_directly_takes_the_public_way(monkeypatch):
    def fails(*_):
        raise RuntimeError("no such internals")

    monkeypatch.setattr(_direct, "_compiled", fails)
    monkeypatch.setattr(_lanes, "compiled", fails)
    taken = []
    public = fxhess.pipeline.compiled
    monkeypatch.setattr(
        fxhess.pipeline, "compiled", lambda module, *_: taken.append(module) or module.forward
    )
    model = mlp(3, 8, 1).requires_grad_(False)
    hess = fxhess.transform(model, compile=True)
    x = randn(4, 3)
    assert_close(hess(x), oracle.hessian(model, x))
    assert_close(hess(x), oracle.hessian(model, x))
    assert len(taken) == 1 and public is not fails
