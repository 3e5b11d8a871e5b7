"""Conformance with PyTorch's own table of operators: ``python -m tests.conformance``.

Every entry of PyTorch's operator table that it says can be differentiated twice is used as one
sample without batch axes (``event_ndim = x.ndim``), behind a nonlinear function, in float64, and
compared with double backward; where they differ, with central differences.  Prints a line
for each entry that is not right and a table of counts; ``--write FILE`` keeps it as Markdown.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
import types
import unittest
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fxhess
from fxhess import oracle

MAX_ENTRIES = 130  # of x: the referee takes one backward an entry
TOLERANCE = 1e-8


@dataclass(frozen=True)
class Case:
    """One use of one operator: a scalar function of one sample, and the sample."""

    name: str
    function: Callable[[torch.Tensor], torch.Tensor]
    x: torch.Tensor


@dataclass(frozen=True)
class Outcome:
    """``verdict``: 'right', 'wrong', 'refused' (by fxhess), 'no referee' (double backward itself
    fails) or 'no case' (no small real sample)."""

    name: str
    verdict: str
    detail: str = ""
    seconds: float = 0.0


# --- PyTorch's table: the only place that touches torch.testing._internal -----------------------


def entries() -> list[Any]:
    """The operators that PyTorch says have a double backward in float64."""
    if (
        "expecttest" not in sys.modules and importlib.util.find_spec("expecttest") is None
    ):  # its base class is all that is needed
        stub: Any = types.ModuleType("expecttest")
        stub.TestCase = unittest.TestCase
        sys.modules.setdefault("expecttest", stub)
    from torch.testing._internal.common_methods_invocations import op_db

    return [
        op
        for op in op_db
        if op.supports_autograd and op.supports_gradgrad and torch.float64 in op.dtypes
    ]


def name_of(entry: Any) -> str:
    variant = f".{entry.variant_test_name}" if entry.variant_test_name else ""
    return f"{entry.name}{variant}"


def cases(entry: Any, limit: int) -> Iterator[Case]:
    """The first ``limit`` samples whose first operand is a small real tensor."""
    found = 0
    for sample in entry.sample_inputs("cpu", torch.float64, requires_grad=True):
        first = sample.input
        listed = isinstance(first, (list, tuple))
        x = first[0] if listed and first else first
        if not isinstance(x, torch.Tensor) or not x.is_floating_point() or not x.requires_grad:
            continue
        if not 0 < x.numel() <= MAX_ENTRIES or x.layout != torch.strided:
            continue
        yield Case(name_of(entry), _function(entry, sample, listed), x.detach().clone())
        found += 1
        if found == limit:
            return


def _function(entry: Any, sample: Any, listed: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.detach()
        if isinstance(value, (list, tuple)):
            return type(value)(plain(v) for v in value) if type(value) in (list, tuple) else value
        return value

    rest = [plain(v) for v in sample.input[1:]] if listed else []
    args = [plain(v) for v in sample.args]
    kwargs = {k: plain(v) for k, v in sample.kwargs.items()}

    def function(x: torch.Tensor) -> torch.Tensor:
        given = [x, *rest] if listed else x
        return _scalar(sample.output_process_fn_grad(entry(given, *args, **kwargs)))

    return function


def _scalar(result: Any) -> torch.Tensor:
    """A nonlinear function of all differentiable results."""
    results = result if isinstance(result, (list, tuple)) else [result]
    total: Any = 0.0
    for y in results:
        if not isinstance(y, torch.Tensor) or not (y.is_floating_point() or y.is_complex()):
            continue
        if y.is_complex():
            y = torch.view_as_real(y.resolve_conj())
        total = total + torch.sin(y).sum()
    return total


# --- comparing ------------------------------------------------------------------------------------


def judge(case: Case) -> Outcome:
    """Compare fxhess with double backward on one case."""
    start = time.perf_counter()

    def outcome(verdict: str, detail: str = "") -> Outcome:
        return Outcome(case.name, verdict, detail, time.perf_counter() - start)

    rank = case.x.ndim
    try:
        if not torch.equal(case.function(case.x).nan_to_num(), case.function(case.x).nan_to_num()):
            return outcome("no referee", "draws random numbers")
        want = oracle.hessian(case.function, case.x, rank)
        n = case.x.numel()
        square = want.reshape(n, n)  # its symmetric part: some conventions break the symmetry
        want = ((square + square.T) / 2).reshape(want.shape)
    except Exception as error:
        return outcome("no referee", _short(error))
    try:
        hess = fxhess.transform(case.function, event_ndim=rank)
        got = hess(case.x)
    except Exception as error:
        return outcome("refused", _short(error))
    if got.shape != want.shape:
        return outcome("wrong", f"shape {tuple(got.shape)}, not {tuple(want.shape)}")
    finite = want.isfinite()
    scale = max(1.0, float(want[finite].abs().max()) if finite.any() else 1.0)
    error = float((got - want)[finite].abs().max()) if finite.any() else 0.0
    if not error <= TOLERANCE * scale:
        twice = oracle.differences(case.function, case.x, rank)
        if torch.allclose(got, twice, rtol=1e-5, atol=1e-5 * scale):
            return outcome("right", "double backward is not; central differences agree")
        if not torch.equal(got.nan_to_num(), hess(case.x).nan_to_num()):
            return outcome("no referee", "draws random numbers")
        return outcome("wrong", f"off by {error:.2g} where entries reach {scale:.2g}")
    return outcome("right", "" if finite.all() else "double backward is not finite")


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


_ORDER = ("wrong", "refused", "no referee", "no case", "right")


def run(chosen: Sequence[Any], limit: int) -> Iterator[Outcome]:
    """The worst outcome of each entry."""
    for entry in chosen:
        try:
            outcomes = [judge(case) for case in cases(entry, limit)]
        except Exception as error:  # the table's own samples could not be made
            outcomes = [Outcome(name_of(entry), "no case", _short(error))]
        outcomes = outcomes or [Outcome(name_of(entry), "no case")]
        yield min(outcomes, key=lambda o: _ORDER.index(o.verdict))


def table(outcomes: Sequence[Outcome]) -> str:
    """Counts, and every entry that is not right, as Markdown."""
    counts = Counter(o.verdict for o in outcomes)
    lines = ["| verdict | entries |", "| --- | --- |"]
    lines += [f"| {verdict} | {counts[verdict]} |" for verdict in reversed(_ORDER)]
    lines += ["", "| entry | verdict | why |", "| --- | --- | --- |"]
    lines += [
        f"| {o.name} | {o.verdict} | {o.detail.replace('|', ' ')} |"
        for o in outcomes
        if o.verdict != "right"
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="parts of names; all entries without")
    parser.add_argument("--samples", type=int, default=2, help="samples for each entry")
    parser.add_argument("--part", default="0/1", help="i/n: every n-th entry, from the i-th")
    parser.add_argument("--write", type=Path, help="write the table there")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    part, of = map(int, options.part.split("/"))
    outcomes = []
    chosen = [
        entry
        for entry in entries()
        if not options.names or any(part in name_of(entry) for part in options.names)
    ]
    outcomes = []
    for outcome in run(chosen[part::of], options.samples):
        outcomes.append(outcome)
        if outcome.verdict != "right":
            print(f"{outcome.name:40} {outcome.verdict:10} {outcome.detail}", flush=True)
    text = table(outcomes)
    print(text.split("\n\n")[0])
    print(f"{sum(o.seconds for o in outcomes):.0f} s")
    if options.write:
        options.write.write_text(text)


if __name__ == "__main__":
    main()
