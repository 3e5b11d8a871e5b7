"""Where a model's tensors are read, and the lock that keeps captures and readers apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxhess.locks import making

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


def _place(source: Source, model: nn.Module) -> tuple[dict[str, Any], str] | None:
    """The dictionary that a parameter or buffer stands in, and its name there."""
    parent: Any = model
    for name in source.path[:-1]:
        parent = getattr(parent, name, None)
    if not isinstance(parent, nn.Module) or not source.path:
        return None
    for places in (parent._parameters, parent._buffers):
        if source.path[-1] in places:
            return places, source.path[-1]
    return None


class Reader:
    """Reads the sources' tensors off one model, as long as it has the same submodules."""

    def __init__(self, sources: Sequence[Source], model: nn.Module) -> None:
        self._sources = sources
        self._model = model
        places = [_place(source, model) for source in sources]
        # Attribute access of modules takes a microsecond each; their dictionaries do not.
        self._places = [p for p in places if p is not None] if None not in places else None

    def __call__(self) -> list[torch.Tensor]:
        """The tensors, never those of a capture that another thread has under way."""
        if torch.compiler.is_dynamo_compiling():
            return self._slowly()
        before = _epoch
        tensors = self._read()
        if before % 2 or before != _epoch:
            with making:  # wait until it is over
                tensors = self._read()
        return tensors

    def _read(self) -> list[torch.Tensor]:
        if self._places is not None:
            try:
                return [places[name] for places, name in self._places]
            except KeyError:  # became a plain attribute, or a parametrized one
                pass
        return self._slowly()

    def _slowly(self) -> list[torch.Tensor]:
        return [source.read(self._model) for source in self._sources]


@contextmanager
def exclusive() -> Iterator[None]:
    """Inside, no other thread captures a model, or reads one."""
    global _epoch
    with making:
        nested = _epoch % 2  # a model that is captured may call a transformed one
        _epoch += 1 - nested
        try:
            yield
        finally:
            _epoch += 1 - nested


def tracing_elsewhere() -> bool:
    """Whether this thread is being traced by somebody else (``torch.compile``, ``torch.export``).
    While a model is captured, all threads seem to be: this waits until none is."""
    with making:
        return torch.compiler.is_compiling()


def traced() -> bool:
    """Whether PyTorch traces this call, so that nothing can be known of values; not only that a
    model is captured by another thread, which is waited for."""
    if torch.compiler.is_dynamo_compiling():
        return True
    return torch.compiler.is_compiling() and tracing_elsewhere()
