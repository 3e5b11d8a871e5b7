"""The page of coverage: totals, exceptions with their reasons, and every entry."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from .reasons import reason
from .records import KINDS, Record

_MARK = {"right": "✓", "wrong": "wrong", "refused": "refused", "no referee": "–", "": "–"}
_HEAD = """# Coverage

PyTorch's own test tables of operators (`OpInfo`) and modules (`ModuleInfo`): every entry that
PyTorch says can be differentiated twice and that takes float64, or complex numbers of it, on the
CPU. Value, gradient and Hessian are compared with double backward in float64, one sample at a time,
to 1e-8 of the largest entry; where they differ, central differences of the values decide. Operands
other than the differentiated one are constants; of operands with many entries, the first 60 are x.
Several outputs are brought to one number by fixed random weights and a sine.

* *unbatched*: x is one sample (`event_ndim=x.ndim`).
* *batched*: several samples along a further first axis, or x's own first axis as the batch, where
  they are independent of each other (tried on values and on derivatives).
* *mixing*: the same where they are not, or where a sample's place in the batch counts: right is a
  refusal by name (`SampleMixingError`), wrong is any number that is not every sample's Hessian.

Written by `python -m tests.conformance --table docs/coverage.md` with PyTorch {version} (in pieces:
`--part i/n --results FILE`). A row counts as its worst case.
"""


def complaints(record: Record) -> Iterator[str]:
    """A line for every case that is not right."""
    if record.note:
        yield f"{record.table} {record.name}: {record.note}"
    for o in record.outcomes:
        if o.verdict != "right":
            yield f"{record.table} {record.name} [{o.label}], {o.kind}: {o.verdict}: {o.detail}"


def totals(records: Sequence[Record]) -> str:
    """Counts of entries as a Markdown table."""
    lines = [
        "| entries | judged | fxhess right | wrong | refused | `torch.func.hessian` right | wrong"
        " | fails |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for table in ("op", "module"):
        for kind in KINDS:
            own = [r for r in records if r.table == table]
            found = [w.verdict for r in own if (w := r.worst(kind)) if w.verdict != "no referee"]
            rival = [
                r.rival(kind) for r in own if (w := r.worst(kind)) and w.verdict != "no referee"
            ]
            counts = [len(found), *(found.count(v) for v in ("right", "wrong", "refused"))]
            theirs = [rival.count(v) for v in ("right", "wrong", "fails")]
            shown = theirs if kind != "mixing" else ["", "", ""]
            name = "operators" if table == "op" else "modules"
            row = [f"{name}, {kind}", *counts, *shown]
            lines.append("| " + " | ".join(map(str, row)) + " |")
    return "\n".join(lines)


def exceptions(records: Sequence[Record]) -> list[tuple[str, str, str, str]]:
    """Name, kind, verdict and detail of every entry and kind that is not right."""
    found = []
    for record in sorted(records, key=_order):
        for kind in KINDS:
            worst = record.worst(kind)
            if worst is not None and worst.verdict != "right":
                detail = f"{worst.detail} [{worst.label}]"
                found.append((record.name, kind, worst.verdict, detail))
        if record.note:
            found.append((record.name, "all", "no case", record.note))
    return found


def page(records: Sequence[Record]) -> str:
    """The whole page."""
    lines = [_HEAD.format(version=torch.__version__.partition("+")[0]), "## Totals", ""]
    lines += [totals(records), "", "## Exceptions", ""]
    lines += ["| entry | kind | verdict | reason |", "| --- | --- | --- | --- |"]
    for name, kind, verdict, detail in exceptions(records):
        why = reason(name, kind) or f"unexplained: {detail[:200]}"
        lines.append(f"| `{name}` | {kind} | {verdict} | {_cell(why)} |")
    lines += ["", "## Where `torch.func.hessian` is not right", ""]
    for verdict, text in (("wrong", "Another number, no error"), ("fails", "An error")):
        names = [
            f"`{r.name}`"
            for r in sorted(records, key=_order)
            if any(o.rival == verdict for o in r.outcomes)
        ]
        lines += [f"{text}: {', '.join(names) or 'nowhere'}.", ""]
    lines += ["## Where double backward is not right", ""]
    lines += [
        "fxhess agrees with central differences of the values here, PyTorch does not:",
        "",
    ]
    corrected = [
        f"`{r.name}`" for r in sorted(records, key=_order) if any(_corrects(o) for o in r.outcomes)
    ]
    lines += [", ".join(corrected) + "." if corrected else "nowhere.", "", "## Every entry", ""]
    lines += [
        "`torch.func.hessian`: unbatched / batched (`vmap`). –: no such case, or double backward"
        " fails.",
        "",
    ]
    for table, title in (("op", "Operators"), ("module", "Modules")):
        lines += [
            f"### {title}",
            "",
            f"| {title.lower()[:-1]} | unbatched | batched | mixing | `torch.func.hessian` |",
        ]
        lines.append("| --- | --- | --- | --- | --- |")
        for r in sorted((r for r in records if r.table == table), key=_order):
            own = [_MARK[w.verdict if (w := r.worst(kind)) else ""] for kind in KINDS]
            rival = " / ".join(_rival(r.rival(kind)) for kind in ("unbatched", "batched"))
            lines.append(f"| `{r.name}` | " + " | ".join(own) + f" | {rival} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def listed(page: str) -> set[tuple[str, str]]:
    """Names and kinds in the table of exceptions of a page."""
    section = page.split("## Exceptions", 1)[1].split("\n## ", 1)[0]
    rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| `")]
    return {(row[0].strip("| `"), row[1].strip()) for row in rows}


def _corrects(outcome: object) -> bool:
    return "central differences agree" in getattr(outcome, "detail", "")


def _rival(verdict: str) -> str:
    return {"right": "✓", "": "–"}.get(verdict, verdict)


def _order(record: Record) -> tuple[int, str]:
    return "op module".index(record.table), record.name.lower()


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
