"""Comparisons with the referee: double backward of one sample at a time in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import nn

import fxhess
from fxhess import oracle

TOLERANCE = 1e-9  # relative to the largest entry, in float64
FLOOR = 1e-3  # rounding of results that nearly cancel is relative to what was added up
ALL = ("value", "gradient", "hessian")

Model = nn.Module | Callable[..., Any]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Standard normal numbers that depend on nothing but the seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def mlp(*widths: int, activation: type[nn.Module] = nn.Tanh, seed: int = 0) -> nn.Sequential:
    """A float64 multi-layer perceptron."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for n, m in pairwise(widths):
        layers += [nn.Linear(n, m), activation()]
    return nn.Sequential(*layers[:-1]).double()


def assert_close(
    got: torch.Tensor, want: torch.Tensor, tolerance: float = TOLERANCE, what: str = "result"
) -> None:
    """Equal shapes, and no entry off by more than ``tolerance`` of the largest one."""
    assert got.shape == want.shape, f"{what}: {list(got.shape)}, expected {list(want.shape)}"
    if not want.numel():
        return
    assert torch.isfinite(want).all(), f"{what}: the reference itself is not finite"
    error = (got - want).abs().max().item()
    scale = max(want.abs().max().item(), FLOOR)
    assert error <= tolerance * scale, f"{what}: off by {error:.3g}, entries reach {scale:.3g}"


def assert_symmetric(hessian: torch.Tensor, event_ndim: int = 1) -> None:
    """Equal to its transpose bit for bit."""
    n = math.prod(hessian.shape[hessian.ndim - event_ndim :])
    square = hessian.reshape(-1, n, n) if n else hessian.reshape(0, 1, 1)
    assert torch.equal(square, square.mT)


def check(
    model: Model, x: torch.Tensor, event_ndim: int = 1, strategy: str = "auto"
) -> fxhess.HessianModule:
    """Compare value, gradient and Hessian of ``model`` at x with the referee; returns the
    transform for further questions."""
    hess = fxhess.transform(model, ALL, event_ndim=event_ndim, strategy=strategy)
    got = hess(x)
    assert_symmetric(got.hessian, event_ndim)
    nb = x.ndim - event_ndim
    batch, event = x.shape[:nb], x.shape[nb:]
    if 0 in batch:
        outputs = got.value.shape[nb:]
        assert got.value.shape[:nb] == batch
        assert got.gradient.shape == (*batch, *outputs, *event)
        assert got.hessian.shape == (*batch, *outputs, *event, *event)
        return hess
    value = model(x)
    outputs = value.shape[nb:]
    scalar = math.prod(outputs) == 1
    assert_close(got.value, value.reshape(batch) if scalar else value, what="value")
    assert_close(got.gradient, oracle.gradient(model, x, event_ndim), what="gradient")
    assert_close(got.hessian, oracle.hessian(model, x, event_ndim), what="hessian")
    return hess


def block_diagonal(model: Model, x: torch.Tensor, event_ndim: int = 1) -> torch.Tensor:
    """The diagonal blocks of the whole Hessian of a model that returns one number for the whole
    batch, by double backward; the other blocks must vanish."""
    nb = x.ndim - event_ndim
    batch, event = x.shape[:nb], x.shape[nb:]
    count, n = math.prod(batch), math.prod(event)
    whole = torch.autograd.functional.hessian(lambda t: model(t).reshape(()), x)
    whole = whole.reshape(count, n, count, n)
    same = torch.eye(count, dtype=torch.bool)
    others = whole.movedim(2, 1)[~same]
    assert others.numel() == 0 or others.abs().max().item() == 0
    return whole.movedim(2, 1)[same].reshape(*batch, *event, *event)


def referee(function: Callable[..., Any], *parts: torch.Tensor) -> list[list[torch.Tensor]]:
    """Blocks of one sample's Hessian in several tensors, by double backward: ``blocks[a][b]`` is
    ``[*m, *shape_a, *shape_b]``; m as the function's result has it, but for a size of 1."""
    sizes = [p.numel() for p in parts]

    def of_one(z: torch.Tensor) -> Any:
        pieces = z.split(sizes)
        return function(*(p.reshape(t.shape) for p, t in zip(pieces, parts, strict=True)))

    H = oracle.hessian(of_one, torch.cat([p.detach().reshape(-1) for p in parts]), 1)
    return [
        [
            H.split(sizes, -2)[a].split(sizes, -1)[b].reshape(*H.shape[:-2], *p.shape, *q.shape)
            for b, q in enumerate(parts)
        ]
        for a, p in enumerate(parts)
    ]
