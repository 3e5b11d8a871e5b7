"""The programs in ``examples/``, each run in a short form and held against what is known."""

from __future__ import annotations

import importlib.util
import math
import struct

import pytest
import torch
from reference import assert_close, randn
from torch import nn

from examples import laplace, newton, normal_modes, pictures, poisson_pinn, score_matching


@pytest.fixture
def picture(tmp_path):
    """Where an example is to draw; that it has, and fully, is checked after the test."""
    if importlib.util.find_spec("matplotlib") is None:
        yield None  # the extra `examples` is not installed: the test is of the numbers alone
        return
    path = tmp_path / "picture.png"
    yield str(path)
    content = path.read_bytes()
    width, height = struct.unpack(">II", content[16:24])
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and width > 1000 and height > 600
    assert len(content) > 40_000  # not blank


@pytest.mark.parametrize(
    ("path", "missing", "told"),
    [
        ("x.png", True, "pip install -c constraints.txt -e '.[examples]'"),
        ("nowhere/x.png", False, "no folder 'nowhere'"),
        ("x.mp3", False, ".png"),
    ],
)
def test_what_keeps_a_picture_from_being_drawn_is_told_first(
    path, missing, told, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    if missing:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    else:
        pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit) as done:
        pictures.parser("newton", newton.__doc__).parse_args(["--plot", path])
    assert done.value.code == 2 and told in capsys.readouterr().err


def test_normal_modes_of_water(picture):
    """The published wave numbers, to one in a thousand; six zero modes."""
    found = normal_modes.main(picture)
    for name, known in normal_modes.PUBLISHED.items():
        *still, bend, symmetric, antisymmetric = found[name]
        assert max(map(abs, still)) < 1e-3 and len(still) == 6
        for got, want in zip((bend, symmetric, antisymmetric), known, strict=True):
            assert got == pytest.approx(want, abs=1)
    heavier = [found[name][-1] for name in ("H2O", "HDO", "D2O")]
    assert heavier == sorted(heavier, reverse=True)


def test_newton_converges_quadratically(picture):
    norms, _, _ = newton.main(penalties=4, starts=2, steps=2, plot=picture)
    assert norms[0].min() > 0.1 and norms[-1].max() < 1e-14
    last = norms[:, -1]  # of the weakest penalty
    small = [k for k in range(len(last) - 1) if 1e-7 < last[k] < 1e-2]
    assert small and all(last[k + 1] < 1e4 * last[k] ** 2 for k in small)


def test_leaving_one_out():
    """As if the flower were not in the data, by another optimizer."""
    penalty = torch.tensor([0.01], dtype=torch.float64)
    told, right = newton.leave_one_out(penalty)
    assert told.shape == right.shape == (1, 150) and 140 < right.sum() < 150
    everything = newton.Regression()
    for flower in (0, 70, 106):
        rest = newton.Regression()
        for name in ("x", "chosen"):
            rows = getattr(rest, name)
            setattr(rest, name, torch.cat([rows[:flower], rows[flower + 1 :]]))
        w = torch.zeros(15, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [w], max_iter=400, tolerance_grad=1e-11, tolerance_change=0, history_size=20,
            line_search_fn="strong_wolfe",
        )  # fmt: skip

        def closure(rest=rest, w=w):
            value = rest(w, penalty[0], torch.ones(149).double())
            (w.grad,) = torch.autograd.grad(value, w)
            return value

        optimizer.step(closure)
        expected = everything.log_likelihood(w.detach())[flower]
        assert_close(told[0, flower], expected, 1e-7)
        assert expected < everything.log_likelihood(newton.path(penalty)[0])[0, flower]


def test_trust_region_finds_the_certified_parameters():
    first = torch.rand(20, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    b, history = newton.trust_region(first, 40)
    assert (history[1:] <= history[:-1]).all()
    best = b[history[-1].argmin()]
    for got, want in zip(best.tolist(), newton.CERTIFIED, strict=True):
        assert got == pytest.approx(want, rel=1e-9)
    assert history[-1].min().item() == pytest.approx(newton.CERTIFIED_SUM, rel=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_the_subproblem_of_the_trust_region(seed):
    """No step of the allowed length makes the quadratic model smaller; checked at random steps."""
    A = randn(6, 4, 4, seed=seed)
    g, H, radius = randn(6, 4, seed=seed + 9), A + A.mT, torch.full((6,), 0.7).double()
    p = newton.restricted(g, H, radius)
    assert (p.norm(dim=-1) <= radius * (1 + 1e-9)).all()

    def model(p):
        return (g * p).sum(-1) + 0.5 * (p * (H @ p[..., None])[..., 0]).sum(-1)

    others = randn(2000, 6, 4, seed=seed + 7)
    scale = torch.rand(2000, 6, 1).double() * radius[:, None] / others.norm(dim=-1, keepdim=True)
    assert (model(p) <= model(others * scale) + 1e-9).all()


def test_poisson_pinn(picture):
    """Values and gradients of all ways agree (``timing.compare`` raises otherwise), and training
    brings the error down."""
    error, seconds = poisson_pinn.main(steps=60, count=128, rounds=2, plot=picture)
    assert error < 0.95 and len(seconds) == 3
    inside, edge = poisson_pinn.points(64, torch.Generator())
    assert ((edge == 0) | (edge == 1)).any(-1).all() and ((inside > 0) & (inside < 1)).all()
    x = torch.rand(5, 2).double().requires_grad_()
    (g,) = torch.autograd.grad(poisson_pinn.solution(x).sum(), x, create_graph=True)
    rows = [torch.autograd.grad(g[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(2)]
    assert_close(-sum(rows), poisson_pinn.source(x).detach())


def test_score_matching(picture):
    """Of Gaussian data, the score is known: that of the least loss."""
    losses, seconds = score_matching.main(steps=40, count=128, rounds=2, plot=picture)
    assert sum(losses[-5:]) < sum(losses[:5]) and len(seconds) == 3
    x = randn(4000, 2, seed=1)
    exact = score_matching.Score(lambda x: -x.square().sum(-1) / 2)(x).item()
    assert exact == pytest.approx(0.5 * x.square().sum(-1).mean().item() - 2)
    for other in (0.7, 1.4):
        worse = score_matching.Score(lambda x, a=other: -a * x.square().sum(-1) / 2)(x).item()
        assert worse > exact


def test_laplace_is_exact_for_a_linear_model():
    """There the posterior is normal: its mean and variance are those of Bayesian regression."""
    net = nn.Linear(1, 1).double()
    x, y = laplace.data(40)
    posterior = laplace.Posterior(net, x, y)
    X = torch.cat([x, torch.ones_like(x)], 1)
    A = X.T @ X / laplace.NOISE**2 + laplace.PRIOR * torch.eye(2, dtype=x.dtype)
    w = torch.linalg.solve(A, X.T @ y / laplace.NOISE**2)
    assert_close(posterior.precision, A)
    where = torch.tensor([[-3.0], [0.5]], dtype=x.dtype)
    rows = torch.cat([where, torch.ones_like(where)], 1)
    mean, deviation = posterior.predict(where)
    assert_close(mean, (rows @ w)[:, 0], 1e-8)
    assert_close(deviation, (rows @ torch.linalg.solve(A, rows.T)).diagonal().sqrt(), 1e-8)


def test_the_evidence_is_exact_for_a_linear_model():
    """There y is normal, with the covariance of noise and prior."""
    x, y = laplace.data(20)
    X = torch.cat([x, torch.ones_like(x)], 1)
    for prior in (0.1, 3.0):
        posterior = laplace.Posterior(nn.Linear(1, 1).double(), x, y, prior=prior)
        covariance = laplace.NOISE**2 * torch.eye(20, dtype=x.dtype) + X @ X.T / prior
        exact = torch.distributions.MultivariateNormal(torch.zeros_like(y[:, 0]), covariance)
        assert posterior.evidence == pytest.approx(exact.log_prob(y[:, 0]).item(), rel=1e-9)


def test_laplace_of_a_network(picture):
    posterior, priors, evidences = laplace.main(priors=3, plot=picture)
    assert priors[1] == pytest.approx(1) and evidences.argmax() == 1
    assert posterior.decrease < 1e-8  # it is a mode, and a minimum: the factorization went through
    x, y = laplace.data()
    where = torch.tensor([[-1.5], [0.0], [2.0], [5.0]], dtype=x.dtype)
    _, deviation = posterior.predict(where)
    seen, gap, also_seen, far = deviation.tolist()
    assert 3 * seen < gap < far and 3 * also_seen < gap
    draws = posterior.draws(where, 20000, torch.Generator().manual_seed(0))
    assert_close(draws.std(0), deviation, 0.03)
    residual = (y[:, 0] - posterior.predict(x)[0]).std().item()
    assert math.isclose(residual, laplace.NOISE, rel_tol=0.3)


def test_scipys_methods_find_the_tabulated_cluster(picture):
    pytest.importorskip("scipy")
    from examples import scipy_newton

    found = scipy_newton.main(methods=(*scipy_newton.METHODS, "trust-krylov"), plot=picture)
    for method, result in found.items():
        assert result.success, f"{method}: {result.message}"
        assert result.fun == pytest.approx(scipy_newton.TABULATED, abs=2e-6)
        assert result.nit < 30 or method == "BFGS"


def test_what_scipy_is_fed_with():
    """Against double backward."""
    pytest.importorskip("scipy")
    from examples import scipy_newton

    p = scipy_newton.icosahedron() + 0.05 * randn(13, 3, seed=1)
    v = randn(13, 3, seed=2)
    problem = scipy_newton.Problem(scipy_newton.energy, (13, 3))
    value, gradient = problem.fun(p.numpy().ravel())
    H = torch.autograd.functional.hessian(scipy_newton.energy, p).reshape(39, 39)
    (g,) = torch.autograd.functional.vjp(scipy_newton.energy, p)[1:]
    assert value == pytest.approx(scipy_newton.energy(p).item(), rel=1e-12)
    assert_close(torch.from_numpy(gradient), g.flatten())
    assert_close(torch.from_numpy(problem.hess(p.numpy().ravel())), H)
    product = problem.hessp(p.numpy().ravel(), v.numpy().ravel())
    assert_close(torch.from_numpy(product), H @ v.flatten())
