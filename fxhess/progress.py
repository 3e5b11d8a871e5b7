"""How far a long call is: a bar of tqdm over the samples, moved after each tile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_DELAY = 0.2  # seconds before a bar appears
# The bar of the call under way, in this thread; None where none was asked for.
_bar: ContextVar[Any] = ContextVar("bar", default=None)


@contextmanager
def shown(samples: int) -> Iterator[None]:
    """Inside, a bar on standard error that :func:`advance` moves up to ``samples``; it is closed in
    any case, full where nothing was raised."""
    from tqdm.auto import tqdm  # here, so that importing fxhess stays light

    with tqdm(total=samples, desc="fxhess", unit="sample", unit_scale=True, delay=_DELAY) as bar:
        token = _bar.set(bar)
        try:
            yield
        finally:
            _bar.reset(token)
        bar.update(bar.total - bar.n)


@contextmanager
def hidden() -> Iterator[None]:
    """Inside, :func:`advance` moves nothing: whoever calls counts for itself."""
    token = _bar.set(None)
    try:
        yield
    finally:
        _bar.reset(token)


def advance(samples: float) -> None:
    """So many samples more are done."""
    bar = _bar.get()
    if bar is not None:
        bar.update(min(samples, bar.total - bar.n))


__all__ = ["advance", "hidden", "shown"]
