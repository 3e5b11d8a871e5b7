"""What holds for Hessians of any model, whatever computes them."""

from __future__ import annotations

import pytest
import torch
from reference import ALL, assert_close, assert_symmetric, mlp, randn
from torch import nn
from torch.nn import functional as F

import fxhess


def _gated(x):
    h = torch.tanh(x @ W)
    return (h * torch.sigmoid(x @ V)).sum(-1)


def _products(x):
    return (x[..., 0] * x[..., 1]).sin() + x[..., 2] ** 3 * x[..., 3].exp()


def _normalized(x):
    return (torch.softmax(x @ W, -1) * F.layer_norm(x @ V, (6,))).sum(-1)


def _attention(x):
    return (torch.softmax(x @ W @ (x @ V).mT, -1) @ x).square().sum((-1, -2))


W, V = randn(4, 6, seed=11), randn(4, 6, seed=12)
NETWORK = mlp(4, 8, 8, 1, seed=3)
MODELS = {  # name: model, event shape
    "mlp": (NETWORK, (4,)),
    "vector mlp": (mlp(4, 8, 3, activation=nn.Softplus, seed=4), (4,)),
    "gated": (_gated, (4,)),
    "products": (_products, (4,)),
    "normalized": (_normalized, (4,)),
    "attention": (_attention, (3, 4)),
}
every_model = pytest.mark.parametrize("name", MODELS)


def _transform(name, **options):
    model, event = MODELS[name]
    return fxhess.transform(model, event_ndim=len(event), **options)


@every_model
@pytest.mark.parametrize("strategy", ["auto", "close", "rebase"])
def test_symmetric_bit_for_bit(name, strategy):
    event = MODELS[name][1]
    hess = _transform(name, strategy=strategy)
    assert_symmetric(hess(randn(17, *event)), len(event))


@every_model
def test_symmetric_bit_for_bit_in_float32(name):
    model, event = MODELS[name]
    if isinstance(model, nn.Module):
        model = mlp(4, 8, 8, 1).float()
        x = randn(17, *event, dtype=torch.float32)
        hess = fxhess.transform(model)
    else:
        lowered = {id(W): W.float(), id(V): V.float()}

        def single(x, model=model):
            with _Swapped(lowered):
                return model(x)

        x = randn(17, *event, dtype=torch.float32)
        hess = fxhess.transform(single, event_ndim=len(event))
    got = hess(x)
    assert got.dtype == torch.float32
    assert_symmetric(got, len(event))


class _Swapped(torch.overrides.TorchFunctionMode):
    """Stand-ins for tensors that a function closes over."""

    def __init__(self, table):
        super().__init__()
        self.table = table

    def __torch_function__(self, func, types, args=(), kwargs=None):
        args = tuple(self.table.get(id(a), a) for a in args)
        return func(*args, **(kwargs or {}))


@every_model
def test_a_sample_does_not_see_the_batch(name):
    """Only to rounding: a matrix product of another height is blocked and summed differently."""
    event = MODELS[name][1]
    hess = _transform(name)
    x = randn(7, *event)
    whole = hess(x)
    other = torch.cat([x[:2], randn(30, *event, seed=9)])
    assert_close(hess(other)[:2], whole[:2], 1e-13)
    assert_close(hess(x[3:4]), whole[3:4], 1e-13)


@every_model
def test_permuting_samples_permutes_hessians(name):
    event = MODELS[name][1]
    hess = _transform(name)
    x = randn(6, *event)
    order = torch.tensor([3, 0, 5, 4, 1, 2])
    assert_close(hess(x[order]), hess(x)[order], 1e-13)


@every_model
def test_chain_rule_under_a_linear_map(name):
    """The Hessian of ``x -> f(A x)`` is ``A^T H(A x) A``."""
    model, event = MODELS[name]
    n = event[-1]
    a = randn(n, n, seed=5)
    k = len(event)
    composed = fxhess.transform(lambda x: model(x @ a.T), event_ndim=k)
    inner = _transform(name)
    x = randn(3, *event)
    h = inner(x @ a.T)
    equation = "bip,ij,pq->bjq" if k == 1 else "bnimp,ij,pq->bnjmq"
    if h.ndim == 4 and k == 1:
        equation = "boip,ij,pq->bojq"
    assert_close(composed(x), torch.einsum(equation, h, a, a))


@every_model
@pytest.mark.parametrize("factor", [-2.5, 0.0, 1e-3])
def test_scaling_the_model_scales_its_hessian(name, factor):
    model, event = MODELS[name]
    x = randn(3, *event) / 3  # far from saturation, where rounding of the logits would be all
    scaled = fxhess.transform(lambda x: factor * model(x), event_ndim=len(event))
    assert_close(scaled(x), factor * _transform(name)(x), 1e-12)


@every_model
def test_scaling_the_input(name):
    model, event = MODELS[name]
    x = randn(3, *event) / 3  # far from saturation, where rounding of the logits would be all
    scaled = fxhess.transform(lambda x: model(3 * x), event_ndim=len(event))
    assert_close(scaled(x), 9 * _transform(name)(3 * x), 1e-11)


def test_hessian_of_a_sum_is_the_sum():
    x = randn(5, 4)
    names = ["mlp", "gated", "products"]
    models = [MODELS[n][0] for n in names]
    total = fxhess.transform(lambda x: sum(m(x).reshape(len(x)) for m in models))
    assert_close(total(x), sum(fxhess.transform(m)(x) for m in models), 1e-12)


def test_product_rule():
    f, g = _gated, _products
    x = randn(4, 4)
    a, b = fxhess.transform(f, ALL)(x), fxhess.transform(g, ALL)(x)
    cross = a.gradient[:, :, None] * b.gradient[:, None, :]
    want = a.hessian * b.value[:, None, None] + b.hessian * a.value[:, None, None]
    got = fxhess.transform(lambda x: f(x) * g(x))(x)
    assert_close(got, want + cross + cross.mT, 1e-12)


@every_model
def test_strategies_agree(name):
    event = MODELS[name][1]
    x = randn(4, *event)
    want = _transform(name, strategy="close")(x)
    for strategy in ("auto", "rebase"):
        assert_close(_transform(name, strategy=strategy)(x), want, 1e-12)


# --- degrees ------------------------------------------------------------------------------------

Q, LINEAR = randn(5, 5, seed=21), nn.Linear(5, 3).double()
QUADRATIC = {
    "x Q x": (lambda x: (x @ Q * x).sum(-1), Q + Q.T),
    "half": (lambda x: 0.5 * torch.einsum("...i,ij,...j->...", x, Q, x), (Q + Q.T) / 2),
    "squares": (lambda x: (x**2).sum(-1), 2 * torch.eye(5, dtype=torch.float64)),
    "square of a sum": (lambda x: x.sum(-1) ** 2, torch.full((5, 5), 2.0, dtype=torch.float64)),
    "with lower terms": (lambda x: (x @ Q * x).sum(-1) + x.sum(-1) - 3, Q + Q.T),
}


@pytest.mark.parametrize("name", QUADRATIC)
def test_quadratic_models_have_a_constant_hessian(name):
    model, want = QUADRATIC[name]
    got = fxhess.transform(model)(randn(3, 5))
    assert_close(got, want.expand(3, 5, 5), 1e-15)
    assert torch.equal(got[0], got[1])
    assert torch.equal(got, fxhess.transform(model)(1e150 * randn(3, 5)))


AFFINE = {
    "linear": lambda x: LINEAR(x),
    "two layers": lambda x: (LINEAR(x) @ Q[:3]).sum(-1) + 1,
    "views": lambda x: x.flip(-1).cumsum(-1)[..., 1::2].mean(-1) - x[..., 0],
    "detached factor": lambda x: (x.detach().exp() * x).sum(-1),
    "constant": lambda x: torch.zeros_like(x[..., 0]) + 2,
    "independent of x": lambda x: LINEAR.bias.sum().expand(x.shape[:-1]),
    "piecewise": lambda x: torch.relu(LINEAR(x)).sum(-1),
}


@pytest.mark.parametrize("name", AFFINE)
def test_an_affine_model_gives_zeros_and_runs_nothing(name):
    hess = fxhess.transform(AFFINE[name])
    x = randn(3, 5)
    got = hess(x)
    outputs = AFFINE[name](x).shape[1:]
    assert got.shape == (3, *outputs, 5, 5)
    assert torch.equal(got, torch.zeros_like(got))
    calls = [n for n in hess.graph_module(x).graph.nodes if n.op.startswith("call")]
    assert {str(getattr(n.target, "__name__", n.target)) for n in calls} <= {
        "zeros",
        "size",
    }
    assert "affine" in str(hess.explain(x))


def test_a_model_affine_in_part_has_zero_blocks():
    got = fxhess.transform(lambda x: x[..., :2].exp().sum(-1) + x[..., 2:].sum(-1))(randn(3, 5))
    assert torch.equal(got[:, 2:], torch.zeros(3, 3, 5, dtype=torch.float64))
    assert torch.equal(got[:, 0, 1], torch.zeros(3, dtype=torch.float64))
    assert (got[:, 0, 0] > 0).all()


def test_gradient_and_value_of_a_constant_model():
    got = fxhess.transform(lambda x: torch.full_like(x[..., 0], 2.0), ALL)(randn(3, 5))
    assert torch.equal(got.value, torch.full((3,), 2.0, dtype=torch.float64))
    assert torch.equal(got.gradient, torch.zeros(3, 5, dtype=torch.float64))
    assert torch.equal(got.hessian, torch.zeros(3, 5, 5, dtype=torch.float64))
