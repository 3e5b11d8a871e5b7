"""What the compiler did, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import fx

from fxhess import cost
from fxhess.emit import ORIGIN, ROLE, VAL, Emitter, Var

if TYPE_CHECKING:
    from fxhess.pipeline import Options, Program


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
    """The plan for inputs of one shape; ``str()`` is a table for a terminal."""

    shape: tuple[int, ...]
    outputs: tuple[str, ...]
    summed: bool
    vector: bool
    bases: tuple[str, ...]
    rows: tuple[Row, ...]
    contractions: tuple[tuple[str, str, str, int], ...]
    operations: int
    flops: int
    peak_bytes: int
    predicted: float
    notes: tuple[str, ...]

    @classmethod
    def of(cls, program: Program, x: torch.Tensor, options: Options) -> Explanation:
        """Read the plan off a program."""
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
        notes = list(program.notes)
        if "hessian" in options.outputs and not rows:
            notes.append(
                "no operation is curved: the model is affine (or piecewise linear) in x, and H is"
                " zero almost everywhere"
            )
        if program.summed:
            notes.append("the model returns a plain sum over the batch of separate terms")
        contractions = tuple(
            (
                n.name,
                n.meta.get(ROLE, ""),
                " @ ".join(str(list(i.meta[VAL].shape)) for i in n.all_input_nodes[:2]),
                cost.flops(n),
            )
            for n in nodes
            if cost.name_of(n) in ("matmul", "mm", "bmm", "linear", "convolution")
        )
        rates = cost.rates_for(x.device, x.dtype)
        return cls(
            tuple(x.shape), options.outputs, program.summed, program.vector, tuple(program.bases),
            rows, contractions, len(nodes), sum(map(cost.flops, nodes)), cost.peak_bytes(nodes),
            cost.total(nodes, rates), tuple(notes),
        )  # fmt: skip

    def __str__(self) -> str:
        bases = " -> ".join(self.bases)
        lines = [
            f"{', '.join(self.outputs)} at x of shape {list(self.shape)}"
            + (" (vector outputs)" if self.vector else ""),
            f"{self.operations} operations, {_si(self.flops)}FLOP, about"
            f" {_si(self.peak_bytes)}B at the peak, {self.predicted * 1e3:.3g} ms predicted",
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
