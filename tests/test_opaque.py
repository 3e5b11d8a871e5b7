"""Operations without a rule: PyTorch's own double backward, traced, batched and spliced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from reference import assert_close, randn
from torch.nn import functional as F

import fxhess
from fxhess import oracle
from fxhess.errors import InputError, SampleMixingError, UnsupportedOpError

linalg, special = torch.linalg, torch.special
MATRIX = randn(3, 3, seed=7)
COMPLEX = torch.complex(MATRIX, MATRIX.mT)
EYE = torch.eye(3, dtype=torch.float64)


@dataclass(frozen=True)
class Use:
    """A function ``[B, *event] -> [B, ..]`` of an operation, and what it needs of its operand."""

    name: str
    function: Callable[[torch.Tensor], torch.Tensor]
    event: tuple[int, ...] = (3, 3)
    shift: float = 3.0  # of the diagonal of square operands: well conditioned

    def draw(self, batch: int = 4) -> torch.Tensor:
        x = randn(batch, *self.event, seed=3)
        return x + self.shift * EYE if self.event == (3, 3) else x


IMAGE = randn(1, 2, 4, 4, seed=5)


USES = [
    Use("inv", linalg.inv),
    Use("solve", lambda x: linalg.solve(x, x.sin())),
    Use("solve with a constant", lambda x: linalg.solve(x, MATRIX)),
    Use("constant solved for x", lambda x: linalg.solve(MATRIX + 4 * EYE, x)),
    Use("cholesky", lambda x: linalg.cholesky(x @ x.mT)),
    Use("cholesky_solve", lambda x: torch.cholesky_solve(x, linalg.cholesky(x @ x.mT))),
    Use("det", linalg.det),
    Use("slogdet", lambda x: linalg.slogdet(x).logabsdet),
    Use("logdet", lambda x: torch.logdet(x @ x.mT)),
    Use("eigh", lambda x: linalg.eigh(x + x.mT).eigenvalues),
    Use("eigenvectors", lambda x: linalg.eigh(x + x.mT).eigenvectors.square()),
    Use("eigvalsh", lambda x: linalg.eigvalsh(x + x.mT)),
    Use("svdvals", linalg.svdvals),
    Use("qr", lambda x: linalg.qr(x).R),
    Use("matrix_exp", lambda x: linalg.matrix_exp(x / 4)),
    Use("pinv", linalg.pinv),
    Use("solve_triangular", lambda x: linalg.solve_triangular(x.triu(), x.sin(), upper=True)),
    Use("fft, abs", lambda x: torch.fft.fft(x).abs(), (4,)),
    Use("rfft, irfft", lambda x: torch.fft.irfft(torch.fft.rfft(x).square(), n=4), (4,)),
    Use("complex weights", lambda x: (x.to(torch.complex128) @ COMPLEX).abs()),
    Use("grid_sample", lambda x: F.grid_sample(
        IMAGE.expand(x.shape[0], 2, 4, 4), x.reshape(-1, 3, 1, 2).tanh() / 2, align_corners=False
    ), (6,)),
    Use("two results", lambda x: linalg.qr(x).Q @ linalg.eigh(x + x.mT).eigenvectors.square()),
    Use("merged batch", lambda x: linalg.det(x.reshape(-1, 2, 2)).reshape(x.shape[0], 2), (8,)),
]  # fmt: skip


def _model(use: Use) -> Callable[[torch.Tensor], torch.Tensor]:
    """Curved before and after the operation, so that tangents, adjoints and curvature count."""

    def model(x: torch.Tensor) -> torch.Tensor:
        y = torch.sin(use.function(x + 0.1 * x.tanh())).reshape(x.shape[0], -1)
        return (y * torch.linspace(0.5, 1.5, y.shape[1])).sum(1)

    return model


@pytest.mark.parametrize("use", USES, ids=lambda use: use.name.replace(" ", "-"))
def test_is_double_backward(use):
    model, x = _model(use), use.draw()
    if use.name == "grid_sample" and torch.__version__ < (2, 13):  # type: ignore[operator]
        pytest.skip("PyTorch itself has no second derivative of it")
    hess = fxhess.transform(
        model, ("value", "gradient", "hessian"), event_ndim=len(use.event), fallback="error"
    )
    got = hess(x)
    assert_close(got.value, model(x))
    assert_close(got.gradient, oracle.gradient(model, x, len(use.event)))
    assert_close(got.hessian, oracle.hessian(model, x, len(use.event)))
    assert torch.equal(hess(x[:1]).hessian, got.hessian[:1]) or torch.allclose(
        hess(x[:1]).hessian, got.hessian[:1], rtol=1e-10
    )


def test_without_batch_axes():
    x = USES[0].draw()[0]
    got = fxhess.transform(lambda x: linalg.slogdet(x).logabsdet.sin(), event_ndim=2)(x)
    want = oracle.differences(lambda x: linalg.slogdet(x).logabsdet.sin(), x, 2)
    assert_close(got, want, 1e-6)


def test_two_batch_axes():
    x = randn(2, 4, 3, 3) + 3 * EYE
    model = lambda x: linalg.det(x).sin()  # noqa: E731
    assert_close(fxhess.transform(model, event_ndim=2)(x), oracle.hessian(model, x, 2))


def test_vector_outputs():
    x = USES[0].draw()
    model = lambda x: linalg.inv(x).sin().flatten(1)[:, :4]  # noqa: E731
    assert_close(fxhess.transform(model, event_ndim=2)(x), oracle.hessian(model, x, 2))


@pytest.mark.parametrize(
    "function", [linalg.det, lambda x: linalg.slogdet(x).logabsdet], ids=["det", "slogdet"]
)
def test_third_order(function):
    """Gradients flow through H, also where a backward reuses results that carry none."""
    x, weight = USES[0].draw(), randn(4, 3, 3, 3, 3, seed=9)
    hess = fxhess.transform(function, event_ndim=2)
    p = x.clone().requires_grad_()
    (got,) = torch.autograd.grad((hess(p) * weight).sum(), p)
    step = 1e-5
    for entry in [(0, 0, 0), (1, 2, 1), (2, 0, 1)]:
        moved = torch.zeros_like(x)
        moved[entry] = step
        want = ((hess(x + moved) - hess(x - moved)) * weight).sum() / (2 * step)
        assert_close(got[entry], want, 1e-6)


def test_compile_and_export():
    x = USES[0].draw()
    hess = fxhess.transform(lambda x: linalg.inv(x).sin().sum((1, 2)), event_ndim=2)
    want = hess(x)
    assert_close(torch.compile(hess, backend="aot_eager", fullgraph=True)(x), want)
    program = torch.export.export(hess, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    assert_close(program.module()(x[:2]), want[:2])


# --- samples that see each other ----------------------------------------------------------------


class Centred(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x - x.mean(0)

    @staticmethod
    def backward(ctx, g):
        return g - g.mean(0)


MIXING = {
    "inverse over the batch": lambda x: linalg.inv(x @ x.T + torch.eye(x.shape[0])).sum(1),
    "custom function": lambda x: Centred.apply(x).square().sum(1),
    "matrix_exp of all": lambda x: linalg.matrix_exp(x[:, None, :] - x[None, :, 0:1]).sum((1, 2)),
}


@pytest.mark.parametrize("name", MIXING)
def test_mixing_is_refused(name):
    with pytest.raises(SampleMixingError, match=r"test_opaque\.py"):
        fxhess.transform(MIXING[name])(randn(3, 3))


# --- functions and operators of the user's own --------------------------------------------------


class Rounded(torch.autograd.Function):
    """Straight-through: the identity, as far as derivatives go."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, g):
        return g


class Scaled(torch.autograd.Function):
    """x^3 that claims the gradient 5 k x^2: only the user's backward can tell."""

    @staticmethod
    def forward(ctx, x, k):
        ctx.save_for_backward(x)
        ctx.k = k
        return x**3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 5 * ctx.k * g * x * x, None


class Pair(torch.autograd.Function):
    """Two results, and setup_context."""

    @staticmethod
    def forward(x, w):
        return x.sin() * w, x.cos()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g, h):
        x, w = ctx.saved_tensors
        return g * x.cos() * w - h * x.sin(), None


class NumpySine(torch.autograd.Function):
    """Nothing that a trace could look into; its derivative is another of its kind."""

    @staticmethod
    def forward(ctx, x, phase):
        ctx.save_for_backward(x)
        ctx.phase = phase
        return torch.from_numpy((x.detach().numpy() + phase).__array__()).sin()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * NumpySine.apply(x, ctx.phase + torch.pi / 2), None


CUSTOM = {
    "straight through": lambda x: (Rounded.apply(3 * x).sin() * x).sum(-1),
    "wrong on purpose": lambda x: Scaled.apply(x.sin(), 2.0).exp().sum(-1),
    "vector outputs": lambda x: Scaled.apply(x.sin(), 2.0).exp(),
    "two results": lambda x: (Pair.apply(x, MATRIX[0])[0] * Pair.apply(x, MATRIX[1])[1]).sum(-1),
    "twice, other constants": lambda x: (Scaled.apply(x, 1.0) * Scaled.apply(x, 3.0)).sum(-1),
}


@pytest.mark.parametrize("name", CUSTOM)
def test_custom_function(name):
    x = randn(4, 3)
    got = fxhess.transform(CUSTOM[name], fallback="error")(x)
    assert_close(got, oracle.hessian(CUSTOM[name], x))


def _sines(x: torch.Tensor) -> torch.Tensor:
    return NumpySine.apply(x.sin(), 0.3).exp().sum(-1)


def test_untraceable_function_runs_by_autograd():
    x = randn(4, 3)
    hess = fxhess.transform(_sines)
    want = oracle.hessian(_sines, x)
    assert_close(hess(x), want)
    with torch.no_grad():
        assert_close(hess(x), want)
    with torch.inference_mode():
        assert_close(hess(x.clone()), want)
    assert any("NumpySine" in note for note in hess.explain(x).notes)
    p = x.clone().requires_grad_()
    hess(p).sum().backward()
    assert p.grad is not None and p.grad.abs().sum() > 0


def test_untraceable_function_is_refused():
    with pytest.raises(UnsupportedOpError, match=r"NumpySine[\s\S]*test_opaque\.py[\s\S]*fallback"):
        fxhess.transform(_sines, fallback="error")(randn(4, 3))


def test_unknown_fallback():
    with pytest.raises(InputError, match="allow"):
        fxhess.transform(_sines, fallback="never")


@torch.library.custom_op("fxhess_tests::cubed", mutates_args=())
def cubed(x: torch.Tensor, k: float) -> torch.Tensor:
    return k * x**3


@cubed.register_fake
def _(x, k):
    return torch.empty_like(x)


cubed.register_autograd(
    lambda ctx, g: (4 * ctx.k * g * ctx.saved_tensors[0] ** 2, None),
    setup_context=lambda ctx, inputs, output: (
        ctx.save_for_backward(inputs[0]),
        setattr(ctx, "k", inputs[1]),
    ),
)


def test_custom_operator():
    x = randn(4, 3)
    model = lambda x: cubed(x.sin(), 2.0).exp().sum(-1)  # noqa: E731
    assert_close(fxhess.transform(model, fallback="error")(x), oracle.hessian(model, x))
