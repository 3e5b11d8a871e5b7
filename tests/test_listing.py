"""An explanation in a terminal's width, and what a card of the picture has room for."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
import torch
from reference import mlp
from torch import nn

import fxhess
from fxhess.listing import plain_table
from fxhess.picture import Card, svg
from fxhess.steps import Tangent


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, "gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = mlp(8, 1).float()

    def forward(self, x):
        return self.head(self.encoder(x).mean(1))


@pytest.fixture(scope="module")
def explained():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fxhess.explain._MEASURING", 0.005)
        return fxhess.transform(Encoder(), event_ndim=2).explain(torch.randn(2, 6, 8))


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_tables_keep_within_a_terminal(explained, width, monkeypatch):
    whole = str(explained)  # standard output is none here
    assert max(map(len, whole.splitlines())) > 120 and __file__ in whole
    monkeypatch.setattr("fxhess.explain.terminal_width", lambda: width)
    told = str(explained)
    tables = [line for line in told.splitlines() if line.startswith("  ")]
    assert tables and max(map(len, tables)) <= width
    assert told.isascii() and "test_listing.py" in told
    assert len(tables) == len([line for line in whole.splitlines() if line.startswith("  ")])


def test_equal_terms_are_told_once(explained):
    rows, told = explained.rows, str(explained)
    (terms,) = re.findall(r"terms of H = .*?\n\n", told, re.S)
    counts = [int(n) for n in re.findall(r" x(\d+) ", terms)]
    assert len(terms.splitlines()) - 4 + sum(counts) - len(counts) == len(rows) and counts


@pytest.mark.parametrize(("text", "width", "want"), [
    ("abcdefgh", 8, "abcdefgh"), ("abcdefgh", 7, "abc..gh"), ("abcdefgh", 6, "ab..gh"),
])  # fmt: skip
def test_the_middle_of_a_cell_goes(text, width, want):
    head, rule, line = plain_table(("a",), [(text,)], width + 2)
    assert line == f"  {want}" and rule == f"  {'-' * len(want)}" and head == "  a"


@pytest.mark.parametrize("tangent", [None, Tangent(0, "dense", False, 0, 0)], ids=str)
@pytest.mark.parametrize("cost", ["", "1.08 ms", "123.4 ms"])
@pytest.mark.parametrize("counts", [{"pull": 1}, {"close": 3, "rebase": 3},
                                    {"close": 12, "pull": 24, "rebase": 36}], ids=str)  # fmt: skip
def test_how_terms_end_leaves_room_for_the_time(tangent, cost, counts):
    card = Card("native_layer_norm", cost=cost, endings=counts, tangent=tangent)
    drawn = svg([card], [], "one")
    chips = re.findall(r'class="fx-chip fx-(\w+)" x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', drawn)
    assert [how for how, _, _ in chips] == list(counts)
    for (_, x, wide), (_, after, _) in pairwise(chips):
        assert float(x) + float(wide) < float(after)
    _, x, wide = chips[-1]
    assert float(x) + float(wide) <= 254 - 6 * len(cost)
    assert all(f"×{n}<" in drawn for n in counts.values() if n > 1)
