"""Types and precision: float32 beside ``vmap(hessian)``, halves, autocast, complex insides."""

from __future__ import annotations

import copy
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from reference import ALL, assert_close, check, mlp, randn
from torch import nn

import fxhess
from fxhess import oracle


def _load(name):
    path = Path(__file__).parent / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


precision = _load("precision")
HALVES = (torch.bfloat16, torch.float16)

# --- float32 --------------------------------------------------------------------------------------

SOME = [
    "tanh net", "GELU net", "softmax net", "log-ndtr net", "layer norm", "logsumexp",
    "tanh net 20-64-8-64-1", "pair energy", "softplus net at 20 sigma",
    "softmax, nearly one-hot", "log-softmax, nearly one-hot",
    "attention: attention, linear",
]  # fmt: skip
CASES = {case.name: case for case in (*precision.cases(), *precision.zoo())}


@pytest.mark.parametrize("name", SOME)
def test_float32_errors_are_no_larger_than_the_rivals(name):
    errors = precision.measure(CASES[name])
    assert errors.theirs is not None
    assert not errors.worse, errors


def test_a_worse_formula_is_noticed():
    """tanh' = 4 / (e^x + e^-x)^2, differentiated, loses digits that 1 - y^2 keeps."""
    case = precision.Case("", lambda: lambda x: x.tanh().sum(1), precision.normal(64, 1))
    good = precision.measure(case)
    bad = precision.Errors("", (good.ours[0] + 1e-6, good.ours[1] + 1e-5), good.theirs)
    assert bad.worse and not good.worse


W = torch.complex(randn(4, 4, seed=1), randn(4, 4, seed=2))
V = randn(4, seed=3)

# --- the type of the results ----------------------------------------------------------------------


def _typed(got, dtype):
    assert got.value.dtype == got.gradient.dtype == got.hessian.dtype == dtype
    return got


def _within(got, want, dtype, factor=30):
    """Off by at most ``factor`` roundings of the type, relative to the largest entry."""
    assert_close(got.double(), want, factor * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
@pytest.mark.parametrize("outputs", [1, 3])
def test_results_have_the_type_of_the_model(dtype, outputs):
    net = mlp(4, 8, 8, outputs).to(dtype)
    x = randn(5, 4, dtype=dtype)
    got = _typed(fxhess.transform(net, ALL)(x), net(x).dtype)
    _within(got.hessian, oracle.hessian(copy.deepcopy(net).double(), x.double()), dtype)
    _within(got.gradient, oracle.gradient(copy.deepcopy(net).double(), x.double()), dtype)


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_of_many_operations(dtype):
    """Normalization, softmax, convolution and matrix products in half precision."""
    model = nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(16, 8), nn.LayerNorm(8),
        nn.Softplus(), nn.Linear(8, 4), nn.Softmax(-1), nn.Linear(4, 1),
    ).to(dtype)  # fmt: skip
    x = randn(3, 2, 6, dtype=dtype)
    got = _typed(fxhess.transform(model, ALL, event_ndim=2)(x), model(x).dtype)
    want = oracle.hessian(copy.deepcopy(model).double(), x.double(), 2)
    _within(got.hessian, want, dtype)


@pytest.mark.parametrize("dtype", HALVES)
def test_autocast(dtype):
    """The type that the model's own forward gives; accurate at that type's scale; the programs
    inside and outside of autocast are two, and one does not run in the other's place."""
    net = mlp(4, 16, 16, 1).float()
    x = randn(6, 4, dtype=torch.float32)
    hess = fxhess.transform(net, ALL)
    want = oracle.hessian(copy.deepcopy(net).double(), x.double())
    before = hess(x)
    with torch.autocast("cpu", dtype):
        inside = _typed(hess(x), net(x).dtype)
        assert net(x).dtype == dtype
        with torch.autocast("cpu", enabled=False):
            again = hess(x)
    after = _typed(hess(x), torch.float32)
    for plain in (again, after):
        assert all(map(torch.equal, plain, before))
    _within(after.hessian, want, torch.float32)
    _within(inside.hessian, want, dtype)
    _within(inside.gradient, oracle.gradient(copy.deepcopy(net).double(), x.double()), dtype)


def test_autocast_around_a_linear_model_and_in_place():
    linear = nn.Linear(3, 2)
    x = randn(4, 3, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = _typed(fxhess.transform(linear, ALL)(x), torch.bfloat16)
        assert not got.hessian.any()
        out = torch.empty(4, 2, 3, 3, dtype=torch.bfloat16)
        assert fxhess.transform(nn.Sequential(linear, nn.Tanh()))(x, out=out) is out
    with pytest.raises(fxhess.InputError, match="bfloat16"):
        fxhess.transform(nn.Sequential(linear, nn.Tanh()))(x, out=out)


def test_autocast_inside_of_a_model():
    net = mlp(3, 8, 1).float()

    def model(x):
        with torch.autocast("cpu", torch.bfloat16):
            h = net(x)
        return h.float().square()

    x = randn(4, 3, dtype=torch.float32)
    got = _typed(fxhess.transform(model, ALL)(x), torch.float32)
    double = copy.deepcopy(net).double()
    want = oracle.hessian(lambda x: double(x).square(), x.double())
    _within(got.hessian, want, torch.bfloat16)


def test_large_programs_run_without_autocast_too():
    """The run in tiles, with weights' work hoisted."""
    net = mlp(64, 64, 64, 1).float().requires_grad_(False)
    x = randn(32, 64, dtype=torch.float32)
    hess = fxhess.transform(net)
    want = oracle.hessian(copy.deepcopy(net).double(), x[:2].double())
    with torch.autocast("cpu", torch.bfloat16):
        assert hess(x).dtype == torch.bfloat16
        _within(hess(x)[:2], want, torch.bfloat16)
    assert hess(x).dtype == torch.float32
    _within(hess(x)[:2], want, torch.float32)


class _Mixed(nn.Module):
    """A float64 parameter, an integer buffer, and a float32 x: PyTorch promotes."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(1, 2, 4, dtype=torch.float64))
        self.register_buffer("order", torch.tensor([3, 2, 1, 0]))
        self.register_buffer("counts", torch.arange(1, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x[:, self.order] * self.scale * self.counts).sin().sum(1) * x.cos().sum(1)


@pytest.mark.parametrize(
    "model",
    [
        _Mixed(),
        lambda x: (x.double() @ W.real).sin().sum(1),
        lambda x: (x.double().sin().float() * V).prod(1),
    ],
)
def test_mixed_types(model):
    x = randn(3, 4, dtype=torch.float32)
    got = _typed(fxhess.transform(model, ALL)(x), model(x).dtype)
    _within(got.hessian, oracle.hessian(model, x.double()), torch.float32)
    _within(got.gradient, oracle.gradient(model, x.double()), torch.float32)


# --- complex numbers inside -----------------------------------------------------------------------


class _Circuit(nn.Module):
    """Two qubits: rotations by x, an entangling gate, rotations, an expectation value."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gate", torch.tensor([1, 1, 1, -1], dtype=torch.complex128))
        self.register_buffer("observable", torch.tensor([1, -1, -1, 1], dtype=torch.complex128))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        half = (x + 0j) / 2
        c, s = torch.cos(half), -1j * torch.sin(half)
        turns = torch.stack([torch.stack([c, s], -1), torch.stack([s, c], -1)], -2)
        state = torch.einsum("bi,bj->bij", turns[:, 0, :, 0], turns[:, 1, :, 0])
        state = state * self.gate.reshape(2, 2)
        state = turns[:, 2] @ state @ turns[:, 3].mT
        return (state.conj() * state * self.observable.reshape(2, 2)).sum((1, 2)).real


class _ComplexNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 5, dtype=torch.complex128)
        self.last = nn.Linear(5, 1, dtype=torch.complex128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.first(x + 0j))).abs().square()


COMPLEX = {
    "fft": lambda x: torch.fft.fft(x.sin()).abs().square().mul(V.square()).sum(1),
    "rfft and back": lambda x: torch.fft.irfft(torch.fft.rfft(x) * W[0, :3], 4).sin().sum(1),
    "complex weights": lambda x: (torch.complex(x, x.sin()) @ W).abs().square().sum(1),
    "conj products": lambda x: ((x + 0j) @ W * ((x + 0j) @ W).conj()).real.square().sum(1),
    "einsum": lambda x: torch.einsum("bi,ij,bj->b", x.sin() + 0j, W, x.cos() + 0j).imag,
    "exp and sin": lambda x: (torch.exp(1j * x) * torch.sin(x + 0.5j)).real.sum(1),
    "polar": lambda x: torch.polar(x.exp(), x.square()).sum(1).abs(),
    "view_as_complex": lambda x: torch.view_as_complex(x.reshape(-1, 2, 2)).pow(3).imag.sum(1),
    "view_as_real": lambda x: torch.view_as_real((x + 0j) @ W).sin().sum((1, 2)),
    "angle": lambda x: torch.complex(x.exp(), x.sin() + 2).angle().prod(1),
    "quotient and log": lambda x: torch.log((x + 2j) / (1.5 - 1j * x)).imag.sum(1),
    "circuit": _Circuit(),
    "net": _ComplexNet(),
}


@pytest.mark.parametrize("name", COMPLEX)
def test_complex_insides(name):
    model, x = COMPLEX[name], randn(3, 4)
    hess = check(model, x)
    got = hess(x).hessian
    torch.testing.assert_close(got, oracle.differences(model, x), rtol=2e-5, atol=2e-5)


def test_complex_insides_in_single_precision():
    net = copy.deepcopy(COMPLEX["net"]).to(torch.complex64)
    x = randn(3, 4, dtype=torch.float32)
    got = _typed(fxhess.transform(net, ALL)(x), torch.float32)
    want = oracle.hessian(copy.deepcopy(net).to(torch.complex128), x.double())
    _within(got.hessian, want, torch.float32)


@pytest.mark.parametrize(
    "dtype", [torch.complex64, torch.int64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_what_x_cannot_be(dtype):
    with pytest.raises(fxhess.InputError, match=str(dtype).removeprefix("torch.")):
        fxhess.transform(lambda x: x.sum(1))(torch.ones(2, 3).to(dtype))


def test_a_complex_result_is_refused():
    with pytest.raises(fxhess.CaptureError, match="complex"):
        fxhess.transform(lambda x: torch.exp(1j * x).sum(1))(randn(2, 3))
