"""Children of the test's process, which end by themselves, by a signal or for want of memory."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

MORE = float(os.environ.get("FXHESS_FAULTS", "1"))


def times(n: int) -> int:
    """How often: ``FXHESS_FAULTS`` times as much as usual."""
    return max(1, int(n * MORE))


def forked(function: Callable[..., object], *args: object) -> int:
    """Run ``function`` in a child; returns its process number."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        function(*args)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def finished(pid: int) -> int:
    """Wait for a child: its exit status, or the negative number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@contextmanager
def answers() -> Iterator[tuple[Callable[[str], None], Callable[[], list[str]]]]:
    """How children tell what they found, line by line, and how to read it once they ended."""
    reading, writing = os.pipe()

    def tell(text: str) -> None:
        os.write(writing, f"{text}\n".encode())

    def told() -> list[str]:
        os.close(writing)
        with open(reading, encoding="utf-8") as file:
            return file.read().splitlines()

    yield tell, told
