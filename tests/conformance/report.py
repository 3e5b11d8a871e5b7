"""The page of coverage: totals, exceptions with their reasons, and every entry."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .records import KINDS, VERDICTS, Record


def complaints(record: Record) -> Iterator[str]:
    """A line for every case that is not right."""
    if record.note:
        yield f"{record.table} {record.name}: {record.note}"
    for o in record.outcomes:
        if o.verdict != "right":
            yield f"{record.table} {record.name} [{o.label}], {o.kind}: {o.verdict}: {o.detail}"


def totals(records: Sequence[Record]) -> str:
    lines = ["| | " + " | ".join(VERDICTS[::-1]) + " | torch.func: right | wrong | fails |"]
    lines.append("|" + " --- |" * (len(VERDICTS) + 4))
    for table in ("op", "module"):
        for kind in KINDS:
            own = [r for r in records if r.table == table]
            found = [w.verdict for r in own if (w := r.worst(kind))]
            rival = [r.rival(kind) for r in own]
            counts = [str(found.count(v)) for v in VERDICTS[::-1]]
            counts += [str(rival.count(v)) for v in ("right", "wrong", "fails")]
            lines.append(f"| {table}s, {kind} | " + " | ".join(counts) + " |")
    return "\n".join(lines)


def page(records: Sequence[Record]) -> str:
    return totals(records)
