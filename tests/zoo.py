"""The zoo: named models of real architectures, one file a family in tests/models."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from reference import randn
from torch import nn

FILES = sorted((Path(__file__).parent / "models").glob("[!_]*.py"))


@dataclass(frozen=True)
class Case:
    """``build`` makes a model of ``x: [batch, *event]`` (modules are made double, and keep the
    ``training`` flag they come with); ``make`` draws x, by default standard normal."""

    name: str
    build: Callable[[], Any]
    event: tuple[int, ...] = (4,)
    batch: int = 2
    make: Callable[[tuple[int, ...]], torch.Tensor] | None = None

    def model(self) -> Any:
        torch.manual_seed(0)
        model = self.build()
        return model.double() if isinstance(model, nn.Module) else model

    def draw(self) -> torch.Tensor:
        shape = (self.batch, *self.event)
        return self.make(shape) if self.make is not None else randn(*shape, seed=1)


class Apply(nn.Module):
    """A module and how it is called: ``call(module, x)``."""

    def __init__(self, inner: nn.Module, call: Callable[[nn.Module, torch.Tensor], Any]) -> None:
        super().__init__()
        self.inner = inner
        self.call = call

    def forward(self, x: torch.Tensor) -> Any:
        return self.call(self.inner, x)


def uniform(low: float, high: float) -> Callable[[tuple[int, ...]], torch.Tensor]:
    """Draw x between bounds."""

    def make(shape: tuple[int, ...]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)

    return make


def table() -> list[tuple[str, Case]]:
    """Every case with its family."""
    found = []
    for path in FILES:
        spec = importlib.util.spec_from_file_location(f"models_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found += [(path.stem, case) for case in module.CASES]
    return found
