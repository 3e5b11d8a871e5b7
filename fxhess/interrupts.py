"""Ctrl-C while a program is made: at once, but between two operations.

Python raises ``KeyboardInterrupt`` wherever it happens to be: also half-way into a context manager,
or in the middle of putting something back.  Making a program goes through thousands of these, most
of them PyTorch's, and what they switch is the whole process'.  So in the meantime a first Ctrl-C is
only noted, and handed on at the next place where an error of the model itself could be raised as
well: a traced operation, the end of a pass, the end of it all.  A second one is handed on at once.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class _Noted:
    """A signal's usual handler, and how often the signal came."""

    def __init__(self, usual: Any) -> None:
        self.usual = usual
        self.pending = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.pending:
            self.pass_on(frame)
        else:
            self.pending = True

    def pass_on(self, frame: FrameType | None) -> None:
        self.pending = False
        self.usual(signal.SIGINT, frame)


_noted: _Noted | None = None  # of the main thread, which alone sees signals


@contextmanager
def between_operations() -> Iterator[None]:
    """Inside, Ctrl-C has an effect where :func:`passed` is called, and at the end."""
    global _noted
    main = threading.current_thread() is threading.main_thread()
    usual = signal.getsignal(signal.SIGINT) if main and _noted is None else None
    if not callable(usual):  # held already, or nobody's concern
        yield
        return
    noted = _Noted(usual)
    try:
        _noted = noted
        signal.signal(signal.SIGINT, noted)
        yield
    finally:
        _noted = None
        if signal.getsignal(signal.SIGINT) is noted:  # else the model set one, which stays
            signal.signal(signal.SIGINT, usual)
        if noted.pending:
            noted.pass_on(sys._getframe())


def passed() -> None:
    """A place where nothing is half done has been passed."""
    noted = _noted
    if noted is None or not noted.pending:
        return
    if threading.current_thread() is threading.main_thread():
        noted.pass_on(sys._getframe())


__all__ = ["between_operations", "passed"]
