"""The picture: a row for each workload, a mark for each rival, time on a logarithmic axis."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed, or there

from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter

from benchmarks.report import Run, times
from benchmarks.rivals import OURS

__all__ = ["draw"]

MARKERS = "osD^v<>"
# Okabe and Ito's palette, told apart with any colour vision; ours is the one filled mark.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")


def draw(path: Path, runs: Sequence[Run], title: str) -> None:
    """Write the picture as PNG."""
    names = list(dict.fromkeys(r.rival for run in runs for r in run.results))
    figure, axes = plt.subplots(figsize=(9.5, 1.6 + 0.42 * len(runs)), layout="constrained")
    for y, run in enumerate(runs):
        medians = [r.median * 1e3 for r in run.results if r.median is not None and r.correct]
        if medians:
            axes.plot([min(medians), max(medians)], [y, y], color="0.88", linewidth=5, zorder=1)
        annotate(axes, y, run)
    for index, name in enumerate(names):
        points = [
            (r.median * 1e3, y)
            for y, run in enumerate(runs)
            for r in run.results
            if r.rival == name and r.median is not None and r.correct
        ]
        ours = name == OURS
        colour = COLOURS[index % len(COLOURS)]
        axes.scatter(
            [x for x, _ in points],
            [y for _, y in points],
            marker=MARKERS[index % len(MARKERS)],
            s=70 if ours else 42,
            facecolors=colour if ours else "white",
            edgecolors=colour,
            linewidths=1.4,
            label=name,
            zorder=4 if ours else 3,
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("milliseconds a batch (median)")
    axes.set_yticks(range(len(runs)), [label(run) for run in runs])
    axes.set_ylim(len(runs) - 0.4, -0.6)
    axes.grid(axis="x", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.legend(loc="outside lower center", ncols=min(4, len(names)), frameon=False)
    axes.set_title(title, loc="left", fontsize=9, color="0.3")
    heading = "best rival\n÷ fxhess"
    axes.annotate(heading, (1.01, 1.0), xycoords="axes fraction", fontsize=8, color="0.3")
    figure.savefig(path, dpi=160)
    plt.close(figure)


def label(run: Run) -> str:
    """The workload's name and batch."""
    return f"{run.workload.name}  {'×'.join(map(str, run.workload.shape))}"


def annotate(axes: plt.Axes, y: int, run: Run) -> None:
    """At the right edge, how the best rival compares."""
    ours, best = run.ours, run.best_rival
    if any(r.rival == OURS and not r.correct for r in run.results):
        at = ("axes fraction", "data")
        axes.annotate("failed", (1.01, y), xycoords=at, va="center", fontsize=9, color="0.5")
        return
    if ours is None or best is None or ours.median is None or best.median is None:
        return
    ratio = best.median / ours.median
    axes.annotate(
        times(ratio),
        xy=(1.01, y),
        xycoords=("axes fraction", "data"),
        va="center",
        fontsize=9,
        fontweight="bold" if ratio >= 1 else "normal",
        color=COLOURS[0] if ratio >= 1 else "0.5",
    )
