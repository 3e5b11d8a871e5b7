"""For which values a captured program holds: small programs that compute again what it was told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn

from fxhess import _traced
from fxhess.reads import Read
from fxhess.sources import Source, read_tensors


class Guard:
    """Holds where each of ``reads`` gets the answer it got at capture.  ``module`` computes their
    operands, one after the other, from x (if ``varying``) and the tensors of ``sources``."""

    def __init__(
        self,
        module: fx.GraphModule,
        sources: Sequence[Source],
        reads: Sequence[Read],
        varying: bool,
    ) -> None:
        self.module = module
        self.sources = list(sources)
        self.reads = list(reads)
        self.varying = varying
        # Copies of the tensors for which it held last, replaced at once.
        self._known: tuple[torch.Tensor, ...] | None = None

    @classmethod
    def of(
        cls,
        graph: fx.Graph,
        sources: Sequence[Source],
        reads: Sequence[Read],
        watched: Sequence[Sequence[fx.Node]],
        varying: bool,
    ) -> Guard | None:
        """The guard of those ``reads`` that depend on x, or of those that do not."""
        chosen = [i for i, read in enumerate(reads) if read.varying == varying]
        if not chosen:
            return None
        operands = [node for i in chosen for node in watched[i]]
        needed = _traced.ancestors(*operands)
        x, *places = [n for n in graph.nodes if n.op == "placeholder"]
        own = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        kept = [(n, s) for n, s in zip(places, sources, strict=True) if n in needed]
        for node in ([x] if varying else []) + [n for n, _ in kept]:
            copies[node] = own.node_copy(node)
        for node in graph.nodes:
            if node in needed and node.op not in ("placeholder", "output"):
                copies[node] = own.node_copy(node, copies.__getitem__)
        own.output(tuple(copies[n] for n in operands))
        module = fx.GraphModule(nn.Module(), own, "Guard")
        return cls(module, [s for _, s in kept], [reads[i] for i in chosen], varying)

    def operands(
        self, x: torch.Tensor, tensors: Sequence[torch.Tensor]
    ) -> list[tuple[torch.Tensor, ...]]:
        """What each read asks about."""
        found = self.module(*([x] if self.varying else []), *tensors)
        return split(found, self.reads)

    def holds(self, model: nn.Module, x: torch.Tensor) -> bool:
        """Whether the program is right for this x and the model's tensors as they are now."""
        with torch.no_grad():
            tensors = [t.detach() for t in read_tensors(self.sources, model)]
            if self.varying:
                return self._agree(x.detach(), tensors)
            known = self._known
            if known is not None and all(map(_equal, tensors, known)):
                return True
            if not self._agree(x, tensors):
                return False
            self._known = tuple(t.clone() for t in tensors)
            return True

    def _agree(self, x: torch.Tensor, tensors: Sequence[torch.Tensor]) -> bool:
        found = self.operands(x, tensors)
        return all(read.holds(own) for read, own in zip(self.reads, found, strict=True))

    def demand(self, x: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
        """Inside a trace by somebody else: make it part of the program that the operands are those
        seen.  Otherwise it raises a RuntimeError when it runs."""
        found = self.operands(x.detach(), [t.detach() for t in tensors])
        for read, own in zip(self.reads, found, strict=True):
            for now, seen in zip(own, read.operands, strict=True):
                torch._assert_async((now == seen).all(), _CHANGED.format(read))


_CHANGED = (
    "fxhess: the structure of the model has changed since it was compiled or exported, where it read"
    " {}; call the module uncompiled once with the new values, then compile or export again"
)


def split(
    operands: Sequence[torch.Tensor], reads: Sequence[Read]
) -> list[tuple[torch.Tensor, ...]]:
    """The operands of each read, from those of all."""
    parts, at = [], 0
    for read in reads:
        parts.append(tuple(operands[at : at + len(read.operands)]))
        at += len(read.operands)
    return parts


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


@dataclass(frozen=True)
class Structure:
    """What a program was told of values: ``constant`` guards the model's tensors, ``varying`` x."""

    constant: Guard | None
    varying: Guard | None

    @classmethod
    def of(
        cls, graph_module: fx.GraphModule, sources: Sequence[Source], reads: Sequence[Read]
    ) -> Structure | None:
        """Split a traced graph that returns the result and the operands of ``reads``: these become
        guards of their own, the graph returns the result alone."""
        graph = graph_module.graph
        output = next(n for n in graph.nodes if n.op == "output")
        ((result, watched),) = output.args
        output.args = (result,)
        structure = None
        if reads:
            guards = [Guard.of(graph, sources, reads, watched, v) for v in (False, True)]
            structure = cls(*guards)
            graph.eliminate_dead_code()
        graph_module.recompile()
        return structure

    @property
    def guards(self) -> list[Guard]:
        return [g for g in (self.constant, self.varying) if g is not None]

    @property
    def reads(self) -> list[Read]:
        return [read for guard in self.guards for read in guard.reads]

    def holds(self, model: nn.Module, x: torch.Tensor) -> bool:
        """Whether the program is right for this x and the model's tensors as they are now."""
        return all(guard.holds(model, x) for guard in self.guards)
