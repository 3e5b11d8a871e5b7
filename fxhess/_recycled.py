"""Adapter: memory of large results that nobody holds any more, taken again by the next one.

Fetching 80 MB from the system anew takes 3 to 50 ms, on virtual machines the most: as long as the
arithmetic of many a Hessian.  ``torch._C`` counts who holds a storage (tensors, their views, arrays
of other packages, saved values of autograd); where nobody does, neither there nor in Python, its
memory serves the next result of the same size.  Without that count nothing is taken again.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

MOST = 256 << 20  # bytes in all; larger results are not kept track of


@dataclass(frozen=True)
class _Block:
    """A storage, and where its memory was when it was made."""

    storage: torch.UntypedStorage
    place: int


class Recycled:
    """Memory of results, for all threads of a process."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._blocks: list[_Block] = []  # those used last come last

    def empty(
        self, shape: Sequence[int], dtype: torch.dtype, fetched: Callable[[torch.Tensor], None]
    ) -> torch.Tensor:
        """A contiguous tensor to be written, in memory of its own; ``fetched`` is called with it
        where that comes from the system."""
        size = torch.Size(shape).numel() * dtype.itemsize
        with self._lock:
            block = self._free(size)
            fresh = block is None
            if block is None:
                storage = torch.UntypedStorage(size)
                block = _Block(storage, storage.data_ptr())
                if _COUNTS and size <= self._most:
                    self._forget(self._most - size)
            if _COUNTS and size <= self._most:
                self._blocks.append(block)
            steps = torch.empty(tuple(shape), dtype=dtype, device="meta").stride()
            result = torch.empty(0, dtype=dtype).set_(block.storage, 0, tuple(shape), steps)
        if fresh:
            fetched(result)
        return result

    def release(self) -> None:
        """Give back the memory that nobody holds."""
        with self._lock:
            self._blocks.clear()

    def _free(self, size: int) -> _Block | None:
        """Memory of this size that nobody holds, taken out of the list."""
        for i, block in enumerate(self._blocks):
            if block.storage.nbytes() == size and _is_free(block):
                return self._blocks.pop(i)
        return None

    def _forget(self, most: int) -> None:
        """Keep track of no more than ``most`` bytes: those used longest ago are forgotten."""
        while sum(block.storage.nbytes() for block in self._blocks) > most:
            self._blocks.pop(0)


def _holders(block: _Block) -> tuple[int, int]:
    """How many hold a storage in C++, and how many its object in Python."""
    return torch._C._storage_Use_Count(block.storage._cdata), sys.getrefcount(block.storage)


def _is_free(block: _Block) -> bool:
    storage = block.storage
    moved = storage.data_ptr() != block.place or storage.is_shared()
    del storage
    return not moved and _holders(block) == _NOBODY


def _counted() -> tuple[int, int] | None:
    """The counts of a storage that nobody holds; None where PyTorch does not tell."""
    try:
        block = _Block(torch.UntypedStorage(8), 0)
        nobody = _holders(block)
        tensor = torch.empty(0).set_(block.storage, 0, (2,), (1,))
        view = tensor[1:]
        held = _holders(block)
        own = tensor.untyped_storage()
        del tensor, view
        named = _holders(block)
        del own
        tells = held[0] > nobody[0] and named != nobody and _holders(block) == nobody
    except (AttributeError, TypeError, RuntimeError):  # pragma: no cover - another PyTorch
        return None
    return nobody if tells else None


_NOBODY = _counted()
_COUNTS = _NOBODY is not None

results = Recycled()

__all__ = ["MOST", "Recycled", "results"]
