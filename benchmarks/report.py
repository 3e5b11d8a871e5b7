"""The results as tables: for a terminal, and in Markdown for the README."""

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.cold import STEPS
from benchmarks.load import BUSY
from benchmarks.measure import Result
from benchmarks.record import Run, summary
from benchmarks.rivals import OURS, STRATEGIES

__all__ = [
    "markdown",
    "print_cold",
    "print_strategies",
    "print_summary",
    "print_times",
    "times",
]

MIB = 2**20


def milliseconds(value: float) -> str:
    """Seconds as milliseconds with three digits."""
    ms = value * 1e3
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"


def times(ratio: float) -> str:
    """A ratio with two digits, without an exponent."""
    return f"{ratio:,.0f}×" if ratio >= 10 else f"{ratio:.2g}×"


def megabytes(size: int) -> str:
    """Bytes as MB; less than one says nothing."""
    return "<1 MB" if size < MIB else f"{size / MIB:.0f} MB"


def cell(result: Result, run: Run) -> tuple[str, str, str]:
    """The median or what went wrong, in how many of ours it is, and the peak of memory."""
    if result.median is None:
        return "fails", "", ""
    peak = "" if result.peak is None else megabytes(result.peak)
    if not result.correct:
        return "wrong", "", peak
    ours = run.ours
    ratio = ""
    if ours is not None and ours is not result and ours.median is not None:
        ratio = times(result.median / ours.median)
    return milliseconds(result.median), ratio, peak


def limit_cell(run: Run) -> tuple[str, str]:
    """The limit and our distance from it."""
    if run.limit is None:
        return "–", ""
    return milliseconds(run.limit), "" if run.over_limit is None else times(run.over_limit)


def plain_table(title: str, columns: Sequence[str], left: int) -> Table:
    """An empty table whose first ``left`` columns are words."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right", no_wrap=True)
    return table


def names_of(runs: Sequence[Run]) -> list[str]:
    """The rivals of all runs, in order."""
    return list(dict.fromkeys(r.rival for run in runs for r in run.results))


def print_times(console: Console, runs: Sequence[Run]) -> None:
    """Time over memory, then each failure, wrong value and faster rival in a line of its own."""
    names = names_of(runs)
    title = (
        "Milliseconds a batch (×: that time over ours), peak memory of a call with its result;"
        " limit (×: our time over it)"
    )
    table = plain_table(title, ("workload", "x", *names, "limit"), 2)
    for run in runs:
        found = {r.rival: r for r in run.results}
        table.add_row(
            run.name, run.size, *(rich_cell(found[n], run) if n in found else "–" for n in names),
            " ".join(limit_cell(run)),
        )  # fmt: skip
    console.print(table)
    for run in runs:
        for result in run.results:
            where = f"{run.name}, {result.rival}: "
            if result.failure is not None:
                console.print(f"[red]{where}[/red]{escape(result.failure)}")
            elif not result.correct:
                console.print(f"[red]{where}[/red]relative error {result.error}")
        lead, best = run.lead(), run.best_rival
        if lead is not None and best is not None and lead < 1:
            console.print(f"{run.name}: {best.rival} is {times(1 / lead)} faster than ours")


def rich_cell(result: Result, run: Run) -> str:
    """Two lines: time and ratio, memory."""
    time, ratio, peak = cell(result, run)
    if time in ("fails", "wrong"):
        time = f"[red]{time}[/red]"
    elif result is run.ours:
        time = f"[bold]{time}[/bold]"
    text = f"{time} [dim]{ratio}[/dim]"
    return f"{text}\n[dim]{peak}[/dim]" if peak else text


def print_summary(console: Console, runs: Sequence[Run]) -> None:
    """Over all rows."""
    for line in summary_lines(runs):
        console.print(line)


def summary_lines(runs: Sequence[Run]) -> list[str]:
    """One sentence for each of ours: the mean lead, the smallest, memory."""
    lines = []
    for name in names_of(runs):
        found = summary(runs, name) if name.startswith(OURS) else None
        if found is None:
            continue
        line = (
            f"{name}: geometric mean of (best rival / ours) {times(found.mean)} over"
            f" {found.counted} of {found.rows} rows; smallest {times(found.smallest)}"
            f" ({found.smallest_row})"
        )
        if found.weighed:
            line += f"; memory at most the best rival's in {found.leaner} of {found.weighed}"
        lines.append(line)
    return lines


def print_strategies(console: Console, runs: Sequence[Run]) -> None:
    """The planner's choice beside each strategy forced: it should never be the slower one."""
    forced = [f"{OURS} {name}" for name in STRATEGIES]
    columns = ("workload", "x", OURS, *forced, "best single / ours")
    table = plain_table("Milliseconds a batch, planned and forced", columns, 2)
    ratios = []
    for run in runs:
        found = {r.rival: r for r in run.results}
        singles = [r.median for n in forced if (r := run.result_of(n)) is not None]
        best = min((m for m in singles if m is not None), default=None)
        ours, ratio = run.ours, None
        if best is not None and ours is not None and ours.median is not None:
            ratio = best / ours.median
            ratios.append((ratio, run.name))
        table.add_row(
            run.name,
            run.size,
            *(rich_cell(found[n], run) if n in found else "–" for n in (OURS, *forced)),
            "–" if ratio is None else times(ratio),
        )
    console.print(table)
    for run in runs:
        for result in run.results:
            if result.failure is not None:
                console.print(f"{run.name}, {result.rival}: {escape(result.failure)}")
    if ratios:
        ratio, name = min(ratios)
        console.print(f"smallest best single / ours: {times(ratio)} ({name})")


def print_cold(console: Console, cold: Mapping[str, list[float]]) -> None:
    """First calls."""
    title = f"First calls, medians of {len(cold['first'])} fresh processes"
    table = plain_table(title, ("what", "ms"), 1)
    for step, what in STEPS.items():
        table.add_row(what, milliseconds(statistics.median(cold[step])))
    console.print(table)


# --- Markdown -------------------------------------------------------------------------------------


def markdown(document: Mapping[str, Any], runs: Sequence[Run]) -> str:
    """The README's table with what it was measured on, out of a JSON document."""
    machine, versions = document["machine"], document["versions"]
    threads = machine["torch_threads"]
    where = machine.get("gpu") or (
        f"{threads} {'thread' if threads == 1 else 'threads'} ({machine['processor']})"
    )
    names = names_of(runs)
    memory = any(r.peak is not None for run in runs for r in run.results)
    caption = (
        f"Milliseconds a batch: medians of interleaved rounds on {where}, PyTorch"
        f" {versions['torch']}, JAX {versions['jax']}, {document['date'][:10]},"
        f" `{document['command']}`; every value checked against float64 double backward. ×: that"
        " time over ours, so above 1 fxhess is faster."
        + (" In brackets the peak memory of a call with its result, in MB." if memory else "")
        + " Limit: the plan's matrix products at the machine's fastest measured rate and the"
        " result written once (×: our time over that)."
    )
    busy = document["share_of_processors_used_by_others"]
    if busy > BUSY:
        caption += f" Others used {busy:.0%} of the processors meanwhile: times may be far off."
    lines = [
        fill(caption),
        "",
        table_row(("workload", "x", *names, "limit")),
        table_row(["---"] * (len(names) + 3)),
    ]
    for run in runs:
        found = {r.rival: r for r in run.results}
        cells = [markdown_cell(found[n], run) if n in found else "–" for n in names]
        limit, over = limit_cell(run)
        label = run.summary.replace("|", "\\|")
        lines.append(table_row((label, run.size, *cells, f"{limit}, {over}" if over else limit)))
    failures = [
        f"{run.name}, {r.rival}: {r.failure or f'relative error {r.error:.1g}'}"
        for run in runs
        for r in run.results
        if r.failure is not None or not r.correct
    ]
    lines += ["", *(fill(f"- {line}", "  ") for line in summary_lines(runs))]
    if failures:
        lines += ["", fill("Fails or is wrong: " + "; ".join(f"`{f}`" for f in failures) + ".")]
    return "\n".join(lines)


def fill(text: str, indent: str = "") -> str:
    """A paragraph of the README's width, its words whole."""
    return textwrap.fill(
        text, 114, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def table_row(cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def markdown_cell(result: Result, run: Run) -> str:
    """``118, 4.6× (95)``."""
    time, ratio, peak = cell(result, run)
    if result is run.ours:
        time = f"**{time}**"
    text = f"{time}, {ratio}" if ratio else time
    return f"{text} ({peak.removesuffix(' MB')})" if peak else text
