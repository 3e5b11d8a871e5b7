"""Softmaxes.  Attention itself is captured in its mathematical form: matrix products, a mask, and
one of these.

With forms of their own, in which tangents and adjoints enter by their differences from the mean
only: what all entries have in common changes nothing, and in the forms of exponential, sum and
quotient it would cancel at the end, with its rounding errors left.
"""

from __future__ import annotations

from typing import Any

import torch

from fxhess.kinds import Along, Call
from fxhess.registry import aten, composite, smooth
from fxhess.rules.reductions import centred, from_mean


def _float_first(op: Any) -> Any:
    """The type of the result is that of the operand, here."""

    def rewrite(self: torch.Tensor, dim: int, half_to_float: bool) -> Any:
        if self.ndim == 0:
            return op(self[None], 0, half_to_float)[0]
        return op(self.float(), dim, False) if half_to_float else NotImplemented

    return rewrite


def _softmax_pull(g: Any, call: Call) -> Any:
    return call.y * centred(call.y, g, [call.args[1]])


def _softmax_curve(call: Call, g: Any, i: int, j: int, t: Any) -> Any:
    p, dims = call.y, [call.args[1]]
    return p * from_mean(p, centred(p, g, dims) * centred(p, t, dims), dims)


smooth(
    aten._softmax.default,
    Along("dim"),
    push=lambda call, t: _softmax_pull(t, call),
    pull=_softmax_pull,
    curve=_softmax_curve,
    rewrite=_float_first(aten._softmax.default),
    finite=True,
)


@composite(aten._safe_softmax.default)
def safe_softmax(self: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """0 in rows that are masked wholly, where ``softmax`` is not a number."""
    x = self if dtype is None else self.to(dtype)
    none = torch.all(torch.isneginf(x), dim, True)
    return torch.where(none, 0.0, torch.softmax(torch.where(none, 0.0, x), dim))


def _log_softmax_pull(g: Any, call: Call) -> Any:
    return g - torch.exp(call.y) * torch.sum(g, [call.args[1]], True)


def _log_softmax_curve(call: Call, g: Any, i: int, j: int, t: Any) -> Any:
    p = torch.exp(call.y)
    return -torch.sum(g, [call.args[1]], True) * p * centred(p, t, [call.args[1]])


smooth(
    aten._log_softmax.default,
    Along("dim"),
    push=lambda call, t: centred(torch.exp(call.y), t, [call.args[1]]),
    pull=_log_softmax_pull,
    curve=_log_softmax_curve,
    rewrite=_float_first(aten._log_softmax.default),
    finite=True,
)
