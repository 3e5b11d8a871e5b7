"""Choosing by value: how many entries there are depends on what a mask holds.

For a mask that depends on x only their number is read (see ``fxhess.reads``); the positions are
computed by the program, so that it serves all masks with as many entries.
"""

from __future__ import annotations

from typing import Any

import torch

from fxhess import _traced
from fxhess.registry import aten, composite


@composite(aten.nonzero.default)
def nonzero(self: torch.Tensor) -> Any:
    if not _traced.varies(self):
        return NotImplemented
    hit = self.reshape(-1) != 0
    count = int(torch.sum(hit))
    if self.ndim == 0 or count == 0:
        return torch.zeros((count, self.ndim), dtype=torch.int64, device=self.device)
    # A stable sort puts the positions that are hit first, in order.
    order = torch.sort(torch.logical_not(hit).to(torch.int8), stable=True, dim=0)
    place = order[1][:count]
    columns: list[torch.Tensor] = []
    for n in reversed(self.shape[1:]):
        columns.insert(0, torch.remainder(place, n))
        place = torch.div(place, n, rounding_mode="floor")
    return torch.stack([place, *columns], 1)


@composite(aten.masked_select.default)
def masked_select(self: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    shape = torch.broadcast_shapes(self.shape, mask.shape)
    common = len(shape) - mask.ndim  # leading axes along which the mask is the same: the batch
    while mask.ndim and isinstance(mask.shape[0], int) and mask.shape[0] == 1:
        mask, common = mask[0], common + 1
    entries = self.expand(shape)
    if mask.ndim == 0:
        mask, entries = mask.reshape(1), torch.unsqueeze(entries, -1)
    else:
        mask = mask.expand(shape[common:])
    return aten.index.Tensor(entries, [*[None] * common, mask]).reshape(-1)
