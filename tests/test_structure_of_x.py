"""Structure that depends on x: neighbour lists, masks, branches; each sample has its own."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import ALL, assert_close, randn
from structures import VARYING, X, boolean, energy, same, where
from torch.nn import functional as F

import fxhess
from fxhess import CaptureError, SampleMixingError, oracle


@pytest.mark.parametrize("name", VARYING)
def test_structure_of_x(name):
    model = VARYING[name]
    hess = fxhess.transform(model, ALL)
    for seed in range(2):
        x = randn(2, 4, seed=seed)
        if name == "steps":  # not differentiable twice in PyTorch
            got = hess(x)
            assert_close(got.hessian, oracle.differences(model, x), 1e-5)
        else:
            same(hess, model, x)
    assert "structures so far" in str(hess.explain(x))


def test_a_neighbour_list_that_moves_across_the_cutoff():
    model = energy(1.5)
    hess = fxhess.transform(model, ALL, event_ndim=2)
    still = torch.tensor([[0.0, 0, 0], [1, 0.1, 0], [0, 1.1, 0.2]], dtype=torch.float64)
    counts = set()
    for distance in (1.2, 1.6, 2.6, 1.25):  # the fourth atom leaves one after the other
        atom = torch.tensor([[distance, distance / 2, 0.0]], dtype=torch.float64)
        p = torch.cat([still, atom])[None]
        same(hess, model, p, 2)
        counts.add(int((torch.cdist(p, p) < 1.5).sum()))
    assert len(counts) > 2


def test_each_sample_has_its_own_neighbours():
    model = energy(1.3)
    p = 0.6 * randn(4, 4, 3)
    hess = fxhess.transform(model, ALL, event_ndim=2)
    same(hess, model, p, 2)
    assert len(set((torch.cdist(p, p) < 1.3).sum((1, 2)).tolist())) > 2
    same(hess, model, p.flip(0)[:2], 2)
    text = str(hess.explain(p))
    assert "run as a batch" in text and "slower" not in text
    assert "guarded" in text and "nonzero(as_tuple=True)" in text
    result = torch.empty(4, 4, 3, 4, 3, dtype=p.dtype)
    only = fxhess.transform(model, event_ndim=2)
    assert only(p, out=result) is result
    assert_close(result, hess(p).hessian)
    assert only(p[:0]).shape == (0, 4, 3, 4, 3)
    hess.verify(p)


def test_two_batch_axes():
    def model(x):
        a, b, i = torch.where(x > 0)
        return x.new_zeros(x.shape[:2]).index_put((a, b), x[a, b, i].exp(), accumulate=True)

    same(fxhess.transform(model, ALL), model, randn(2, 2, 3))


def test_gradients_flow_through_samples_of_several_structures():
    scale = torch.tensor([1.0, 2.0, 0.5, 1.5], dtype=torch.float64, requires_grad=True)

    def model(x):
        b, i = torch.where(x > 0)
        return x.new_zeros(len(x)).index_add(0, b, (scale * x).sin()[b, i])

    x = X.clone().requires_grad_()
    fxhess.transform(model)(x).square().sum().backward()
    want = torch.diag_embed((x > 0) * -(scale**2) * (scale * x).sin())
    expected = torch.autograd.grad(want.square().sum(), (scale, x))
    assert_close(scale.grad, expected[0])
    assert_close(x.grad, expected[1])


def test_one_sample_without_batch_axes():
    def model(x):
        y = x[x > 0]
        return (y.exp().sum() if y.sum() > 2 else y.prod()) * x.sum()

    hess = fxhess.transform(model, ALL, event_ndim=2)
    for seed in range(3):
        x = randn(2, 3, seed=seed)
        same(hess, model, x, 2)


def test_samples_that_run_one_at_a_time():
    def model(x):  # a matrix of each sample, with no rule for it
        return torch.stack([torch.linalg.matrix_exp(torch.outer(s, s))[s > 0].sum() for s in x])

    hess = fxhess.transform(model, ALL)
    x = 0.5 * randn(3, 3)
    same(hess, model, x)
    assert "one at a time" in str(hess.explain(x))


def shared(x):
    return x.exp().sum(-1) if x.sum() > 0 else x.cos().sum(-1)


def test_a_branch_that_the_batch_shares():
    hess = fxhess.transform(shared, ALL)
    same(hess, shared, X.abs())
    same(hess, shared, -X.abs())
    with pytest.raises(SampleMixingError, match=r"test_structure_of_x\.py:\d+: return x\.exp"):
        hess(torch.stack([X[0].abs(), -0.1 * X[1].abs()]))


def test_a_number_of_python_that_is_never_the_same():
    def model(x):
        return x.exp().sum() * float(x.detach().max())

    hess = fxhess.transform(model, ALL, event_ndim=2)
    with pytest.raises(
        CaptureError, match=r"(?s)number of Python.*float\(x\.detach\(\)\.max\(\)\).*keep it"
    ):
        for seed in range(20):
            same(hess, model, randn(2, 2, seed=seed), 2)
    other = fxhess.transform(lambda x: x.exp().sum() * x.max().item(), ALL, event_ndim=2)
    for seed in range(20):  # a constant of the derivative, as in PyTorch, without a guard
        other(randn(2, 2, seed=seed))
    assert_close(other(X).hessian, oracle.hessian(model, X, 2))


def test_many_structures_are_kept_and_warned_of():
    hess = fxhess.transform(lambda x: x[x > 0].exp().sum())
    with pytest.warns(fxhess.StructureWarning, match="captured 16 times"):
        for k in range(16):
            x = torch.where(torch.arange(16) < k, 1.0, -1.0)[None]
            assert hess(x).diagonal(dim1=1, dim2=2).count_nonzero() == k


def test_threads_capture_in_turn():
    hess, wrong = fxhess.transform(where), []

    def work(seed):
        for k in range(2):
            x = randn(2, 4, seed=10 * seed + k)
            try:
                assert_close(hess(x), oracle.hessian(where, x))
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_one_inside_of_another():
    inner = fxhess.transform(boolean, "gradient")
    inner(X)
    with pytest.raises(fxhess.FxhessError):
        fxhess.transform(lambda x: inner(x).square().sum(-1))(X)


# --- scan, map: loops over entries ----------------------------------------------------------------


def scanned(x):
    last, all_ = torch._higher_order_ops.scan(
        lambda c, s: (c + s.sin(), c * s), x.new_zeros(len(x)), x.T.contiguous()
    )
    return last * all_.sum(0)


def test_scan_and_map():
    def plain(x):
        before = x.sin().cumsum(-1) - x.sin()
        return x.sin().sum(-1) * (before * x).sum(-1)

    got = fxhess.transform(scanned)(X)
    assert_close(got, oracle.hessian(plain, X))
    mapped = fxhess.transform(lambda x: torch._higher_order_ops.map(lambda s: s.exp().prod(), x))
    assert_close(mapped(X), oracle.hessian(lambda x: x.exp().prod(-1), X))


@settings(max_examples=4, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.integers(1, 3), st.sampled_from(["where", "rows", "written"]))
def test_random_batches(seed, batch, name):
    same(RANDOM[name], VARYING[name], randn(batch, 3, seed=seed))


RANDOM = {name: fxhess.transform(VARYING[name], ALL) for name in ("where", "rows", "written")}


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_sum_or_a_mean_over_the_batch(reduction):
    """PyTorch's loss looks at the values of its variances, so samples are looked at alone."""

    def loss(x):
        return F.gaussian_nll_loss(x.sin(), x.cos(), x.square() + 1, reduction=reduction)

    x = randn(5, 3)
    got = fxhess.transform(loss, ALL)(x)
    whole = torch.autograd.functional.hessian(loss, x)
    assert_close(got.hessian, torch.stack([whole[i, :, i] for i in range(5)]))
    assert_close(got.gradient, torch.func.grad(loss)(x))
    assert_close(got.value, loss(x))
