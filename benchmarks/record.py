"""What was measured: runs, how they compare, and their JSON with machine, versions and command."""

import datetime
import importlib.metadata
import json
import math
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.measure import CHECKED_SAMPLES, Result
from benchmarks.memory import METHOD
from benchmarks.rivals import OURS
from benchmarks.workloads import Workload

__all__ = ["Run", "Speed", "machine", "read_json", "runs_of", "summary", "write_json"]

PACKAGES = ("fxhess", "torch", "networkx", "opt_einsum", "jax", "jaxlib", "numpy")


@dataclass(frozen=True)
class Speed:
    """What a machine does at most, for one type: operations a second in its fastest matrix
    product, and bytes a second written into a fresh result; both measured."""

    product: float
    write: float


@dataclass(frozen=True)
class Run:
    """One workload and its results, ours first if we took part."""

    name: str
    summary: str
    shape: tuple[int, ...]
    dtype: str
    outputs: int
    results: Sequence[Result]
    speed: Speed | None = None

    @classmethod
    def of(cls, workload: Workload, results: Sequence[Result], speed: Speed | None) -> "Run":
        """The results of a workload on a machine."""
        dtype = str(workload.dtype).removeprefix("torch.")
        shape, outputs = workload.shape, workload.outputs
        return cls(workload.name, workload.summary, shape, dtype, outputs, results, speed)

    @property
    def size(self) -> str:
        """The batch's shape, and its type where it is not float32."""
        shape = "×".join(map(str, self.shape))
        return shape if self.dtype == "float32" else f"{shape} {self.dtype}"

    def result_of(self, rival: str) -> Result | None:
        """A rival's result, if it has times and they count."""
        return next((r for r in self.results if r.rival == rival and r.times and r.correct), None)

    @property
    def ours(self) -> Result | None:
        """Our own plain call's."""
        return self.result_of(OURS)

    @property
    def best_rival(self) -> Result | None:
        """The fastest correct rival that is not ours."""
        others = [r for r in self.results if not r.rival.startswith(OURS) and r.correct]
        timed = [(r.median, r) for r in others if r.median is not None]
        return min(timed, key=lambda pair: pair[0], default=(None, None))[1]

    def lead(self, rival: str = OURS) -> float | None:
        """The best rival's time over one of ours: above 1, ours is faster."""
        ours, best = self.result_of(rival), self.best_rival
        if ours is None or best is None or ours.median is None or best.median is None:
            return None
        return best.median / ours.median

    @property
    def limit(self) -> float | None:
        """Seconds that our plan's matrix products would take at the fastest product's rate, and
        its result to be written, with nothing in between."""
        plan = next((r for r in self.results if r.arithmetic is not None), None)
        if plan is None or self.speed is None:
            return None
        assert plan.arithmetic is not None and plan.written is not None
        return plan.arithmetic / self.speed.product + plan.written / self.speed.write

    @property
    def over_limit(self) -> float | None:
        """Our time over that."""
        ours, limit = self.ours, self.limit
        if ours is None or ours.median is None or not limit:
            return None
        return ours.median / limit


@dataclass(frozen=True)
class Summary:
    """How one of ours compares with the best rival of each row: the geometric mean of the best
    rival's time over ours, the smallest such ratio and its row, and how many rows are counted, of
    all. Beside it, in how many rows our memory is at most the best rival's (within 1 MB, below
    which the system's count says nothing), of those where both were measured."""

    rival: str
    mean: float
    smallest: float
    smallest_row: str
    counted: int
    rows: int
    leaner: int
    weighed: int


def summary(runs: Sequence[Run], rival: str = OURS) -> Summary | None:
    """The summary of one of ours over all rows; None where nothing can be compared."""
    leads = [(lead, run.name) for run in runs if (lead := run.lead(rival)) is not None]
    if not leads:
        return None
    mean = math.exp(sum(math.log(lead) for lead, _ in leads) / len(leads))
    pairs = [
        (ours.peak, best.peak)
        for run in runs
        if (ours := run.result_of(rival)) is not None and (best := run.best_rival) is not None
    ]
    weighed = [(a, b) for a, b in pairs if a is not None and b is not None]
    leaner = sum(a < b + 2**20 for a, b in weighed)
    return Summary(rival, mean, *min(leads), len(leads), len(runs), leaner, len(weighed))


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
    calibrated: bool,
    others: float,
) -> dict[str, Any]:
    """Everything measured, in seconds and bytes; returns the document."""
    names = list(dict.fromkeys(r.rival for run in runs for r in run.results))
    summaries = [summary(runs, name) for name in names if name.startswith(OURS)]
    document = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "commit": commit(),
        "machine": machine(device),
        "versions": versions(),
        "share_of_processors_used_by_others": round(others, 3),
        "plans": "of measured rates" if calibrated else "of built-in rates",
        "method": {
            "times": "seconds a batch; interleaved rounds in one process, fresh data each round",
            "error": f"of the largest entry, against float64 double backward one sample at a time, "
            f"on up to {CHECKED_SAMPLES} samples",
            "memory": f"bytes of a call above what was held before, most of three: {METHOD}; JAX's"
            " on the CPU: XLA's own figure, where that is more"
            if device == "cpu"
            else "bytes of a call above what was held before, most of three: PyTorch's allocator",
            "limit": "the operations of our plan's matrix products at the fastest measured product"
            " of this machine, and the result's bytes at the measured rate of writing a fresh one",
            "lead": "the best rival's median over ours",
        },
        "summaries": [asdict(found) for found in summaries if found is not None],
        "workloads": [
            {
                "name": run.name,
                "summary": run.summary,
                "shape": list(run.shape),
                "dtype": run.dtype,
                "outputs": run.outputs,
                "speed": None if run.speed is None else asdict(run.speed),
                "limit": run.limit,
                "over_limit": run.over_limit,
                "lead": run.lead(),
                "results": [
                    {"median": r.median, "correct": r.correct, **asdict(r)} for r in run.results
                ],
            }
            for run in runs
        ],
        "cold": cold,
    }
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return document


def read_json(path: Path) -> dict[str, Any]:
    """A document that was written before."""
    document = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(document, dict)
    return document


def runs_of(document: Mapping[str, Any]) -> list[Run]:
    """The runs that a document tells of."""
    return [
        Run(
            w["name"],
            w["summary"],
            tuple(w["shape"]),
            w["dtype"],
            w["outputs"],
            [
                Result(**{k: v for k, v in r.items() if k not in ("median", "correct")})
                for r in w["results"]
            ],
            None if w["speed"] is None else Speed(**w["speed"]),
        )
        for w in document["workloads"]
    ]
