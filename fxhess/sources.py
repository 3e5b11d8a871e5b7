"""Where a model's tensors are read, and the lock that keeps captures and readers apart."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_capturing = threading.RLock()  # tracing switches process-wide settings of PyTorch


_epoch = 0  # odd while a model is captured: its weights are stand-ins then, for all threads


@dataclass(frozen=True)
class Source:
    """Where an input of the graph is read: a dotted path of attributes below the model, or, for
    tensors that have none (made inside ``forward``, held in a list), the tensor itself."""

    path: tuple[str, ...] = ()
    constant: torch.Tensor | None = None

    def read(self, model: nn.Module) -> torch.Tensor:
        if self.constant is not None:
            return self.constant
        value: Any = model
        for name in self.path:
            value = getattr(value, name)
        return value  # type: ignore[no-any-return]


def read_tensors(sources: Sequence[Source], model: nn.Module) -> list[torch.Tensor]:
    """The model's tensors, never those of a capture that another thread has under way."""
    if torch.compiler.is_dynamo_compiling():
        return [source.read(model) for source in sources]
    before = _epoch
    tensors = [source.read(model) for source in sources]
    if before % 2 or before != _epoch:
        with _capturing:  # wait until it is over
            tensors = [source.read(model) for source in sources]
    return tensors


@contextmanager
def exclusive() -> Iterator[None]:
    """Inside, no other thread captures a model, or reads one."""
    global _epoch
    with _capturing:
        _epoch += 1
        try:
            yield
        finally:
            _epoch += 1


def tracing_elsewhere() -> bool:
    """Whether this thread is being traced by somebody else (``torch.compile``, ``torch.export``).
    While a model is captured, all threads seem to be: this waits until none is."""
    with _capturing:
        return torch.compiler.is_compiling()
