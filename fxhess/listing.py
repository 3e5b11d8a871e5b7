"""An explanation as tables of words, for a page and for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
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


__all__ = ["Listing", "costliest", "listings", "time_of"]
