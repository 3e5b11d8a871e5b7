"""Uses of selection: masks that are the same for every sample, and masks of its own."""

from __future__ import annotations

import torch

from fxhess.testing import Sample

MASK = torch.tensor([True, False, True, True])
GRID = torch.tensor([[True, False, False, True], [False, True, True, False]])


def _largest(x: torch.Tensor) -> torch.Tensor:
    """Above the sample's mean: how many there are depends on x."""
    sample, place = (x > x.mean(1, keepdim=True)).nonzero().unbind(1)
    return x.new_zeros(len(x)).index_add(0, sample, x[sample, place].exp())


SAMPLES = [
    Sample("index by a mask", lambda x: x[:, MASK]),
    Sample("index by a mask of two axes", lambda x: x[:, GRID], (2, 4)),
    Sample("nonzero", lambda x: x[:, MASK.nonzero()[:, 0]]),
    Sample("nonzero of x", _largest),
    Sample("masked_select", lambda x: x.masked_select(MASK).reshape(len(x), -1)),
    Sample(
        "masked_select of x", lambda x: x.sort(1)[0].masked_select(MASK).reshape(len(x), -1).sin()
    ),
    Sample("where, positions", lambda x: x[:, torch.where(MASK)[0]].cos()),
]
