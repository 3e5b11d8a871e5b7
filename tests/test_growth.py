"""Tracing and planning take work that is linear in the number of operations."""

from __future__ import annotations

import gc
import sys
from typing import Any

import pytest
import torch
from torch import nn

import fxhess
from fxhess import _batched


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


class Gated(nn.Module):
    """Long skips: every layer reads the first one's result too."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = h = torch.tanh(x)
        for layer in self.layers:
            h = torch.sigmoid(layer(h)) * first + h
        return h.sum(-1)


def _convolutions(depth: int) -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Conv2d(1, 1, 3, padding=1), nn.SiLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(9, 1))


class Encoder(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).square().sum((1, 2))


def _spectra(depth: int) -> Any:
    """Layers through complex numbers: operations without rules, a region in each."""

    def model(x: torch.Tensor) -> torch.Tensor:
        for _ in range(depth):
            x = x + torch.fft.irfft(torch.fft.rfft(x).square() / 8, n=4)
        return x.sum(-1)

    return model


FAMILIES = {
    "residual": (lambda n: nn.Sequential(*(Block() for _ in range(n))), (4,), 6),
    "long skips": (Gated, (4,), 6),
    "convolutions": (_convolutions, (1, 3, 3), 4),
    "encoder": (Encoder, (2, 4), 1),
}


def _work(model: Any, event: tuple[int, ...]) -> tuple[int, int]:
    """Calls of functions, Python's and C's, that a specialization makes; and the operations of
    the program.  A count, unlike a time, is the same on a busy machine."""
    fxhess.cache_clear()
    hess = fxhess.transform(model, event_ndim=len(event))
    x = torch.zeros(2, *event)
    calls = 0

    def count(frame: Any, kind: str, argument: Any) -> None:
        nonlocal calls
        calls += kind in ("call", "c_call")

    gc.collect()  # so that no destructors run meanwhile
    before = sys.getprofile()
    sys.setprofile(count)
    try:
        hess.specialize(x)
    finally:
        sys.setprofile(before)
    return calls, len(hess.graph_module(x).graph.nodes)


@pytest.mark.parametrize("family", FAMILIES)
def test_work_grows_with_the_number_of_operations(family):
    make, event, depth = FAMILIES[family]
    _work(make(1), event)  # what only the first specialization pays
    one, operations = _work(make(depth), event)
    two, twice = _work(make(2 * depth), event)
    assert twice / operations > 1.7
    assert two / one < 1.25 * twice / operations  # quadratic would be twice that


def test_equal_operations_without_rules_are_traced_once(monkeypatch):
    traced = []
    trace = _batched.trace_batched

    def counted(*args: Any) -> Any:
        traced.append(args)
        return trace(*args)

    monkeypatch.setattr(_batched, "trace_batched", counted)
    counts = []
    for depth in (2, 4):
        traced.clear()
        fxhess.cache_clear()
        fxhess.transform(_spectra(depth)).specialize(torch.zeros(2, 4))
        counts.append(len(traced))
    assert counts[0] > 0
    assert counts[1] < 1.5 * counts[0]
