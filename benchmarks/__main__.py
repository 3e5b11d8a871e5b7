"""``python -m benchmarks``: run, check and show all workloads and rivals."""

import argparse
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from tqdm import tqdm

import fxhess
from benchmarks import plot, record, report
from benchmarks.cold import measure_cold
from benchmarks.growth import GROWTH
from benchmarks.load import BUSY, watch_others
from benchmarks.rivals import OURS, RIVALS, STRATEGIES, Rival
from benchmarks.worker import Job, run_job
from benchmarks.workloads import WORKLOADS, Workload

__all__ = ["main"]

PATIENCE = {"strategies": 20.0, "growth": 120.0}  # seconds for a hopeless one


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="fxhess beside its rivals; values checked."
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--cold", action="store_true", help="first calls only")
    kind.add_argument(
        "--strategies", action="store_true", help="ours, planned, beside each strategy forced"
    )
    kind.add_argument(
        "--growth", action="store_true", help="time and memory over batch, inputs, depth, width"
    )
    kind.add_argument(
        "--markdown", action="store_true", help="measure nothing; the JSON written last as Markdown"
    )
    names = ", ".join(workload.name for workload in WORKLOADS)
    parser.add_argument(
        "--only", action="append", metavar="NAME", help=f"a workload; repeatable. {names}"
    )
    rivals = ", ".join(f"'{rival.name}'" for rival in RIVALS)
    parser.add_argument("--rivals", nargs="+", metavar="NAME", help=f"instead of all: {rivals}")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, ...")
    parser.add_argument("--quick", action="store_true", help="short workloads, few rounds, no cold")
    parser.add_argument(
        "--seconds", type=float, metavar="S", help="timing for each rival and workload (default 3)"
    )
    parser.add_argument(
        "--patience",
        type=float,
        metavar="S",
        help="stop a rival that shows nothing for so long (default: 20 with --strategies, 120 with"
        " --growth, else none)",
    )
    parser.add_argument(
        "--calibrated", action="store_true", help="plan by this machine's rates, measured first"
    )
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="times only")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), metavar="DIR")
    arguments = parser.parse_args(argv)
    arguments.kind = next((k for k in ("strategies", "growth") if getattr(arguments, k)), "")
    if arguments.patience is None:
        arguments.patience = PATIENCE.get(arguments.kind)
    for given, known in (
        (arguments.only, [w.name for w in (GROWTH if arguments.growth else WORKLOADS)]),
        (arguments.rivals, [rival.name for rival in RIVALS]),
    ):
        unknown = [name for name in given or () if name not in known]
        if unknown:
            parser.error(f"no {', '.join(unknown)}; there are {', '.join(known)}")
    return arguments


def selected(arguments: argparse.Namespace) -> tuple[list[Workload], list[Rival]]:
    """The workloads and rivals that were asked for, in the tables' order."""
    table = GROWTH if arguments.growth else WORKLOADS
    if arguments.only:
        workloads = [w for w in table if w.name in arguments.only]
    else:
        workloads = [w for w in table if w.quick or not arguments.quick]
    if arguments.rivals:
        return workloads, [r for r in RIVALS if r.name in arguments.rivals]
    if arguments.strategies:
        names = [OURS, *(f"{OURS} {strategy}" for strategy in STRATEGIES)]
        return workloads, [r for r in RIVALS if r.name in names]
    return workloads, [r for r in RIVALS if r.default]


@contextmanager
def rates_kept(calibrated: bool) -> Iterator[None]:
    """Inside, plans are those of the built-in rates, or of rates measured inside; whatever this
    user keeps is neither read nor written."""
    before = dict(os.environ)
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update({"FXHESS_CACHE_DIR": folder, "FXHESS_CACHE": "1" if calibrated else "0"})
        try:
            yield
        finally:
            for name in ("FXHESS_CACHE_DIR", "FXHESS_CACHE"):
                os.environ.pop(name)
                if name in before:
                    os.environ[name] = before[name]


def speeds(device: str, dtypes: set[torch.dtype], quick: bool) -> dict[torch.dtype, record.Speed]:
    """What this machine does at most, measured."""
    found = {}
    for dtype in dtypes:
        rates = fxhess.calibrate(device, dtype, seconds=1.0 if quick else 3.0)
        fastest = max(rate for _, rate in (*rates.flat, *rates.batched))
        found[dtype] = record.Speed(fastest, rates.memory)
    return found


def run_all(arguments: argparse.Namespace) -> list[record.Run]:
    """Measure what was asked for, under a progress bar that counts workloads."""
    workloads, rivals = selected(arguments)
    names = tuple(rival.name for rival in rivals)
    budget = arguments.seconds or (0.5 if arguments.quick else 3.0)
    limits = speeds(arguments.device, {w.dtype for w in workloads}, arguments.quick)
    runs = []
    with tqdm(workloads, unit="workload", dynamic_ncols=True) as bar:
        for workload in bar:
            bar.set_description(workload.name)
            job = Job(
                workload.name,
                names,
                arguments.device,
                budget,
                arguments.memory,
                arguments.patience,
            )
            found = run_job(job, lambda stage, rival: bar.set_postfix_str(f"{rival}: {stage}"))
            runs.append(record.Run.of(workload, found, limits[workload.dtype]))
    return runs


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print, write; 1 if our own result failed or was wrong on a workload, else 0."""
    arguments = parse(argv)
    path = arguments.out / "-".join(filter(None, (arguments.device, arguments.kind)))
    if arguments.markdown:
        document = record.read_json(path.with_suffix(".json"))
        print(report.markdown(document, record.runs_of(document)))
        return 0
    given = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", "-m", "benchmarks", *given])
    share_of_others = watch_others()
    with rates_kept(arguments.calibrated):
        runs = [] if arguments.cold else run_all(arguments)
        no_cold = arguments.quick or arguments.kind
        cold = {} if no_cold else measure_cold(processes=5)
    others = share_of_others()

    console = Console()
    if not console.is_terminal:
        console.width = 200
    facts = record.machine(arguments.device)
    where = facts.get("gpu", facts["processor"])
    threads = facts["torch_threads"]
    threads = f"{threads} thread" + "s" * (threads != 1)
    title = f"{where}, {threads}, PyTorch {torch.__version__}"
    console.print(f"{title}\n")
    if others > BUSY:
        console.print(
            f"[red]Others used {others:.0%} of the processors; times may be far off.[/red]"
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.strategies:
        report.print_strategies(console, runs)
    elif runs:
        report.print_times(console, runs)
        report.print_summary(console, runs)
        draw = plot.draw_growth if arguments.growth else plot.draw
        draw(path.with_suffix(".png"), runs, title)
    if cold:
        report.print_cold(console, cold)
    document = record.write_json(
        path.with_suffix(".json"),
        runs,
        cold,
        command=command,
        device=arguments.device,
        calibrated=arguments.calibrated,
        others=others,
    )
    if runs:
        path.with_suffix(".md").write_text(report.markdown(document, runs) + "\n", encoding="utf-8")
    console.print(f"Written to {arguments.out}")
    ours = [r for run in runs for r in run.results if r.rival == OURS]
    return 0 if all(r.failure is None and r.correct for r in ours) else 1


if __name__ == "__main__":
    sys.exit(main())
