"""``python -m benchmarks.outputs``: what each output costs, in gradients and in memory.

A gradient of fxhess is the unit of time.  Laplacians stand beside those of folx (JAX), the forward
Laplacian of R. Li et al. (Nature Machine Intelligence 6 (2024) 209).  All of a model's rows are
measured in one process, in interleaved rounds, every value checked against double backward in
float64; weights are frozen.  What must hold is checked, and said where it does not: no more memory
than one Hessian for what never holds one, and at most five gradients for a Hessian-vector product.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm

import fxhess
from benchmarks import models
from benchmarks.load import BUSY, watch_others
from benchmarks.measure import MIN_SECONDS, TOLERANCES, reference, seconds
from benchmarks.memory import peak_bytes
from benchmarks.record import machine
from benchmarks.rivals import Problem
from benchmarks.workloads import WORKLOADS, Workload

__all__ = ["CASES", "Row", "broken", "main", "measure"]

CHECKED = 3
MOST_GRADIENTS = 5.0  # of a product of H and a vector
WITHOUT_H = ("laplacian", "diagonal", "quadratic", "hvp")  # these never hold [B, d, d]
ALONE = 8 << 20  # bytes of a Hessian above which a peak tells whether there is one
FOLX = "folx"


class Electrons(nn.Module):
    """``[*batch, n, 3]`` to log psi, ``[*batch]``: layers of each electron that see the mean of all
    (as FermiNet's do), one of self-attention (as Psiformer's), and an envelope."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter = nn.Linear(4, width)
        self.own = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.others = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width)
        self.leave = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``x: [*batch, n, 3]`` to ``[*batch]``."""
        r = x.square().sum(-1, keepdim=True).sqrt()
        h = torch.tanh(self.enter(torch.cat([x, r], -1)))
        for own, others in zip(self.own, self.others, strict=True):
            h = h + torch.tanh(own(h) + others(h.mean(-2, keepdim=True)))
        q, k, v = self.qkv(h).chunk(3, -1)
        h = h + (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
        return self.leave(torch.tanh(h)).sum((-1, -2)) - r.sum((-1, -2))


NAMES = ("headline", "pinn", "wide", "deep-set", "pairwise", "glm", "encoder")
CASES = [
    Workload(
        "laplacian-mlp",
        "tanh net 50-768-768-512-512-1",
        lambda: models.tanh_net(50, 768, 768, 512, 512, 1),
        (64, 50),
    ),
    Workload("electrons", "16 electrons, width 64, attention", lambda: Electrons(64), (64, 16, 3)),
    *(w for w in WORKLOADS if w.name in NAMES),
]


@dataclass
class Row:
    """One output of one workload: seconds of the whole batch, peak bytes of a call with its result,
    largest deviation over the largest entry; ``hessian``: bytes of ``[B, d, d]``."""

    workload: str
    output: str
    times: list[float] = field(default_factory=list)
    peak: int = 0
    error: float = 0.0
    hessian: int = 0

    @property
    def time(self) -> float:
        """The median time."""
        return median(self.times)


Call = Callable[[Tensor, Tensor], Any]  # of x and a vector for each sample


def ours(workload: Workload, model: nn.Module) -> dict[str, Call]:
    """Every output, as a user calls it."""
    n = workload.event_ndim

    def plain(name: str, **options: Any) -> Call:
        derived = fxhess.transform(model, name, event_ndim=n, **options)
        if name in ("hvp", "quadratic"):
            return lambda x, v: derived(x, vector=v)
        return lambda x, v: derived(x)

    names = ("gradient", "hessian", "laplacian", "diagonal", "hvp", "quadratic")
    return {
        **{name: plain(name) for name in names},
        "laplacian compiled": plain("laplacian", compile=True),
    }


def folx(workload: Workload, model: nn.Module) -> tuple[Call, Callable[[Tensor], Any]]:
    """Its forward Laplacian, jitted over the batch, and how to bring a batch into JAX."""
    import jax
    import jax.numpy as jnp
    from folx import ForwardLaplacianOperator

    from benchmarks import twins

    jax.config.update("jax_default_matmul_precision", "highest")
    weights = {k: jnp.asarray(t.numpy()) for k, t in model.state_dict().items()}
    f = electrons_twin if isinstance(model, Electrons) else twins.twin_of(model)

    def laplacian(weights: Any, x: Any) -> Any:
        shape = x.shape
        flat = ForwardLaplacianOperator(0)(lambda s: f(weights, s.reshape(shape)))
        return flat(x.reshape(-1))[0]

    batched = jax.jit(jax.vmap(laplacian, in_axes=(None, 0)))
    call = lambda x, v: batched(weights, x).block_until_ready()  # noqa: E731
    return call, lambda x: jnp.asarray(x.numpy())


def electrons_twin(p: Any, x: Any) -> Any:
    """``Electrons`` in JAX, for one sample."""
    import jax
    import jax.numpy as jnp

    from benchmarks.twins import dense

    r = jnp.linalg.norm(x, axis=-1, keepdims=True)
    h = jnp.tanh(dense(p, "enter", jnp.concatenate([x, r], -1)))
    for i in range(2):
        mean = h.mean(-2, keepdims=True) @ p[f"others.{i}.weight"].T
        h = h + jnp.tanh(dense(p, f"own.{i}", h) + mean)
    q, k, v = jnp.split(dense(p, "qkv", h), 3, axis=-1)
    h = h + jax.nn.softmax(q @ k.T / q.shape[-1] ** 0.5, axis=-1) @ v
    return dense(p, "leave", jnp.tanh(h)).sum() - r.sum()


def expected(name: str, H: Tensor, g: Tensor, v: Tensor) -> Tensor:
    """An output, from Hessians ``[B, n, n]``, gradients ``[B, n]`` and vectors ``[B, n]``."""
    product = (H @ v[..., None])[..., 0]
    match name.split()[0]:
        case "gradient":
            return g
        case "hessian":
            return H
        case "diagonal":
            return H.diagonal(dim1=-2, dim2=-1)
        case "hvp":
            return product
        case "quadratic":
            return (v * product).sum(-1)
    return H.diagonal(dim1=-2, dim2=-1).sum(-1)


def measure(workload: Workload, rounds: int, with_folx: bool) -> list[Row]:
    """All rows of a workload.

    Raises:
        ArithmeticError: a value is wrong.
    """
    model = workload.make_model("cpu")
    problem = Problem(workload, model, "cpu")
    x, v = workload.make_x(0, "cpu"), workload.make_x(1, "cpu")
    some, n = x[:CHECKED], workload.event_size
    H = reference(problem, some).reshape(-1, n, n)
    f = problem.double().sample_function()
    g = torch.stack([torch.autograd.functional.jacobian(f, s.double()).flatten() for s in some])
    calls = ours(workload, model)
    prepare: dict[str, Callable[[Tensor], Any]] = {}
    if with_folx:
        calls[FOLX], prepare[FOLX] = folx(workload, model)
    rows, repeats = {}, {}
    for name, call in calls.items():
        given = prepare.get(name, lambda t: t)(x)
        got = torch.tensor(numpy.asarray(call(given, v)), dtype=torch.float64)[:CHECKED]
        want = expected(name, H, g, v[:CHECKED].flatten(1).double())
        error = ((got.reshape(want.shape) - want).abs().max() / want.abs().max()).item()
        if not error <= TOLERANCES[workload.dtype]:
            raise ArithmeticError(f"{workload.name}, {name}: off by {error:.2g}")
        rows[name] = Row(workload.name, name, error=error,
                         hessian=len(x) * n * n * x.element_size())  # fmt: skip
        warm = seconds(lambda t, call=call: call(t, v), given, "cpu")  # type: ignore[misc]
        repeats[name] = max(1, round(MIN_SECONDS / warm))
    for k in range(rounds):
        x = workload.make_x(k, "cpu")
        for name, call in calls.items():
            given = prepare.get(name, lambda t: t)(x)
            run = lambda t, call=call: call(t, v)  # type: ignore[misc] # noqa: E731
            seconds(run, given, "cpu")
            rows[name].times.append(seconds(run, given, "cpu", repeats[name]))
    for name, call in calls.items():
        given = prepare.get(name, lambda t: t)(x)
        rows[name].peak = max(peak_bytes(lambda: call(given, v), "cpu") for _ in range(3))  # noqa: B023
    return list(rows.values())


def broken(rows: Sequence[Row]) -> list[str]:
    """What must hold of a workload's rows and does not."""
    found = {row.output: row for row in rows}
    unit = found["gradient"].time
    said = []
    for name in WITHOUT_H:
        row = found[name]
        if row.hessian > ALONE and row.peak >= row.hessian:
            said.append(f"{row.workload}, {name}: {row.peak >> 20} MB, as much as H")
    if found["hvp"].time > MOST_GRADIENTS * unit:
        said.append(f"{found['hvp'].workload}, hvp: {found['hvp'].time / unit:.1f} gradients")
    return said


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Workload, output, milliseconds, gradients, megabytes, those of H, error."""
    units = {r.workload: r.time for r in rows if r.output == "gradient"}
    return [
        [
            row.workload, row.output, f"{row.time * 1e3:.3g}",
            f"{row.time / units[row.workload]:.2g}",
            f"{row.peak / 1e6:.0f}", f"{row.hessian / 1e6:.0f}", f"{row.error:.0e}",
        ]
        for row in rows
    ]  # fmt: skip


HEAD = ("workload", "output", "ms", "gradients", "peak MB", "MB of H", "error")


def in_a_process(name: str, arguments: argparse.Namespace) -> list[Row]:
    """A workload's rows, measured in a process of its own."""
    given = ["--one", name, "--rounds", str(arguments.rounds)]
    given += [] if arguments.folx else ["--no-folx"]
    child = [sys.executable, "-m", "benchmarks.outputs", *given]
    done = subprocess.run(child, stdout=subprocess.PIPE, text=True, check=True)
    return [Row(**row) for row in json.loads(done.stdout.splitlines()[-1])]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 if something does not hold that must."""
    names = [w.name for w in CASES]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.outputs", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--no-folx", dest="folx", action="store_false", help="without JAX")
    parser.add_argument("--one", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), metavar="DIR")
    arguments = parser.parse_args(argv)
    if arguments.one:
        workload = next(w for w in CASES if w.name == arguments.one)
        print(json.dumps([asdict(r) for r in measure(workload, arguments.rounds, arguments.folx)]))
        return 0
    given = sys.argv[1:] if argv is None else argv
    share_of_others = watch_others()
    rows = [r for name in tqdm(arguments.only) for r in in_a_process(name, arguments)]
    others = share_of_others()
    said = [text for name in arguments.only
            for text in broken([r for r in rows if r.workload == name])]  # fmt: skip
    facts = machine("cpu")
    title = f"{facts['processor']}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}"
    shown = Table(*HEAD, title=title)
    for line in table(rows):
        shown.add_row(*line)
    console = Console(width=120)
    console.print(shown)
    for text in said:
        console.print(f"[red]does not hold: {text}[/red]")
    if others > BUSY:
        console.print(f"[red]Others used {others:.0%} of the processors; times may be off.[/red]")
    command = shlex.join(["python", "-m", "benchmarks.outputs", *given])
    arguments.out.mkdir(parents=True, exist_ok=True)
    stem = arguments.out / "outputs"
    record = {"command": command, "machine": facts, "torch": torch.__version__,
              "used_by_others": round(others, 3), "rows": [asdict(r) for r in rows],
              "does_not_hold": said}  # fmt: skip
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    lines = ["| " + " | ".join(line) + " |" for line in (HEAD, ["---"] * len(HEAD), *table(rows))]
    about = " ".join((__doc__ or "").split("\n\n", 1)[1].split())
    stem.with_suffix(".md").write_text(
        f"`{command}`, {title}.\n\n{about}\n\n" + "\n".join(lines) + "\n", encoding="utf-8"
    )
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
