"""The peak memory of one call, above what the process held before it, the result included.

On the CPU: Linux keeps the highest resident size of a process and lets it be reset, so freed memory
is first given back, the mark reset, and the mark read after the call. Elsewhere the resident size
is sampled every millisecond during the call. On a CUDA device: the peak of PyTorch's allocator
(JAX's cannot be reset, so JAX has none there). On the CPU, JAX keeps freed memory where the mark
does not see it taken again, so what XLA says of a program, its temporaries and its result, counts
where that is more. The call comes after others, so that compiling is not counted. The system counts
pages, and by thread: differences under 1 MB say nothing.
"""

import ctypes
import gc
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

import fxhess.memory

__all__ = ["METHOD", "peak_bytes"]

CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
RESET_PEAK = "5"  # proc(5): "reset the peak resident set size to the process's current"


def can_reset() -> bool:
    """Whether this system's mark of the highest resident size can be reset."""
    try:
        CLEAR.write_text(RESET_PEAK)
    except OSError:
        return False
    return "VmHWM" in STATUS.read_text()


HAS_MARK = can_reset()
METHOD = "resident high-water mark" if HAS_MARK else "resident size sampled each millisecond"


def resident(field: str) -> int:
    """A resident size out of the process's status, in bytes: ``VmRSS`` now, ``VmHWM`` highest."""
    match = re.search(rf"{field}:\s+(\d+) kB", STATUS.read_text())
    assert match is not None
    return int(match[1]) * 1024


def give_back() -> None:
    """Return freed memory to the system, so that reusing it is seen as use."""
    gc.collect()
    fxhess.memory.release()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
        if trim is not None:
            trim(0)


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """Bytes that ``call`` needs at its worst moment, on the device that it runs on."""
    give_back()
    if device.startswith("cuda"):
        return cuda_peak(call)
    return marked_peak(call) if HAS_MARK else sampled_peak(call)


def cuda_peak(call: Callable[[], object]) -> int:
    """By PyTorch's allocator."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def marked_peak(call: Callable[[], object]) -> int:
    """By the system's high-water mark."""
    CLEAR.write_text(RESET_PEAK)
    before = resident("VmRSS")
    call()
    return max(0, resident("VmHWM") - before)


def sampled_peak(call: Callable[[], object]) -> int:
    """By looking every millisecond."""
    process, done = psutil.Process(), threading.Event()
    before = highest = process.memory_info().rss

    def look() -> None:
        nonlocal highest
        while not done.wait(0.001):
            highest = max(highest, process.memory_info().rss)

    watcher = threading.Thread(target=look)
    watcher.start()
    result = call()
    highest = max(highest, process.memory_info().rss)  # while the result is still there
    done.set()
    watcher.join()
    del result
    return highest - before
