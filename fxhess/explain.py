"""What the compiler did, as a table."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxhess import _torch, cost
from fxhess.clock import median_seconds, synchronize
from fxhess.emit import ORIGIN, ROLE, SYMMETRIC, VAL, VARIES, Emitter, Var
from fxhess.errors import InputError
from fxhess.execute import PLAIN, Running
from fxhess.listing import plain_table, terminal_width
from fxhess.page import fragment, page
from fxhess.rates import Rates, rates_for
from fxhess.steps import Step
from fxhess.symmetric import use_symmetric_products
from fxhess.units import si

if TYPE_CHECKING:
    from fxhess.pipeline import Options, Program


_MEASURING = 0.3  # seconds that runs for a measured time may take
_ROUNDS = 5  # at most, of runs operation by operation
_PRODUCTS = ("matmul", "mm", "bmm", "linear", "convolution", "symmetric_product")


@dataclass(frozen=True)
class Row:
    """One term of the Hessian's sum: the curved operation, its module and line, how its term
    ends (closed, or carried from a later base), at which base, and its structure."""

    op: str
    module: str
    line: str
    ending: str
    base: str
    structure: str


@dataclass(frozen=True)
class Operation:
    """One operation of the model: what became of it, and what that costs for this batch.

    ``predicted`` and ``measured``: seconds of all that it became in the program (measured one by
    one, the whole batch at once; None where that takes too much memory); ``flops``; ``bytes``: what
    it writes; ``hoisted``: how many of its ``step.nodes`` depend on weights alone and are not run
    again.
    """

    step: Step
    predicted: float
    measured: float | None
    flops: int
    bytes: int
    hoisted: int


@dataclass(frozen=True)
class Explanation:
    """The plan for inputs of one shape.

    ``str()`` is a table for a terminal, :meth:`write_html` a page to look at; a notebook shows a
    picture.  ``steps``: the operations of the model; ``contractions``: name, purpose, shapes and
    operations of each matrix product; ``flops``: operations in all, ``arithmetic``: those of the
    matrix products that every call runs (what depends on weights alone is kept); ``predicted``:
    seconds of a call by the device's rates; ``measured``: the median of a few calls without
    autograd, None where it takes too much of the device's memory, or more than ``max_memory``;
    ``tiles``: slices of the batch that such a call runs in; ``kept_bytes``: what depends on weights
    alone.
    """

    shape: tuple[int, ...]
    outputs: tuple[str, ...]
    summed: bool
    vector: bool
    bases: tuple[str, ...]
    rows: tuple[Row, ...]
    contractions: tuple[tuple[str, str, str, int], ...]
    operations: int
    flops: int
    arithmetic: int
    peak_bytes: int
    predicted: float
    measured: float | None
    notes: tuple[str, ...]
    steps: tuple[Operation, ...] = ()
    tiles: int = 1
    kept_bytes: int = 0

    @classmethod
    def of(
        cls,
        program: Program,
        inputs: Sequence[torch.Tensor],
        options: Options,
        run: Callable[[], object],
        structure: Sequence[str] = (),
        running: Running = PLAIN,
    ) -> Explanation:
        """Read the plan off a program, and time ``run()``; ``inputs``: what the program takes, x
        first; ``structure``: notes on what it was told of values."""
        x = inputs[0]
        rows = tuple(
            Row(
                origin.op.removeprefix("aten.") if origin else "",
                origin.module if origin else "",
                origin.line if origin else "",
                kind,
                base,
                structure,
            )
            for origin, kind, base, structure in program.terms
        )
        nodes = [
            n for n in _at(program.graph_module.graph, inputs).nodes if n.op.startswith("call")
        ]
        notes = [*structure, *program.notes]
        if "hessian" in options.names and not rows:
            notes.append(
                "no operation is curved: the model is affine (or piecewise linear) in x, and H is"
                " zero almost everywhere"
            )
        if program.one_size:
            notes.append(
                "the program is for this size of the batch alone, and is not run in tiles: a tensor"
                " of the model, or one given for all samples, has an entry for each; as an argument"
                " that is batched it would serve all sizes"
            )
        if program.summed:
            notes.append("the model returns a plain sum over the batch of separate terms")
        products = [n for n in nodes if cost.name_of(n) in _PRODUCTS]
        contractions = tuple(
            (
                n.name,
                n.meta.get(ROLE, ""),
                " @ ".join(str(list(i.meta[VAL].shape)) for i in n.all_input_nodes[:2]),
                cost.flops(n),
            )
            for n in products
        )
        (results,) = next(n for n in program.graph_module.graph.nodes if n.op == "output").args
        names = [n.name for n in (results if isinstance(results, tuple) else (results,))]  # type: ignore[union-attr]
        written = sum(_bytes(n.meta[VAL]) for n in nodes if n.name in names)
        peak = cost.peak_bytes(nodes)
        room = min(_room(x.device), running.max_memory or math.inf)
        seconds = _profile(program.graph_module, inputs) if peak < room else None
        execution = program.execution
        tiled = execution is not None and execution.worthwhile(x)
        return cls(
            shape=tuple(x.shape),
            outputs=options.names,
            summed=program.summed,
            vector=program.vector,
            bases=tuple(program.bases),
            rows=rows,
            contractions=contractions,
            operations=len(nodes),
            flops=sum(map(cost.flops, nodes)),
            arithmetic=_arithmetic(_at(program.graph_module.graph, inputs)),
            peak_bytes=peak,
            predicted=cost.total(nodes, rates_for(x.device, x.dtype)),
            measured=_measured(run, x) if written < _room(x.device) else None,
            notes=tuple(notes),
            steps=tuple(_operations(program.steps, nodes, rates_for(x.device, x.dtype), seconds)),
            tiles=execution.tiles(x, running.max_memory) if execution is not None and tiled else 1,
            kept_bytes=execution.hoisted if execution is not None and tiled else 0,
        )

    def __str__(self) -> str:
        bases = " -> ".join(self.bases)
        measured = (
            "not measured: it takes too much memory"
            if self.measured is None
            else f"{self.measured * 1e3:.3g} ms measured (without autograd)"
        )
        lines = [
            f"{', '.join(self.outputs)} at x of shape {list(self.shape)}"
            + (" (vector outputs)" if self.vector else ""),
            f"{self.operations} operations, {si(self.flops)}FLOP, about"
            f" {si(self.peak_bytes)}B at the peak",
            f"{self.predicted * 1e3:.3g} ms predicted, {measured}",
            f"tangents start at: {bases}",
            *self._running(),
            "",
        ]
        if self.rows:
            lines += ["terms of H = sum J^T C J:"]
            equal = ((row, len([*group])) for row, group in itertools.groupby(self.rows))
            lines += plain_table(
                ("curved op", "module", "ends", "at base", "structure", "line"),
                [
                    (r.op, r.module, f"{r.ending} x{n}" if n > 1 else r.ending, r.base, r.structure,
                     r.line)
                    for r, n in equal
                ],
                terminal_width(),
            )  # fmt: skip
        if self.contractions:
            lines += ["", "matrix products, in order:"]
            lines += plain_table(
                ("name", "for", "shapes", "FLOP"),
                [(n, role, shapes, si(f)) for n, role, shapes, f in self.contractions],
                terminal_width(),
            )
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    __repr__ = __str__

    def html(self) -> str:
        """One HTML page that needs nothing else: the operations of the model as a picture (kind,
        structure of the tangents, how terms end, cost and memory, the user's lines), predicted
        beside measured time, tables."""
        return page(self)

    def write_html(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`html` to a file.

        Raises:
            OSError: it cannot be written.
        """
        with open(path, "w", encoding="utf-8") as file:
            file.write(self.html())

    def _repr_html_(self) -> str:
        return fragment(self)

    def _running(self) -> list[str]:
        """How a call without autograd runs."""
        kept = f", {si(self.kept_bytes)}B that depend on weights alone" if self.kept_bytes else ""
        return [f"runs in {self.tiles} tiles of the batch{kept}"] if self.tiles > 1 or kept else []


def _at(graph: fx.Graph, inputs: Sequence[torch.Tensor]) -> fx.Graph:
    """The program with stand-ins of the inputs' own batch size."""
    emitter = Emitter()
    values: dict[fx.Node, Var] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            val = inputs[len(values)].detach().to("meta")
            values[node] = emitter.placeholder(node.name, val, bool(node.meta[VARIES]))
        elif node.op != "output":
            args = fx.node.map_arg(node.args, values.__getitem__)
            kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
            with emitter.at(node.meta.get(ORIGIN), node.meta.get(ROLE, "value")):
                values[node] = emitter.create_proxy(node.op, node.target, args, kwargs)  # type: ignore[arg-type]
            values[node].node.name = node.name
            values[node].node.meta[SYMMETRIC] = node.meta.get(SYMMETRIC, False)
    return emitter.graph


def _arithmetic(graph: fx.Graph) -> int:
    """Operations of the products that every call without autograd runs."""
    nodes = use_symmetric_products(graph).nodes
    products = [n for n in nodes if n.op == "call_function" and cost.name_of(n) in _PRODUCTS]
    return sum(cost.flops(n) for n in products if n.meta.get(VARIES, True))


def _operations(
    steps: Sequence[Step],
    nodes: Sequence[fx.Node],
    rates: Rates,
    seconds: Mapping[str, float] | None,
) -> Iterator[Operation]:
    by_name = {node.name: node for node in nodes}
    for step in steps:
        own = [by_name[name] for name in step.nodes if name in by_name]
        each = [n for n in own if n.meta.get(VARIES, True)]  # what a call computes anew
        yield Operation(
            step,
            cost.total(own, rates),
            None if seconds is None else sum(seconds.get(n.name, 0.0) for n in each),
            sum(map(cost.flops, own)),
            sum(map(cost.own_bytes, own)),
            len(own) - len(each),
        )


class _Stopwatch(fx.Interpreter):
    """Runs a program operation by operation; ``seconds``: the shortest time of each so far."""

    def __init__(self, module: fx.GraphModule, device: torch.device) -> None:
        super().__init__(module)
        self.seconds: dict[str, float] = {}
        self._device = device

    def run_node(self, n: fx.Node) -> Any:
        if not n.op.startswith("call"):
            return super().run_node(n)
        synchronize(self._device)
        start = time.perf_counter()
        result = super().run_node(n)
        synchronize(self._device)
        taken = time.perf_counter() - start
        self.seconds[n.name] = min(taken, self.seconds.get(n.name, math.inf))
        return result


def _profile(module: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> dict[str, float] | None:
    """Seconds of each operation of the plain program, by name."""
    x = inputs[0]
    stopwatch = _Stopwatch(module, x.device)
    start = time.perf_counter()
    with torch.no_grad(), _torch.as_written(x.device), _random_kept(x):
        try:
            for _ in range(_ROUNDS):
                stopwatch.run(*[t.detach() for t in inputs])
                if time.perf_counter() - start > _MEASURING:
                    break
        except torch.OutOfMemoryError:
            return None
    return stopwatch.seconds


def _random_kept(x: torch.Tensor) -> AbstractContextManager[None]:
    """The state of the random numbers stays as it is."""
    return torch.random.fork_rng([x.device] if x.is_cuda else [])


def _measured(run: Callable[[], object], x: torch.Tensor) -> float | None:
    """Seconds of a call without autograd; the state of the random numbers stays as it is."""
    with torch.no_grad(), _random_kept(x):
        try:
            return median_seconds(run, x.device, _MEASURING)
        except (torch.OutOfMemoryError, InputError):  # the device's memory, or a limit on it
            return None


def _room(device: torch.device) -> float:
    """Bytes that a result may take to be made for measuring only."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 4
    except (AttributeError, ValueError, OSError):  # a system without these names
        return 1 << 30


def _bytes(value: torch.Tensor) -> int:
    return value.numel() * value.element_size()
