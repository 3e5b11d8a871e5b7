"""Real architectures with small real shapes against double backward of one sample at a time."""

from __future__ import annotations

import re

import pytest
import torch
from reference import check
from zoo import Case, table

TABLE = table()


def _identifier(family: str, case: Case) -> str:
    return f"{family}-{re.sub('[^A-Za-z0-9_.=,+-]+', '_', case.name)}"


@pytest.mark.parametrize("case", [pytest.param(c, id=_identifier(f, c)) for f, c in TABLE])
def test_model(case):
    x = case.draw()
    model = case.model()
    check(model, x, event_ndim=len(case.event))


def test_names_are_unique():
    names = [_identifier(family, case) for family, case in TABLE]
    assert len(names) == len(set(names))
    assert torch.get_default_dtype() is torch.float32
