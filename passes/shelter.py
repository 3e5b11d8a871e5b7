"""Sheltering: no infinite derivative by what does not depend on x.

*Needs* canonical facts, and every value written.  *Gives*, for operations of which some operands'
entries may be constants and that have points without finite derivatives, what their rules see: a
harmless argument wherever the true one is a constant::

    y = sqrt(where(m, x, 0))      ==>      sqrt' is taken of where(m, x, 0.5);  y as it is

Without it ``sqrt'(0) = inf`` meets the tangent 0 of the constant, and inf 0 = nan.  An entry
depends on x where the pushforwards of linear operations (``where``, writing at an index, a slice)
and of piecewise linear ones (``relu``, ``clamp``) and scalings make something of positive numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxhess.contraction import Factor, contract
from fxhess.emit import ORIGIN, VAL, Var
from fxhess.facts import Canonical, is_active, is_repeatable, known_fact
from fxhess.kinds import Call, Elementwise, Label, Linear, Multilinear, Smooth
from fxhess.passes.choice import is_piecewise_linear, moved
from fxhess.passes.dependence import Dependence, depends, scales
from fxhess.passes.forms import Forms
from fxhess.passes.harmless import Harmless
from fxhess.structure import Structured

Write = Callable[[fx.Node, Callable[[fx.Node], Any]], Any]


def shelter(canonical: Canonical, forms: Forms, write: Write) -> dict[fx.Node, Call]:
    """What the rules of some operations see in place of their operands; ``write(node, values)``
    writes a node's operation again, with other operands."""
    dependence = Dependence(canonical)
    if not dependence.sheltered:
        return {}
    return _Writer(canonical, forms, write, dependence).run()


class _Writer:
    """Writes masks of what depends on x, and calls with harmless arguments elsewhere."""

    def __init__(
        self, canonical: Canonical, forms: Forms, write: Write, dependence: Dependence
    ) -> None:
        self.canonical = canonical
        self.forms = forms
        self.write = write
        self.dependence = dependence
        self.emitter = forms.emitter
        self.harmless = Harmless(canonical, self.emitter)
        self.masks: dict[fx.Node, Var | None] = {}

    def run(self) -> dict[fx.Node, Call]:
        calls = {}
        for node in self._needed():
            with self.emitter.at(node.meta.get(ORIGIN), "value"):
                mask = self.masks[node] = self._mask(node)
                if node in self.dependence.sheltered and mask is not None:
                    calls[node] = self._call(node, mask)
        return calls

    def _needed(self) -> list[fx.Node]:
        """The nodes to shelter and what their masks are made of, in order."""
        needed = set(self.dependence.sheltered)
        for node in reversed(list(self.canonical.nodes())):
            if node in needed:
                needed.update(filter(self.dependence.varied, known_fact(node).operands))
        return [node for node in self.canonical.nodes() if node in needed]

    # --- what depends on x ------------------------------------------------------------------------

    def _mask(self, node: fx.Node) -> Var | None:
        """``[*batch, *event]`` with sizes 1 where it is the same; None where all depends on x."""
        known = known_fact(node)
        kind = known.kind
        if isinstance(kind, Linear) and not kind.fold:
            return self._pushed(node)
        total: Any = None
        for i in range(len(known.operands)):
            if not depends(known, i):
                continue
            part = self._through(node, i)
            if part is None:
                return None
            total = part if total is None else total | part
        return total  # type: ignore[no-any-return]

    def _through(self, node: fx.Node, i: int) -> Var | None:
        """The entries that depend on x through operand i."""
        known = known_fact(node)
        kind = known.kind
        mask = self.masks.get(known.operands[i])
        rank = len(self.canonical.event(node))
        output: list[Label] = [("e", k) for k in range(rank)]
        factors: list[Factor] = []
        if isinstance(kind, (Elementwise, Multilinear)):
            inputs, output, _ = self.forms.labelled(node)
            source = inputs[i]
        else:
            source = moved(known.axes[i])
        if mask is not None:
            factors.append((self._number(mask), [*self.forms.batch(), *source]))
        if isinstance(kind, Elementwise) and is_piecewise_linear(kind, i):
            slope, labels = self.forms.pointwise(node, (i,))
            if isinstance(slope, Var):
                factors.append((self._number(slope != 0), labels))  # type: ignore[arg-type]
        if scales(self.canonical, node):
            factors += [
                (self._number(value != 0), labels)  # type: ignore[arg-type]
                for value, labels in self.forms.others(node, {i})
                if isinstance(value, Var)
            ]
        if not factors:
            return None
        count = contract(
            self.emitter, factors, [*self.forms.batch(), *output], None, self.forms.batch_size
        )
        return count > 0 if isinstance(count, Var) else None  # type: ignore[return-value, operator]

    def _number(self, mask: Var) -> Var:
        return mask.to(self.forms.algebra.like.dtype)  # type: ignore[no-any-return]

    def _pushed(self, node: fx.Node) -> Var:
        """Through a linear operation: of positive numbers where its operands depend on x."""
        tangents: list[Structured | None] = []
        for operand in known_fact(node).operands:
            if not is_active(operand):
                tangents.append(None)
                continue
            weights: Any = self.harmless.weights(operand)
            mask: Any = self.masks.get(operand)
            core = weights if mask is None else weights * mask.to(weights.dtype)
            event = self.canonical.event(operand)
            tangents.append(Structured(core, (None,) * len(event), (), event))
        image: Any = self.forms.algebra.tensor(self.forms.push(node, tangents))
        return image != 0  # type: ignore[no-any-return]

    # --- harmless arguments -----------------------------------------------------------------------

    def _call(self, node: fx.Node, mask: Var) -> Call:
        known = known_fact(node)
        before = self.forms.call(node)
        replaced: dict[fx.Node, Any] = {}
        for i, (operand, value) in enumerate(zip(known.operands, before.operands, strict=True)):
            dtype = operand.meta[VAL].dtype
            if not (dtype.is_floating_point or dtype.is_complex):
                continue
            if isinstance(known.kind, Smooth):
                own = self.harmless.spread(self.forms, node, i, mask)
                point: Any = self.harmless.regular(operand)
            else:
                own, point = mask, self.dependence.sheltered[node][i]
            replaced[operand] = value if own is None else torch.where(own, value, point)

        def lookup(n: fx.Node) -> Any:
            return replaced[n] if n in replaced else self.forms.values[n]

        if is_repeatable(node) or not isinstance(known.kind, Smooth):
            y = self.write(node, lookup)
        else:
            y = torch.where(mask, before.y, 0.0)  # type: ignore[arg-type]
        return Call(
            fx.node.map_arg(known.args, lookup),  # type: ignore[arg-type]
            fx.node.map_arg(dict(known.kwargs), lookup),  # type: ignore[arg-type]
            tuple(map(lookup, known.operands)),
            y,  # type: ignore[arg-type]
        )
