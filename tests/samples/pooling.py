"""Pooling in one to three dimensions."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from fxhess.testing import Sample

IMAGE = {1: (2, 7), 2: (2, 4, 5), 3: (1, 3, 3, 4)}


def _pool(kind: str, rank: int, name: str, *args: Any, **options: Any) -> Sample:
    pool = getattr(F, f"{kind}_pool{rank}d")
    return Sample(f"{kind}_pool{rank}d{name}", lambda x: pool(x, *args, **options), IMAGE[rank])


def _relu_then_pool(x: torch.Tensor) -> torch.Tensor:
    return F.max_pool2d(F.relu(x), 2).exp()


def _there_and_back(x: torch.Tensor) -> torch.Tensor:
    values, places = F.max_pool2d(x, 2, return_indices=True)
    return F.max_unpool2d(values.sin(), places, 2, output_size=[4, 5])


def _there_and_back_1d(x: torch.Tensor) -> torch.Tensor:
    return F.max_unpool1d(*F.max_pool1d(x, 2, return_indices=True), 2)


SAMPLES = [
    *(_pool("max", rank, "", 2) for rank in (1, 2, 3)),
    *(_pool("max", rank, " padding", 3, 2, 1) for rank in (1, 2, 3)),
    *(_pool("max", rank, " ceil", 2, ceil_mode=True) for rank in (1, 2, 3)),
    _pool("max", 1, " dilation", 2, 1, 0, 2),
    _pool("max", 2, " kernel by axis", (1, 3), (2, 1)),
    Sample("max_pool2d at ties", _relu_then_pool, (1, 4, 4)),
    *(_pool("avg", rank, "", 2) for rank in (1, 2, 3)),
    *(_pool("avg", rank, " padding", 3, 2, 1) for rank in (1, 2, 3)),
    *(_pool("avg", rank, " uncounted", 3, 2, 1, True, False) for rank in (1, 2, 3)),
    _pool("avg", 2, " divisor", 2, divisor_override=3),
    *(_pool("adaptive_avg", rank, "", 2) for rank in (1, 2, 3)),
    *(_pool("adaptive_avg", rank, " to one", 1) for rank in (1, 2, 3)),
    *(_pool("adaptive_max", rank, "", 2) for rank in (1, 2, 3)),
    _pool("adaptive_avg", 2, " by axis", (3, None)),
    *(_pool("lp", rank, "", 2, 2) for rank in (1, 2, 3)),
    Sample("max_unpool2d", _there_and_back, IMAGE[2]),
    Sample(
        "max_unpool3d",
        lambda x: F.max_unpool3d(
            *F.max_pool3d(x, 2, return_indices=True), 2, output_size=[3, 3, 4]
        ),
        IMAGE[3],
    ),
    Sample("max_unpool1d", _there_and_back_1d, (2, 6)),
]
