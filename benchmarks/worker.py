"""A workload in a process of its own; a rival that fails is left out of a second one.

A failure can leave PyTorch unusable for the rest of its process (an error inside a compiled
``torch.func`` transform leaves its levels on the stack), or end the process (out of memory). So a
failing rival ends the process, its failure is kept, and the workload starts anew without it.

The job comes as JSON on the command line; events go out as JSON, a line each.
"""

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.growth import GROWTH
from benchmarks.measure import Result, RivalFailedError, measure
from benchmarks.rivals import RIVALS
from benchmarks.workloads import WORKLOADS

__all__ = ["Job", "run_job"]

MARK = "event: "  # before each event, since libraries may print, too


@dataclass(frozen=True)
class Job:
    """What one process measures."""

    workload: str
    rivals: tuple[str, ...]
    device: str
    budget: float  # seconds of timing for each rival
    memory: bool
    limit: float | None = None  # seconds that a rival may take until it gives a sign of life


def run_job(job: Job, progress: Callable[[str, str], None]) -> list[Result]:
    """Measure a workload, in as many processes as it takes; results in the order of ``rivals``."""
    found: dict[str, Result] = {}
    remaining = job.rivals
    while remaining:
        blamed = None
        for event in events_of(replace(job, rivals=remaining)):
            match event:
                case {"stage": stage, "rival": rival}:
                    blamed = rival
                    progress(stage, rival)
                case {"failed": rival, "failure": failure}:
                    found[rival] = Result(rival, failure=failure)
                case {"results": results}:
                    found |= {r["rival"]: Result(**r) for r in results}
                case {"late": limit}:
                    assert blamed is not None
                    found[blamed] = Result(blamed, failure=f"stopped after {limit:g} s")
                case {"died": status, "said": said}:
                    if blamed is None:
                        raise RuntimeError(f"the benchmark's process died ({status}): {said}")
                    found[blamed] = Result(blamed, failure=f"process died ({status}): {said}")
        remaining = tuple(name for name in remaining if name not in found)
    return [found[name] for name in job.rivals]


def events_of(job: Job) -> Iterator[dict[str, Any]]:
    """The events of one process, and how it ended if not well."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.worker", json.dumps(asdict(job))],
        cwd=Path(__file__).resolve().parent.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said = ""
    assert process.stdout is not None
    with process, Watch(process, job.limit) as watch:
        for line in process.stdout:
            if line.startswith(MARK):
                watch.restart()
                yield json.loads(line.removeprefix(MARK))
            else:
                said = line.strip() or said
    if watch.stopped:
        yield {"late": job.limit}
    elif process.returncode != 0:
        yield {"died": process.returncode, "said": said}


class Watch:
    """Ends a process that gives no sign of life for ``limit`` seconds (None: waits for ever).

    The clock starts at the first sign: starting Python and the reference values are not a rival's.
    """

    def __init__(self, process: subprocess.Popen[str], limit: float | None) -> None:
        self.process, self.limit = process, limit
        self.stopped = False
        self.timer: threading.Timer | None = None

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def restart(self) -> None:
        """A sign of life."""
        self.cancel()
        if self.limit is not None:
            self.timer = threading.Timer(self.limit, self.stop)
            self.timer.daemon = True
            self.timer.start()

    def cancel(self) -> None:
        """Watch no longer."""
        if self.timer is not None:
            self.timer.cancel()

    def stop(self) -> None:
        """Time is up."""
        if self.process.poll() is None:
            self.stopped = True
            self.process.kill()


def send(event: dict[str, Any]) -> None:
    """One event to the parent."""
    print(MARK + json.dumps(event), flush=True)


def die_first() -> None:
    """Where Linux runs out of memory, let it end this process, not one that others need."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def main(argv: Sequence[str]) -> int:
    """Measure one job in this process."""
    # JAX would take most of a GPU's memory at its first use; PyTorch needs it, too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    warnings.filterwarnings("ignore")
    logging.getLogger("torch").setLevel(logging.ERROR)
    die_first()
    # PyTorch's fused attention has no second derivative, and would refuse the rivals.
    torch.backends.mha.set_fastpath_enabled(False)
    for kernel in ("flash", "mem_efficient", "cudnn"):
        getattr(torch.backends.cuda, f"enable_{kernel}_sdp")(False)
    job = Job(**json.loads(argv[0]))
    workload = next(w for w in (*WORKLOADS, *GROWTH) if w.name == job.workload)
    rivals = [rival for rival in RIVALS if rival.name in job.rivals]
    try:
        results = measure(
            workload,
            rivals,
            job.device,
            job.budget,
            job.memory,
            lambda stage, rival: send({"stage": stage, "rival": rival}),
        )
    except RivalFailedError as error:
        send({"failed": error.rival, "failure": error.failure})
    else:
        send({"results": [asdict(result) for result in results]})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
