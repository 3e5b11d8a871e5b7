"""Tensors seen by the places of their entries in memory, as plain indexing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fxhess.errors import SampleMixingError, UnsupportedOpError
from fxhess.registry import aten, composite


@composite(aten.as_strided.default)
def as_strided(
    self: torch.Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    storage_offset: int | None = None,
) -> torch.Tensor:
    """The entries of a contiguous tensor at ``offset + sum_k i_k stride_k``; batch axes have to be
    the leading axes of both.  Anything else reads memory that is not the tensor's own."""
    start = 0 if storage_offset is None else storage_offset - self.storage_offset()
    batch = 0
    for n, step, own, own_step in zip(size, stride, self.shape, self.stride(), strict=False):
        if isinstance(own, int) or n != own or step != own_step:
            break
        batch += 1
    count = math.prod(self.shape[batch:])
    sizes, steps = list(size[batch:]), list(stride[batch:])
    known = all(isinstance(n, int) for n in (count, *sizes, *steps))
    last = start + sum((n - 1) * s for n, s in zip(sizes, steps, strict=True)) if known else -1
    if not known:
        raise SampleMixingError(
            "samples of the batch see each other: this operation reads the memory of all of them",
            hint="write it with view, slices or Tensor.unfold",
        )
    if not self.is_contiguous() or start < 0 or not 0 <= last < count:
        raise UnsupportedOpError(
            "as_strided reads memory that is not the tensor's own",
            hint="write it with view, slices or Tensor.unfold",
        )
    positions = torch.full((1,) * len(sizes), int(start), device=self.device)
    for k, (n, step) in enumerate(zip(sizes, steps, strict=True)):
        places = torch.arange(n, device=self.device) * step
        positions = positions + places.reshape([n] + [1] * (len(sizes) - k - 1))
    rows = self.reshape([*self.shape[:batch], count])
    return torch.index_select(rows, batch, positions.reshape(-1)).reshape(
        [*self.shape[:batch], *sizes]
    )
