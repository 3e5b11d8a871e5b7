"""A workload in a process of its own; a rival that fails is left out of a second one.

A failure can leave PyTorch unusable for the rest of its process (an error inside a compiled
``torch.func`` transform leaves its levels on the stack), or end the process (out of memory). So a
failing rival ends the process, its failure is kept, and the workload starts anew without it.

The job comes as JSON on the command line; events go out as JSON, a line each.
"""

import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

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
                case {"died": status, "said": said}:
                    if blamed is None:
                        raise RuntimeError(f"the benchmark's process died ({status}): {said}")
                    found[blamed] = Result(blamed, failure=f"process died ({status}): {said}")
        remaining = tuple(name for name in remaining if name not in found)
    return [found[name] for name in job.rivals]


def events_of(job: Job) -> Iterator[dict[str, Any]]:
    """The events of one process, and how it died if it did."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.worker", json.dumps(asdict(job))],
        cwd=Path(__file__).resolve().parent.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said = ""
    assert process.stdout is not None
    with process:
        for line in process.stdout:
            if line.startswith(MARK):
                yield json.loads(line.removeprefix(MARK))
            else:
                said = line.strip() or said
    if process.returncode != 0:
        yield {"died": process.returncode, "said": said}


def send(event: dict[str, Any]) -> None:
    """One event to the parent."""
    print(MARK + json.dumps(event), flush=True)


def main(argv: Sequence[str]) -> int:
    """Measure one job in this process."""
    # JAX would take most of a GPU's memory at its first use; PyTorch needs it, too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    warnings.filterwarnings("ignore")
    logging.getLogger("torch").setLevel(logging.ERROR)
    job = Job(**json.loads(argv[0]))
    workload = next(w for w in WORKLOADS if w.name == job.workload)
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
