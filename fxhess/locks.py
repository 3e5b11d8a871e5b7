"""The one lock of all that makes programs.

Tracing puts stand-ins where a model's weights are and switches settings of the whole process, and a
model that is traced may call another one that is transformed.  With a lock for each transform, one
for captures and one for the cache, two threads could come to wait for each other.  So there is
one, which its thread may take again.

``fork`` waits until no other thread holds it, so that the child, which has no other threads, finds
everything whole and nothing taken.
"""

from __future__ import annotations

import os
import threading

_PATIENCE = 60.0  # seconds that a fork waits for another thread that makes a program

making = threading.RLock()
_held: list[bool] = []


def _before() -> None:
    _held.append(making.acquire(timeout=_PATIENCE))


def _after() -> None:
    if _held.pop():
        making.release()


def _in_child() -> None:
    if _held.pop():
        making.release()
    else:  # nobody here will
        making._at_fork_reinit()  # type: ignore[attr-defined]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_in_child)
