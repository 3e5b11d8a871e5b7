"""Programs are made once for a structure and shared."""

from __future__ import annotations

import copy
import gc
import threading

import pytest
import torch
from reference import assert_close, mlp, randn
from torch import nn

import fxhess
from fxhess import oracle
from fxhess.kinds import Elementwise, Pointwise
from fxhess.registry import Rule


@pytest.fixture(autouse=True)
def empty_cache():
    fxhess.cache_clear()


def _misses():
    return fxhess.cache_info().misses


def test_info_counts():
    assert fxhess.cache_info()[:3] == (0, 0, 0)
    hess = fxhess.transform(mlp(3, 4, 1))
    hess(randn(2, 3))
    hess(randn(2, 3))
    assert fxhess.cache_info()[:3] == (0, 1, 1)
    fxhess.transform(mlp(3, 4, 1, seed=5))(randn(2, 3))
    info = fxhess.cache_info()
    assert (info.hits, info.misses, info.size) == (1, 1, 1) and info.maxsize >= 1


def test_modules_of_one_structure_share_code_and_keep_their_weights():
    x = randn(3, 4)
    one, two = mlp(4, 5, 1, seed=1), mlp(4, 5, 1, seed=2)
    a, b = fxhess.transform(one), fxhess.transform(two)
    ha, hb = a(x), b(x)
    assert _misses() == 1
    assert a.graph_module(x) is b.graph_module(x)
    assert_close(ha, oracle.hessian(one, x))
    assert_close(hb, oracle.hessian(two, x))
    assert (ha - hb).abs().max() > 1e-3


def test_functions_of_one_structure_share_code():
    x, matrices = randn(3, 4), [randn(4, 4, seed=s) for s in range(3)]
    for q in matrices:
        got = fxhess.transform(lambda x, q=q: ((x @ q).tanh()).sum(-1))(x)
        assert_close(got, oracle.hessian(lambda x, q=q: ((x @ q).tanh()).sum(-1), x))
    assert _misses() == 1


def test_any_batch_size_is_one_program():
    hess = fxhess.transform(mlp(3, 4, 1))
    for size in (4, 1, 0, 7, 2, 300):
        assert hess(randn(size, 3)).shape == (size, 3, 3)
    assert fxhess.cache_info()[:2] == (0, 1)


def test_layouts_in_memory_share_a_program():
    hess = fxhess.transform(mlp(3, 4, 1))
    x = randn(5, 3)
    want = hess(x)
    assert_close(hess(x.T.contiguous().T), want, 1e-14)
    assert_close(hess(randn(10, 3)[::2] * 0 + x), want, 1e-14)
    assert_close(hess(x[:1].expand(5, 3))[3:4], want[:1], 1e-14)
    assert _misses() == 1


DIFFERENT = {
    "width": lambda: fxhess.transform(mlp(3, 5, 1))(randn(2, 3)),
    "activation": lambda: fxhess.transform(mlp(3, 4, 1, activation=nn.Sigmoid))(randn(2, 3)),
    "event shape": lambda: fxhess.transform(mlp(2, 4, 1))(randn(2, 2)),
    "dtype": lambda: fxhess.transform(mlp(3, 4, 1).float())(randn(2, 3).float()),
    "outputs": lambda: fxhess.transform(mlp(3, 4, 1), "gradient")(randn(2, 3)),
    "batch axes": lambda: fxhess.transform(mlp(3, 4, 1))(randn(2, 2, 3)),
    "strategy": lambda: fxhess.transform(mlp(3, 4, 1), strategy="close")(randn(2, 3)),
    "a number": lambda: fxhess.transform(lambda x: 2 * x.exp().sum(-1))(randn(2, 3)),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_programs_differ_by(what):
    fxhess.transform(mlp(3, 4, 1))(randn(2, 3))
    fxhess.transform(lambda x: 3 * x.exp().sum(-1))(randn(2, 3))
    before = _misses()
    DIFFERENT[what]()
    assert _misses() == before + 1


def test_clear_forgets():
    hess = fxhess.transform(mlp(3, 4, 1))
    x = randn(2, 3)
    want, before = hess(x), hess.graph_module(x)
    fxhess.cache_clear()
    assert fxhess.cache_info()[:3] == (0, 0, 0)
    assert torch.equal(hess(x), want)
    assert hess.graph_module(x) is not before
    assert _misses() == 1


@pytest.mark.usefixtures("rule_table")
def test_a_registered_rule_makes_new_programs():
    model = lambda x: torch.tanh(x).sum(-1)  # noqa: E731
    x = randn(2, 3)
    right = fxhess.transform(model)(x)
    doubled = Elementwise((1,), {(0, 0): lambda y, x: -4 * y * (1 - y * y)})
    fxhess.register_rule(Rule(torch.ops.aten.tanh.default, Pointwise(), doubled), override=True)
    assert_close(fxhess.transform(model)(x), 2 * right, 1e-14)


def test_threads_share_one_program():
    models = [mlp(3, 6, 1, seed=s) for s in range(4)]
    x = randn(5, 3)
    results: dict[int, torch.Tensor] = {}
    failures: list[BaseException] = []
    start = threading.Barrier(8)

    def work(i):
        try:
            start.wait()
            results[i] = fxhess.transform(models[i % 4])(x)
        except BaseException as error:  # shown by the assertion below
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures
    assert _misses() == 1
    for i in range(8):
        assert_close(results[i], oracle.hessian(models[i % 4], x))


def test_threads_call_one_transform():
    model = mlp(3, 6, 1)
    hess = fxhess.transform(model)
    inputs = [randn(s, 3, seed=s) for s in (1, 2, 3, 4)]
    results: dict[int, torch.Tensor] = {}
    threads = [
        threading.Thread(target=lambda i=i, x=x: results.update({i: hess(x)}))
        for i, x in enumerate(inputs)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i, x in enumerate(inputs):
        assert_close(results[i], oracle.hessian(model, x))


def test_threads_see_the_weights_of_their_time():
    """Work on the weights alone is kept between calls: never an outdated one, in any thread."""
    model = mlp(20, 64, 64, 1)
    hess = fxhess.transform(model, example=randn(2, 20))
    x, failures = randn(4, 20), []

    def work(want):
        with torch.no_grad():
            for _ in range(20):
                if (hess(x) - want).abs().max() > 1e-9:
                    failures.append("outdated")

    for seed in range(4):
        with torch.no_grad():
            model[0].weight.copy_(randn(64, 20, seed=seed))
        want = oracle.hessian(model, x)
        threads = [threading.Thread(target=work, args=(want,)) for _ in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert not failures


def test_many_transforms_of_one_structure_do_not_grow_anything():
    x = randn(2, 3)

    def objects():
        gc.collect()
        return sum(isinstance(o, (torch.fx.Node, torch.Tensor)) for o in gc.get_objects())

    def work(n):
        for seed in range(n):
            fxhess.transform(mlp(3, 4, 1, seed=seed))(x)

    work(3)
    before = objects()
    work(200)
    assert _misses() == 1
    assert objects() <= before + 10


def test_the_least_recently_used_program_is_dropped(monkeypatch):
    monkeypatch.setattr("fxhess.cache.MAXSIZE", 2)
    x = randn(2, 3)
    for width in (4, 5, 4, 6):  # 5 is dropped for 6
        fxhess.transform(mlp(3, width, 1))(x)
    assert fxhess.cache_info()[:3] == (1, 3, 2)
    fxhess.transform(mlp(3, 4, 1))(x)
    assert _misses() == 3
    fxhess.transform(mlp(3, 5, 1))(x)
    assert _misses() == 4


def test_a_failure_is_not_kept():
    hess = fxhess.transform(lambda x: x.cumsum(0).exp().sum(-1))
    for _ in range(2):
        with pytest.raises(fxhess.SampleMixingError):
            hess(randn(2, 3))
    assert fxhess.cache_info().size == 0


def test_copies_use_the_program():
    hess = fxhess.transform(mlp(3, 4, 1))
    x = randn(2, 3)
    want = hess(x)
    assert torch.equal(copy.deepcopy(hess)(x), want)
    assert _misses() == 1
