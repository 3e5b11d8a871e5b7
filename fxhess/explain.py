"""What the compiler did, as a table."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import fx

from fxhess import cost
from fxhess.clock import median_seconds
from fxhess.emit import ORIGIN, ROLE, VAL, VARIES, Emitter, Var
from fxhess.errors import InputError
from fxhess.rates import rates_for

if TYPE_CHECKING:
    from fxhess.pipeline import Options, Program


_MEASURING = 0.3  # seconds that runs for a measured time may take
_PRODUCTS = ("matmul", "mm", "bmm", "linear", "convolution")


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
class Explanation:
    """The plan for inputs of one shape; ``str()`` is a table for a terminal.

    ``contractions``: name, purpose, shapes and operations of each matrix product; ``flops``:
    operations in all, ``arithmetic``: those of the matrix products that every call runs (what
    depends on weights alone is kept); ``predicted``: seconds of a call by the device's rates;
    ``measured``: the median of a few calls without autograd, None where it takes too much of
    the device's memory, or more than ``max_memory``.
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

    @classmethod
    def of(
        cls,
        program: Program,
        x: torch.Tensor,
        options: Options,
        run: Callable[[torch.Tensor], object],
        structure: Sequence[str] = (),
    ) -> Explanation:
        """Read the plan off a program, and time ``run(x)``; ``structure``: notes on what it was
        told of values."""
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
        nodes = [n for n in _at(program.graph_module.graph, x).nodes if n.op.startswith("call")]
        notes = [*structure, *program.notes]
        if "hessian" in options.names and not rows:
            notes.append(
                "no operation is curved: the model is affine (or piecewise linear) in x, and H is"
                " zero almost everywhere"
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
            arithmetic=sum(cost.flops(n) for n in products if n.meta.get(VARIES, True)),
            peak_bytes=cost.peak_bytes(nodes),
            predicted=cost.total(nodes, rates_for(x.device, x.dtype)),
            measured=_measured(run, x) if written < _room(x.device) else None,
            notes=tuple(notes),
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
            f"{self.operations} operations, {_si(self.flops)}FLOP, about"
            f" {_si(self.peak_bytes)}B at the peak",
            f"{self.predicted * 1e3:.3g} ms predicted, {measured}",
            f"tangents start at: {bases}",
            "",
        ]
        if self.rows:
            lines += ["terms of H = sum J^T C J:"]
            lines += _table(
                ("curved op", "module", "ends", "at base", "structure", "line"),
                [(r.op, r.module, r.ending, r.base, r.structure, r.line) for r in self.rows],
            )
        if self.contractions:
            lines += ["", "matrix products, in order:"]
            lines += _table(
                ("name", "for", "shapes", "FLOP"),
                [(n, role, shapes, _si(f)) for n, role, shapes, f in self.contractions],
            )
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    __repr__ = __str__


def _at(graph: fx.Graph, x: torch.Tensor) -> fx.Graph:
    """The program with stand-ins of x's own batch size."""
    emitter = Emitter()
    values: dict[fx.Node, Var] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            val = node.meta[VAL] if values else x.detach().to("meta")
            values[node] = emitter.placeholder(node.name if values else "x", val)
        elif node.op != "output":
            args = fx.node.map_arg(node.args, values.__getitem__)
            kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
            with emitter.at(node.meta.get(ORIGIN), node.meta.get(ROLE, "value")):
                values[node] = emitter.create_proxy(node.op, node.target, args, kwargs)  # type: ignore[arg-type]
            values[node].node.name = node.name
    return emitter.graph


def _measured(run: Callable[[torch.Tensor], object], x: torch.Tensor) -> float | None:
    """Seconds of a call without autograd; the state of the random numbers stays as it is."""
    x = x.detach()
    with torch.no_grad(), torch.random.fork_rng([x.device] if x.is_cuda else []):
        try:
            return median_seconds(lambda: run(x), x.device, _MEASURING)
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


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(str(row[i])) for row in [header, *rows]) for i in range(len(header))]
    rendered = [
        "  " + "  ".join(str(c).ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    ]
    return [rendered[0], "  " + "  ".join("-" * w for w in widths), *rendered[1:]]


def _si(value: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} P"
