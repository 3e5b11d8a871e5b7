"""Axes by name: where the batch is in every value, also where the model merged it with others.

Each axis of a captured value is a *group* of *atoms*: atoms are batch axes or event axes that the
canonical value keeps apart, so ``x.view(-1, 16)`` of ``[B, 3, 16]`` is the groups ``(b, 3), (16,)``
of the canonical ``[B, 3, 16]`` and costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy
import torch
from torch import fx

from fxhess import contraction
from fxhess.emit import ORIGIN, Emitter, Var
from fxhess.errors import InternalError, Origin, SampleMixingError
from fxhess.facts import FACT, Fact, fact
from fxhess.kinds import Kind, Linear, Multilinear


@dataclass(frozen=True, eq=False)
class Atom:
    """An axis of a canonical value: batch axis number ``batch``, or an event axis of ``size``."""

    size: int
    batch: int | None = None

    def __repr__(self) -> str:
        return str(self.size) if self.batch is None else f"b{self.batch}"


Group: TypeAlias = tuple[Atom, ...]


@dataclass(frozen=True)
class Laid:
    """A captured value that depends on x: its canonical form, and its axes as groups of atoms.

    ``summed``: batch axes over which it is a plain sum of per-sample terms.
    """

    var: Var
    groups: tuple[Group, ...]
    summed: frozenset[int] = frozenset()

    @property
    def event(self) -> tuple[Atom, ...]:
        return tuple(a for group in self.groups for a in group if a.batch is None)

    @property
    def batches(self) -> frozenset[int]:
        return frozenset(a.batch for g in self.groups for a in g if a.batch is not None)


def fresh(group: Group) -> Group:
    """The same axes as new atoms: within one value every event atom is another object."""
    return tuple(Atom(a.size) if a.batch is None else a for a in group)


class Layouts:
    """Writes canonical nodes that only rearrange axes, for the axes signatures to build on."""

    def __init__(self, emitter: Emitter, symbols: Sequence[Any], implied: bool = False) -> None:
        self.emitter = emitter
        self.symbols = symbols
        self.implied = implied  # all values have the batch axes, though the captured ones do not
        self.nb = len(symbols)
        self.x: Var | None = None
        self.origin: Origin | None = None
        self._batch_sizes: dict[int, Var] = {}

    # --- sizes ------------------------------------------------------------------------------

    def batch_size(self, index: int) -> Var:
        """The size of a batch axis as a value of the graph."""
        if index not in self._batch_sizes:
            assert self.x is not None
            with self.emitter.graph.inserting_after(self._last_placeholder()):
                self._batch_sizes[index] = self.emitter.call(
                    torch.ops.aten.sym_size.int, self.x, index
                )
        return self._batch_sizes[index]

    def _last_placeholder(self) -> Any:
        return [n for n in self.emitter.graph.nodes if n.op == "placeholder"][-1]

    def extent(self, group: Group) -> Any:
        """Total size of a group, as a sympy expression in the batch symbols."""
        return sympy.Mul(*(a.size if a.batch is None else self.symbols[a.batch] for a in group))

    def size_of(self, group: Group) -> Any:
        """Total size of a group, as a number or a value of the graph."""
        total: Any = math.prod(a.size for a in group if a.batch is None)
        for atom in group:
            if atom.batch is not None:
                size = self.batch_size(atom.batch)
                total = size if isinstance(total, int) and total == 1 else size * total
        return total

    def number(self, size: Any) -> Any:
        """A size that depends on the batch as a tensor like any other factor: 1 / 0 is no error."""
        if not isinstance(size, Var):
            return size
        return self.emitter.call(torch.Tensor.new_full, self.x, (), size)

    # --- nodes ------------------------------------------------------------------------------

    def annotate(
        self,
        var: Var,
        kind: Kind,
        operands: Sequence[Var],
        axes: Sequence[tuple[int | None, ...]],
        args: tuple[Any, ...] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        mixed: int = 0,
        operator: Any = None,
        derived: bool = False,
    ) -> Var:
        """Attach the fact that differentiation reads; ``args`` are the node's own by default."""
        nodes: Any = fx.node.map_aggregate(
            (var.node.args, var.node.kwargs) if args is None else (args, dict(kwargs or {})),
            lambda v: v.node if isinstance(v, Var) else v,
        )
        var.node.meta[FACT] = Fact(
            kind,
            tuple(v.node for v in operands),
            tuple(axes),
            nodes[0],
            nodes[1],
            mixed,
            operator or var.node.target,
            derived=derived,
        )
        var.node.meta[ORIGIN] = self.origin
        return var

    def equation(
        self,
        operands: Sequence[Var],
        inputs: Sequence[Sequence[Any]],
        output: Sequence[Any],
        *,
        scale: Any = 1.0,
        sizes: dict[Any, int] | None = None,
    ) -> Var:
        """A multilinear node over labelled canonical axes."""
        if isinstance(scale, Var) and not isinstance(scale.val, torch.Tensor):
            scale = self.number(scale)
        kind = Multilinear(tuple(map(tuple, inputs)), tuple(output), scale, dict(sizes or {}))
        var = self.emitter.call(
            contraction.evaluate, kind.inputs, kind.output, kind.sizes, scale, *operands
        )
        if not any(fact(v.node) for v in operands):
            return var
        event_out = list(output[self.nb :])
        axes = []
        for labels in inputs:
            own = labels[self.nb :]
            axes.append(tuple(event_out.index(a) if a in event_out else None for a in own))
        return self.annotate(var, kind, operands, axes)

    def split(self, laid: Laid, atom: Atom, sizes: Sequence[int]) -> tuple[Laid, Group]:
        """Cut one event atom into several."""
        event = laid.event
        at = event.index(atom)
        parts = tuple(Atom(s) for s in sizes)
        dim = at - len(event)
        var = self.emitter.call(torch.unflatten, laid.var, dim, tuple(sizes))
        after = len(sizes) - 1
        axes = tuple(i if i < at else (None if i == at else i + after) for i in range(len(event)))
        first = at - (len(event) + after)
        last = first + after
        kind = Linear(pull=lambda g, c: torch.flatten(g, first, last), moves=True)
        self.annotate(var, kind, [laid.var], [axes])
        groups = tuple(
            tuple(p for a in group for p in (parts if a is atom else (a,))) for group in laid.groups
        )
        return Laid(var, groups, laid.summed), parts

    def merge(self, laid: Laid, axis: int) -> Laid:
        """Make one event atom of an axis made of several."""
        group = laid.groups[axis]
        if len(group) <= 1:
            return laid
        if any(a.batch is not None for a in group):
            raise self.mixing("works along an axis that the batch was merged into")
        event = laid.event
        at, n = event.index(group[0]), len(group)
        if event[at : at + n] != group:
            raise InternalError("atoms of one axis are not adjacent", where=self.origin)
        first, last = at - len(event), at + n - 1 - len(event)
        sizes = tuple(a.size for a in group)
        var = self.emitter.call(torch.flatten, laid.var, first, last)
        kind = Linear(pull=lambda g, c: torch.unflatten(g, last, sizes), moves=True)
        axes = tuple(
            i if i < at else (None if i < at + n else i - n + 1) for i in range(len(event))
        )
        self.annotate(var, kind, [laid.var], [axes])
        whole = (Atom(math.prod(sizes)),)
        groups = (*laid.groups[:axis], whole, *laid.groups[axis + 1 :])
        return Laid(var, groups, laid.summed)

    def arrange(self, var: Var, labels: Sequence[Any], target: Sequence[Any], *, laid: bool) -> Var:
        """Permute, drop and insert axes of size 1 so that the axes read as ``target``."""
        labels, target = list(labels), list(target)
        if labels == target:
            return var
        if not laid and labels == target[len(target) - len(labels) :]:
            return var  # broadcasting aligns it by itself
        return self.equation([var], [labels], target, sizes=dict.fromkeys(target, 1))

    def mixing(self, what: str) -> SampleMixingError:
        return SampleMixingError(
            f"samples of the batch see each other: this operation {what}",
            where=self.origin,
            hint="compute each sample on its own (batch norm: model.eval()), or name more"
            " trailing axes as one sample with event_ndim=",
        )
