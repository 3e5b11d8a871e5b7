"""A call like the last one: for small work, the few microseconds that finding the program takes.

Everything that decides which program runs, and how, is either a property of the tensors (then one
check in C++ compares it), or of the model's modules (a walk over their dictionaries).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from fxhess._direct import same_inputs
from fxhess.cache import programs
from fxhess.sources import Reader


class Repeat:
    """What the last call ran, and what has to be the same to run it again: x but for the sizes of
    its batch axes, as long as it has at most ``limit`` entries, the model's tensors and modules,
    and the modes that are on."""

    def __init__(
        self,
        model: nn.Module,
        read: Reader,
        run: Callable[..., Any],
        check: Callable[..., bool],
        limit: int,
    ) -> None:
        self._modules = [
            (m.__dict__, m.training, list(m.__dict__["_modules"].values())) for m in model.modules()
        ]
        self._read = read
        self._run = run
        self._check = check
        self._limit = limit
        self._generation = programs.generation

    @classmethod
    def of(
        cls,
        model: nn.Module,
        read: Reader,
        run: Callable[..., Any],
        inputs: Sequence[torch.Tensor],
        batch_ndim: int,
        limit: int,
    ) -> Repeat | None:
        """None where PyTorch has no such check."""
        check = same_inputs(inputs, [0], batch_ndim, strides=False)
        return None if check is None else cls(model, read, run, check, limit)

    def call(self, x: Any) -> Sequence[Any] | None:
        """The results; None where the call is another one."""
        for own, training, children in self._modules:
            if own["training"] is not training:
                return None
            if (own["_modules"] or children) and list(own["_modules"].values()) != children:
                return None
        tensors = self._read()
        same = self._generation == programs.generation and isinstance(x, torch.Tensor)
        if not same or not self._check(x, *tensors) or x.numel() > self._limit:
            return None
        result = self._run(x, *tensors)
        return result if isinstance(result, tuple) else (result,)
