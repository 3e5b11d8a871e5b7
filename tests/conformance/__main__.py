"""``python -m tests.conformance``: judge PyTorch's tables, keep what was found, write the page."""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import torch

from . import report
from ._pytorch import Entry, entries
from .records import KINDS, examine, keep, load


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument("names", nargs="*", help="parts of names; all entries without")
    parser.add_argument("--samples", type=int, default=3, help="uses of each entry (default 3)")
    parser.add_argument("--part", default="0/1", help="i/n: every n-th entry, from the i-th")
    parser.add_argument("--only", choices=("op", "module"), help="one of the two tables")
    parser.add_argument("--ways", nargs="*", default=list(KINDS), choices=KINDS)
    parser.add_argument(
        "--results", type=Path, help="keep results there; entries that it has are not run again"
    )
    parser.add_argument("--table", type=Path, help="write the page there, from all results")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    records = load(options.results) if options.results else []
    known = {(r.table, r.name) for r in records}
    chosen = [e for e in entries() if _wanted(e, options.names, options.only)]
    part, of = map(int, options.part.split("/"))
    start = time.process_time()
    for entry in chosen[part::of]:
        if (entry.table, entry.name) in known:
            continue
        record = examine(entry, options.samples, options.ways)
        records.append(record)
        if options.results:
            keep(record, options.results)
        for line in report.complaints(record):
            print(line, flush=True)
    print(report.totals(records))
    print(f"{time.process_time() - start:.0f} s")
    if options.table:
        options.table.parent.mkdir(exist_ok=True)
        options.table.write_text(report.page(records))


def _wanted(entry: Entry, names: list[str], table: str | None) -> bool:
    return (not names or any(n in entry.name for n in names)) and table in (None, entry.table)


if __name__ == "__main__":
    main()
