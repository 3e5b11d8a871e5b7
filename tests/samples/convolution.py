"""Convolutions in one to three dimensions, and sliding windows."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from fxhess.testing import Sample

D = torch.float64
torch.manual_seed(0)

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
IMAGE = {1: (2, 6), 2: (2, 4, 3), 3: (2, 3, 2, 3)}


def _conv(
    rank: int, name: str, kernel: int, event: tuple[int, ...] = (), **options: object
) -> Sample:
    return Sample(
        f"conv{rank}d{name}",
        CONV[rank](2, 4, kernel, dtype=D, **options),
        event or IMAGE[rank],
    )


def _transposed(rank: int, name: str, kernel: int, **options: object) -> Sample:
    module = TRANSPOSED[rank](2, 4, kernel, dtype=D, **options)
    return Sample(f"conv_transpose{rank}d{name}", module, IMAGE[rank])


ROWS = torch.randn(3, 1, 2, 1, dtype=D)

SAMPLES = [
    *(_conv(rank, "", 2) for rank in (1, 2, 3)),
    *(_conv(rank, " stride", 2, stride=2, padding=1) for rank in (1, 2, 3)),
    *(_conv(rank, " groups", 2, groups=2, bias=False) for rank in (1, 2, 3)),
    _conv(1, " stride that loses an entry", 2, (2, 7), stride=2),
    _conv(1, " stride that loses two", 3, (2, 8), stride=3, padding=1),
    _conv(1, " dilation", 3, dilation=2),
    _conv(2, " dilation, stride", 2, (2, 5, 6), dilation=2, stride=(2, 1), padding=(0, 1)),
    _conv(1, " same", 2, padding="same"),
    _conv(1, " circular", 3, padding=1, padding_mode="circular"),
    _conv(2, " reflect", 2, padding=1, padding_mode="reflect"),
    _conv(1, " replicate", 3, padding=1, padding_mode="replicate"),
    Sample("conv1d without bias", nn.Conv1d(2, 2, 3, bias=False, dtype=D), (2, 4)),
    Sample("conv2d of rows", lambda x: F.conv2d(x.unsqueeze(1), ROWS), (3, 2)),
    Sample(
        "conv1d of merged axes",
        lambda x: F.conv1d(x.reshape(-1, 1, 4), ROWS[:, :, :, 0]).reshape(-1, 2, 9),
        (2, 4),
    ),
    Sample("conv2d unbatched", lambda x: F.conv2d(x, ROWS), (1, 3, 2), batch=1, twice=False),
    *(_transposed(rank, "", 2) for rank in (1, 2, 3)),
    *(_transposed(rank, " stride", 3, stride=2, padding=1) for rank in (1, 2)),
    *(_transposed(rank, " groups", 2, groups=2, bias=False) for rank in (1, 2)),
    _transposed(1, " output_padding", 3, stride=2, output_padding=1),
    _transposed(2, " output_padding", 2, stride=(3, 2), output_padding=(2, 1), padding=1),
    _transposed(1, " output_padding of a stride", 2, stride=1, dilation=3, output_padding=2),
    Sample("unfold", lambda x: F.unfold(x, 2), (2, 3, 3)),
    Sample("unfold options", lambda x: F.unfold(x, (2, 1), 1, 1, 2), (1, 3, 4)),
    Sample("fold", lambda x: F.fold(x, (3, 3), 2), (4, 4)),
    Sample("fold options", lambda x: F.fold(x, (3, 4), (2, 1), padding=1, stride=2), (2, 6)),
]
