"""The pictures: a row for each workload, a mark for each rival; and lines over one size each."""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed, or there

from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter

from benchmarks.growth import AXES, BASE, size_of
from benchmarks.measure import Result
from benchmarks.record import Run
from benchmarks.report import names_of, times
from benchmarks.rivals import OURS

__all__ = ["draw", "draw_growth"]

# Ours are filled and of one colour, each rival open and of its own (Okabe and Ito's palette, told
# apart with any colour vision).
OUR_COLOUR = "#D55E00"
OUR_MARKERS = "osD^v"
COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "sD^v<>"
MIB = 2**20


def style_of(names: Sequence[str], name: str) -> dict[str, str]:
    """A rival's mark and colours."""
    ours = [n for n in names if n.startswith(OURS)]
    if name in ours:
        marker = OUR_MARKERS[ours.index(name) % len(OUR_MARKERS)]
        face = OUR_COLOUR if name == OURS else "#F6C9A8"
        return {"marker": marker, "color": OUR_COLOUR, "face": face}
    index = [n for n in names if n not in ours].index(name)
    marker, colour = MARKERS[index % len(MARKERS)], COLOURS[index % len(COLOURS)]
    return {"marker": marker, "color": colour, "face": "white"}


def draw(path: Path, runs: Sequence[Run], title: str) -> None:
    """Write the picture of all workloads as PNG."""
    names = names_of(runs)
    figure, axes = plt.subplots(figsize=(10, 1.9 + 0.4 * len(runs)), layout="constrained")
    for y, run in enumerate(runs):
        medians = [r.median * 1e3 for r in run.results if r.median is not None and r.correct]
        if medians:
            axes.plot([min(medians), max(medians)], [y, y], color="0.9", linewidth=5, zorder=1)
        annotate(axes, y, run)
    limits = [(run.limit * 1e3, y) for y, run in enumerate(runs) if run.limit is not None]
    if limits:
        axes.scatter(
            *zip(*limits, strict=True), marker="|", s=160, color="0.25", linewidths=1.6,
            label="limit", zorder=2,
        )  # fmt: skip
    for name in reversed(names):  # ours on top
        points = [
            (r.median * 1e3, y)
            for y, run in enumerate(runs)
            if (r := run.result_of(name)) is not None and r.median is not None
        ]
        style = style_of(names, name)
        axes.scatter(
            [x for x, _ in points],
            [y for _, y in points],
            marker=style["marker"],
            s=72 if name == OURS else 38,
            facecolors=style["face"],
            edgecolors=style["color"],
            linewidths=1.3,
            label=name,
            zorder=5 if name == OURS else 4 if name.startswith(OURS) else 3,
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("milliseconds a batch (median)")
    axes.set_yticks(range(len(runs)), [f"{run.name}  {run.size}" for run in runs])
    axes.set_ylim(len(runs) - 0.4, -0.6)
    axes.grid(axis="x", color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    bare(axes, ("top", "right", "left"))
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: [*names, "limit"].index(labels[i]))
    figure.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        loc="outside lower center",
        ncols=min(5, len(names) + 1),
        frameon=False,
    )
    axes.set_title(title, loc="left", fontsize=9, color="0.3", pad=14)
    heading = "best rival\n÷ fxhess"
    axes.annotate(heading, (1.01, 1.0), xycoords="axes fraction", fontsize=8, color="0.3")
    figure.savefig(path, dpi=160)
    plt.close(figure)


def bare(axes: plt.Axes, sides: Sequence[str]) -> None:
    """No frame at these sides."""
    for side in sides:
        axes.spines[side].set_visible(False)


def annotate(axes: plt.Axes, y: int, run: Run) -> None:
    """At the right edge, how the best rival compares."""
    lead = run.lead()
    failed = any(r.rival == OURS and not r.correct for r in run.results)
    if lead is None and not failed:
        return
    ahead = lead is not None and lead >= 1
    axes.annotate(
        "failed" if lead is None else times(lead),
        xy=(1.01, y),
        xycoords=("axes fraction", "data"),
        va="center",
        fontsize=9,
        fontweight="bold" if ahead else "normal",
        color=OUR_COLOUR if ahead else "0.5",
    )


def draw_growth(path: Path, runs: Sequence[Run], title: str) -> None:
    """Write time and memory over batch, inputs, depth and width as PNG, all axes logarithmic."""
    names = names_of(runs)
    groups = {
        axis: [(size_of(run.name)[1], run) for run in runs if size_of(run.name)[0] == axis]
        for axis in AXES
    }
    groups = {axis: sorted(found, key=lambda p: p[0]) for axis, found in groups.items() if found}
    quantities: list[tuple[str, Callable[[Result], float | None]]] = [
        ("milliseconds", lambda r: None if r.median is None else r.median * 1e3)
    ]
    if any(r.peak is not None for run in runs for r in run.results):
        # Below that the system's count says nothing.
        quantities.append(
            ("peak MB, at least 1", lambda r: None if r.peak is None else max(r.peak / MIB, 1.0))
        )
    figure, grid = plt.subplots(
        len(quantities), len(groups), figsize=(3.1 * len(groups) + 0.6, 2.7 * len(quantities) + 1),
        layout="constrained", squeeze=False, sharey="row", sharex="col",
    )  # fmt: skip
    for row, (label, quantity) in enumerate(quantities):
        for column, (axis, found) in enumerate(groups.items()):
            axes = grid[row][column]
            for name in reversed(names):
                line(axes, names, name, found, quantity)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.set_xticks([size for size, _ in found])
            axes.minorticks_off()
            axes.grid(color="0.92", linewidth=0.8)
            axes.tick_params(length=0, labelsize=8)
            bare(axes, ("top", "right"))
            if row == len(quantities) - 1:
                axes.set_xlabel(AXES[axis])
            if column == 0:
                axes.set_ylabel(label)
    handles, labels = grid[0][0].get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: names.index(labels[i]))
    figure.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        loc="outside lower center",
        ncols=min(4, len(names)),
        frameon=False,
    )
    figure.suptitle(
        f"{title}; {BASE} but for the size varied", fontsize=9, color="0.3", x=0.01, ha="left"
    )
    figure.savefig(path, dpi=160)
    plt.close(figure)


def line(
    axes: plt.Axes,
    names: Sequence[str],
    name: str,
    found: Sequence[tuple[int, Run]],
    quantity: Callable[[Result], float | None],
) -> None:
    """One rival's values over the sizes; a size that it failed at is left out."""
    points = [
        (size, value)
        for size, run in found
        if (r := run.result_of(name)) is not None and (value := quantity(r)) is not None
    ]
    style = style_of(names, name)
    axes.plot(
        [x for x, _ in points],
        [y for _, y in points],
        marker=style["marker"],
        color=style["color"],
        markerfacecolor=style["face"],
        markersize=6 if name == OURS else 4.5,
        linewidth=2 if name == OURS else 1.1,
        linestyle="-" if name == OURS or not name.startswith(OURS) else "--",
        label=name,
        zorder=5 if name == OURS else 3,
    )
