"""Adapter: programs of one sample a lane, compiled by the C++ compiler that PyTorch itself uses.

``torch._inductor`` knows the compiler, its flags for this processor and a cache of what was
compiled; ``libtorch_cpu`` holds the vector library (SLEEF) of its own kernels.  Without the first,
loading fails as other imports do; without the second, functions are the C library's.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import operator
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import fx

from fxhess import memory
from fxhess.lane_operations import OPERATIONS, WRITING
from fxhess.lane_values import NoLanesError
from fxhess.lane_views import VIEWS
from fxhess.lanes import Lanes

_log = logging.getLogger(__name__)
# Those that take the vector library's functions, in the order in which the header names them, and
# how exact it says they are (10: 1.0 units in the last place).
_FUNCTIONS = (
    "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sin", "cos", "tan", "asin", "acos",
    "atan", "sinh", "cosh", "asinh", "acosh", "atanh", "erf", "erfc", "lgamma",
)  # fmt: skip
_ERRORS = {"erfc": 15}
_FAILURES = {
    1: MemoryError("no room for the values of a few samples"),
    2: IndexError("an index is out of range"),
}
# Loops are over vectors already: to look for more takes a compiler most of its time.
_FLAGS = ("-O2", "-fno-tree-vectorize")
_SUFFIX = {torch.float32: ("f", 4), torch.float64: ("d", 8)}


@functools.cache
def _header() -> str:
    return (resources.files("fxhess") / "data" / "lanes.h").read_text(encoding="utf-8")


@functools.cache
def _addresses(suffix: str) -> Any:
    """Where the vector library's functions are; 0 for those that it has not."""
    found = []
    try:
        library: Any = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    except OSError:
        library = None
    for name in _FUNCTIONS:
        symbol = f"Sleef_{name}{suffix}_u{_ERRORS.get(name, 10)}"
        function = getattr(library, symbol, None)
        found.append(ctypes.cast(function, ctypes.c_void_p).value if function else None)
    return (ctypes.c_void_p * len(found))(*found)


def _load(source: str) -> Any:
    from torch._inductor.codecache import CppCodeCache

    return CppCodeCache.load(source, extra_flags=_FLAGS)


class _Kept:
    """What code keeps from call to call: packed matrices, and the inputs that they are of, which
    nobody changes; each call takes it, so that of several threads one has it."""

    def __init__(self, count: int, positions: Sequence[int]) -> None:
        self._count = count
        self._positions = positions
        self._free: list[tuple[torch.Tensor, list[torch.Tensor]]] = []

    def take(self, args: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor], bool]:
        """Room for the matrices, the inputs that they are of, and whether they are there."""
        now = [args[i] for i in self._positions]
        try:
            packed, then = self._free.pop()
        except IndexError:
            return torch.empty(self._count, dtype=torch.uint8), now, False
        return packed, now, all(map(operator.is_, now, then))

    def give_back(self, packed: torch.Tensor, inputs: list[torch.Tensor]) -> None:
        if not self._free:
            self._free.append((packed, inputs))


def compiled(
    graph: fx.Graph,
    inputs: Sequence[torch.Tensor],
    batch_ndim: int,
    written: int,
    kept: Sequence[int] = (),
) -> Callable[[Sequence[torch.Tensor]], Any] | None:
    """Code that takes a list of tensors like ``inputs`` and writes into the last ``written`` of
    them, or returns a tuple of its results; None where the program has no such form.  The inputs at
    the positions ``kept`` are never changed: the same tensor holds the same numbers."""
    dtype = inputs[0].dtype
    if batch_ndim != 1 or dtype not in (torch.float32, torch.float64):
        return None
    try:
        lanes = Lanes(graph, inputs, written, OPERATIONS, VIEWS, WRITING, kept)
    except NoLanesError as error:
        _log.info("no form of one sample a lane: %s", error)
        return None
    library = _load(lanes.source(_header()))
    letter, bytes_each = _SUFFIX[dtype]
    library.use_functions(_addresses(f"{letter}{library.lane_bytes() // bytes_each}"))
    run = library.run
    run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long, ctypes.c_int,
                    ctypes.c_void_p, ctypes.c_int]  # fmt: skip
    run.restype = ctypes.c_int
    library.packed_bytes.restype = ctypes.c_long
    constants = lanes.constants
    pointers_k = (ctypes.c_void_p * max(1, len(constants)))(*[t.data_ptr() for t in constants])
    shapes = [] if written else lanes.results.sizes
    pointers_of = ctypes.c_void_p * (len(inputs) + len(shapes))
    packing = _Kept(library.packed_bytes(), kept) if lanes.packs_kept else None

    def call(args: Sequence[torch.Tensor]) -> Any:
        x = args[0]
        samples = x.shape[0]
        results = [memory.empty((samples, *shape), dtype, x.device) for shape in shapes]
        pointers = pointers_of(*[t.data_ptr() for t in (*args, *results)])
        threads = torch.get_num_threads()
        if packing is None:
            failed = run(pointers, pointers_k, samples, threads, None, 0)
        else:
            packed, own, known = packing.take(args)
            failed = run(pointers, pointers_k, samples, threads, packed.data_ptr(), known)
            if not failed:
                packing.give_back(packed, own)
        if failed:
            raise _FAILURES[failed]
        return tuple(results)

    call.constants = constants  # type: ignore[attr-defined]  # as long as the code lives
    return call
