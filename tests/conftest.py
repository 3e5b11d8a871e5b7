"""Settings of the whole suite: one thread a worker, fixed seeds, and a rule table put back."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

import fxhess
from fxhess import registry

# Plans of the built-in rates, in all processes started here; not of what this machine keeps.
os.environ["FXHESS_CACHE"] = "0"

# The same examples at every run; `--hypothesis-profile=search` looks for new ones.
hypothesis.settings.register_profile(
    "fixed", deadline=None, derandomize=True, database=None, max_examples=40
)
hypothesis.settings.register_profile("search", deadline=None, max_examples=400)
hypothesis.settings.load_profile("fixed")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # xdist has a worker for each core


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def rule_table() -> Iterator[None]:
    """Rules registered in the test are gone after it, and so are programs made with them."""
    saved = dict(registry._rules)
    yield
    registry._rules.clear()
    registry._rules.update(saved)
    fxhess.cache_clear()
