"""Operators that PyTorch shows on other devices or in other builds: each is rewritten to plain
operations, which are compared here with the public function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxhess.rules  # noqa: F401  (fills the registry)
from fxhess.kinds import Composite
from fxhess.registry import find

aten = torch.ops.aten
D = torch.float64


def _draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=D, generator=torch.Generator().manual_seed(sum(shape)))


X, W, BIAS = _draw(2, 4, 6, 5), _draw(6, 2, 3, 2), _draw(6)
MEAN, VAR = _draw(4), 1 + _draw(4) ** 2
GATES, STATE = _draw(2, 4), _draw(2, 3)
LSTM, GRU = nn.LSTMCell(4, 3, dtype=D), nn.GRUCell(4, 3, dtype=D)


def _gates(cell: Any) -> tuple[torch.Tensor, ...]:
    return GATES @ cell.weight_ih.T, STATE @ cell.weight_hh.T


CASES: dict[Any, tuple[tuple[Any, ...], Callable[[], Any]]] = {
    aten._convolution.default: (
        (X, W, BIAS, [2, 1], [1, 0], [1, 1], False, [0, 0], 2, False, False, True, True),
        lambda: F.conv2d(X, W, BIAS, (2, 1), (1, 0), 1, 2),
    ),
    aten.convolution_overrideable.default: (
        (X, W, BIAS, [2, 1], [1, 0], [1, 1], False, [0, 0], 2),
        lambda: F.conv2d(X, W, BIAS, (2, 1), (1, 0), 1, 2),
    ),
    aten.mkldnn_convolution.default: (
        (X, W, BIAS, [1, 0], [2, 1], [1, 1], 2),
        lambda: F.conv2d(X, W, BIAS, (2, 1), (1, 0), 1, 2),
    ),
    aten.cudnn_convolution.default: (
        (X, W, [1, 0], [2, 1], [1, 1], 2, False, False, True),
        lambda: F.conv2d(X, W, None, (2, 1), (1, 0), 1, 2),
    ),
    aten.cudnn_batch_norm.default: (
        (X, VAR, MEAN, MEAN, VAR, False, 0.1, 1e-4),
        lambda: F.batch_norm(X, MEAN, VAR, VAR, MEAN, eps=1e-4),
    ),
    aten.miopen_batch_norm.default: (
        (X, VAR, MEAN, None, None, True, 0.1, 1e-4),
        lambda: F.batch_norm(X, None, None, VAR, MEAN, training=True, eps=1e-4),
    ),
    aten._fused_rms_norm.default: (
        (X, [6, 5], X[0, 0], None),
        lambda: F.rms_norm(X, (6, 5), X[0, 0]),
    ),
    aten.mkldnn_max_pool2d.default: ((X, [2, 3]), lambda: F.max_pool2d(X, (2, 3))),
    aten.mkldnn_max_pool3d.default: ((X, [2, 3, 1]), lambda: F.max_pool3d(X, (2, 3, 1))),
    aten._thnn_fused_lstm_cell.default: (
        (*_gates(LSTM), STATE.sin(), LSTM.bias_ih, LSTM.bias_hh),
        lambda: LSTM(GATES, (STATE, STATE.sin())),
    ),
    aten._thnn_fused_gru_cell.default: (
        (*_gates(GRU), STATE, GRU.bias_ih, GRU.bias_hh),
        lambda: GRU(GATES, STATE),
    ),
}


@pytest.mark.parametrize("op", CASES, ids=str)
def test_rewritten_kernel(op: Any) -> None:
    arguments, public = CASES[op]
    rule = find(op)
    assert rule is not None and isinstance(rule.kind, Composite)
    got, want = rule.kind.rewrite(*arguments), public()
    got, want = ((v,) if isinstance(v, torch.Tensor) else v for v in (got, want))
    for g, w in zip(got, want, strict=False):
        torch.testing.assert_close(g, w)
