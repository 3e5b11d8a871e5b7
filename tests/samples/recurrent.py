"""Recurrent layers and cells: stacked, in both directions, batch first and sequence first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fxhess.testing import Sample

D = torch.float64
torch.manual_seed(0)


def _layer(kind: Callable[..., nn.Module], name: str, **options: Any) -> Sample:
    layer = kind(2, 3, dtype=D, batch_first=True, **options)
    return Sample(f"{kind.__name__}{name}", lambda x: layer(x)[0], (3, 2))


def _sequence_first(kind: Callable[..., nn.Module]) -> Sample:
    layer = kind(2, 3, dtype=D)
    return Sample(
        f"{kind.__name__} sequence first",
        lambda x: layer(x.transpose(0, 1))[0].transpose(0, 1),
        (3, 2),
    )


def _cell(kind: Callable[..., nn.Module], **options: Any) -> Sample:
    cell = kind(4, 3, dtype=D, **options)

    def function(x: torch.Tensor) -> torch.Tensor:
        state = cell(x)
        return torch.cat(state, 1) if isinstance(state, tuple) else state

    return Sample(kind.__name__, function)


def _fused_lstm(x: torch.Tensor) -> torch.Tensor:
    state = torch.ops.aten._thnn_fused_lstm_cell(x, x.sin(), x[:, :1])
    return torch.cat(state[:2], 1)


def _fused_gru(x: torch.Tensor) -> torch.Tensor:
    bias = torch.arange(3, dtype=D)
    return torch.ops.aten._thnn_fused_gru_cell(x, x.cos(), x[:, :1], bias, -bias)[0]


KINDS = (nn.RNN, nn.LSTM, nn.GRU)

SAMPLES = [
    *(_layer(kind, "") for kind in KINDS),
    *(
        _layer(kind, " stacked, both directions", num_layers=2, bidirectional=True)
        for kind in KINDS
    ),
    *(_sequence_first(kind) for kind in KINDS),
    _layer(nn.RNN, " relu", nonlinearity="relu"),
    _layer(nn.LSTM, " projected", proj_size=2),
    _layer(nn.GRU, " without bias", bias=False),
    *(_cell(kind) for kind in (nn.RNNCell, nn.LSTMCell, nn.GRUCell)),
]
