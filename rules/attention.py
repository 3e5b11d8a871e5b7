"""Softmaxes.  Attention itself is captured in its mathematical form: matrix products, a mask, and
one of these."""

from __future__ import annotations

import torch

from fxhess.registry import aten, composite
from fxhess.rules.reductions import finite_peak


def _exponentials(self: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``exp(x - peak)`` and its sum along ``dim``, from which all softmaxes follow."""
    terms = torch.exp(self - finite_peak(self, [dim]))
    return terms, torch.sum(terms, [dim], True)


@composite(aten._softmax.default)
def softmax(self: torch.Tensor, dim: int, half_to_float: bool) -> torch.Tensor:
    terms, total = _exponentials(self.float() if half_to_float else self, dim)
    return terms / total


@composite(aten._safe_softmax.default)
def safe_softmax(self: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """0 in rows that are masked wholly, where ``softmax`` is not a number."""
    terms, total = _exponentials(self if dtype is None else self.to(dtype), dim)
    return terms / torch.where(total == 0, 1.0, total)


@composite(aten._log_softmax.default)
def log_softmax(self: torch.Tensor, dim: int, half_to_float: bool) -> torch.Tensor:
    x = self.float() if half_to_float else self
    shifted = x - finite_peak(x, [dim])
    return shifted - torch.log(torch.sum(torch.exp(shifted), [dim], True))
