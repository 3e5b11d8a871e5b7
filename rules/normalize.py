"""Normalizations, written out: their statistics are means of the operand itself.

Batch normalization in training is written as plainly; the mean over the batch that goes back to
the samples is then refused where it happens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fxhess.registry import aten, composite, substitute
from fxhess.rules.moments import vector_norm

Maybe = torch.Tensor | None


def _standardized(
    x: torch.Tensor, dims: list[int], eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(x - mean) / sqrt(var + eps)``, the mean, and the reciprocal of the root."""
    mean = torch.mean(x, dims, True)
    rest = x - mean
    std = torch.sqrt(torch.mean(rest * rest, dims, True) + eps)
    return rest / std, mean, 1 / std


def _affine(x: torch.Tensor, weight: Maybe, bias: Maybe) -> torch.Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


@composite(aten.native_layer_norm.default)
def layer_norm(
    input: torch.Tensor, normalized_shape: Sequence[int], weight: Maybe, bias: Maybe, eps: float
) -> tuple[torch.Tensor, ...]:
    dims = list(range(-len(normalized_shape), 0))
    y, mean, rstd = _standardized(input, dims, eps)
    return _affine(y, weight, bias), mean, rstd


@composite(aten._fused_rms_norm.default)
def rms_norm(
    input: torch.Tensor, normalized_shape: Sequence[int], weight: Maybe, eps: float | None
) -> tuple[torch.Tensor, ...]:
    dims = list(range(-len(normalized_shape), 0))
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    rstd = torch.rsqrt(torch.mean(input * input, dims, True) + eps)
    return _affine(input * rstd, weight, None), rstd


@composite(aten.native_group_norm.default)
def group_norm(
    input: torch.Tensor,
    weight: Maybe,
    bias: Maybe,
    N: Any,
    C: Any,
    HxW: Any,
    group: int,
    eps: float,
) -> tuple[torch.Tensor, ...]:
    x = torch.unflatten(input, 1, (group, -1))
    y, mean, rstd = _standardized(x, list(range(2, x.ndim)), eps)
    shape = (-1, *[1] * (input.ndim - 2))
    y = _affine(torch.flatten(y, 1, 2), _shaped(weight, shape), _shaped(bias, shape))
    return y, torch.flatten(mean, 1), torch.flatten(rstd, 1)


def _shaped(value: Maybe, shape: Sequence[int]) -> Maybe:
    return None if value is None else value.reshape(shape)


# --- batch normalization ------------------------------------------------------------------------


def _batch_norm(
    x: torch.Tensor,
    weight: Maybe,
    bias: Maybe,
    running_mean: Maybe,
    running_var: Maybe,
    training: bool,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The result and the saved statistics; running statistics stay as they are."""
    shape = (-1, *[1] * (x.ndim - 2))
    if training:
        y, mean, rstd = _standardized(x, [0, *range(2, x.ndim)], eps)
        y = _affine(y, _shaped(weight, shape), _shaped(bias, shape))
        return y, mean.reshape(-1), rstd.reshape(-1)
    assert running_mean is not None and running_var is not None
    scale = torch.rsqrt(running_var + eps)
    scale = scale if weight is None else scale * weight  # one factor, the same for all samples
    y = _affine(x - running_mean.reshape(shape), scale.reshape(shape), _shaped(bias, shape))
    return y, x.new_empty(0), x.new_empty(0)


@composite(aten.native_batch_norm.default)
def native_batch_norm(
    input: torch.Tensor,
    weight: Maybe,
    bias: Maybe,
    running_mean: Maybe,
    running_var: Maybe,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[torch.Tensor, ...]:
    return _batch_norm(input, weight, bias, running_mean, running_var, training, eps)


@composite(aten._native_batch_norm_legit.no_stats)
def native_batch_norm_no_stats(
    input: torch.Tensor, weight: Maybe, bias: Maybe, training: bool, momentum: float, eps: float
) -> tuple[torch.Tensor, ...]:
    return _batch_norm(input, weight, bias, None, None, training, eps)


@composite(aten._native_batch_norm_legit_no_training.default)
def native_batch_norm_evaluated(
    input: torch.Tensor,
    weight: Maybe,
    bias: Maybe,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    momentum: float,
    eps: float,
) -> tuple[torch.Tensor, ...]:
    return _batch_norm(input, weight, bias, running_mean, running_var, False, eps)


@composite(aten._native_batch_norm_legit_functional.default)
def native_batch_norm_functional(
    input: torch.Tensor,
    weight: Maybe,
    bias: Maybe,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[torch.Tensor, ...]:
    results = _batch_norm(input, weight, bias, running_mean, running_var, training, eps)
    return *results, running_mean, running_var


@composite(aten._batch_norm_with_update_functional.default)
def batch_norm_with_update(
    input: torch.Tensor,
    weight: Maybe,
    bias: Maybe,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    momentum: float,
    eps: float,
) -> tuple[torch.Tensor, ...]:
    results = _batch_norm(input, weight, bias, running_mean, running_var, True, eps)
    return *results, _no_reserve(input), running_mean, running_var


# These update the running statistics, which the module of derivatives leaves alone.
_LEGIT = [aten._native_batch_norm_legit]
if hasattr(torch, "_native_batch_norm_legit"):
    _LEGIT.append(getattr(torch, "_native_batch_norm_legit"))  # noqa: B009 - not everywhere


@substitute(*_LEGIT)
def native_batch_norm_legit(input: torch.Tensor, *args: Any) -> tuple[torch.Tensor, ...]:
    *_, training, momentum, eps = args
    if len(args) == 5:
        return native_batch_norm_no_stats(input, args[0], args[1], training, momentum, eps)
    return native_batch_norm(input, *args)


@substitute(aten._batch_norm_with_update, aten._batch_norm_with_update.default)
def batch_norm_with_update_in_place(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
    return batch_norm_with_update(*args, **kwargs)[:4]


@composite(aten._batch_norm_no_update.default)
def batch_norm_no_update(
    input: torch.Tensor,
    weight: Maybe,
    bias: Maybe,
    running_mean: Maybe,
    running_var: Maybe,
    momentum: float,
    eps: float,
) -> tuple[torch.Tensor, ...]:
    results = _batch_norm(input, weight, bias, running_mean, running_var, False, eps)
    return *results, _no_reserve(input)


@composite(aten.cudnn_batch_norm.default)
def cudnn_batch_norm(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: Maybe,
    running_mean: Maybe,
    running_var: Maybe,
    training: bool,
    exponential_average_factor: float,
    epsilon: float,
) -> tuple[torch.Tensor, ...]:
    results = _batch_norm(input, weight, bias, running_mean, running_var, training, epsilon)
    return *results, _no_reserve(input)


@composite(aten.miopen_batch_norm.default)
def miopen_batch_norm(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: Maybe,
    running_mean: Maybe,
    running_var: Maybe,
    training: bool,
    exponential_average_factor: float,
    epsilon: float,
) -> tuple[torch.Tensor, ...]:
    return _batch_norm(input, weight, bias, running_mean, running_var, training, epsilon)


def _no_reserve(input: torch.Tensor) -> torch.Tensor:
    """The workspace that the backward pass of fused kernels asks for."""
    return torch.empty(0, dtype=torch.uint8, device=input.device)


# --- by norms -----------------------------------------------------------------------------------


@composite(aten.renorm.default)
def renorm(self: torch.Tensor, p: float, dim: int, maxnorm: float) -> torch.Tensor:
    """Slices along ``dim`` of norm above ``maxnorm`` are scaled down to it."""
    dims = [d for d in range(self.ndim) if d != dim % self.ndim]
    size = vector_norm(self, p, dims, True)
    # 1e-7 is the operator's own guard.
    return self * torch.where(size > maxnorm, maxnorm / (size + 1e-7), 1.0)


@composite(aten._weight_norm_interface.default)
def weight_norm(
    v: torch.Tensor, g: torch.Tensor, dim: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    dims = [d for d in range(v.ndim) if d != dim % v.ndim]
    size = vector_norm(v, 2, dims, True)
    return v * (g / size), size
