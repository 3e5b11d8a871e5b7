"""Bad input: a clear error, nothing lost, nothing changed."""

from __future__ import annotations

import copy

import pytest
import torch
from reference import ALL, assert_close, mlp, randn
from torch import nn

import fxhess
from fxhess import CaptureError, FxhessError, InputError, SampleMixingError, UnsupportedOpError

X = randn(3, 4)


def _model():
    return mlp(4, 5, 1)


def _branching(x):
    if torch.rand(()) > 0.5:
        return x.exp().sum(-1)
    return x.sum(-1)


def _item(x):
    return x.exp().sum(-1) * x.detach().sum().item()


def _unique(x):
    return torch.unique(x).exp().sum()


BAD_X = {  # name: x, error, parts of the message
    "a list": ([[1.0, 2.0]], InputError, ("must be a tensor", "list")),
    "an array of integers": (torch.ones(3, 4, dtype=torch.long), InputError, ("int64", "float")),
    "booleans": (torch.ones(3, 4, dtype=torch.bool), InputError, ("bool",)),
    "complex": (torch.ones(3, 4, dtype=torch.cfloat), InputError, ("complex64", "real")),
    "rank 0": (torch.tensor(1.0), InputError, ("0 axes", "event_ndim=1")),
    "too few features": (randn(3, 3), CaptureError, ("[3, 3]",)),
    "too many features": (randn(3, 5), CaptureError, ("[3, 5]",)),
    "float32 for float64 weights": (X.float(), FxhessError, ("float32", "float64")),
    "half for float64 weights": (X.half(), FxhessError, ("float16", "float64")),
    "sparse": (X.to_sparse(), InputError, ("layout", "to_dense")),
    "sparse csr": (X.to_sparse_csr(), InputError, ("layout", "to_dense")),
    "meta": (X.to("meta"), InputError, ("meta device",)),
}


@pytest.mark.parametrize("name", BAD_X)
def test_bad_x(name):
    x, error, parts = BAD_X[name]
    model = _model()
    weights = copy.deepcopy(model.state_dict())
    hess = fxhess.transform(model)
    before = hess(X)
    with pytest.raises(error) as caught:
        hess(x)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert torch.equal(hess(X), before)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert model.training and hess.training


@pytest.mark.parametrize("name", BAD_X)
def test_bad_x_at_the_first_call(name):
    x, error, parts = BAD_X[name]
    hess = fxhess.transform(_model())
    with pytest.raises(error) as caught:
        hess(x)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert hess(X).shape == (3, 4, 4)


BAD_MODELS = {  # name: model, error, parts of the message
    "samples in another place": (
        lambda x: x.sin().T, CaptureError, ("not one of each sample", "axes of x are batch axes"),
    ),
    "two tensors": (lambda x: (x.sum(-1), x.exp().sum(-1)), CaptureError, ("several values",)),
    "a dictionary": (lambda x: {"y": x.sum(-1)}, CaptureError, ("several values",)),
    "nothing": (lambda x: None, CaptureError, ("None",)),
    "a number": (lambda x: 3.0, CaptureError, ("3.0",)),
    "integers": (lambda x: x.argmax(-1), CaptureError, ("int64",)),
    "complex numbers": (lambda x: torch.complex(x, x).sum(-1), FxhessError, ("omplex",)),
    "a branch on chance": (_branching, CaptureError, ("random numbers", "torch.where")),
    "a number of the whole batch": (_item, SampleMixingError, ("sum over the batch",)),
    "unique values": (_unique, UnsupportedOpError, ("no derivative of aten._unique2",)),
    "an error of its own": (
        lambda x: x @ torch.ones(7, 2, dtype=x.dtype), CaptureError, ("check that model(x)",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_model(name):
    model, error, parts = BAD_MODELS[name]
    with pytest.raises(error) as caught:
        fxhess.transform(model)(X)
    message = str(caught.value)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    "name", ["a branch on chance", "a number of the whole batch", "unique values"]
)
def test_what_depends_on_values_is_reported_at_the_users_line(name):
    with pytest.raises(FxhessError, match=r"where: .*test_inputs\.py:\d+: "):
        fxhess.transform(BAD_MODELS[name][0])(X)


def test_weights_on_meta():
    with pytest.raises(InputError, match=r"'0\.weight' is on the meta device"):
        fxhess.transform(nn.Sequential(nn.Linear(4, 1, device="meta")).double())(X)


def test_x_on_meta_with_weights_elsewhere():
    with pytest.raises(InputError, match="meta"):
        fxhess.transform(_model())(torch.empty(3, 4, dtype=torch.float64, device="meta"))


BAD_CALLS = {
    "unknown output": (lambda: fxhess.transform(_model(), "hesian"), "'hesian'.*\n.*'hessian'"),
    "no output": (lambda: fxhess.transform(_model(), ()), "named, and once each"),
    "the same twice": (lambda: fxhess.transform(_model(), ("value", "value")), "once each"),
    "no model": (lambda: fxhess.transform(3), "not int"),
    "a class": (lambda: fxhess.transform(nn.Linear), r"Linear is a class.*Linear\(\.\.\.\)"),
    "outputs that are none": (lambda: fxhess.transform(_model(), 3), "outputs=3"),
    "a set of outputs": (lambda: fxhess.transform(_model(), {"value"}), "outputs="),
    "a word for memory": (lambda: fxhess.transform(_model(), max_memory="8MB"), "'8MB'"),
    "part of a byte": (lambda: fxhess.transform(_model(), max_memory=1.5), "counts bytes"),
    "a word for axes": (lambda: fxhess.transform(_model(), event_ndim="1"), "counts axes"),
    "axes that are true": (lambda: fxhess.transform(_model(), event_ndim=True), "counts axes"),
    "compile by name": (lambda: fxhess.transform(_model(), compile="max"), "not 'max'"),
    "saved untransformed": (lambda: fxhess.save(_model(), "a.fx", X), "not Sequential"),
    "packaged untransformed": (lambda: fxhess.package(_model(), "a.pt2", X), "not Sequential"),
    "negative event_ndim": (lambda: fxhess.transform(_model(), event_ndim=-1), "negative"),
    "unknown strategy": (lambda: fxhess.transform(_model(), strategy="fast")(X), "'fast'"),
    "unknown strategy at once": (lambda: fxhess.transform(_model(), strategy="fast"), "'fast'"),
    "bad example": (lambda: fxhess.transform(_model(), example=X.long()), "int64"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_call(name):
    call, message = BAD_CALLS[name]
    with pytest.raises(InputError, match=f"(?s){message}"):
        call()


def test_errors_have_one_base_and_ordinary_ones():
    for error in (InputError, CaptureError, fxhess.UnsupportedOpError, fxhess.RuleError):
        assert issubclass(error, FxhessError)
    assert issubclass(InputError, ValueError)
    assert issubclass(fxhess.UnsupportedOpError, NotImplementedError)
    assert issubclass(fxhess.VerificationError, FxhessError)


# --- edges that are no errors -------------------------------------------------------------------


def test_an_output_with_details_comes_first():
    both = fxhess.transform(_model(), (("entries", [(0, 1)]), "hessian"))(X)
    assert torch.equal(both.entries[:, 0], both.hessian[:, 0, 1])


@pytest.mark.parametrize("batch", [(0,), (0, 3), (3, 0)])
def test_an_empty_batch_gives_an_empty_result(batch):
    got = fxhess.transform(mlp(4, 5, 2), ALL)(randn(*batch, 4))
    assert got.value.shape == (*batch, 2)
    assert got.gradient.shape == (*batch, 2, 4)
    assert got.hessian.shape == (*batch, 2, 4, 4)


def test_an_empty_batch_first_and_a_full_one_after():
    hess = fxhess.transform(_model())
    assert hess(randn(0, 4)).shape == (0, 4, 4)
    assert_close(hess(X), fxhess.transform(_model())(X))


@pytest.mark.parametrize("outputs", ["hessian", ("diagonal", "hvp"), "laplacian"])
def test_an_empty_batch_of_rows_that_are_not_contiguous(outputs):
    """PyTorch repeats the weight of a linear layer for each sample there: for none."""
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    hess = fxhess.transform(lambda x: net(x.mT.sin()).sum((-1, -2)), outputs, event_ndim=2)
    for n in (0, 2, 0):
        x = torch.ones(n, 3, 4, dtype=torch.float64)
        given = {"vector": x} if "hvp" in outputs else {}
        got = hess(x, **given)
        for part in got if isinstance(got, tuple) else (got,):
            assert part.shape[0] == n


def test_samples_without_entries():
    got = fxhess.transform(lambda x: x.exp().sum(-1), ALL)(randn(3, 0))
    assert got.hessian.shape == (3, 0, 0) and got.gradient.shape == (3, 0)
    assert torch.equal(got.value, torch.zeros(3, dtype=torch.float64))


POISONED = {
    "mlp": (_model(), 1),
    "softmax": (lambda x: (torch.softmax(x, -1) ** 2).sum(-1), 1),
    "layer norm": (lambda x: nn.functional.layer_norm(x, (4,)).pow(3).sum(-1), 1),
    "product": (lambda x: x.prod(-1), 1),
    "sum over the batch": (lambda x: x.exp().sum(), 1),
    "tensordot": (lambda x: torch.tensordot(x.sin(), x.cos(), dims=2), 1),
}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("strategy", ["close", "rebase"])
@pytest.mark.parametrize("name", POISONED)
def test_what_is_not_finite_stays_in_its_sample(name, strategy, bad):
    model, _ = POISONED[name]
    hess = fxhess.transform(model, ("gradient", "hessian"), strategy=strategy)
    clean = hess(X)
    x = X.clone()
    x[1, 2] = bad
    got = hess(x)
    for part, want in zip(got, clean, strict=True):
        assert_close(part[[0, 2]], want[[0, 2]], 1e-14)
    if bad != bad:
        assert torch.isnan(got.hessian[1]).any()


def test_x_is_not_changed():
    x = X.clone()

    def model(x):
        y = x.clone()
        y[:, 0] = 2 * y[:, 1]
        return y.exp().sum(-1)

    fxhess.transform(model, ALL)(x)
    assert torch.equal(x, X)


def test_x_written_in_place_by_the_model_is_not_changed():
    x = X.clone()
    fxhess.transform(lambda x: x.mul_(2).exp().sum(-1))(x)
    assert torch.equal(x, X)
