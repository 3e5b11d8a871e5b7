"""Dropout: a random mask, drawn once a call and so the same for all orders of derivative.

PyTorch's own functions ask for the number of entries while being traced, so they cannot be traced
for all batch sizes; ours run instead.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from fxhess.registry import aten, composite, substitute


def _mask(input: torch.Tensor, p: float, features: bool = False) -> torch.Tensor:
    """1 with probability 1 - p, else 0: for each entry, or for each feature ``[N, C]``.  Drawn as
    PyTorch does: at the same seed it is the mask that the model itself would use."""
    shape = [*input.shape[:2], *[1] * (input.ndim - 2)] if features else input.shape
    return torch.bernoulli(input.new_empty(shape), 1 - p)


def _dropped(input: torch.Tensor, p: float, training: bool, features: bool) -> torch.Tensor:
    if not 0 <= p <= 1:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    if not training or p == 0:
        return input
    if p == 1:
        return input * 0.0
    return input * (_mask(input, p, features) / (1 - p))


# The value that SELU tends to on the left, which alpha dropout puts in place of what it drops;
# scale and shift keep mean and variance (Klambauer et al. 2017, Self-Normalizing Neural Networks).
_LEFT = -1.7580993408473766


def _alpha_dropped(input: torch.Tensor, p: float, training: bool, features: bool) -> torch.Tensor:
    if not training or p == 0 or p == 1:
        return _dropped(input, p, training, features)
    kept = _mask(input, p, features)
    scale = 1 / math.sqrt((1 - p) * (1 + p * _LEFT**2))
    return input * (kept * scale) + ((1 - kept) * _LEFT - p * _LEFT) * scale


def _written(input: torch.Tensor, result: torch.Tensor, inplace: bool) -> torch.Tensor:
    return input.copy_(result) if inplace else result


@substitute(F.dropout, torch.dropout)
def dropout(
    input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> torch.Tensor:
    return _written(input, _dropped(input, p, training, False), inplace)


@substitute(F.dropout2d, F.dropout3d, torch.feature_dropout)
def feature_dropout(
    input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> torch.Tensor:
    return _written(input, _dropped(input, p, training, True), inplace)


@substitute(F.dropout1d)
def dropout1d(
    input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> torch.Tensor:
    if input.ndim == 2:
        return dropout1d(input[None], p, training, inplace)[0]
    return feature_dropout(input, p, training, inplace)


@substitute(F.alpha_dropout, torch.alpha_dropout)
def alpha_dropout(
    input: torch.Tensor, p: float = 0.5, training: bool = False, inplace: bool = False
) -> torch.Tensor:
    return _written(input, _alpha_dropped(input, p, training, False), inplace)


@substitute(F.feature_alpha_dropout, torch.feature_alpha_dropout)
def feature_alpha_dropout(
    input: torch.Tensor, p: float = 0.5, training: bool = False, inplace: bool = False
) -> torch.Tensor:
    return _written(input, _alpha_dropped(input, p, training, True), inplace)


@composite(aten.native_dropout.default)
def native_dropout(
    input: torch.Tensor, p: float, train: bool | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dropout inside of other operations."""
    if train is False or p == 0:
        return input.clone(), torch.ones_like(input, dtype=torch.bool)
    kept = _mask(input, p)
    result = input * 0.0 if p == 1 else input * (kept / (1 - p))
    return result, kept > 0
