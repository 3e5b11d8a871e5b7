"""``python -m benchmarks.processes``: the first call of a process, where another process met the
model before, and where none did.

A 12-layer transformer encoder (8 tokens of 16, two samples, float32).  Every round takes a new
cache folder, and two processes one after the other; a third has the cache turned off.  All three
give the same numbers.  Times are of the wall clock; importing PyTorch and fxhess is apart.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

__all__ = ["Encoder", "main", "measure"]

LAYERS, TOKENS, WIDTH, BATCH = 12, 8, 16, 2
RESULTS = Path(__file__).parent / "results"


class Encoder(nn.Module):
    """PyTorch's own transformer encoder and a smooth number of its result."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 32, 0.0, "gelu", batch_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, tokens, width]`` to ``[batch]``."""
        out: Tensor = self.layers(x).tanh().sum((-1, -2))
        return out


def in_this_process() -> dict[str, object]:
    """Seconds of the import, of the first call and of the second, and a sum of the result."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    torch.manual_seed(0)
    model, x = Encoder(), torch.randn(BATCH, TOKENS, WIDTH)
    model.requires_grad_(False)
    model(x)  # PyTorch's own first-use costs are not ours
    assert "fxhess" not in sys.modules
    start = time.perf_counter()
    import fxhess

    imported = time.perf_counter()
    hess = fxhess.transform(model, event_ndim=2)
    result = hess(x)
    first = time.perf_counter()
    hess(x)
    second = time.perf_counter()
    return {
        "import": imported - start,
        "first": first - imported,
        "second": second - first,
        "sum": float(result.double().abs().sum()).hex(),
    }


def measure(rounds: int) -> dict[str, list[dict[str, float]]]:
    """Of each kind of process, what each round gave.

    Raises:
        RuntimeError: the processes give different numbers.
    """
    found: dict[str, list[dict[str, float]]] = {"off": [], "first": [], "later": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            for kind in found:
                environment = {**os.environ, "FXHESS_CACHE_DIR": str(Path(folder) / "kept")}
                environment["FXHESS_CACHE"] = "0" if kind == "off" else "1"
                done = subprocess.run(
                    [sys.executable, "-m", "benchmarks.processes", "--once"],
                    cwd=Path(__file__).resolve().parent.parent,
                    env=environment, check=True, stdout=subprocess.PIPE, text=True,
                )  # fmt: skip
                found[kind].append(json.loads(done.stdout.splitlines()[-1]))
    if len({run["sum"] for runs in found.values() for run in runs}) > 1:
        raise RuntimeError(f"different numbers: {found}")
    return found


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """Medians as Markdown."""
    from benchmarks.record import machine  # imports fxhess, whose import is timed

    names = {
        "off": "cache turned off", "first": "first process", "later": "later process",
    }  # fmt: skip
    medians = {
        kind: {
            key: statistics.median(r[key] for r in runs) for key in ("import", "first", "second")
        }
        for kind, runs in found.items()
    }
    ratio = medians["first"]["first"] / medians["later"]["first"]
    rows = [
        f"| {names[kind]} | {m['import']:.2f} | {m['first']:.2f} | {m['second']:.3f} |"
        for kind, m in medians.items()
    ]
    both = sum(medians["first"][k] for k in ("import", "first")) / sum(
        medians["later"][k] for k in ("import", "first")
    )
    return "\n".join([
        "# First calls, with plans on disk",
        "",
        f"Seconds in a process of its own, `transform` included; a {LAYERS}-layer"
        f" `nn.TransformerEncoder`, {TOKENS} tokens of {WIDTH},",
        f"{BATCH} samples, float32; medians of {len(found['off'])} rounds, by"
        " `python -m benchmarks.processes`.",
        "",
        "| process | import fxhess | first call | second call |",
        "| --- | --- | --- | --- |",
        *rows,
        "",
        f"The first call of a later process is {ratio:.1f} times faster than that of the first;"
        f" with `import fxhess`, {both:.1f} times.",
        "",
        ", ".join(f"{key} {value}" for key, value in machine("cpu").items())
        + f", torch {torch.__version__}",
        "",
    ])  # fmt: skip


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--once", action="store_true", help="one process, printed as JSON")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.once:
        print(json.dumps(in_this_process()))
        return
    found = measure(options.rounds)
    text = table(found)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "cold.json").write_text(json.dumps(found, indent=1) + "\n")
    (options.output / "cold.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
