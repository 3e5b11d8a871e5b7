"""``fxhess demo``: the founding cases and one real data set, checked and timed beside autograd.

Every row is one model and one batch. The check compares a few samples with double backward in
float64, one sample at a time; the times are medians of interleaved rounds:

- *fxhess*: ``fxhess.transform(model)(x)``, after its first call, which has a column of its own;
- *vmap(hessian)*: ``torch.func.vmap(torch.func.hessian(f))(x)``;
- *loop*: ``torch.autograd.functional.hessian(f, x[i])`` for one i after the other, measured on a
  few samples and multiplied up to the batch.
"""

import argparse
import csv
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fxhess
from fxhess import oracle

__all__ = ["SUMMARY", "add_arguments", "run"]

SUMMARY = "run the founding cases and a real data set, checked and timed beside autograd"

CHECKED_SAMPLES = 3
LOOP_SAMPLES = 2  # of each round
MIN_ROUNDS, MAX_ROUNDS = 2, 7
CASE_SECONDS = 5.0  # no new round begins after these
TOLERANCE = 1e-4  # of the largest entry of H, in float32
MIN_SECONDS = 0.01  # of one measurement: shorter calls are repeated within it

Model = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """A model and its batch ``x: [B, *event]``, the event being the last ``event_ndim`` axes."""

    name: str
    model: Model
    x: Tensor
    event_ndim: int = 1
    in_float64: Model | None = None  # for a function; a module is copied
    note: str = ""


@dataclass(frozen=True)
class Outcome:
    """What one case gave; times in seconds, for the whole batch."""

    shape: tuple[int, ...]
    error: float  # largest deviation from float64 double backward, over the largest entry
    symmetric: bool  # bit for bit
    first: float
    fxhess: float
    vmap: float
    loop: float  # multiplied up from LOOP_SAMPLES

    @property
    def passed(self) -> bool:
        """Whether H is right and symmetric (false also where the error is NaN)."""
        return self.symmetric and self.error <= TOLERANCE


class Standardize(nn.Module):
    """``(x - mean) / std`` by feature, so that Hessians come out in the data's own units."""

    mean: Tensor
    std: Tensor

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", x.mean(0))
        self.register_buffer("std", x.std(0))

    def forward(self, x: Tensor) -> Tensor:
        """``x: [*batch, d]`` to the same shape."""
        return (x - self.mean) / self.std


def tanh_net(*widths: int) -> nn.Sequential:
    """A fully connected net with tanh between its layers."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def iris() -> tuple[Tensor, Tensor]:
    """Fisher's iris measurements ``[150, 4]`` in centimetres, the species ``[150]`` as 0, 1, 2.

    Source: R. A. Fisher, The use of multiple measurements in taxonomic problems, Annals of
    Eugenics 7 (1936) 179-188, table I.
    """
    text = resources.files("fxhess").joinpath("data", "iris.csv").read_text(encoding="utf-8")
    rows = [[float(entry) for entry in row] for row in list(csv.reader(text.splitlines()))[1:]]
    table = torch.tensor(rows)
    return table[:, :4], table[:, 4].long()


def iris_case(device: str) -> Case:
    """Per-sample Hessians of the three log-probabilities of a classifier trained here on iris."""
    x, species = (data.to(device) for data in iris())
    model = nn.Sequential(Standardize(x), tanh_net(4, 16, 3), nn.LogSoftmax(-1)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.nll_loss(model(x), species).backward()
        optimizer.step()
    with torch.no_grad():
        accuracy = (model(x).argmax(-1) == species).float().mean().item()
    note = (
        f"iris: 150 flowers, 4 lengths in cm; a 4-16-3 tanh classifier trained here for a moment "
        f"({accuracy:.0%} of its data right); H of each class's log-probability."
    )
    return Case("iris classifier", model.requires_grad_(False), x, note=note)


def quadratic(Q: Tensor) -> Model:
    """A scalar of the whole batch that is a sum over samples: ``H_b = (Q + Q^T) / 2`` for each."""
    return lambda x: 0.5 * torch.tensordot(x, x @ Q)


def cases(device: str) -> list[Case]:
    """The founding cases at their real sizes, and the real data set.

    Weights are frozen for all ways alike: Hessians are wanted, no gradients through them.
    """
    torch.manual_seed(0)
    per_column = nn.Sequential(nn.Flatten(-2), tanh_net(20, 64, 64, 1))
    nets: list[tuple[str, nn.Module, tuple[int, ...]]] = [
        ("tanh net 200-200-200-1", tanh_net(200, 200, 200, 1), (500, 200)),
        ("tanh net 10-32-1", tanh_net(10, 32, 1), (32, 10)),
        ("tanh net 20-64-64-1", per_column, (320, 20, 1)),
    ]
    Q = torch.randn(16, 16, device=device)
    return [
        *(
            Case(
                name,
                net.to(device).requires_grad_(False),
                torch.randn(shape, device=device),
                len(shape) - 1,
            )
            for name, net, shape in nets
        ),
        Case(
            "0.5*tensordot(x, x @ Q)",
            quadratic(Q),
            torch.randn(64, 16, device=device),
            in_float64=quadratic(Q.double()),
        ),
        iris_case(device),
    ]


def on_one_sample(model: Model) -> Model:
    """``f: [*event] -> []`` or ``[m]`` from a model of batches, by a batch of one."""

    def f(sample: Tensor) -> Tensor:
        y = model(sample.unsqueeze(0))
        return y.reshape(()) if y.numel() == 1 else y.squeeze(0)

    return f


def loop_hessian(f: Model, sample: Tensor) -> Tensor:
    """The Hessian of ``f`` at one sample by double backward, with an axis m first for ``[m]``."""
    if (y := f(sample)).ndim == 0:
        return torch.autograd.functional.hessian(f, sample)
    by_output = [
        torch.autograd.functional.hessian(lambda s, k=k: f(s)[k], sample) for k in range(len(y))
    ]
    return torch.stack(by_output)


def relative_error(H: Tensor, reference: Tensor) -> float:
    """The largest deviation over the largest entry; infinite where the shapes differ."""
    if H.shape != reference.shape:
        return float("inf")
    return ((H.double() - reference).abs().max() / reference.abs().max()).item()


def seconds(call: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Wall time of one call, the mean of ``repeats`` in a row; waits for the device both times."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    wait()
    return (time.perf_counter() - start) / repeats


def measure(case: Case) -> Outcome:
    """Run, check and time one case."""
    x, device = case.x, case.x.device
    hess = fxhess.transform(case.model, event_ndim=case.event_ndim)
    first = seconds(lambda: hess(x), device)
    f = on_one_sample(case.model)
    eager = torch.func.vmap(torch.func.hessian(f))
    rivals: list[Callable[[], object]] = [
        lambda: hess(x),
        lambda: eager(x),
        lambda: [loop_hessian(f, x[i]) for i in range(LOOP_SAMPLES)],
    ]
    repeats = [1 + int(MIN_SECONDS / max(seconds(call, device), 1e-6)) for call in rivals]
    rounds: list[list[float]] = []
    start = time.perf_counter()
    while len(rounds) < MIN_ROUNDS or (
        len(rounds) < MAX_ROUNDS and time.perf_counter() - start < CASE_SECONDS
    ):
        rounds.append([seconds(call, device, n) for call, n in zip(rivals, repeats, strict=True)])
    ours, vmap, loop = (statistics.median(column) for column in zip(*rounds, strict=True))

    H = hess(x)
    spread = len(x) // CHECKED_SAMPLES
    indices = [i * spread for i in range(CHECKED_SAMPLES)]
    exact = case.in_float64 or oracle.double(case.model)
    reference = oracle.hessian(exact, x[indices].double(), case.event_ndim)
    error = relative_error(H[indices], reference)
    n = x.shape[1:].numel()
    flat = H.reshape(-1, n, n)
    return Outcome(
        shape=tuple(H.shape),
        error=error,
        symmetric=torch.equal(flat, flat.mT),
        first=first,
        fxhess=ours,
        vmap=vmap,
        loop=loop * len(x) / LOOP_SAMPLES,
    )


def in_units(value: float) -> str:
    """A time in seconds, readable."""
    if value < 1e-3:
        return f"{value * 1e6:.0f} µs"
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"


def new_table() -> Table:
    """The table's head."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("model", "x", "H"):
        table.add_column(name, no_wrap=True)
    for name in ("max rel. error", "first call", "fxhess", "vmap(hessian)", "loop*"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("check")
    return table


def row(case: Case, outcome: Outcome) -> list[str]:
    """One case's cells; beside each rival's time, in how many of ours it is."""

    def beside(value: float) -> str:
        ratio = value / outcome.fxhess
        return f"{in_units(value)} [bold]({ratio:,.{1 if ratio < 10 else 0}f}x)[/bold]"

    verdict = "[green]passed[/green]" if outcome.passed else "[red]FAILED[/red]"
    if not outcome.symmetric:
        verdict += " (not symmetric)"
    return [
        case.name,
        "×".join(map(str, case.x.shape)),
        "×".join(map(str, outcome.shape)),
        f"{outcome.error:.1e}",
        in_units(outcome.first),
        f"[bold]{in_units(outcome.fxhess)}[/bold]",
        beside(outcome.vmap),
        beside(outcome.loop),
        verdict,
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``fxhess demo``."""
    parser.add_argument("--device", default="cpu", help="where to run: cpu (default), cuda, ...")


def run(arguments: argparse.Namespace) -> int:
    """Run all cases, print the table, and return 0, or 1 if any check failed."""
    console = Console()
    if not console.is_terminal:
        console.width = 150  # a pipe has no width; the table keeps its lines
    console.print(
        f"Per-sample Hessians, float32, {arguments.device}, {torch.get_num_threads()} threads, "
        f"PyTorch {torch.__version__}; interleaved rounds, {MIN_ROUNDS} to {MAX_ROUNDS}, medians.\n"
    )
    table, notes, all_passed = new_table(), [], True
    with console.status("preparing") as status:
        for case in cases(arguments.device):
            status.update(f"{case.name}, x {list(case.x.shape)}")
            try:
                outcome = measure(case)
            except Exception as error:  # one case that fails must not hide the others
                table.add_row(case.name, "×".join(map(str, case.x.shape)), "[red]FAILED[/red]")
                notes.append(f"{case.name}: {type(error).__name__}: {error}")
                all_passed = False
                continue
            table.add_row(*row(case, outcome))
            notes.append(case.note)
            all_passed &= outcome.passed
    console.print(table)
    console.print(
        f"In brackets: that time over ours. Max rel. error: against double backward in float64, "
        f"one sample at a time,\non {CHECKED_SAMPLES} samples; H must also equal its transpose bit "
        f"for bit.\n"
        f"*loop: autograd.functional.hessian one sample after the other, measured on "
        f"{LOOP_SAMPLES} samples a round and multiplied up to the batch."
    )
    for note in filter(None, notes):
        console.print(note)
    if not all_passed:
        console.print(f"[red]A check failed[/red] (tolerance {TOLERANCE:.0e}).")
    return 0 if all_passed else 1
