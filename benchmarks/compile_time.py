"""``python -m benchmarks.compile_time``: how long tracing and planning take, and how it grows.

Models of 2 to 64 equal layers are captured and planned; nothing is run.  The exponent of the growth
is the slope of log time against log depth, over all depths and over the deepest three (where what
any model costs no longer counts): 1 is linear.  The sizes of layers do not matter much, since no
numbers are computed.  Every time is processor time of one process, the least of a few rounds.
"""

import argparse
import gc
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm

import fxhess
from benchmarks import models
from benchmarks.load import BUSY, watch_others
from benchmarks.plot import COLOURS, MARKERS
from benchmarks.record import machine

__all__ = ["FAMILIES", "Timed", "main", "slope"]

DEPTHS = (2, 4, 8, 12, 16, 32, 64)


class ResidualBlock(nn.Module):
    """``x + W2 tanh(W1 x)``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = models.tanh_net(width, width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[*batch, width]`` to the same."""
        return x + self.block(x)


class Encoder(nn.Module):
    """PyTorch's own transformer encoder and a smooth number of its result."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, tokens, 64]`` to ``[B]``."""
        return self.layers(x).square().sum((1, 2))


def convolutions(depth: int) -> nn.Module:
    """Convolutions of 4 channels on 8 by 8 pixels, and a linear layer."""
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [nn.Conv2d(4 if i else 1, 4, 3, padding=1), nn.Tanh()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 64, 1))


@dataclass(frozen=True)
class Family:
    """Models by depth, and the shape of one sample."""

    summary: str
    model: Callable[[int], nn.Module]
    event: tuple[int, ...]


FAMILIES = {
    "mlp": Family(
        "tanh net, width 64", lambda depth: models.tanh_net(10, *(64,) * (depth - 1), 1), (10,)
    ),
    "residual": Family(
        "residual tanh blocks, width 32",
        lambda depth: nn.Sequential(
            nn.Linear(10, 32), *(ResidualBlock(32) for _ in range(depth)), nn.Linear(32, 1)
        ),
        (10,),
    ),
    "cnn": Family("convolutions, 4 channels of 8×8", convolutions, (1, 8, 8)),
    "encoder": Family("nn.TransformerEncoder, 16 tokens of 64", Encoder, (16, 64)),
}


@dataclass(frozen=True)
class Timed:
    """Seconds of processor time that the first specialization took, and the operations of the
    program it gave."""

    family: str
    depth: int
    operations: int
    rounds: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """The least: all else is other processes' and the collector's."""
        return min(self.rounds)


def measure(name: str, depth: int, rounds: int) -> Timed:
    """Specialize fresh models of one kind, the cache empty each time."""
    family = FAMILIES[name]
    x = torch.zeros(2, *family.event)
    times = []
    operations = 0
    for _ in range(rounds):
        torch.manual_seed(0)
        hess = fxhess.transform(family.model(depth), event_ndim=len(family.event))
        fxhess.cache_clear()
        gc.collect()
        start = time.process_time()
        hess.specialize(x)
        times.append(time.process_time() - start)
        operations = sum(n.op.startswith("call") for n in hess.graph_module(x).graph.nodes)
    return Timed(name, depth, operations, tuple(times))


def slope(points: Sequence[tuple[float, float]]) -> float:
    """The exponent p of the best fit ``y = c x**p``, by least squares in logarithms."""
    return statistics.linear_regression(
        [math.log(x) for x, _ in points], [math.log(y) for _, y in points]
    ).slope


def exponents(timed: Sequence[Timed]) -> dict[str, tuple[float, float]]:
    """By family: over all depths, and over the deepest three."""
    found = {}
    for name in dict.fromkeys(t.family for t in timed):
        points = [(t.depth, t.seconds) for t in timed if t.family == name]
        if len(points) > 1:
            found[name] = (slope(points), slope(points[-3:]))
    return found


def markdown(timed: Sequence[Timed]) -> str:
    """The table, seconds by family and depth."""
    depths = sorted({t.depth for t in timed})
    seconds = {(t.family, t.depth): t.seconds for t in timed}
    heads = ["model", *map(str, depths), "exponent", "exponent, deepest three"]
    lines = ["| " + " | ".join(heads) + " |", "| " + " | ".join("---" for _ in heads) + " |"]
    for name, (whole, tail) in exponents(timed).items():
        cells = [f"{seconds[name, d]:.3g}" if (name, d) in seconds else "" for d in depths]
        row = [FAMILIES[name].summary, *cells, f"{whole:.2f}", f"{tail:.2f}"]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def show(console: Console, timed: Sequence[Timed]) -> None:
    """The same for a terminal."""
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in markdown(timed).splitlines()
    ]
    table = Table(*head, box=box.SIMPLE, title="seconds to trace and plan, by depth")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def draw(path: Path, timed: Sequence[Timed], title: str) -> None:
    """Seconds against depth, both logarithmic, with a line of slope 1."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for index, (name, (whole, _)) in enumerate(exponents(timed).items()):
        points = [(t.depth, t.seconds) for t in timed if t.family == name]
        axes.plot(
            *zip(*points, strict=True),
            marker=MARKERS[index],
            color=COLOURS[index],
            label=f"{FAMILIES[name].summary}: exponent {whole:.2f}",
        )
    first = min(t.seconds for t in timed)
    depths = sorted({t.depth for t in timed})
    axes.plot(
        depths,
        [first * d / depths[0] for d in depths],
        color="0.7",
        linestyle="--",
        label="linear",
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("layers")
    axes.set_ylabel("seconds to trace and plan")
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    axes.set_title(title, loc="left", fontsize=9, color="0.3")
    figure.savefig(path, dpi=160)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compile_time", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--depths", nargs="+", type=int, default=list(DEPTHS))
    parser.add_argument("--rounds", type=int, default=3, help="of each (default 3); least counts")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), metavar="DIR")
    arguments = parser.parse_args(argv)
    given = sys.argv[1:] if argv is None else argv
    share_of_others = watch_others()
    for name in arguments.only:  # what only the first capture of a process pays
        measure(name, 1, 1)
    jobs = [(name, depth) for name in arguments.only for depth in sorted(arguments.depths)]
    timed = []
    with tqdm(jobs, unit="model", dynamic_ncols=True) as bar:
        for name, depth in bar:
            bar.set_description(f"{name} of {depth}")
            timed.append(measure(name, depth, arguments.rounds))
    others = share_of_others()
    console = Console()
    if not console.is_terminal:
        console.width = 160
    facts = machine("cpu")
    title = f"{facts['processor']}, PyTorch {torch.__version__}"
    console.print(title)
    if others > BUSY:
        console.print(f"[red]Others used {others:.0%} of the processors; times may be off.[/red]")
    show(console, timed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    stem = arguments.out / "compile_time"
    stem.with_suffix(".md").write_text(
        f"Seconds of processor time to trace and plan, by number of layers: `{command(given)}`.\n"
        f"{title}.\n\n{markdown(timed)}"
    )
    draw(stem.with_suffix(".png"), timed, title)
    record = {
        "command": command(given),
        "machine": facts,
        "torch": torch.__version__,
        "used_by_others": round(others, 3),
        "timed": [asdict(t) for t in timed],
        "exponents": exponents(timed),
    }
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    console.print(f"Written to {arguments.out}")
    return 0


def command(given: Sequence[str]) -> str:
    """What was run."""
    return shlex.join(["python", "-m", "benchmarks.compile_time", *given])


if __name__ == "__main__":
    sys.exit(main())
