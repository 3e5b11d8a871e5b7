"""Adapter: what running generated programs needs of PyTorch's internals.

``torch.ops.mkldnn`` (oneDNN's products) and ``torch._dynamo`` (which axes a compiler takes for
variable); without them the public ``F.linear`` and ``torch.compile`` do the same, slower.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxhess.outputs import Given
from fxhess.progress import hidden

_TRIALS = 3
_LARGE = 8  # binary digits of a batch size that is as good as any larger one
_CLEARLY = 0.97  # the share of the plain way's time below which another one is faster
_HALF = 0.5  # the share of the plain way's time that is fast enough, without trying others
_LONG, _MOST = 0.2, 20  # seconds of trials, or rounds, that tell enough


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


@dataclass(frozen=True)
class Way:
    """One way to do something, and whether it can be done so for these arguments (asked once,
    before it is)."""

    name: str
    run: Callable[..., Any]
    can: Callable[..., bool] = lambda *_: True


class Fastest:
    """The fastest of several ways to do the same, which may be done again: tried on the first
    arguments of every size of batch, up to that from which on size tells nothing.  The first way is
    the plain one, taken where none is clearly faster; others are tried in their order, up to one
    that takes half its time."""

    def __init__(self, *ways: Way) -> None:
        self.ways = ways
        self._chosen: dict[int, Way] = {}
        self.last: Way | None = None

    @property
    def name(self) -> str | None:
        """Which way the last call went; None where there was none."""
        return None if self.last is None else self.last.name

    def __call__(self, x: torch.Tensor, *args: Any) -> Any:
        size = min(_LARGE, x.shape[0].bit_length() if x.ndim else 0)
        way = self._chosen.get(size)
        if way is None:
            if torch._C._len_torch_dispatch_stack() > 0:  # somebody wants to see the operators
                return self.ways[0].run(x, *args)
            way = self._chosen[size] = self._fastest(x, *args)
        self.last = way
        return way.run(x, *args)

    def _fastest(self, *args: Any) -> Way:
        plain, *others = self.ways
        times = {plain: math.inf}
        cuda = [args[0].device] if args[0].is_cuda else []
        with hidden(), torch.random.fork_rng(cuda):
            for way in others:
                if way.can(*args):
                    times[way] = math.inf
                    _race(times, args)
                    if times[way] <= _HALF * times[plain]:
                        break
        best = min(times, key=times.__getitem__)
        return best if times[best] < _CLEARLY * times[plain] else plain


def _race(times: dict[Way, float], args: Sequence[Any]) -> None:
    """Shorten ``times`` to the shortest of rounds of calls, after one of each that makes what is
    made once: other work on the machine meets all ways alike."""
    for way in times:
        way.run(*args)
    spent = 0.0
    for done in range(_MOST):
        if done >= _TRIALS and spent >= _LONG:
            break
        for way in times:
            took = _seconds(lambda way=way: way.run(*args))  # type: ignore[misc]
            times[way] = min(times[way], took)
            spent += took


def fastest(way: Callable[[], Any]) -> float:
    """Seconds of the fastest of a few calls, after one that makes what is made once."""
    way()
    times: list[float] = []
    while len(times) < _MOST and (len(times) < _TRIALS or sum(times) < _LONG):
        times.append(_seconds(way))
    return min(times)


def _seconds(way: Callable[[], Any]) -> float:
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    way()
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
