"""Uses of every normalization, with and without weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fxhess.testing import Sample

IMAGE = (4, 3, 2)
Function = Callable[[torch.Tensor], Any]
aten = torch.ops.aten


def _module(make: type[nn.Module], *args: object, **options: object) -> nn.Module:
    """The module in float64, with weights and statistics away from their starting values."""
    module = make(*args, dtype=torch.float64, **options)
    generator = torch.Generator().manual_seed(1)
    for t in [*module.parameters(), *module.buffers()]:
        if t.is_floating_point():
            t.data = 0.5 + torch.rand(t.shape, generator=generator, dtype=torch.float64)
    return module


def _normalized(x: torch.Tensor) -> torch.Tensor:
    return F.batch_norm(x, None, None, training=True)


def _evaluated(x: torch.Tensor) -> torch.Tensor:
    return F.batch_norm(x, *_statistics(x))


def _statistics(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_full((2,), 0.5), x.new_full((2,), 2.0)


# One sample may have an axis that the model takes for a batch.
KERNELS: dict[str, tuple[Function, Function]] = {
    "legit": (
        lambda x: aten._native_batch_norm_legit(x, None, None, *_statistics(x), True, 0.1, 1e-5),
        _normalized,
    ),
    "legit without statistics": (
        lambda x: aten._native_batch_norm_legit.no_stats(x, None, None, True, 0.1, 1e-5),
        _normalized,
    ),
    "legit functional": (
        lambda x: aten._native_batch_norm_legit_functional(
            x, None, None, *_statistics(x), True, 0.1, 1e-5
        ),
        _normalized,
    ),
    "with update": (
        lambda x: aten._batch_norm_with_update(
            x, x.new_ones(2), x.new_zeros(2), *_statistics(x), 0.1, 1e-5
        ),
        _normalized,
    ),
    "without update": (
        lambda x: aten._batch_norm_no_update(x, None, None, *_statistics(x), 0.1, 1e-5),
        _evaluated,
    ),
    "no training": (
        lambda x: aten._native_batch_norm_legit_no_training(
            x, None, None, *_statistics(x), 0.1, 1e-5
        ),
        _evaluated,
    ),
}

SAMPLES = [
    Sample("layer_norm", lambda x: F.layer_norm(x, (5,)), (5,)),
    Sample("layer_norm 2", _module(nn.LayerNorm, (3, 2)), (2, 3, 2)),
    Sample("layer_norm weight", _module(nn.LayerNorm, 4, bias=False), (3, 4)),
    Sample("rms_norm", lambda x: F.rms_norm(x, (4,)), (3, 4)),
    Sample("rms_norm module", _module(nn.RMSNorm, (3, 4), eps=1e-3), (3, 4)),
    Sample(
        "fused rms_norm",
        lambda x: torch.cat(torch.ops.aten._fused_rms_norm(x, [4], None, None), -1),
        (2, 4),
    ),
    Sample("group_norm", lambda x: F.group_norm(x, 2), IMAGE),
    Sample("group_norm module", _module(nn.GroupNorm, 2, 4), (4, 3)),
    Sample("group_norm flat", _module(nn.GroupNorm, 2, 6), (6,)),
    Sample("instance_norm", lambda x: F.instance_norm(x), (2, 5)),
    Sample("instance_norm affine", _module(nn.InstanceNorm2d, 4, affine=True), IMAGE),
    Sample(
        "instance_norm evaluated",
        _module(nn.InstanceNorm1d, 2, affine=True, track_running_stats=True).eval(),
        (2, 3),
    ),
    Sample("batch_norm flat", _module(nn.BatchNorm1d, 4).eval()),
    Sample("batch_norm 1d", _module(nn.BatchNorm1d, 2, affine=False).eval(), (2, 3)),
    Sample("batch_norm 2d", _module(nn.BatchNorm2d, 4).eval(), IMAGE),
    Sample(
        "batch_norm of statistics",
        lambda x: F.batch_norm(x, x.new_zeros(4), x.new_ones(4), x.new_full((4,), 2.0)),
    ),
    Sample("local_response_norm", lambda x: F.local_response_norm(x, 2), (4, 3)),
    Sample("local_response_norm image", lambda x: F.local_response_norm(x, 3, 0.5), IMAGE),
    Sample("normalize", lambda x: F.normalize(x, dim=-1), (3, 4)),
    Sample("normalize 3", lambda x: F.normalize(x, 3.0, dim=1), (3, 4)),
    Sample("renorm", lambda x: torch.renorm(x, 2, 0, 1.5), (4,)),
    Sample("renorm axis", lambda x: torch.renorm(x.movedim(0, 1), 3, 1, 1.5).movedim(0, 1), (2, 3)),
    Sample(
        "weight_norm",
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 3, dtype=torch.float64)),
    ),
    Sample("cosine_similarity", lambda x: F.cosine_similarity(x[:, 0], x[:, 1]), (2, 4)),
    *(
        Sample(f"batch_norm {name}", lambda x, f=f: f(x)[0], (4, 2), batch=None, reference=g)
        for name, (f, g) in KERNELS.items()
    ),
]
