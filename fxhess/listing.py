"""An explanation as tables of words, for a page and for a terminal."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fxhess.picture import name_of, shape_of
from fxhess.units import duration, si

if TYPE_CHECKING:
    from fxhess.explain import Explanation, Operation


@dataclass(frozen=True)
class Listing:
    """A table; columns whose name begins with ``*`` hold numbers."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


_OPERATION = (
    "operation", "module", "kind", "shape", "tangents", "ends", "*predicted", "*measured",
    "*FLOP", "*written", "line",
)  # fmt: skip


def listings(explanation: Explanation) -> Iterator[Listing]:
    """The operations of the model, the terms of H and the matrix products, in order."""
    e = explanation
    if e.steps:
        rows = tuple(map(_row, e.steps))
        yield Listing(f"All {len(rows)} operations", _OPERATION, rows)
    if e.rows:
        yield Listing(
            f"All {len(e.rows)} terms of H",
            ("curved operation", "module", "ends", "at base", "structure", "line"),
            tuple((r.op, r.module, r.ending, r.base, r.structure, r.line) for r in e.rows),
        )
    if e.contractions:
        yield Listing(
            f"All {len(e.contractions)} matrix products, in order",
            ("name", "for", "shapes", "*FLOP"),
            tuple((name, role, shapes, si(f)) for name, role, shapes, f in e.contractions),
        )


def costliest(explanation: Explanation, count: int) -> list[Operation]:
    """The operations that take longest, at most ``count``."""
    found = [o for o in explanation.steps if time_of(o) > 0]
    return sorted(found, key=time_of, reverse=True)[:count]


def time_of(operation: Operation) -> float:
    """Measured seconds; predicted ones where none were measured."""
    return operation.predicted if operation.measured is None else operation.measured


def _row(o: Operation) -> tuple[str, ...]:
    step = o.step
    return (
        name_of(step),
        step.module,
        step.kind,
        shape_of(step.shape),
        ", ".join(dict.fromkeys(t.structure for t in step.tangents)),
        ", ".join(dict.fromkeys(e.how for e in step.endings)),
        duration(o.predicted),
        "-" if o.measured is None else duration(o.measured),
        si(o.flops),
        si(o.bytes),
        step.line,
    )


# --- as plain text --------------------------------------------------------------------------------

_LEAST = 6  # characters of a column that are left in any case
_FOLDER = re.compile(r"^.*[/\\](?=[^/\\:]+:\d+: )")  # of a line of the user's


def terminal_width() -> int | None:
    """Characters of a line where standard output is a terminal; None elsewhere."""
    out = sys.stdout
    if out is None or out.closed or not out.isatty():
        return None
    return shutil.get_terminal_size().columns


def plain_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], width: int | None = None
) -> list[str]:
    """The lines of a table.  Where these would be longer than ``width``, folders of files go first,
    then the middle of what stands in the widest columns."""
    table = [list(map(str, row)) for row in (header, *rows)]
    widths = _widths(table)
    room = None if width is None else width - 2 * len(header)
    if room is not None and sum(widths) > room:
        table = [[_FOLDER.sub("", cell) for cell in row] for row in table]
        widths = _widths(table)
        while sum(widths) > room and max(widths) > _LEAST:
            widths[widths.index(max(widths))] -= 1
    lines = [
        "  " + "  ".join(_cut(c, w).ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
    return [lines[0], "  " + "  ".join("-" * w for w in widths), *lines[1:]]


def _widths(table: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*table, strict=True)]


def _cut(text: str, width: int) -> str:
    if len(text) <= width:
        return text
    left = (width - 2) // 2  # two dots, so that any terminal can show it
    return f"{text[: width - 2 - left]}..{text[len(text) - left :]}"


__all__ = ["Listing", "costliest", "listings", "plain_table", "terminal_width", "time_of"]
