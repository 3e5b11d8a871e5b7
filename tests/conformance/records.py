"""What was found, one line of JSON for each entry, so that a run can be divided and continued."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import cases
from ._pytorch import Entry
from .judge import Outcome, brief, by_torch_func, judge

LIMIT = 60  # seconds a case, of the processor
# Worst first.
VERDICTS = ("wrong", "refused", "no referee", "right")
KINDS = ("unbatched", "batched", "mixing")


@dataclass(frozen=True)
class Record:
    """All outcomes of one entry; ``note``: why there are none."""

    table: str
    name: str
    outcomes: tuple[Outcome, ...]
    note: str = ""

    def worst(self, kind: str) -> Outcome | None:
        """The worst outcome of this kind; None if there is no such case."""
        of_kind = [o for o in self.outcomes if o.kind == kind]
        return min(of_kind, key=lambda o: VERDICTS.index(o.verdict), default=None)

    def rival(self, kind: str) -> str:
        """The worst verdict on ``torch.func.hessian``; "" if it was not asked."""
        found = [o.rival for o in self.outcomes if o.kind == kind and o.rival]
        return min(found, key=("wrong", "fails", "right").index, default="")


class TooSlowError(BaseException):
    """The case took longer than :data:`LIMIT`; nothing on the way is to catch it."""


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TooSlowError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def examine(entry: Entry, limit: int, ways: Sequence[str] = KINDS, rivals: bool = True) -> Record:
    """Judge the cases of ``limit`` uses of an entry; ``rivals``: ``torch.func.hessian`` as well."""
    outcomes: list[Outcome] = []
    note = "no real operand or result"
    try:
        uses = list(entry.uses(limit))
    except Exception as error:  # the table's own samples cannot be made
        return Record(entry.table, entry.name, (), brief(error))
    for use in uses:
        found: list[cases.Case] = []
        try:
            found += [cases.unbatched(use)] if "unbatched" in ways else []
            found += cases.batched(use) if "batched" in ways else []
        except Exception as error:  # the table's own call fails
            note = brief(error)
        for case in _distinct(found):
            try:
                with _limited():
                    outcome = judge(case, by_torch_func if rivals else None)
            except TooSlowError:
                kind = "batched" if case.batched else "unbatched"
                outcome = Outcome(kind, case.label, "refused", f"not done after {LIMIT} s")
            if not (case.batched and outcome.verdict == "no referee"):  # no way to make a batch
                outcomes.append(outcome)
    return Record(entry.table, entry.name, tuple(outcomes), "" if outcomes else note)


def _distinct(found: Sequence[cases.Case]) -> list[cases.Case]:
    """Without those ways to make a batch that come to the same."""
    kept: list[cases.Case] = []
    for case in found:
        values = cases.seeded(case.function)(case.x)
        if not any(_equal(values, cases.seeded(k.function)(k.x)) for k in kept if k.batched):
            kept.append(case)
    return kept


def _equal(a: Any, b: Any) -> bool:
    return a.shape == b.shape and bool((a.nan_to_num() - b.nan_to_num()).abs().max() < 1e-12)


def load(path: Path) -> list[Record]:
    """The records kept in a file; none if there is no file."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text().splitlines():
        data = json.loads(line)
        outcomes = tuple(Outcome(**o) for o in data.pop("outcomes"))
        found.append(Record(outcomes=outcomes, **data))
    return found


def keep(record: Record, path: Path) -> None:
    """Append a record to a file."""
    with path.open("a") as file:
        file.write(json.dumps(asdict(record)) + "\n")
