"""Cells of recurrent layers that PyTorch computes in one kernel; elsewhere these layers are
captured as the plain operations that they are made of; the gates are cut apart *unsafely*."""

from __future__ import annotations

import torch

from fxhess.registry import aten, composite
from fxhess.rules.shape import split

Maybe = torch.Tensor | None


def _sum(a: torch.Tensor, b: Maybe) -> torch.Tensor:
    return a if b is None else a + b


@composite(aten._thnn_fused_lstm_cell.default)
def lstm_cell(
    input_gates: torch.Tensor,
    hidden_gates: torch.Tensor,
    cx: torch.Tensor,
    input_bias: Maybe = None,
    hidden_bias: Maybe = None,
) -> tuple[torch.Tensor, ...]:
    gates = _sum(_sum(input_gates + hidden_gates, input_bias), hidden_bias)
    i, f, g, o = torch.chunk(gates, 4, -1)
    c = torch.sigmoid(f) * cx + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c, gates


@composite(aten._thnn_fused_gru_cell.default)
def gru_cell(
    input_gates: torch.Tensor,
    hidden_gates: torch.Tensor,
    hx: torch.Tensor,
    input_bias: Maybe = None,
    hidden_bias: Maybe = None,
) -> tuple[torch.Tensor, ...]:
    ir, iz, inew = torch.chunk(_sum(input_gates, input_bias), 3, -1)
    hr, hz, hnew = torch.chunk(_sum(hidden_gates, hidden_bias), 3, -1)
    r, z = torch.sigmoid(ir + hr), torch.sigmoid(iz + hz)
    n = torch.tanh(inew + r * hnew)
    return n + z * (hx - n), input_gates


composite(aten.unsafe_split.Tensor)(split)
