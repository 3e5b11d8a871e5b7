"""``out=``: the result written into a given tensor."""

from __future__ import annotations

import pytest
import torch
from reference import assert_close, mlp, randn

import fxhess
from fxhess import InputError

X = randn(3, 4)


@pytest.fixture
def hess():
    return fxhess.transform(mlp(4, 5, 1))


@pytest.mark.parametrize("batch", [(3,), (0,), (2, 3), ()])
def test_result_is_written_and_returned(hess, batch):
    x = randn(*batch, 4)
    out = torch.full((*batch, 4, 4), 7.0, dtype=torch.float64)
    got = hess(x, out=out)
    assert got is out
    assert_close(out, hess(x).detach())
    assert not out.requires_grad


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_out_in_every_mode(hess, grad):
    with grad():
        out = torch.empty(3, 4, 4, dtype=torch.float64)
        hess(X, out=out)
        assert_close(out.clone(), hess(X).detach().clone())


def test_strided_out_is_written_where_it_lies(hess):
    store = torch.zeros(3, 8, 4, dtype=torch.float64)
    hess(X, out=store[:, ::2])
    assert_close(store[:, ::2].clone(), hess(X).detach())
    assert torch.equal(store[:, 1::2], torch.zeros(3, 4, 4, dtype=torch.float64))
    swapped = torch.empty(4, 4, 3, dtype=torch.float64).permute(2, 0, 1)
    assert_close(hess(X, out=swapped).clone(), hess(X).detach())


@pytest.mark.parametrize("outputs", ["value", "gradient", "hessian"])
@pytest.mark.parametrize("width", [1, 2])
def test_each_output(outputs, width):
    hess = fxhess.transform(mlp(4, 5, width), outputs)
    want = hess(X).detach()
    assert_close(hess(X, out=torch.empty_like(want)), want)


def test_out_of_a_sum_over_the_batch():
    hess = fxhess.transform(lambda x: x.exp().sum(), "value")
    assert_close(hess(X, out=torch.empty((), dtype=torch.float64)), X.exp().sum())


def test_zero_hessian_is_written():
    hess = fxhess.transform(lambda x: x.sum(-1))
    out = torch.full((3, 4, 4), 7.0, dtype=torch.float64)
    assert torch.equal(hess(X, out=out), torch.zeros_like(out))


def empty(*shape, **options):
    return torch.empty(*shape, **{"dtype": torch.float64, **options})


def _behind_x():
    whole = torch.zeros(12 + 48, dtype=torch.float64)
    return whole[:12].view(3, 4).copy_(X), whole[8:56].view(3, 4, 4)


BAD_OUT = {  # name: out, part of the message
    "shape": (lambda: empty(3, 4, 5), "[3, 4, 5]"),
    "batch": (lambda: empty(2, 4, 4), "[2, 4, 4]"),
    "rank": (lambda: empty(48), "[48]"),
    "broadcastable shape": (lambda: empty(1, 4, 4), "[1, 4, 4]"),
    "dtype": (lambda: empty(3, 4, 4, dtype=torch.float32), "float32"),
    "device": (lambda: empty(3, 4, 4, device="meta"), "meta"),
    "gradient": (lambda: empty(3, 4, 4, requires_grad=True), "requires grad"),
    "expanded": (lambda: empty(1, 4, 4).expand(3, 4, 4), "overlaps itself"),
    "expanded columns": (lambda: empty(3, 4, 1).expand(3, 4, 4), "overlaps itself"),
    "overlapping windows": (
        lambda: empty(100).as_strided((3, 4, 4), (5, 4, 1)),
        "overlaps itself",
    ),
}


@pytest.mark.parametrize("name", BAD_OUT)
def test_bad_out(hess, name):
    make, message = BAD_OUT[name]
    with pytest.raises(InputError) as caught:
        hess(X, out=make())
    assert message in str(caught.value)


def test_bad_out_is_left_alone(hess):
    out = torch.full((3, 4, 5), 7.0, dtype=torch.float64)
    with pytest.raises(InputError):
        hess(X, out=out)
    assert (out == 7).all()


def test_out_that_shares_memory_with_x(hess):
    x, out = _behind_x()
    before = x.clone()
    with pytest.raises(InputError, match="overlaps x"):
        hess(x, out=out)
    assert torch.equal(x, before)


def test_out_that_shares_memory_with_a_weight():
    w = randn(3, 4, 4)
    hess = fxhess.transform(lambda x: torch.tanh(x @ w[0]).sum(-1))
    with pytest.raises(InputError, match="overlaps"):
        hess(X, out=w)


def test_out_beside_x_in_one_storage_is_fine(hess):
    whole = torch.zeros(12 + 48, dtype=torch.float64)
    x, out = whole[:12].view(3, 4).copy_(X), whole[12:].view(3, 4, 4)
    hess(x, out=out)
    assert_close(out.clone(), hess(X).detach())
    assert torch.equal(x, X)


def test_out_with_several_outputs():
    hess = fxhess.transform(mlp(4, 5, 1), ("value", "hessian"))
    with pytest.raises(InputError, match="one output"):
        hess(X, out=torch.empty(3, 4, 4, dtype=torch.float64))
