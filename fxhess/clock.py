"""How long a call takes on a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

_RUNS = 25  # at most


def seconds_of(call: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Seconds of one call, the mean of ``repeats``; all work on the device is waited for."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(repeats):
                call()
            stop.record()
            stop.synchronize()
            return start.elapsed_time(stop) / 1e3 / repeats
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize(device)
    return (time.perf_counter() - begin) / repeats


def median_seconds(call: Callable[[], object], device: torch.device, budget: float) -> float:
    """The median of a few runs that together take about ``budget`` seconds (at least one), after
    a first one that is not counted: it may build, compile or fetch what later ones find."""
    call()
    end = time.perf_counter() + budget
    times = [seconds_of(call, device)]
    while len(times) < _RUNS and time.perf_counter() + times[-1] < end:
        times.append(seconds_of(call, device))
    return statistics.median(times)


def synchronize(device: torch.device) -> None:
    """Wait for all work on the device."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
