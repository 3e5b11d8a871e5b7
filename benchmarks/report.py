"""The results as a table, and as JSON with the machine, versions, command and date."""

import datetime
import importlib.metadata
import json
import platform
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.cold import STEPS
from benchmarks.measure import CHECKED_SAMPLES, TOLERANCE, Result
from benchmarks.memory import METHOD
from benchmarks.rivals import OURS
from benchmarks.workloads import Workload

__all__ = ["Run", "machine", "print_cold", "print_memory", "print_times", "times", "write_json"]

PACKAGES = ("fxhess", "torch", "networkx", "opt_einsum", "jax", "jaxlib", "numpy")


@dataclass(frozen=True)
class Run:
    """One workload and its results, ours first if we took part."""

    workload: Workload
    results: Sequence[Result]

    @property
    def ours(self) -> Result | None:
        """Our own result, if there is one with times."""
        return next((r for r in self.results if r.rival == OURS and r.times), None)

    @property
    def best_rival(self) -> Result | None:
        """The fastest correct rival that is not ours."""
        others = [r for r in self.results if not r.rival.startswith(OURS) and r.correct and r.times]
        return min(others, key=lambda r: statistics.median(r.times), default=None)


def machine(device: str) -> dict[str, Any]:
    """What the times depend on; nothing that names the machine or its user."""
    facts: dict[str, Any] = {
        "processor": processor(),
        "cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch_threads": torch.get_num_threads(),
        "device": device,
    }
    if device.startswith("cuda"):
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def processor() -> str:
    """The processor's name where Linux tells it, else what Python knows."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def versions() -> dict[str, str]:
    """The installed versions of what takes part."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    found["torch"] = torch.__version__  # with its build
    return found


def commit() -> str | None:
    """The checkout's commit, marked where files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude", "*"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


def write_json(
    path: Path,
    runs: Sequence[Run],
    cold: Mapping[str, list[float]],
    *,
    command: str,
    device: str,
    others: float,
) -> None:
    """Everything measured, in seconds and bytes."""
    document = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "commit": commit(),
        "machine": machine(device),
        "versions": versions(),
        "share_of_processors_used_by_others": round(others, 3),
        "method": {
            "times": "seconds a batch; interleaved rounds in one process, fresh data each round",
            "error": f"of the largest entry, against float64 double backward one sample at a time, "
            f"on up to {CHECKED_SAMPLES} samples; tolerance {TOLERANCE}",
            "memory": f"bytes of one call above what was held before: {METHOD}"
            if device == "cpu"
            else "bytes of one call above what was held before: PyTorch's allocator",
        },
        "workloads": [
            {
                "name": run.workload.name,
                "summary": run.workload.summary,
                "shape": list(run.workload.shape),
                "outputs": run.workload.outputs,
                "results": [
                    {
                        "rival": r.rival,
                        "failure": r.failure,
                        "median": r.median,
                        "times": r.times,
                        "first_call": r.first_call,
                        "error": r.error,
                        "correct": r.correct,
                        "peak_bytes": r.peak,
                    }
                    for r in run.results
                ],
            }
            for run in runs
        ],
        "cold": cold,
    }
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def milliseconds(value: float) -> str:
    """Seconds as milliseconds with three digits."""
    ms = value * 1e3
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"


def times(ratio: float) -> str:
    """A ratio with two digits, without an exponent."""
    return f"{ratio:,.0f}×" if ratio >= 10 else f"{ratio:.2g}×"


def time_cell(result: Result, run: Run) -> str:
    """The median, and in how many of ours it is; or what went wrong."""
    median = result.median
    if median is None:
        return "[red]failed[/red]"
    text = milliseconds(median)
    ours = run.ours
    if ours is not None and ours is not result and ours.median is not None:
        text += f" [dim]{times(median / ours.median)}[/dim]"
    if result is run.ours:
        text = f"[bold]{text}[/bold]"
    return text if result.correct else f"[red]{text} wrong[/red]"


def memory_cell(result: Result, _: Run) -> str:
    """The peak in MB."""
    if result.peak is None:
        return "–"
    return "<1" if result.peak < 2**20 else f"{result.peak / 2**20:.0f}"


def table_of(title: str, runs: Sequence[Run], cell: Callable[[Result, Run], str]) -> Table:
    """A row for each workload, a column for each rival."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("workload", no_wrap=True)
    table.add_column("x", no_wrap=True)
    for result in runs[0].results:
        table.add_column(result.rival, justify="right", no_wrap=True)
    for run in runs:
        shape = "×".join(map(str, run.workload.shape))
        table.add_row(run.workload.name, shape, *(cell(r, run) for r in run.results))
    return table


def print_times(console: Console, runs: Sequence[Run]) -> None:
    """Medians, then each failure and each wrong value in a line of its own."""
    console.print(table_of("Milliseconds a batch; ×: that time over ours", runs, time_cell))
    for run in runs:
        ours, best = run.ours, run.best_rival
        for result in run.results:
            where = f"{run.workload.name}, {result.rival}: "
            if result.failure is not None:
                console.print(f"[red]{where}[/red]{escape(result.failure)}")
            elif not result.correct:
                console.print(f"[red]{where}[/red]relative error {result.error}")
        if ours is None or best is None or ours.median is None or best.median is None:
            continue
        if best.median < ours.median:
            ratio = times(ours.median / best.median)
            console.print(f"{run.workload.name}: {best.rival} is {ratio} faster than ours")


def print_memory(console: Console, runs: Sequence[Run]) -> None:
    """Peak memory, if any was measured."""
    if any(r.peak is not None for run in runs for r in run.results):
        console.print(table_of("Peak memory of a call, MB, its result included", runs, memory_cell))


def print_cold(console: Console, cold: Mapping[str, list[float]]) -> None:
    """First calls."""
    table = Table(
        title=f"First calls, medians of {len(cold['first'])} fresh processes",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("what")
    table.add_column("ms", justify="right")
    for step, what in STEPS.items():
        table.add_row(what, milliseconds(statistics.median(cold[step])))
    console.print(table)
