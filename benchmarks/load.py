"""How much of the machine others used meanwhile: on a busy one, times say little.

Threads of PyTorch wait for each other by spinning, so that on a few cores one more busy process can
make a parallel call ten times as long, not half as long again.
"""

import os
import time
from collections.abc import Callable

import psutil

__all__ = ["BUSY", "watch_others"]

BUSY = 0.05  # of all cores: from here on, the report says so


def watch_others() -> Callable[[], float]:
    """Start watching; the function returned tells the share of all cores that others used since."""
    start = time.perf_counter(), busy_seconds(), own_seconds()

    def share() -> float:
        wall = time.perf_counter() - start[0]
        others = (busy_seconds() - start[1]) - (own_seconds() - start[2])
        return max(0.0, others / (wall * (psutil.cpu_count() or 1)))

    return share


def busy_seconds() -> float:
    """Processor seconds of the whole machine, idle and waiting ones left out."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0)


def own_seconds() -> float:
    """Processor seconds of this process and of its finished children, and of theirs."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
