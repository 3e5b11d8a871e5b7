"""Real architectures with small real shapes against double backward of one sample at a time."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from reference import check, randn
from torch import nn
from zoo import Case, table

TABLE = table()


def _identifier(family: str, case: Case) -> str:
    return f"{family}-{re.sub('[^A-Za-z0-9_.=,+-]+', '_', case.name)}"


MANY = 2  # variants of one architecture that the suite itself runs


def _params() -> Iterator[Any]:
    """All cases; what comes before the comma in a name is the architecture."""
    before: Counter[tuple[str, str]] = Counter()
    for family, case in TABLE:
        architecture = (family, case.name.split(",")[0])
        marks = [pytest.mark.slow] if before[architecture] >= MANY else []
        before[architecture] += 1
        yield pytest.param(case, id=_identifier(family, case), marks=marks)


@pytest.mark.parametrize("case", list(_params()))
def test_model(case):
    x = case.draw()
    model = case.model()
    check(model, x, event_ndim=len(case.event))


class Summed(nn.Module):
    """One smooth number a sample of what a module, or the first of its results, gives."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        y = y if isinstance(y, torch.Tensor) else y[0]
        return y.flatten(1).tanh().sum(1)


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 12, enable_nested_tensor=False)


def _convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.GELU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.SiLU(), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(64, 10), nn.LogSoftmax(1),
    ).eval()  # fmt: skip


def _bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64,
        vocab_size=50, max_position_embeddings=16,
    )  # fmt: skip
    return Embedded(transformers.BertModel(config).eval())


class Embedded(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(inputs_embeds=x).last_hidden_state


FULL_SIZE = {
    "encoder of 12 layers": (_encoder, (8, 32)),
    "LSTM, 20 steps": (
        lambda: nn.LSTM(8, 16, 2, batch_first=True, bidirectional=True), (20, 8)
    ),
    "convolutions": (_convolutions, (1, 14, 14)),
    "BERT of 4 layers": (_bert, (6, 32)),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size(name):
    build, event = FULL_SIZE[name]
    torch.manual_seed(0)
    model = Summed(build()).double()
    model.train(build is _encoder)
    check(model, randn(2, *event, seed=1), event_ndim=len(event))


def test_names_are_unique():
    names = [_identifier(family, case) for family, case in TABLE]
    assert len(names) == len(set(names))
    assert torch.get_default_dtype() is torch.float32
