"""Measuring this machine's rates: :func:`calibrate`."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxhess import clock, memory, rates
from fxhess.emit import VAL
from fxhess.errors import InputError
from fxhess.kernels import use_fast_kernels
from fxhess.rates import Rates

_SIZES = (2, 4, 8, 16, 32, 64, 128, 256)  # of matrices
_SHORT = 16  # rows of which half is taken
_SIDE = 140  # of transposed matrices: no power of two, whose columns would share lines of a cache
_CALLS = 20  # of the shortest operations, timed at once
_ROUNDS = 3  # at least
_RESULT = 64 << 20  # bytes: more than stays in a cache that cores share


def calibrate(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    seconds: float = 3.0,
) -> Rates:
    """Measure how fast this machine is, for the planner to choose by; takes about ``seconds``.

    The rates are used for every plan made from now on, here and, kept in the user's cache folder,
    in later processes with the same device, number of threads and PyTorch.  Modules that have
    their program keep it; :func:`fxhess.cache_clear` has them plan anew.  Every call measures
    anew.  The machine should be otherwise idle.

    Args:
        device: what to measure; on the CPU, with ``torch.get_num_threads()`` threads.
        dtype: ``torch.float32`` or ``torch.float64``; float32's rates also serve narrower types.
        seconds: how long to measure.

    Returns:
        The rates: a frozen dataclass of numbers, operations or bytes a second.

    Raises:
        InputError: no such device here, a dtype that has no rates, or ``seconds`` not positive.

    Warns:
        UserWarning: the rates cannot be kept for later processes.
    """
    device = torch.device(device)
    if dtype not in (torch.float32, torch.float64):
        raise InputError(
            f"no rates are kept for {dtype}",
            hint="torch.float32, which narrower types share, or torch.float64",
        )
    if not seconds > 0:
        raise InputError(f"seconds is {seconds}; it has to be positive")
    try:
        torch.empty(1, device=device, dtype=dtype)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        raise InputError(f"{device} cannot hold {dtype} here: {error}") from error
    if device.type == "meta":
        raise InputError("the meta device computes nothing")
    with torch.no_grad():
        if device.type == "cpu":
            memory.keep_freed_blocks()
        measured = _run(_Bench(device, dtype), seconds)
    found = _rates(measured)
    rates.keep(device, dtype, found)
    return found


@dataclass(frozen=True)
class _Case:
    """A field of the table (and the size, on a curve), a call, and the work that it does.
    ``cached``: whether it is to find its operands in the cache."""

    field: str
    call: Callable[[], object]
    work: float
    size: float = 0.0
    repeats: int = 1
    cached: bool = True


def _run(bench: _Bench, seconds: float) -> dict[str, dict[float, tuple[float, float]]]:
    """Median seconds and work of each case by field and size.

    In rounds over all cases, so that what disturbs the machine for a moment falls on many cases
    once, not on one case always.
    """
    end = time.perf_counter() + seconds
    cases = list(bench.cases())
    for case in cases:
        case.call()  # first uses build kernels and fetch memory
    times: list[list[float]] = [[] for _ in cases]
    while len(times[0]) < _ROUNDS or time.perf_counter() < end:
        for case, found in zip(cases, times, strict=True):
            if case.cached:
                case.call()
            found.append(clock.seconds_of(case.call, bench.device, case.repeats))
    table: dict[str, dict[float, tuple[float, float]]] = {}
    for case, found in zip(cases, times, strict=True):
        table.setdefault(case.field, {})[case.size] = (statistics.median(found), case.work)
    return table


def _rates(measured: dict[str, dict[float, tuple[float, float]]]) -> Rates:
    speeds = {
        field: {size: work / max(seconds, 1e-9) for size, (seconds, work) in sizes.items()}
        for field, sizes in measured.items()
    }
    plain = {field: sizes[0.0] for field, sizes in speeds.items() if 0.0 in sizes}
    # z + z^T reads z and writes the sum in order; what remains is reading z^T.  Of two kinds, one
    # number: single entries out of order, and whole rows.
    both, bytes_once = measured["scattered"][0.0]
    ordered = 2 * bytes_once / plain["stream"]
    scattered = bytes_once / max(both - ordered, bytes_once / plain["stream"])
    return Rates(
        flat=tuple(speeds["flat"].items()),
        batched=tuple(speeds["batched"].items()),
        convolution=plain["convolution"],
        transposed=plain["transposed"],
        stream=plain["stream"],
        scattered=scattered,
        loops=plain["loops"],
        gather=plain["gather"],
        special=plain["special"],
        memory=plain["memory"],
        launch=1.0 / plain["launch"],
    )


class _Bench:
    """What is timed, on tensors that stay in a CPU's cache and fill a GPU."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.entries = 1 << (20 if device.type == "cpu" else 25)
        generator = torch.Generator(device).manual_seed(0)  # the user's random numbers stay
        self.pool = torch.randn(self.entries, device=device, dtype=dtype, generator=generator)

    def numbers(self, *shape: int) -> torch.Tensor:
        """Random numbers in a tensor of this shape."""
        count = math.prod(shape)
        return self.pool[:count].clone().view(shape)

    def cases(self) -> Iterator[_Case]:
        """All of them."""
        for n in _SIZES:
            rows = self.numbers(max(1, self.entries // (2 * n)), n)
            yield _product("flat", n, rows, self.numbers(n, n))
        for n in _SIZES:
            shape = (max(1, self.entries // (2 * n * n)), n, n)
            yield _product("batched", n, self.numbers(*shape), self.numbers(*shape))
        yield from self.convolutions()
        half = self.entries // 2
        x, y = self.numbers(half), self.numbers(half)
        width = x.element_size()
        yield _Case("stream", lambda: x * y, 3 * half * width)
        z = self.numbers(half // _SIDE**2, _SIDE, _SIDE)
        blocks = math.isqrt(half // _SIDE)
        w = self.numbers(blocks, blocks, _SIDE)
        yield _Case(
            "scattered",
            lambda: (z + z.transpose(1, 2), w + w.transpose(0, 1)),
            (z.numel() + w.numel()) * width,
        )
        short = self.numbers(half // _SHORT**2, _SHORT, _SHORT)[:, : _SHORT // 2, : _SHORT // 2]
        yield _Case("loops", lambda: short * short, len(short) * _SHORT // 2)
        table = self.numbers(50, half // 50)
        index = torch.arange(table.shape[1], device=self.device)
        index = (index * 7919) % table.shape[1]  # out of order, by a large prime
        yield _Case("gather", lambda: table.index_select(1, index), table.numel())
        yield _Case("special", x.tanh, half)
        yield self.writing()
        few = self.numbers(4, 4)
        yield _Case("launch", lambda: (few * few, few @ few, few.sum(0)), 3, repeats=_CALLS)

    def convolutions(self) -> Iterator[_Case]:
        """A small one, and the adjoint of one with strides, over as many images as make them as
        large as other cases."""
        images = self.numbers(self.entries // (8 * 13 * 13 * 12), 8, 13, 13)
        kernel = self.numbers(16, 8, 3, 3)
        convolve, adjoint = torch.nn.functional.conv2d, torch.nn.functional.conv_transpose2d
        result = convolve(images, kernel)
        work = 2 * kernel[0].numel()
        yield _Case("convolution", lambda: convolve(images, kernel), work * result.numel())
        smaller = convolve(images, kernel, stride=2)
        yield _Case(
            "transposed", lambda: adjoint(smaller, kernel, stride=2), work * smaller.numel()
        )

    def writing(self) -> _Case:
        """A fresh result, as a program writes it."""
        size = _RESULT * (1 if self.device.type == "cpu" else 16)
        shape = (size // self.pool.element_size(),)
        return _Case(
            "memory",
            lambda: memory.empty(shape, self.dtype, self.device).fill_(1.0),
            size,
            cached=False,
        )


def _product(field: str, size: int, a: torch.Tensor, b: torch.Tensor) -> _Case:
    kernel = _kernel(a, b)
    return _Case(field, lambda: kernel(a, b), 2 * a.numel() * b.shape[-1], float(size))


def _kernel(a: torch.Tensor, b: torch.Tensor) -> Callable[..., Any]:
    """What a program calls for this product."""
    graph = fx.Graph()
    operands = [graph.placeholder(name) for name in ("a", "b")]
    for node, value in zip(operands, (a, b), strict=True):
        node.meta[VAL] = value
    product = graph.call_function(torch.matmul, tuple(operands))
    use_fast_kernels(graph)
    assert callable(product.target)
    return product.target
