"""An execution as one operator, for programs that a compiler traces."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from fxhess.execute import Execution, Hoisted, Running


@dataclass(eq=False)
class Runner:
    """An execution with one model's hoisted values, as the operator finds it by number."""

    execution: Execution
    kept: Hoisted
    number: int = field(default_factory=itertools.count().__next__)

    def __post_init__(self) -> None:
        _runners[self.number] = self

    def traced(
        self,
        x: torch.Tensor,
        given: Sequence[torch.Tensor],
        tensors: Sequence[torch.Tensor],
    ) -> list[torch.Tensor]:
        """All results, as one call in the graph of whoever traces."""
        return list(torch.ops.fxhess.derivatives(x, list(given), list(tensors), self.number))


_runners: weakref.WeakValueDictionary[int, Runner] = weakref.WeakValueDictionary()


def _derivatives(
    x: torch.Tensor, given: list[torch.Tensor], tensors: list[torch.Tensor], runner: int
) -> list[torch.Tensor]:
    found = _runners[runner]
    return found.execution(x, tensors, None, found.kept, Running(compile=True), given)


def _derivatives_like(
    x: torch.Tensor, given: list[torch.Tensor], tensors: list[torch.Tensor], runner: int
) -> list[torch.Tensor]:
    execution = _runners[runner].execution
    batch = x.shape[: execution.batch_ndim]
    return [x.new_empty(shape, dtype=dtype) for shape, dtype in execution.results(batch)]


torch.library.define(
    "fxhess::derivatives",
    "(Tensor x, Tensor[] given, Tensor[] tensors, int runner) -> Tensor[]",
)
torch.library.impl("fxhess::derivatives", "CompositeExplicitAutograd", _derivatives)
torch.library.register_fake("fxhess::derivatives", _derivatives_like)
