"""Derivatives of derivatives, and PyTorch's functional transforms over them: against nested double
backward in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from reference import assert_close, mlp, randn
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, stack_module_state

import fxhess
from fxhess import oracle
from fxhess.errors import CaptureError, InputError

X = randn(4, 3, seed=3)
NET = mlp(3, 5, 4, 1, seed=1)


class _Pairs(nn.Module):
    """An energy of pairs with a parameter: structure in J, reciprocals, a weight that is shared."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, x):
        gap = x[..., :, None] - x[..., None, :]
        return (self.scale * torch.exp(-gap.square()) / (1 + x[..., None, :] ** 2)).sum((-1, -2))


class _Softmax(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.mix = nn.Linear(3, 4).double()

    def forward(self, x):
        h = torch.softmax(torch.sin(self.mix(x)), -1)
        h = h * torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return torch.logsumexp(h, -1) * x.sum(-1)


MODELS = {"net": NET, "pairs": _Pairs(), "softmax": _Softmax()}
every_model = pytest.mark.parametrize("name", MODELS)


def _scalar(model):
    return lambda x: model(x).reshape(x.shape[0])


def _rows(function, x):
    """Gradients of each column of ``function(x): [B, k]``, for another backward: [B, k, d]."""
    result = function(x)
    found = []
    for column in result.unbind(1):
        (g,) = torch.autograd.grad(column.sum(), x, create_graph=True, allow_unused=True)
        found.append(torch.zeros_like(x) if g is None else g)
    return torch.stack(found, 1)


def _gradient(function):
    return lambda x: _rows(lambda z: function(z)[:, None], x)[:, 0]


def _hessian(function):
    return lambda x: _rows(_gradient(function), x)


def _each(function):
    """Gradients of all entries of a result, one after another, [B, number of entries, d]."""
    return lambda x: _rows(lambda z: function(z).flatten(1), x)


def _laplacian(function):
    return lambda x: _hessian(function)(x).diagonal(dim1=1, dim2=2).sum(-1)


def _at(function, x=X):
    return function(x.clone().requires_grad_()).detach()


# --- transforms of transforms ---------------------------------------------------------------------


@every_model
def test_gradient_of_the_laplacian(name):
    model = MODELS[name]
    want = _at(_gradient(_laplacian(_scalar(model))))
    laplacian = fxhess.transform(model, "laplacian")
    assert_close(fxhess.transform(laplacian, "gradient")(X).detach(), want)
    point = X.clone().requires_grad_()
    (got,) = torch.autograd.grad(laplacian(point).sum(), point)
    assert_close(got, want)


@every_model
def test_biharmonic(name):
    model = MODELS[name]
    biharmonic = fxhess.transform(fxhess.transform(model, "laplacian"), "laplacian")
    want = _at(_laplacian(_laplacian(_scalar(model))))
    assert_close(biharmonic(X).detach(), want, 1e-8)
    with torch.no_grad():
        assert_close(biharmonic(X), want, 1e-8)


@every_model
def test_hessian_of_the_hessian(name):
    """Fourth derivatives, [*batch, d, d, d, d], symmetric in all four axes."""
    model = MODELS[name]
    fourth = fxhess.transform(fxhess.transform(model))
    got = fourth(X).detach()
    want = _hessian(_scalar(model))
    for _ in range(2):
        want = _each(want)
    assert_close(got, _at(want).reshape(got.shape), 1e-8)
    for axes in ((0, 2, 1, 3, 4), (0, 1, 3, 2, 4), (0, 4, 2, 3, 1)):
        assert_close(got.permute(axes), got, 1e-8)
    fourth.verify(X)


def test_hessian_as_the_jacobian_of_the_gradient():
    gradient = fxhess.transform(NET, "gradient")
    assert_close(fxhess.transform(gradient, "jacobian")(X), fxhess.transform(NET)(X))


def test_a_residual_made_of_several_derivatives():
    """Derivatives of a model that itself computes with derivatives."""
    both = fxhess.transform(NET, ("value", "laplacian"))

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.both = both

        def forward(self, x):
            u = self.both(x)
            return (u.laplacian + u.value.sin()) ** 2

    f = _scalar(NET)
    want = _at(_hessian(lambda x: (_laplacian(f)(x) + f(x).sin()) ** 2))
    assert_close(fxhess.transform(Residual())(X).detach(), want, 1e-8)


def test_a_transform_is_made_inside_of_a_trace_from_the_models_own_weights():
    """Made under the trace of another one, a program is as good as any other."""
    model = mlp(3, 4, 1, seed=5)
    laplacian = fxhess.transform(model, "laplacian")
    fxhess.transform(laplacian, "gradient")(X)
    assert_close(laplacian(X).detach(), _at(_laplacian(_scalar(model))))
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    assert_close(laplacian(X).detach(), _at(_laplacian(_scalar(model))))


@pytest.mark.parametrize("axes", [(2, 3), (1, 3), (3, 1), (1, 1), (2, 2, 2)])
def test_outputs_of_any_shape(axes):
    """``[*batch, m1, m2, ..]`` in front of the derivatives' axes."""
    weight = randn(3, *axes, seed=4)

    def model(x):
        factor = x.sum(-1).cos().reshape(-1, *[1] * len(axes))
        return torch.tensordot(x.sin(), weight, 1) * factor

    H = oracle.hessian(model, X).reshape(4, *axes, 3, 3)
    v = randn(2, 4, 3, seed=5)
    columns = v.reshape(2, 4, *[1] * len(axes), 3)
    product = (H @ columns[..., None])[..., 0]
    diagonal = H.diagonal(dim1=-2, dim2=-1)
    want = {
        "value": model(X),
        "gradient": oracle.gradient(model, X).reshape(4, *axes, 3),
        "diagonal": diagonal,
        "laplacian": diagonal.sum(-1),
        "hvp": product,
        "quadratic": (columns * product).sum(-1),
        "hessian": H,
    }
    for outputs in (tuple(want), tuple(want)[:-1]):
        got = fxhess.transform(model, outputs)(X, vector=v)
        for name in outputs:
            assert_close(getattr(got, name), want[name], what=name)
    out = torch.empty_like(H)
    assert fxhess.transform(model)(X, out=out) is out
    assert_close(out, H)


# --- functional transforms ------------------------------------------------------------------------

fresh = pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "known"])


def _transformed(model, outputs, x, fresh):
    """The transform, which has its program already, or makes it where it is called."""
    derived = fxhess.transform(model, outputs)
    return derived if fresh else derived.specialize(x)


@fresh
@every_model
def test_vmap_and_jacobians_over_x(name, fresh):
    model = MODELS[name]
    third = _at(_gradient(_laplacian(_scalar(model))))
    fourth = _at(_hessian(_laplacian(_scalar(model))))
    for transform, want in ((grad, third), (jacrev, third), (jacfwd, third), (hessian, fourth)):
        laplacian = _transformed(model, "laplacian", X[0], fresh)
        assert_close(torch.vmap(transform(laplacian))(X), want, 1e-8)
    whole = _transformed(model, "hessian", X, fresh)
    assert_close(torch.vmap(whole)(X[:, None])[:, 0], whole(X).detach())


@fresh
def test_functional_call(fresh):
    hess = _transformed(NET, "hessian", X, fresh)
    other = copy.deepcopy(NET)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.3)
    weights = {f"model.{name}": p for name, p in other.named_parameters()}
    assert_close(functional_call(hess, weights, (X,)).detach(), oracle.hessian(other, X))
    assert_close(hess(X).detach(), oracle.hessian(NET, X))


@fresh
@pytest.mark.parametrize("output", ["hessian", "laplacian"])
def test_grad_of_a_loss_with_respect_to_parameters(output, fresh):
    derived = _transformed(NET, output, X, fresh)
    weights = {name: p.detach().clone() for name, p in derived.named_parameters()}
    got = grad(lambda p: functional_call(derived, p, (X,)).square().sum())(weights)
    point = X.clone().requires_grad_()
    by_hand = {"hessian": _hessian, "laplacian": _laplacian}[output](_scalar(NET))(point)
    names = [name for name, _ in NET.named_parameters()]
    want = torch.autograd.grad(
        by_hand.square().sum(), list(NET.parameters()), allow_unused=True, materialize_grads=True
    )
    for name, w in zip(names, want, strict=True):
        assert_close(got[f"model.{name}"], w, what=name)


@fresh
@pytest.mark.parametrize("own", [False, True], ids=["one x", "an x each"])
def test_ensembles(own, fresh):
    models = [mlp(3, 5, 4, 1, seed=s) for s in range(3)]
    each = [fxhess.transform(m, ("value", "hessian")) for m in models]
    base = _transformed(models[0], ("value", "hessian"), X, fresh)
    weights, buffers = stack_module_state(each)
    xs = randn(3, 6, 3, seed=9) if own else X.expand(3, *X.shape)
    got = torch.vmap(lambda p, b, x: functional_call(base, (p, b), (x,)))(weights, buffers, xs)
    for i, (hess, x) in enumerate(zip(each, xs, strict=True)):
        want = hess(x)
        assert_close(got.value[i].detach(), want.value.detach())
        assert_close(got.hessian[i].detach(), oracle.hessian(models[i], x))


def test_gradients_of_an_ensembles_loss():
    """``vmap(grad)`` over stacked weights, the way ensembles are trained."""
    models = [mlp(3, 5, 1, seed=s) for s in range(3)]
    each = [fxhess.transform(m, "laplacian") for m in models]
    weights, buffers = stack_module_state(each)
    base = fxhess.transform(models[0], "laplacian")
    loss = lambda p, b: functional_call(base, (p, b), (X,)).square().mean()  # noqa: E731
    got = torch.vmap(grad(loss))(weights, buffers)
    for i, derived in enumerate(each):
        parameters = dict(derived.named_parameters())
        want = torch.autograd.grad(derived(X).square().mean(), list(parameters.values()),
                                   allow_unused=True, materialize_grads=True)  # fmt: skip
        for name, w in zip(parameters, want, strict=True):
            assert_close(got[name][i], w, what=name)


def test_values_that_a_functional_transform_hides_are_refused():
    """Weights under ``vmap`` have no values that a program could depend on."""
    gate = nn.Linear(3, 3).double()
    gate.register_buffer("flag", torch.tensor(True))
    gate.forward = lambda x: x.sin().sum(-1) if gate.flag else x.cos().sum(-1)  # type: ignore
    hess = fxhess.transform(gate)
    stacked = {"model.flag": torch.tensor([True, False])}
    with pytest.raises((InputError, CaptureError), match="values"):
        torch.vmap(lambda b: functional_call(hess, b, (X,)))(stacked)
    assert_close(hess(X).detach(), torch.diag_embed(-X.sin()))
