"""Interpolation of every mode, growing and shrinking; pixel shuffles; sampling at points."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from fxhess.testing import Sample

IMAGE = {"linear": (2, 5), "trilinear": (1, 2, 3, 2)}
FLAT = (1, 3, 4)
D = torch.float64


def _resized(mode: str, name: str, event: tuple[int, ...] = (), **options: Any) -> Sample:
    return Sample(
        f"interpolate {mode}{name}",
        lambda x: F.interpolate(x, mode=mode, **options),
        event or IMAGE.get(mode, FLAT),
    )


torch.manual_seed(0)
POINTS = 1.6 * torch.rand(3, 2, 2, dtype=D) - 0.8
SAMPLING = [
    *(
        ("bilinear", padding, align)
        for padding in ("zeros", "border", "reflection")
        for align in (False, True)
    ),
    ("nearest", "zeros", False),
    ("nearest", "reflection", True),
    ("bicubic", "zeros", False),
    ("bicubic", "reflection", True),
]


def _sampled(mode: str, padding: str, align: bool) -> Sample:
    """An image at points, both made of x: the first 6 entries, and the other 4."""

    def function(x: torch.Tensor) -> torch.Tensor:
        image = x[:, :6].unflatten(1, (1, 2, 3))
        points = 1.4 * torch.sin(x[:, 6:]).unflatten(1, (1, 2, 2))
        return F.grid_sample(
            image, points, mode=mode, padding_mode=padding, align_corners=align
        ).flatten(1)

    return Sample(f"grid_sample {mode} {padding} {align}", function, (10,), twice=False)


SAMPLES = [
    _resized("nearest", " 1d", (2, 3), scale_factor=2),
    _resized("nearest", " down", (5, 4), size=3),
    _resized("nearest", " 2d", scale_factor=(1.5, 2)),
    _resized("nearest", " 3d", (1, 2, 2, 3), size=(3, 1, 4)),
    _resized("nearest-exact", " 1d", (1, 5), size=3),
    _resized("nearest-exact", " 2d", scale_factor=1.5),
    _resized("nearest-exact", " 3d", (1, 2, 3, 2), size=2),
    *(
        _resized(mode, f" {align} {name}", align_corners=align, **size)
        for mode in ("linear", "bilinear", "bicubic", "trilinear")
        for align in (False, True)
        for name, size in (("up", {"scale_factor": 2.0}), ("down", {"size": 2}))
    ),
    _resized("bilinear", " own scale", scale_factor=1.3, recompute_scale_factor=False),
    _resized("bilinear", " antialias", size=2, antialias=True),
    _resized("bicubic", " antialias", size=(2, 5), antialias=True),
    _resized("area", "", (1, 4, 5), size=2),
    Sample("pixel_shuffle", lambda x: F.pixel_shuffle(x.sin(), 2), (4, 2, 3)),
    Sample("pixel_unshuffle", lambda x: F.pixel_unshuffle(x.sin(), 2), (2, 2, 4)),
    Sample("channel_shuffle", lambda x: F.channel_shuffle(x.sin(), 2), (4, 2, 1)),
    *(_sampled(*options) for options in SAMPLING),
    Sample(
        "grid_sample 3d",
        lambda x: F.grid_sample(
            x.unsqueeze(1),
            POINTS[:, :, [0, 1, 1]].reshape(1, 1, 3, 2, 3).expand(x.shape[0], 1, 3, 2, 3),
            align_corners=False,
        ).flatten(1),
        (2, 2, 3),
    ),
]
