"""Settings of the whole suite: one thread a worker, fixed seeds, and a rule table put back."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

import fxhess
from fxhess import registry

# Plans of the built-in rates, in all processes started here, made anew; not of what this machine
# keeps.  FXHESS_TEST_CACHE names a folder to keep them in: in a second run they come from there.
_kept = os.environ.get("FXHESS_TEST_CACHE")
if _kept:
    os.environ["FXHESS_CACHE_DIR"] = _kept
else:
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
def interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt here, and in processes started here, whatever a shell that
    runs pytest in the background says of it: such a shell has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def rule_table() -> Iterator[None]:
    """Rules registered in the test are gone after it, and so are programs made with them."""
    saved = dict(registry._rules)
    yield
    registry._rules.clear()
    registry._rules.update(saved)
    fxhess.cache_clear()


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Plans are kept in a folder of the test's own; nothing is in memory before and after."""
    monkeypatch.delenv("FXHESS_CACHE", raising=False)
    monkeypatch.delenv("FXHESS_CACHE_SIZE", raising=False)
    monkeypatch.setenv("FXHESS_CACHE_DIR", str(tmp_path / "kept"))
    fxhess.cache_clear(disk=True)
    yield tmp_path / "kept" / "plans"
    fxhess.cache_clear()
