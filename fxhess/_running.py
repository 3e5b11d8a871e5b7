"""Adapter: what running generated programs needs of PyTorch's internals.

``torch.ops.mkldnn`` (oneDNN's products) and ``torch._dynamo`` (which axes a compiler takes for
variable); without them the public ``F.linear`` and ``torch.compile`` do the same, slower.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fxhess.outputs import Given

_TRIALS = 3
_LARGE = 8  # binary digits of a batch size that is as good as any larger one
_CLEARLY = 0.9  # the plain way has to be faster than this share of the compiled one's time


def _find_onednn_linear() -> Callable[..., torch.Tensor] | None:
    if not torch.backends.mkldnn.is_available():
        return None
    try:
        op = torch.ops.mkldnn._linear_pointwise
        one = torch.ones(2, 2)
        op(one, one, None, "none", [], "")
    except (AttributeError, RuntimeError):
        return None
    return lambda rows, weight: op(rows, weight, None, "none", [], "")


_onednn_linear = _find_onednn_linear()


def onednn_linear(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``rows @ weight.T`` by oneDNN for float32 on CPUs, otherwise by ``F.linear``.  Has no
    derivative formula."""
    if _onednn_linear is not None and rows.device.type == "cpu":
        return _onednn_linear(rows, weight)
    return torch.nn.functional.linear(rows, weight)


def compiled(
    module: torch.nn.Module, batch_ndim: int, given: Sequence[Given] = ()
) -> Callable[..., Any]:
    """The module through ``torch.compile``: one compilation for all batch sizes but 1.  Its inputs
    are x, then what is ``given``; the others have batch axes where they begin with x's."""
    fast = torch.compile(module.forward, fullgraph=True)
    mark = getattr(torch._dynamo, "maybe_mark_dynamic", None)
    marked = False

    def run(x: torch.Tensor, *rest: Any) -> Any:
        nonlocal marked
        if not marked and mark is not None and 1 not in x.shape[:batch_ndim]:
            batch = x.shape[:batch_ndim]
            starts = [0, *(g.batch_axis for g in given), *([0] * len(rest))]
            for tensor, start in zip((x, *rest), starts, strict=False):
                if start is None or not isinstance(tensor, torch.Tensor):
                    continue
                if tensor.shape[start : start + batch_ndim] == batch:
                    for axis in range(start, start + batch_ndim):
                        mark(tensor, axis)
            marked = True
        return fast(x, *rest)

    return run


class Faster:
    """The faster of two ways to do the same, which may be done again: tried on the first arguments
    of every size of batch, up to that from which on size tells nothing."""

    def __init__(self, compiled: Callable[..., Any], plain: Callable[..., Any]) -> None:
        self._compiled = compiled
        self._plain = plain
        self._chosen: dict[int, Callable[..., Any]] = {}
        self._last: Callable[..., Any] | None = None

    @property
    def tried(self) -> bool:
        """Whether there was a call."""
        return self._last is not None

    @property
    def whole(self) -> bool:
        """Whether the last call ran by code that needs no tiles."""
        return self._last is self._compiled and getattr(self._last, "whole", False)

    def __call__(self, x: torch.Tensor, *args: Any) -> Any:
        size = min(_LARGE, x.shape[0].bit_length() if x.ndim else 0)
        chosen = self._chosen.get(size)
        if chosen is not None:
            self._last = chosen
            return chosen(x, *args)
        result = self._compiled(x, *args)  # compiles
        times = {self._compiled: math.inf, self._plain: math.inf}
        for _ in range(_TRIALS):
            for way in times:
                times[way] = min(times[way], _seconds(way, (x, *args)))
        slow = times[self._plain] >= _CLEARLY * times[self._compiled]
        self._last = self._chosen[size] = self._compiled if slow else self._plain
        return result


def fastest(way: Callable[[], Any]) -> float:
    """Seconds of the fastest of a few calls."""
    return min(_seconds(way, ()) for _ in range(_TRIALS))


def _seconds(way: Callable[..., Any], args: Sequence[Any]) -> float:
    on_gpu = any(isinstance(a, torch.Tensor) and a.is_cuda for a in args)
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    way(*args)
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start


# What PyTorch's allocator says, and oneDNN where it finds no room for its scratchpad.
_NO_MEMORY = ("DefaultCPUAllocator", "could not create a primitive")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on whatever device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
