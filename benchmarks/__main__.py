"""``python -m benchmarks``: run, check and show all workloads and rivals."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from tqdm import tqdm

from benchmarks import plot, report
from benchmarks.cold import measure_cold
from benchmarks.load import BUSY, watch_others
from benchmarks.rivals import OURS, RIVALS, Rival
from benchmarks.worker import Job, run_job
from benchmarks.workloads import WORKLOADS, Workload

__all__ = ["main"]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="fxhess beside its rivals; values checked."
    )
    names = ", ".join(workload.name for workload in WORKLOADS)
    parser.add_argument(
        "--only", action="append", metavar="NAME", help=f"a workload; repeatable. {names}"
    )
    rivals = ", ".join(f"'{rival.name}'" for rival in RIVALS)
    parser.add_argument("--rivals", nargs="+", metavar="NAME", help=f"instead of all: {rivals}")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, ...")
    parser.add_argument("--quick", action="store_true", help="short workloads, few rounds, no cold")
    parser.add_argument("--cold", action="store_true", help="first calls only")
    parser.add_argument(
        "--seconds", type=float, metavar="S", help="timing for each rival and workload (default 3)"
    )
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="times only")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), metavar="DIR")
    arguments = parser.parse_args(argv)
    for given, known in (
        (arguments.only, [workload.name for workload in WORKLOADS]),
        (arguments.rivals, [rival.name for rival in RIVALS]),
    ):
        unknown = [name for name in given or () if name not in known]
        if unknown:
            parser.error(f"no {', '.join(unknown)}; there are {', '.join(known)}")
    return arguments


def selected(arguments: argparse.Namespace) -> tuple[list[Workload], list[Rival]]:
    """The workloads and rivals that were asked for, in the tables' order."""
    if arguments.only:
        workloads = [w for w in WORKLOADS if w.name in arguments.only]
    else:
        workloads = [w for w in WORKLOADS if w.quick or not arguments.quick]
    if arguments.rivals:
        return workloads, [r for r in RIVALS if r.name in arguments.rivals]
    return workloads, [r for r in RIVALS if r.default]


def run_all(arguments: argparse.Namespace) -> list[report.Run]:
    """Measure what was asked for, under a progress bar that counts workloads."""
    workloads, rivals = selected(arguments)
    names = tuple(rival.name for rival in rivals)
    budget = arguments.seconds or (0.5 if arguments.quick else 3.0)
    runs = []
    with tqdm(workloads, unit="workload", dynamic_ncols=True) as bar:
        for workload in bar:
            bar.set_description(workload.name)
            job = Job(workload.name, names, arguments.device, budget, arguments.memory)
            results = run_job(job, lambda stage, rival: bar.set_postfix_str(f"{rival}: {stage}"))
            runs.append(report.Run(workload, results))
    return runs


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print, write; 1 if our own result failed or was wrong on a workload, else 0."""
    arguments = parse(argv)
    given = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", "-m", "benchmarks", *given])
    share_of_others = watch_others()
    runs = [] if arguments.cold else run_all(arguments)
    cold = {} if arguments.quick else measure_cold(processes=5)
    others = share_of_others()

    console = Console()
    if not console.is_terminal:
        console.width = 160
    facts = report.machine(arguments.device)
    where = facts.get("gpu", facts["processor"])
    title = f"{where}, {facts['torch_threads']} threads, PyTorch {torch.__version__}, float32"
    console.print(f"{title}\n")
    if others > BUSY:
        console.print(
            f"[red]Others used {others:.0%} of the processors; times may be far off.[/red]"
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    if runs:
        report.print_times(console, runs)
        report.print_memory(console, runs)
        plot.draw(arguments.out / f"{arguments.device}.png", runs, title)
    if cold:
        report.print_cold(console, cold)
    report.write_json(
        arguments.out / f"{arguments.device}.json",
        runs,
        cold,
        command=command,
        device=arguments.device,
        others=others,
    )
    console.print(f"Written to {arguments.out}")
    ours = [r for run in runs for r in run.results if r.rival == OURS]
    return 0 if all(r.failure is None and r.correct for r in ours) else 1


if __name__ == "__main__":
    sys.exit(main())
