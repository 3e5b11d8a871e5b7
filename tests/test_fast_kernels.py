"""Kernels of runs without autograd against PyTorch's own operators."""

from __future__ import annotations

import pytest
import torch
from reference import assert_close, randn
from torch import nn

import fxhess
from fxhess import oracle
from fxhess.kernels import flat_product, transposed_convolution


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "extra"), [(1, 0, 1, 0), (2, 1, 1, 1), (3, 0, 2, 2)]
)
def test_transposed_convolution(dtype, channels, rank, stride, padding, dilation, extra):
    g = randn(4, 6, *([5, 4, 3][:rank]), dtype=dtype)
    weight = randn(6, channels, *([3, 2, 2][:rank]), seed=1, dtype=dtype)
    rest = [[n] * rank for n in (stride, padding, dilation)]
    got = transposed_convolution(g, weight, None, *rest, True, [extra] * rank, 1)
    want = torch.convolution(g, weight, None, *rest, True, [extra] * rank, 1)
    assert_close(got, want, 1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_transposed_convolution_in_groups(dtype):
    g, weight = randn(4, 6, 5, 5, dtype=dtype), randn(6, 1, 3, 3, seed=1, dtype=dtype)
    rest = ([2, 2], [1, 1], [1, 1], True, [1, 1], 2)
    got = transposed_convolution(g, weight, None, *rest)
    assert_close(got, torch.convolution(g, weight, None, *rest), 1e-5)


@pytest.mark.parametrize("rows", [(3,), (70,), (5, 7)])
def test_flat_product(rows):
    a, b = randn(*rows, 40, dtype=torch.float32), randn(40, 50, seed=1, dtype=torch.float32)
    assert_close(flat_product(a, b), a @ b, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("channels", [1, 3])
def test_convolutional_networks_in_tiles(dtype, channels):
    model = nn.Sequential(
        nn.Conv2d(channels, 4, 3, 2), nn.Tanh(), nn.Conv2d(4, 5, 3, padding=1), nn.Tanh(),
        nn.Flatten(), nn.LazyLinear(1),
    )  # fmt: skip
    x = randn(3, channels, 8, 8, dtype=dtype)
    model.to(dtype)(x)
    model.requires_grad_(False)
    hess = fxhess.transform(model, event_ndim=3, max_memory=1 << 28)
    want = oracle.hessian(oracle.double(model), x.double(), 3)
    assert_close(hess(x).double(), want, 1e-9 if dtype == torch.float64 else 1e-4)


def test_kernels_of_their_own_in_compiled_programs():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(36, 64), nn.Tanh(),
        nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1),
    ).requires_grad_(False)  # fmt: skip
    x = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        got = fxhess.transform(model, event_ndim=3, compile=True, max_memory=1 << 28)(x)
    want = oracle.hessian(oracle.double(model), x.double(), 3)
    assert_close(got.double(), want, 1e-5)
