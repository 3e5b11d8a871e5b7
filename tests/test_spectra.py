"""Eigenvalues and singular values: right also where they repeat, against central differences."""

from __future__ import annotations

import pytest
import torch
from reference import ALL, assert_close, randn

import fxhess
from fxhess import oracle

FLOAT = torch.float64
eigenvalues, singular = torch.linalg.eigvalsh, torch.linalg.svdvals


def _orthogonal(n, seed):
    return torch.linalg.qr(randn(n, n, seed=seed))[0]


def _symmetric(*values):
    """A smooth symmetric matrix of x: at 0 with these eigenvalues."""
    n = len(values)
    q = _orthogonal(n, 1)
    start = q @ torch.diag(torch.tensor(values, dtype=FLOAT)) @ q.mT
    b = randn(3, n, n, seed=2)
    return lambda x: start + torch.einsum("...i,imn->...mn", x.sin() + x * x.flip(-1), b + b.mT)


def _rectangular(m, n, *values):
    start = torch.zeros(m, n, dtype=FLOAT)
    start.diagonal().copy_(torch.tensor(values, dtype=FLOAT))
    start = _orthogonal(m, 3) @ start @ _orthogonal(n, 4)
    b = randn(3, m, n, seed=5)
    return lambda x: start + torch.einsum("...i,imn->...mn", x.sin() + x * x.flip(-1), b)


POINTS = torch.stack([torch.zeros(3, dtype=FLOAT), 0.3 * randn(3)])
TWO, THREE = _symmetric(1.0, 1.0, 2.0), _symmetric(1.0, 1.0, 1.0)
NEAR, NONE = _symmetric(1.0, 1.0 + 1e-9, 2.0), _symmetric(0.0, 0.0, 0.0)
I3 = torch.eye(3, dtype=FLOAT)
APART, W4, W3 = _symmetric(1.0, 2.0, 3.5), randn(1, 4), randn(3)
PAIR, ZEROS = _rectangular(3, 3, 2.0, 1.0, 1.0), _rectangular(3, 3, 1.0, 0.0, 0.0)
TALL, TALL_ZERO = _rectangular(4, 2, 1.0, 1.0), _rectangular(4, 2, 1.0, 0.0)
WIDE, WIDE_APART = _rectangular(2, 3, 0.0, 0.0), _rectangular(3, 4, 1.0, 2.0, 3.5)
EYE = lambda x: I3 + x[:, :, None] * x[:, None] + torch.diag_embed(x)  # noqa: E731

SMOOTH = {
    "squares": lambda x: eigenvalues(TWO(x)).pow(2).sum(-1),
    "exponentials, all equal": lambda x: eigenvalues(THREE(x)).exp().sum(-1),
    "exponentials, almost equal": lambda x: eigenvalues(NEAR(x)).exp().sum(-1),
    "exponentials at 0": lambda x: eigenvalues(NONE(x)).exp().sum(-1),
    "logarithms": lambda x: eigenvalues(THREE(x) + 3 * I3).log().sum(-1),
    "product": lambda x: eigenvalues(THREE(x)).prod(-1),
    "logsumexp": lambda x: torch.logsumexp(eigenvalues(TWO(x)), -1),
    "of eigh": lambda x: torch.linalg.eigh(THREE(x)).eigenvalues.pow(3).sum(-1),
    "times a function of the matrix": lambda x: (
        eigenvalues(TWO(x)).sin().sum(-1) * TWO(x).sum((1, 2))
    ),
    "a network": lambda x: (eigenvalues(THREE(x)).sum(-1, True) * W4).tanh().prod(-1),
    "the simple one of three": lambda x: eigenvalues(TWO(x))[:, 2],
    "both of a pair": lambda x: eigenvalues(TWO(x))[:, :2].exp().sum(-1),
    "several matrices": lambda x: (
        eigenvalues(torch.stack([TWO(x), THREE(x)], 1)).exp().sum((1, 2)).log()
    ),
    "singular values": lambda x: singular(PAIR(x)).cosh().sum(-1),
    "singular values, zeros": lambda x: singular(ZEROS(x)).cosh().prod(-1),
    "singular values, tall": lambda x: singular(TALL(x)).pow(4).sum(-1),
    "singular values, tall, zero": lambda x: singular(TALL_ZERO(x)).cosh().sum(-1),
    "singular values, wide, all zero": lambda x: (
        torch.linalg.svd(WIDE(x)).S.square().log1p().sum(-1)
    ),
    "nuclear norm": lambda x: torch.linalg.matrix_norm(TALL(x), "nuc"),
}  # fmt: skip


@pytest.mark.parametrize("name", SMOOTH)
def test_repeated_values_of_smooth_functions(name):
    model = SMOOTH[name]
    want = oracle.differences(model, POINTS)
    torch.testing.assert_close(fxhess.transform(model)(POINTS), want, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("outputs", ["laplacian", "diagonal", "hvp", ("blocks", 0)])
def test_all_outputs(outputs):
    model = SMOOTH["exponentials, all equal"]
    H = fxhess.transform(model)(POINTS)
    hess = fxhess.transform(model, outputs)
    if outputs == "hvp":
        assert_close(hess(POINTS, vector=POINTS + 1), (H @ (POINTS + 1)[..., None])[..., 0])
    else:
        diagonal = H.diagonal(dim1=1, dim2=2)
        assert_close(hess(POINTS), diagonal.sum(1) if outputs == "laplacian" else diagonal)


@pytest.mark.parametrize("strategy", ["close", "pull", "rebase"])
def test_every_strategy_and_several_outputs(strategy):
    def model(x):
        values = eigenvalues(torch.stack([TWO(x), THREE(x)], 1))
        return torch.stack([values.exp().sum((1, 2)), values.prod(-1).sum(-1)], -1)

    want = torch.stack(
        [oracle.differences(lambda x, k=k: model(x)[:, k], POINTS) for k in (0, 1)], 1
    )
    got = fxhess.transform(model, strategy=strategy)(POINTS)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    "model",
    [
        lambda x: (eigenvalues(APART(x)) * W3).sin().sum(-1),
        lambda x: (singular(WIDE_APART(x)) * W3).sin().sum(-1),
        lambda x: eigenvalues(APART(x))[:, 0],
    ],
)
def test_simple_values_and_a_gradient_through_the_result(model):
    x = POINTS.clone().requires_grad_()
    got = fxhess.transform(model, ALL)(x)
    assert_close(got.gradient, oracle.gradient(model, POINTS))
    assert_close(got.hessian, oracle.hessian(model, POINTS), 1e-11)
    got.hessian.square().sum().backward()
    plain = POINTS.clone().requires_grad_()
    whole = torch.autograd.functional.hessian(lambda x: model(x).sum(), plain, create_graph=True)
    whole.square().sum().backward()
    assert_close(x.grad, plain.grad, 1e-9)


@pytest.mark.parametrize(
    "model",
    [
        lambda x: eigenvalues(THREE(x))[:, -1],
        lambda x: singular(WIDE(x)).sum(-1),
    ],
)
def test_a_kink_between_repeated_values_counts_as_0(model):
    """As a norm at 0; what is smooth besides stays."""
    H = fxhess.transform(model)(POINTS)
    assert H.isfinite().all()
    both = fxhess.transform(lambda x: model(x) + x.pow(2).sum(1))(POINTS)
    torch.testing.assert_close(both[0] - H[0], 2 * I3)


def test_functions_of_eigenvectors_where_values_repeat():
    """NaN, as in PyTorch: no second derivative of what follows tells the limit."""

    def model(x):
        values, vectors = torch.linalg.eigh(EYE(x))
        return (vectors * values.exp()[:, None] @ vectors.mT).square().sum((1, 2))

    H = fxhess.transform(model)(POINTS)
    assert H[0].isnan().all()
    want = oracle.differences(lambda x: torch.matrix_exp(EYE(x)).square().sum((1, 2)), POINTS)
    torch.testing.assert_close(H[1], want[1], rtol=1e-4, atol=1e-4)
    smooth = fxhess.transform(lambda x: torch.matrix_exp(EYE(x)).square().sum((1, 2)))
    torch.testing.assert_close(smooth(POINTS), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["squares", "singular values, tall"])
def test_double_inside_of_float32(name):
    want = oracle.differences(SMOOTH[name], POINTS)
    hess = fxhess.transform(lambda x: SMOOTH[name](x.double()).float())
    torch.testing.assert_close(hess(POINTS.float()).double(), want, rtol=1e-4, atol=1e-4)
