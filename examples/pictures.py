"""How the pictures of the examples look, and what is said where none can be drawn."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Told apart in every common form of colour blindness, and by lightness: M. Okabe and K. Ito,
# "Color Universal Design" (2008).
BLUE, VERMILION, GREEN, PURPLE, SKY, ORANGE = (
    "#0072b2", "#d55e00", "#009e73", "#a6508b", "#56b4e9", "#e69f00"
)  # fmt: skip
GREY = "0.72"

_STYLE = {
    "font.size": 11, "axes.titlesize": 11.5, "axes.labelsize": 11, "legend.fontsize": 10,
    "xtick.labelsize": 10, "ytick.labelsize": 10, "axes.titlepad": 8, "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8,
}  # fmt: skip


def _target(path: str) -> str:
    """The path of a picture, if one can be drawn there: asked before the work begins."""
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError(
            "pictures need matplotlib: pip install -c constraints.txt -e '.[examples]'"
        )
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = FigureCanvasBase.get_supported_filetypes()
    if Path(path).suffix[1:].lower() not in kinds:
        raise argparse.ArgumentTypeError(f"{path!r} ends in none of .{', .'.join(sorted(kinds))}")
    if not Path(path).absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {str(Path(path).parent)!r}")
    return path


def parser(module: str, doc: str | None) -> argparse.ArgumentParser:
    """A command line with ``--plot PATH``, of the example ``examples.module``."""
    made = argparse.ArgumentParser(
        prog=f"python -m examples.{module}", description=(doc or "").partition("\n")[0]
    )
    made.add_argument("--plot", metavar="PATH", type=_target, help="draw a picture there")
    return made


@contextmanager
def sheet(
    path: str, size: tuple[float, float], mosaic: Sequence[Sequence[str]], **options: Any
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """A figure of ``size`` inches and its axes by name, written to ``path`` at the end."""
    import matplotlib
    from matplotlib.figure import Figure  # not pyplot: no window, no state left behind

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08, wspace=0.04, hspace=0.04)
        yield figure, figure.subplot_mosaic([list(row) for row in mosaic], **options)
        figure.savefig(path, dpi=130)
    print(f"picture: {path}")


def bars(axis: Any, seconds: Mapping[str, float]) -> None:
    """The time of a training step in each way, the first one's coloured and on top."""
    names = list(seconds)[::-1]
    times = [seconds[name] * 1e3 for name in names]
    axis.barh(names, times, color=[GREY] * (len(names) - 1) + [BLUE], height=0.6)
    for k, value in enumerate(times):
        axis.text(value, k, f" {value:.1f}", va="center")
    axis.set(xlabel="milliseconds a training step", xlim=(0, max(times) * 1.17))
    axis.tick_params(axis="y", length=0)
    axis.set_title("loss and its gradient, same values")
