"""One workload: every rival made ready, checked, timed in interleaved rounds, then its memory."""

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.memory import peak_bytes
from benchmarks.rivals import Problem, Rival, Runner
from benchmarks.workloads import Workload

__all__ = ["CHECKED_SAMPLES", "TOLERANCES", "Result", "RivalFailedError", "measure"]

CHECKED_SAMPLES = 3
TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-9}  # of the largest entry
MIN_SECONDS = 0.005  # of one measurement: shorter calls are repeated within it
MIN_ROUNDS, MAX_ROUNDS = 3, 25
MEMORY_CALLS = 3

Progress = Callable[[str, str], None]  # a stage begins, for a rival


class RivalFailedError(Exception):
    """A rival's name, and its error in one line."""

    def __init__(self, rival: str, failure: str) -> None:
        super().__init__(f"{rival}: {failure}")
        self.rival, self.failure = rival, failure


@dataclass
class Result:
    """One rival on one workload. Times in seconds for the whole batch; memory in bytes.

    Of our own plan: the operations of its matrix products, and the time that it expected.
    """

    rival: str
    failure: str | None = None  # the error's first line
    first_call: float | None = None  # tracing and compiling included
    error: float | None = None  # largest deviation over largest entry of the reference
    times: list[float] = field(default_factory=list)  # one of each round
    peak: int | None = None
    tolerance: float = 0.0  # of the error
    written: int | None = None  # the result's own bytes
    arithmetic: int | None = None
    predicted: float | None = None

    @property
    def median(self) -> float | None:
        """The median time, if there is one."""
        return statistics.median(self.times) if self.times else None

    @property
    def correct(self) -> bool:
        """Whether the values were right; false also where they were NaN."""
        return self.error is not None and self.error <= self.tolerance


def reference(problem: Problem, x: Tensor) -> Tensor:
    """Double backward in float64, one sample at a time: ``[len(x), (m,) *event, *event]``."""
    f = problem.double().sample_function()
    hessian = torch.autograd.functional.hessian
    outputs = problem.workload.outputs

    def of_one(sample: Tensor) -> Tensor:
        if outputs == 1:
            return hessian(f, sample)
        return torch.stack([hessian(lambda s, k=k: f(s)[k], sample) for k in range(outputs)])

    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        return torch.stack([of_one(sample) for sample in x.cpu().double()])


def relative_error(H: Tensor, expected: Tensor) -> float:
    """The largest deviation over the largest entry; infinite where the shapes differ."""
    if H.shape != expected.shape:
        return math.inf
    return ((H.cpu().double() - expected).abs().max() / expected.abs().max()).item()


def seconds(call: Callable[[Any], object], x: Any, device: str, repeats: int = 1) -> float:
    """Wall time of one call, the mean of ``repeats``; waits for the device before and after."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        call(x)
    wait()
    return (time.perf_counter() - start) / repeats


def first_line(error: BaseException) -> str:
    """An error in one line."""
    text = str(error).strip() or type(error).__name__
    return f"{type(error).__name__}: {text.splitlines()[0]}"


@contextlib.contextmanager
def blaming(rival: Rival) -> Iterator[None]:
    """Whatever goes wrong inside is this rival's failure."""
    try:
        yield
    except Exception as error:
        raise RivalFailedError(rival.name, first_line(error)) from error


@dataclass(frozen=True)
class Entrant:
    """A rival made ready for one problem, its values checked."""

    rival: Rival
    result: Result
    runner: Runner
    rounds: int  # how many it takes part in
    repeats: int  # calls in one measurement

    def take_part(self, x: Tensor, device: str) -> None:
        """Measure one round, after a call that is not counted: whoever ran before leaves threads
        that still spin, and caches and memory of its own."""
        prepared = self.runner.prepare(x)
        seconds(self.runner.call, prepared, device)
        self.result.times.append(seconds(self.runner.call, prepared, device, self.repeats))

    def measure_memory(self, x: Tensor, device: str) -> None:
        """Measure the peak of a call, the largest of a few: what a library keeps from one call for
        the next one is not seen as use, so that on CPUs it counts what the library states."""
        prepared = self.runner.prepare(x)
        peaks = [
            peak_bytes(lambda: self.runner.call(prepared), device) for _ in range(MEMORY_CALLS)
        ]
        if self.runner.stated is not None and device == "cpu":
            peaks.append(self.runner.stated(prepared))
        self.result.peak = max(peaks)


def make_ready(
    rival: Rival,
    problem: Problem,
    x: Tensor,
    indices: Sequence[int],
    expected: Tensor,
    budget: float,
) -> Entrant:
    """Build a rival, take its first call, check its values at ``indices``, and plan its rounds."""
    result = Result(rival.name, tolerance=TOLERANCES[problem.workload.dtype])
    start = time.perf_counter()
    runner = rival.build(problem)
    built = time.perf_counter() - start
    prepared = runner.prepare(x)
    result.first_call = built + seconds(runner.call, prepared, problem.device)
    H = runner.to_torch(runner.call(prepared))
    result.written = H.numel() * H.element_size()
    result.error = relative_error(H[list(indices)], expected)
    if H.dtype != problem.workload.dtype:
        raise TypeError(f"the result is {H.dtype}, not {problem.workload.dtype}")
    del H
    if runner.explain is not None:
        plan = runner.explain(x)
        result.arithmetic, result.predicted = plan.arithmetic, plan.predicted
    warm = seconds(runner.call, prepared, problem.device)
    rounds = int(budget / max(warm, MIN_SECONDS))
    return Entrant(
        rival,
        result,
        runner,
        rounds=max(MIN_ROUNDS, min(MAX_ROUNDS, rounds)),
        repeats=math.ceil(MIN_SECONDS / max(warm, 1e-6)),
    )


def measure(
    workload: Workload,
    rivals: Sequence[Rival],
    device: str,
    budget: float,
    memory: bool,
    progress: Progress,
) -> list[Result]:
    """All rivals on one workload; ``budget`` is the seconds of timing for each rival.

    Interleaved: in each round, every rival that takes part runs once on the same fresh data, each
    round beginning with another one. A slow rival takes part in fewer rounds, spread over all of
    them. Raises ``RivalFailedError``.
    """
    problem = Problem(workload, workload.make_model(device), device)
    x = workload.make_x(0, device)
    spread = max(1, len(x) // CHECKED_SAMPLES)
    indices = range(0, len(x), spread)[:CHECKED_SAMPLES]
    expected = reference(problem, x[list(indices)])

    entrants: list[Entrant] = []
    for rival in rivals:
        progress("first call", rival.name)
        with blaming(rival):
            entrants.append(make_ready(rival, problem, x, indices, expected, budget))

    total = max(entrant.rounds for entrant in entrants)
    for index in range(total):
        x = workload.make_x(index + 1, device)
        first = index % len(entrants)
        for entrant in [*entrants[first:], *entrants[:first]]:
            if index * entrant.rounds % total < entrant.rounds:  # evenly, `rounds` times in all
                progress(f"round {index + 1} of {total}", entrant.rival.name)
                with blaming(entrant.rival):
                    entrant.take_part(x, device)

    for entrant in entrants:
        unseen = entrant.rival.own_allocator and device.startswith("cuda")
        if memory and not unseen:
            progress("memory", entrant.rival.name)
            with blaming(entrant.rival):
                entrant.measure_memory(x, device)
    return [entrant.result for entrant in entrants]
