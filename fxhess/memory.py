"""Host memory: fetching pages from the system anew costs more than the arithmetic done on them.

Remedies; the first two are of the C library and the kernel, without effect where these are others:

- A freed block goes back to the system if it is larger than a threshold, which glibc raises to the
  largest block freed so far, up to 32 MiB (mallopt(3), M_MMAP_THRESHOLD).  Tiles free blocks of
  megabytes thousands of times a second.
- A large result is backed by huge pages where the system leaves that to the program (madvise(2),
  MADV_HUGEPAGE).  Writing a fresh 80 MB takes 20 ms in pages of 4 KiB, 3 ms in pages of 2 MiB
  (two cores of an AMD EPYC).
- A large result takes the memory of an earlier one that nobody holds any more
  (:mod:`fxhess._recycled`): 256 MB at most stay with the process for that.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fxhess import _recycled

# The largest block whose release raises the threshold; larger ones have pages of their own.
_LARGEST = 32 << 20
_LARGE = 32 << 20  # bytes of a result from which on its memory is taken again


@functools.cache
def keep_freed_blocks() -> None:
    """Have freed blocks below 32 MiB stay with the process, up to twice that in all."""
    torch.empty(_LARGEST - (1 << 20), dtype=torch.uint8)  # never touched: costs no memory


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor to be written; where it is large, in memory of an earlier result that nobody holds,
    or on huge pages if the system allows it."""
    size = torch.Size(shape).numel() * dtype.itemsize
    if device.type != "cpu" or size <= _LARGE:
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    try:
        return _recycled.results.empty(shape, dtype, _on_huge_pages)
    except RuntimeError:  # no memory: that of earlier results may suffice
        _recycled.results.release()
        return torch.empty(tuple(shape), dtype=dtype, device=device)


def release() -> None:
    """Give back to the system what is kept of earlier results."""
    _recycled.results.release()


def _on_huge_pages(tensor: torch.Tensor) -> None:
    advise = _advise()
    size = tensor.numel() * tensor.element_size()
    if advise is not None:
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        stop = (tensor.data_ptr() + size) // mmap.PAGESIZE * mmap.PAGESIZE
        advise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_HUGEPAGE)


@functools.cache
def _advise() -> Callable[..., Any] | None:
    """The C library's ``madvise``, where there is one that knows huge pages."""
    if sys.platform != "linux" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    return getattr(ctypes.CDLL(None), "madvise", None)
