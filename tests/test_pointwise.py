"""Pointwise operations where PyTorch's double backward is no referee: it has none, gives nan or is
wrong.  The referee is central differences, or the value known by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn, special

import fxhess
from fxhess import oracle
from fxhess.errors import UnsupportedOpError

FLOAT = torch.float64
W = torch.tensor([0.2, 0.9, 0.4, 0.6], dtype=FLOAT)


def _points(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=FLOAT)[:, None]


def _second(f, x):
    """f'' at points ``x: [n, 1]``, and f'."""
    result = fxhess.transform(lambda x: f(x).sum(1), ("gradient", "hessian"))(x)
    return result.hessian.reshape(-1), result.gradient.reshape(-1)


# --- no double backward in PyTorch --------------------------------------------------------------

WITHOUT_DOUBLE_BACKWARD = {
    "hardsigmoid": lambda x: F.hardsigmoid(x) * x,
    "remainder of a number": lambda x: (5 % (1.3 + x * x)) * x,
    "remainder": lambda x: torch.remainder(x, 1.3 + x.sin() / 2) * x,
    "multi_margin": lambda x: F.multi_margin_loss(
        x, torch.tensor([2]).expand(len(x)), p=2, weight=W, reduction="none"
    )[:, None],
}


@pytest.mark.parametrize("name", WITHOUT_DOUBLE_BACKWARD)
def test_without_double_backward(name):
    f = WITHOUT_DOUBLE_BACKWARD[name]
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(3), dtype=FLOAT)

    def model(x):
        return torch.sin(f(x)).sum(1)

    expected = oracle.differences(model, x)
    torch.testing.assert_close(fxhess.transform(model)(x), expected, atol=1e-5, rtol=1e-5)


# --- right where PyTorch gives nan or another value ---------------------------------------------

AT_POINTS = {  # name: (f, x, f'(x), f''(x))
    "sinc at 0": (torch.sinc, 0.0, 0.0, -(math.pi**2) / 3),
    "sinc near 0": (torch.sinc, 1e-9, -(math.pi**2) / 3 * 1e-9, -(math.pi**2) / 3),
    "i1 near 0": (special.i1, 1e-10, 0.5, 3 / 8 * 1e-10),
    "x**0 at 0": (lambda x: x**0, 0.0, 0.0, 0.0),
    "x**p at 0, p = 0": (lambda x: x ** torch.zeros(1), 0.0, 0.0, 0.0),
    "x**p at 0, p = 1": (lambda x: x ** torch.ones(1), 0.0, 1.0, 0.0),
    "0**x": (lambda x: torch.pow(0, x), 2.0, 0.0, 0.0),
    "xlogy(0, 0)": (lambda x: torch.xlogy(torch.zeros(1), x), 0.0, 0.0, 0.0),
    "logaddexp far left": (lambda x: torch.logaddexp(x, 2 * x), -1e4, 1.0, 0.0),
    "logaddexp far right": (lambda x: torch.logaddexp(x, 2 * x), 1e4, 2.0, 0.0),
    "logsigmoid far left": (F.logsigmoid, -1e4, 1.0, 0.0),
    "softplus far right": (F.softplus, 1e4, 1.0, 0.0),
    "mish far right": (F.mish, 1e4, 1.0, 0.0),
    "gelu far left": (F.gelu, -1e200, 0.0, 0.0),
    "gelu tanh far right": (lambda x: F.gelu(x, approximate="tanh"), 1e200, 1.0, 0.0),
    "log_ndtr far left": (special.log_ndtr, -1e5, 1e5, -1.0),
    "log_ndtr far right": (special.log_ndtr, 1e3, 0.0, 0.0),
    "erfcx far right": (special.erfcx, 1e5, -5.641895835e-11, 1.128379167e-15),
    "hypot at the origin": (lambda x: torch.hypot(x, 0 * x), 0.0, 0.0, 0.0),
}


@pytest.mark.parametrize("name", AT_POINTS)
def test_at_points(name):
    f, x, first, second = AT_POINTS[name]
    got_second, got_first = _second(f, _points(x))
    assert got_first.item() == pytest.approx(first, rel=1e-8, abs=1e-30)
    assert got_second.item() == pytest.approx(second, rel=1e-8, abs=1e-30)


@pytest.mark.parametrize("name", sorted(set(AT_POINTS) - {"hypot at the origin"}))
def test_gradients_through_the_hessian_are_finite(name):
    """What a formula does not choose must not reach its gradient as nan."""
    f, x, _, _ = AT_POINTS[name]
    point = _points(x).requires_grad_()
    fxhess.transform(lambda x: f(x).sum(1) + (x**3).sum(1))(point).sum().backward()
    assert point.grad is not None and point.grad.isfinite().all()


@pytest.mark.parametrize(
    "f",
    [
        special.zeta,
        special.gammainc,
        special.gammaincc,
        lambda x, _: special.zeta(x, 2.0),
    ],
)
def test_unknown_derivatives_are_refused(f):
    with pytest.raises(UnsupportedOpError, match="no closed form"):
        fxhess.transform(lambda x: f(x, x).sum(1))(torch.full((2, 3), 2.5, dtype=FLOAT))


# --- losses reduced over the batch --------------------------------------------------------------


def _sum_of_samples(model, x):
    """Per-sample Hessians of a scalar that is a sum over the samples."""
    whole = oracle.hessian(model, x, x.ndim)
    return torch.stack([whole[b, :, b] for b in range(len(x))])


def _logits(x):
    return torch.tanh(x @ torch.linspace(-1, 1, 12, dtype=FLOAT).reshape(4, 3))


TARGET = torch.linspace(0.1, 0.9, 15, dtype=FLOAT).reshape(5, 3)
CLASSES = torch.tensor([0, 2, 1, -100, 2])
LOSSES = {
    "mse": lambda y, r: F.mse_loss(y, TARGET, reduction=r),
    "l1": lambda y, r: F.l1_loss(y, TARGET, reduction=r),
    "huber": lambda y, r: F.huber_loss(y, TARGET, reduction=r, delta=0.3),
    "smooth_l1": lambda y, r: F.smooth_l1_loss(y, TARGET, reduction=r, beta=0.3),
    "bce": lambda y, r: F.binary_cross_entropy(torch.sigmoid(y), TARGET, reduction=r),
    "bce logits": lambda y, r: F.binary_cross_entropy_with_logits(y, TARGET, reduction=r),
    "kl_div": lambda y, r: F.kl_div(F.log_softmax(y, 1), TARGET, reduction=r),
    "cross_entropy": lambda y, r: F.cross_entropy(y, CLASSES, reduction=r),
    "cross_entropy weight": lambda y, r: F.cross_entropy(y, CLASSES, W[:3], reduction=r),
    "cross_entropy probabilities": lambda y, r: F.cross_entropy(y, TARGET, reduction=r),
    "poisson": lambda y, r: F.poisson_nll_loss(y, TARGET, reduction=r),
    "soft_margin": lambda y, r: F.soft_margin_loss(y, TARGET, reduction=r),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # PyTorch's advice on sizes and means
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_over_the_batch(name, reduction):
    def model(x):
        return LOSSES[name](_logits(x), reduction)

    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(4), dtype=FLOAT)
    got = fxhess.transform(model, ("value", "hessian"))(x)
    torch.testing.assert_close(got.value, model(x))
    torch.testing.assert_close(got.hessian, _sum_of_samples(model, x))


# --- dropout ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("f", "p"),
    [(F.dropout, 0.5), (F.dropout, 0.0), (F.dropout, 1.0), (F.dropout1d, 0.5), (F.dropout2d, 0.5)],
)
def test_dropout_has_one_mask_for_all_orders(f, p):
    shape = {F.dropout: (12,), F.dropout1d: (3, 4), F.dropout2d: (3, 2, 2)}[f]
    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(5), dtype=FLOAT)

    def model(x):
        kept = f(x.reshape(-1, *shape), p, True)
        return (kept**2).flatten(1).sum(1) / 2

    got = fxhess.transform(model, ("value", "gradient", "hessian"))(x)
    squares = got.hessian.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(got.gradient, squares * x)
    torch.testing.assert_close(got.value, (squares * x * x).sum(1) / 2)
    assert set(squares.unique().tolist()) <= {0.0, (1 / (1 - p)) ** 2 if p < 1 else 0.0}
    if f is not F.dropout:
        features = squares.reshape(4, 3, 4)
        assert (features == features[..., :1]).all()


@pytest.mark.parametrize("module", [nn.Dropout(0.4), nn.AlphaDropout(0.4), nn.Dropout(0.4, True)])
def test_dropout_modules(module):
    model = nn.Sequential(nn.Linear(4, 5), nn.SELU(), module, nn.Linear(5, 1)).to(FLOAT)
    x = torch.randn(3, 4, dtype=FLOAT)
    hess = fxhess.transform(model)
    assert not torch.equal(hess(x), hess(x))
    model.eval()
    torch.testing.assert_close(hess(x), oracle.hessian(model, x))


@pytest.mark.parametrize(
    "f",
    [F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dropout_draws_the_mask_that_the_model_would(f, dtype):
    x = torch.randn(3, 4, 2, 2, 2, dtype=dtype)
    x = x[..., 0, 0] if f is F.dropout1d else x[..., 0] if f is F.dropout2d else x

    def model(x):
        return f(x, 0.4, training=True).sum()

    hess = fxhess.transform(model, "value", event_ndim=x.ndim, example=x)
    torch.manual_seed(3)
    want = model(x)
    torch.manual_seed(3)
    torch.testing.assert_close(hess(x), want)


def test_alpha_dropout_keeps_mean_and_variance():
    x = torch.randn(4000, 20, dtype=FLOAT)
    value = fxhess.transform(lambda x: F.alpha_dropout(x, 0.3, True).sum(1), ("value",))(x).value
    assert abs(value.mean() / 20) < 0.02
    assert abs(value.var() / 20 - 1) < 0.1
