"""Recurrent networks: stacked, in both directions, as encoders and as decoders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from zoo import Apply, Case

STEPS, INPUTS = 4, 2


def _net(kind: Callable[..., nn.Module], **options: Any) -> Callable[[], nn.Module]:
    first = options.get("batch_first", False)

    def call(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = layer(x if first else x.transpose(0, 1))[0]
        y = y if first else y.transpose(0, 1)
        return (y[:, -1] * y[:, 0].cos()).sum(-1) + y.square().mean((1, 2))

    return lambda: Apply(kind(INPUTS, 3, **options), call)


def _case(kind: Callable[..., nn.Module], name: str, **options: Any) -> Case:
    return Case(f"{kind.__name__}{name}", _net(kind, **options), (STEPS, INPUTS))


class Tagger(nn.Module):
    """Two directions, two layers, dropout between them (evaluated), logits at every step from the
    hidden state as well."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(INPUTS, 3, 2, batch_first=True, bidirectional=True, dropout=0.3)
        self.head = nn.Linear(6, 2)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, (h, c) = self.rnn(x)
        scores = self.head(y).log_softmax(-1)[..., 0].sum(1)
        return scores + (h * c).sum((0, 2))


class Sequence(nn.Module):
    """An encoder hands its state to a decoder of cells, which reads what it wrote, with attention
    over the encoder's steps."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.GRU(INPUTS, 3, batch_first=True)
        self.cell = nn.GRUCell(3 + INPUTS, 3)
        self.out = nn.Linear(3, INPUTS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        steps, last = self.encoder(x)
        h, y = last[0], x.new_zeros(x.shape[0], INPUTS)
        outputs = []
        for _ in range(3):
            weights = torch.softmax(torch.einsum("bth,bh->bt", steps, h), 1)
            context = torch.bmm(weights.unsqueeze(1), steps).squeeze(1)
            h = self.cell(torch.cat([y, context], 1), h)
            y = self.out(h)
            outputs.append(y)
        return torch.stack(outputs, 1).square().sum((1, 2))


class Masked(nn.Module):
    """Steps that are padding leave the state as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.LSTMCell(INPUTS, 3)
        self.h0 = nn.Parameter(torch.randn(3))
        self.register_buffer("used", torch.tensor([1.0, 1.0, 1.0, 0.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.h0.expand(x.size(0), -1)
        c = torch.zeros_like(h)
        for t in range(x.size(1)):
            new_h, new_c = self.cells(x[:, t], (h, c))
            used = self.used[t]
            h, c = used * new_h + (1 - used) * h, used * new_c + (1 - used) * c
        return h.sum(1)


KINDS = (nn.RNN, nn.LSTM, nn.GRU)

CASES = [
    *(_case(kind, "") for kind in KINDS),
    *(_case(kind, ", batch first", batch_first=True) for kind in KINDS),
    *(_case(kind, ", stacked, both ways", num_layers=2, bidirectional=True) for kind in KINDS),
    _case(nn.LSTM, ", projected", batch_first=True, proj_size=2),
    Case("tagger", Tagger, (STEPS, INPUTS)),
    Case("encoder and decoder", Sequence, (STEPS, INPUTS)),
    Case("cells with a mask", Masked, (STEPS, INPUTS)),
]
