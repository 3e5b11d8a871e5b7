"""First calls, in fresh processes: ``python -m benchmarks.cold`` measures once and prints JSON."""

import importlib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

from benchmarks.models import tanh_net

__all__ = ["STEPS", "measure_cold"]

WIDTHS, BATCH = (10, 64, 64, 64, 1), 32

STEPS = {
    "import": "import fxhess, PyTorch already imported",
    "first": "first call on a 4-layer tanh net",
    "steady": "the same call again",
    "batch": "first call with another batch size",
    "second": "first call on a second module of the same structure",
    "other": "first call on a net of other widths",
}


def measure_cold(processes: int) -> dict[str, list[float]]:
    """Seconds of each of ``STEPS``, one entry for each fresh process."""
    root = Path(__file__).resolve().parent.parent
    runs = [
        subprocess.run(
            [sys.executable, "-m", "benchmarks.cold"],
            cwd=root,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(processes)
    ]
    measured = [json.loads(run.stdout.splitlines()[-1]) for run in runs]
    return {step: [times[step] for times in measured] for step in STEPS}


def in_this_process() -> dict[str, float]:
    """Seconds of each of ``STEPS``; right only if fxhess has not been imported yet."""
    assert "fxhess" not in sys.modules
    models = [tanh_net(*WIDTHS), tanh_net(*WIDTHS), tanh_net(*(2 * w for w in WIDTHS[:-1]), 1)]
    xs = [torch.randn(BATCH, 10), torch.randn(BATCH, 10), torch.randn(BATCH, 20)]
    for model, x in zip(models, xs, strict=True):
        model(x)  # PyTorch's own first-use costs are not ours

    times: dict[str, float] = {}
    start = time.perf_counter()
    fxhess = importlib.import_module("fxhess")
    times["import"] = time.perf_counter() - start

    def first_call(model: nn.Module, x: torch.Tensor) -> tuple[nn.Module, float]:
        start = time.perf_counter()
        hess = fxhess.transform(model)
        hess(x)
        return hess, time.perf_counter() - start

    def again(hess: nn.Module, x: torch.Tensor) -> float:
        start = time.perf_counter()
        hess(x)
        return time.perf_counter() - start

    hess, times["first"] = first_call(models[0], xs[0])
    times["steady"] = statistics.median(again(hess, xs[0]) for _ in range(20))
    times["batch"] = again(hess, torch.randn(2 * BATCH + 1, 10))
    _, times["second"] = first_call(models[1], xs[1])
    _, times["other"] = first_call(models[2], xs[2])
    return times


if __name__ == "__main__":
    print(json.dumps(in_this_process()))
