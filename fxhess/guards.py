"""For which values a captured program holds: small programs that compute again what it was told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn

from fxhess import _kept, _traced
from fxhess.errors import CaptureError
from fxhess.outputs import Given
from fxhess.reads import Read, asking
from fxhess.sources import Reader, Source


class Guard:
    """Holds where each of ``reads`` gets the answer it got at capture.  ``module`` computes their
    operands, one after the other, from those inputs of the program that it ``takes`` (x and all
    constants if ``varying``) and the tensors of ``sources``; ``names`` tells for each read what it
    depends on."""

    def __init__(
        self,
        module: fx.GraphModule,
        takes: Sequence[int],
        sources: Sequence[Source],
        model: nn.Module,
        reads: Sequence[Read],
        names: Sequence[Sequence[str]],
        varying: bool,
    ) -> None:
        self.module = module
        self.takes = list(takes)
        self.sources = list(sources)
        self.read = Reader(sources, model)
        self.reads = list(reads)
        self.names = names
        self.varying = varying
        self._messages = [_CHANGED.format(read) for read in self.reads]
        # Copies of the tensors for which it held last, replaced at once.
        self._known: tuple[torch.Tensor, ...] | None = None

    @classmethod
    def of(
        cls,
        graph: fx.Graph,
        constants: Sequence[Given],
        sources: Sequence[Source],
        model: nn.Module,
        reads: Sequence[Read],
        watched: Sequence[Sequence[fx.Node]],
        varying: bool,
    ) -> Guard | None:
        """The guard of those ``reads`` that depend on samples, or of those that do not."""
        chosen = [i for i, read in enumerate(reads) if read.varying == varying]
        if not chosen:
            return None
        operands = [node for i in chosen for node in watched[i]]
        needed = _traced.ancestors(*operands)
        every = [n for n in graph.nodes if n.op == "placeholder"]
        inputs, places = every[: 1 + len(constants)], every[1 + len(constants) :]
        takes = [i for i, place in enumerate(inputs) if varying or place in needed]
        own = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        kept = [(n, s) for n, s in zip(places, sources, strict=True) if n in needed]
        for node in [inputs[i] for i in takes] + [n for n, _ in kept]:
            copies[node] = own.node_copy(node)
        for node in graph.nodes:
            if node in needed and node.op not in ("placeholder", "output"):
                copies[node] = own.node_copy(node, copies.__getitem__)
        own.output(tuple(copies[n] for n in operands))
        module = _kept.module_of(own, "Guard")
        named = list(zip(inputs, ["x", *(c.name for c in constants)], strict=True))
        named += [(n, ".".join(s.path) or "a constant") for n, s in kept]
        names = [
            [name for place, name in named if place in _traced.ancestors(*watched[i])]
            for i in chosen
        ]
        own_reads = [reads[i] for i in chosen]
        return cls(module, takes, [s for _, s in kept], model, own_reads, names, varying)

    def _operands(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [t.detach() for t in (*(inputs[i] for i in self.takes), *self.read())]

    def holds(self, inputs: Sequence[torch.Tensor]) -> bool:
        """Whether the program is right for these inputs (x, then the constants) and the model's
        tensors as they are now."""
        with torch.no_grad():
            tensors = self._operands(inputs)
            if self.varying:
                return self._agree(tensors)
            known = self._known
            if known is not None and all(map(_equal, tensors, known)):
                return True
            if not self._agree(tensors):
                return False
            self._known = tuple(t.clone() for t in tensors)
            return True

    def _agree(self, tensors: Sequence[torch.Tensor]) -> bool:
        try:
            found = split(self.module(*tensors), self.reads)
        except (RuntimeError, IndexError):  # what was done after another answer cannot be done now
            return False
        return all(read.holds(own) for read, own in zip(self.reads, found, strict=True))

    def demand(self, inputs: Sequence[torch.Tensor], module: fx.GraphModule | None = None) -> None:
        """While PyTorch traces the call: make it part of the program that the operands are those
        seen.  Otherwise it raises a RuntimeError when it runs.  ``module``: one that computes the
        operands for a batch of samples."""
        if not torch.compiler.is_dynamo_compiling() and asking():
            raise CaptureError(
                "a transformed model whose structure depends on values runs inside of another one",
                where=self.reads[0].origin,
                hint="call it outside, or transform the model that does not contain it",
            )
        found = split((module or self.module)(*self._operands(inputs)), self.reads)
        for read, own, message in zip(self.reads, found, self._messages, strict=True):
            for now, seen in zip(own, read.operands, strict=True):
                _traced.demand((now == seen).all(), message)


_CHANGED = (
    "fxhess: the structure of the model has changed since it was compiled or exported, where it"
    " read {}; call the module uncompiled once with the new values, then compile or export again"
)


def split(
    operands: torch.Tensor | Sequence[torch.Tensor], reads: Sequence[Read]
) -> list[tuple[torch.Tensor, ...]]:
    """The operands of each read, from those of all."""
    parts, at = [], 0
    operands = [operands] if isinstance(operands, torch.Tensor) else operands
    for read in reads:
        parts.append(tuple(operands[at : at + len(read.operands)]))
        at += len(read.operands)
    return parts


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


@dataclass(frozen=True)
class Structure:
    """What a program was told of values: ``constant`` guards what all samples share, ``varying``
    x and what is given for each."""

    constant: Guard | None
    varying: Guard | None

    @classmethod
    def of(
        cls,
        graph_module: fx.GraphModule,
        constants: Sequence[Given],
        sources: Sequence[Source],
        model: nn.Module,
        reads: Sequence[Read],
    ) -> Structure | None:
        """Split a traced graph that returns the result and the operands of ``reads``: these become
        guards of their own, the graph returns the result alone."""
        graph = graph_module.graph
        output = next(n for n in graph.nodes if n.op == "output")
        ((result, watched),) = output.args
        output.args = (result,)
        structure = None
        if reads:
            guards = [
                Guard.of(graph, constants, sources, model, reads, watched, varying)
                for varying in (False, True)
            ]
            structure = cls(*guards)
            graph.eliminate_dead_code()
        _kept.recompiled(graph_module)
        return structure

    @property
    def guards(self) -> list[Guard]:
        return [g for g in (self.constant, self.varying) if g is not None]

    @property
    def reads(self) -> list[Read]:
        return [read for guard in self.guards for read in guard.reads]

    def demand(self, inputs: Sequence[torch.Tensor], matcher: fx.GraphModule | None = None) -> None:
        """See :meth:`Guard.demand`; ``matcher`` is for what varies."""
        for guard in self.guards:
            guard.demand(inputs, matcher if guard.varying else None)

    def notes(self, captures: int) -> list[str]:
        """For ``explain``: what was read, of what, and how often the model was captured."""
        found = [
            f"guarded: {read}, of {', '.join(names)}"
            for guard in self.guards
            for read, names in zip(guard.reads, guard.names, strict=True)
        ]
        times = "once" if captures == 1 else f"{captures} times"
        return [*found, f"captured {times} so far, for values like these"]

    def holds(self, inputs: Sequence[torch.Tensor]) -> bool:
        """Whether the program is right for these inputs and the model's tensors as they are now."""
        return all(guard.holds(inputs) for guard in self.guards)
