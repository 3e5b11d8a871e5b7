"""Losses, as the plain operations that they are made of.

``reduction`` is ATen's number: 0 none, 1 mean, 2 sum.  Targets may depend on x like anything else.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fxhess.registry import aten, composite, substitute

Reduced = torch.Tensor


def _reduce(loss: torch.Tensor, reduction: int) -> Reduced:
    if reduction == 0:
        return loss
    return torch.mean(loss) if reduction == 1 else torch.sum(loss)


@composite(aten.mse_loss.default)
def mse_loss(self: torch.Tensor, target: torch.Tensor, reduction: int = 1) -> Reduced:
    d = self - target
    return _reduce(d * d, reduction)


@composite(aten.huber_loss.default)
def huber_loss(
    self: torch.Tensor, target: torch.Tensor, reduction: int = 1, delta: float = 1.0
) -> Reduced:
    d = self - target
    size = torch.abs(d)
    loss = torch.where(size < delta, d * d * 0.5, delta * (size - 0.5 * delta))
    return _reduce(loss, reduction)


@composite(aten.smooth_l1_loss.default)
def smooth_l1_loss(
    self: torch.Tensor, target: torch.Tensor, reduction: int = 1, beta: float = 1.0
) -> Reduced:
    d = self - target
    size = torch.abs(d)
    if beta == 0:
        return _reduce(size, reduction)
    loss = torch.where(size < beta, d * d * (0.5 / beta), size - 0.5 * beta)
    return _reduce(loss, reduction)


def _clamped_log(x: torch.Tensor) -> torch.Tensor:
    """log x, and PyTorch's -100 for x = 0, where it counts as constant."""
    positive = x > 0
    return torch.where(positive, torch.log(torch.where(positive, x, 1.0)), -100.0)


@composite(aten.binary_cross_entropy.default)
def binary_cross_entropy(
    self: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    reduction: int = 1,
) -> Reduced:
    loss = (target - 1) * _clamped_log(1 - self) - target * _clamped_log(self)
    return _reduce(loss if weight is None else loss * weight, reduction)


@composite(aten.binary_cross_entropy_with_logits.default)
def binary_cross_entropy_with_logits(
    self: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    pos_weight: torch.Tensor | None = None,
    reduction: int = 1,
) -> Reduced:
    cost = F.softplus(-self, threshold=40)  # -log sigmoid(x)
    positive = 1.0 if pos_weight is None else (pos_weight - 1) * target + 1
    loss = (1 - target) * self + positive * cost
    return _reduce(loss if weight is None else loss * weight, reduction)


@composite(aten.soft_margin_loss.default)
def soft_margin_loss(self: torch.Tensor, target: torch.Tensor, reduction: int = 1) -> Reduced:
    return _reduce(F.softplus(-target * self, threshold=40), reduction)


def _picked(table: torch.Tensor, target: torch.Tensor, classes: int) -> torch.Tensor:
    """``table[target]`` along a last axis, as a choice."""
    index = torch.arange(classes, device=target.device)
    chosen = target.unsqueeze(-1) == index
    return torch.sum(torch.where(chosen, table, 0.0), -1)


def _negative_log_likelihood(
    self: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    reduction: int,
    ignore_index: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Classes along the last axis; the result and the total weight."""
    counted = target != ignore_index
    if weight is None:
        each = counted.to(self.dtype)
    else:
        each = torch.where(counted, _picked(weight, target, self.shape[-1]), 0.0)
    loss = torch.where(counted, -each * _picked(self, target, self.shape[-1]), 0.0)
    total = torch.sum(each)
    if reduction == 0:
        return loss, total
    return (torch.sum(loss) / total if reduction == 1 else torch.sum(loss)), total


@composite(aten.nll_loss_forward.default)
def nll_loss_forward(
    self: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    reduction: int,
    ignore_index: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _negative_log_likelihood(self, target, weight, reduction, ignore_index)


@composite(aten.nll_loss2d_forward.default)
def nll_loss2d_forward(
    self: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    reduction: int,
    ignore_index: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _negative_log_likelihood(
        torch.movedim(self, 1, -1), target, weight, reduction, ignore_index
    )


@composite(aten.multi_margin_loss.default)
def multi_margin_loss(
    self: torch.Tensor,
    target: torch.Tensor,
    p: float = 1,
    margin: float = 1,
    weight: torch.Tensor | None = None,
    reduction: int = 1,
) -> Reduced:
    classes = self.shape[-1]
    own = _picked(self, target, classes).unsqueeze(-1)
    others = target.unsqueeze(-1) != torch.arange(classes, device=target.device)
    excess = torch.clamp_min(margin - own + self, 0)
    each = torch.where(others, excess * excess if p == 2 else excess, 0.0)
    loss = torch.sum(each, -1) / classes
    return _reduce(loss if weight is None else loss * _picked(weight, target, classes), reduction)


# torch 2.13 has it.  Its chunks are computed with their gradients in the forward pass, for tensors
# that require one, and cannot be differentiated twice: the plain path can.
_linear_cross_entropy = getattr(F, "linear_cross_entropy", None)


@substitute(*([] if _linear_cross_entropy is None else [_linear_cross_entropy]))
def linear_cross_entropy(*args: Any, options: Any = None, **kwargs: Any) -> Reduced:
    assert _linear_cross_entropy is not None
    result: torch.Tensor = _linear_cross_entropy(*args, **kwargs)
    return result
