"""Tables for a terminal, by rich.  Text of the user's is never read as markup."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fxhess.compared import Comparison
from fxhess.explain import Explanation
from fxhess.listing import costliest, listings, time_of
from fxhess.picture import ENDINGS, name_of, shape_of
from fxhess.steps import Step
from fxhess.units import duration, si

_COSTLIEST = 15
_BAR = 18  # characters

Cell = str | Text


def console() -> Console:
    """Standard output; a pipe has no width, so tables keep their lines there."""
    found = Console(highlight=False)
    if not found.is_terminal:
        found.width = 160
    return found


def table(header: Sequence[str], rows: Sequence[Sequence[Cell]], title: str = "") -> Table:
    """A table; columns whose name begins with ``*`` hold numbers."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title or None, title_justify="left")
    for name in header:
        made.add_column(
            Text(name.lstrip("*")),
            justify="right" if name.startswith("*") else "left",
            no_wrap=name != "line",
            overflow="ellipsis",
        )
    for row in rows:
        made.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return made


def show_explanation(out: Console, e: Explanation, everything: bool) -> None:
    """The plan: what it takes, where the time goes, how terms end."""
    shape = "×".join(map(str, e.shape)) or "scalar"
    out.print(Text.assemble((", ".join(e.outputs), "bold"), f" at x: {shape}"))
    measured = "not measured" if e.measured is None else f"{duration(e.measured)} measured"
    out.print(
        Text(
            f"{measured}, {duration(e.predicted)} predicted; {e.operations:,} operations,"
            f" {si(e.flops)}FLOP, {si(e.peak_bytes)}B at the peak"
        )
    )
    if e.tiles > 1 or e.kept_bytes:
        kept = f", {si(e.kept_bytes)}B kept of weights alone" if e.kept_bytes else ""
        out.print(Text(f"{e.tiles} {'tile' if e.tiles == 1 else 'tiles'} of the batch{kept}"))
    if everything:
        for listing in listings(e):
            out.print(table(listing.header, listing.rows, listing.title))
    else:
        _show_costliest(out, e)
    for note in e.notes:
        out.print(Text.assemble(("note: ", "yellow"), note))


def _show_costliest(out: Console, e: Explanation) -> None:
    first = costliest(e, _COSTLIEST)
    if not first:
        return
    most = max(map(time_of, first))
    rows: list[list[Cell]] = [
        [
            Text(name_of(o.step), "bold"),
            o.step.module,
            o.step.kind,
            shape_of(o.step.shape),
            ", ".join(dict.fromkeys(t.structure for t in o.step.tangents)),
            _endings(o.step),
            duration(o.predicted),
            "-" if o.measured is None else duration(o.measured),
            Text("█" * round(_BAR * time_of(o) / most), "blue"),
        ]
        for o in first
    ]
    header = (
        "operation", "module", "kind", "shape", "tangents", "ends", "*predicted", "*measured", "",
    )  # fmt: skip
    out.print(table(header, rows))
    if len(e.steps) > len(first):
        out.print(Text(f"{len(e.steps) - len(first)} more operations: --all", "dim"))


def _endings(step: Step) -> Text:
    counts: dict[str, int] = {}
    for ending in step.endings:
        counts[ending.how] = counts.get(ending.how, 0) + 1
    colours = {"close": "green", "pull": "yellow", "rebase": "magenta"}
    parts: list[tuple[str, str]] = []
    for how, count in counts.items():
        sign, _ = ENDINGS[how]
        parts.append((f"{sign} {how}" + (f" ×{count} " if count > 1 else " "), colours[how]))
    if step.lost:
        parts.append(("structure lost", "red"))
    return Text.assemble(*parts)


def show_comparison(out: Console, found: Comparison) -> None:
    """Times of all ways, beside ours."""
    ours = found.ways[0].seconds or 0.0
    rows: list[list[Cell]] = []
    for way in found.ways:
        if way.seconds is None or way.fastest is None or way.slowest is None:
            rows.append([way.name, Text(way.failed, "red"), "", "", ""])
            continue
        rows.append(
            [
                Text(way.name, "bold" if way is found.ways[0] else ""),
                Text(duration(way.seconds), "bold"),
                f"{duration(way.fastest)} to {duration(way.slowest)}",
                f"{way.seconds / ours:.2f}×",
                "-" if way is found.ways[0] else f"{way.error:.1e}",
            ]
        )
    out.print(table(("way", "*median", "*rounds", "*of fxhess", "*difference"), rows))
    out.print(
        Text(
            f"first call {duration(found.first)}; error {found.verified:.1e} (allowed"
            f" {found.allowed:.0e}) against double backward in float64"
        )
    )


__all__ = ["console", "show_comparison", "show_explanation", "table"]
