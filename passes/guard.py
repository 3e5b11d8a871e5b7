"""Guarding: no infinite derivative from what is not chosen.

*Needs* canonical facts, and every value written.  *Gives*, for operations of which some results
may not be chosen later on and that have points without finite derivatives, a value and arguments
that are harmless wherever the result is not chosen::

    y = where(x > 0, log(x), x)      ==>      log is taken at where(x > 0, x, 0.5)

Without it ``log'(0) = inf`` meets the adjoint 0 of what was not chosen, and inf 0 = nan; also in a
backward pass through the result.  What is chosen has the same value and derivatives, to the bit,
and every choice is made by the true values.

An entry is *live* where it has a path to the output: found backwards from the output by what the
pullbacks of linear operations (``where``, ``gather``, a slice, a maximum) and of piecewise linear
ones (``relu``, ``clamp``) leave of positive numbers; products and curved operations pass all on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxhess.emit import ORIGIN, VAL, Var
from fxhess.facts import Canonical, fact, is_active, is_repeatable, known_fact, operands
from fxhess.kinds import Call, Elementwise, Linear, Smooth
from fxhess.passes.choice import Choices, is_linear, is_piecewise_linear
from fxhess.passes.forms import Forms
from fxhess.passes.harmless import Harmless

Write = Callable[[fx.Node, Callable[[fx.Node], Any]], Any]


def guard(
    canonical: Canonical, raw: Forms, write: Write
) -> tuple[dict[fx.Node, Any], dict[fx.Node, Call]]:
    """Values to use in place of the true ones, and what rules see in place of their operands.

    ``raw`` knows the values as they are; ``write(node, values)`` writes a node's operation again,
    with other operands.
    """
    choices = Choices(canonical)
    if not choices.guarded:
        return {}, {}
    return _Writer(canonical, raw, write, choices).run()


class _Writer:
    """Writes masks of what is live, and harmless values."""

    def __init__(self, canonical: Canonical, raw: Forms, write: Write, choices: Choices) -> None:
        self.canonical = canonical
        self.raw = raw
        self.write = write
        self.choices = choices
        self.emitter = raw.emitter
        self.nb = canonical.batch_ndim
        self.harmless = Harmless(canonical, self.emitter)
        self.users: dict[fx.Node, list[tuple[fx.Node, int]]] = {}
        for node in canonical.nodes():
            for i, operand in enumerate(operands(node)):
                if node in choices.reaching and (is_active(node) or not is_active(operand)):
                    self.users.setdefault(operand, []).append((node, i))
        self.masks: dict[fx.Node, Var | None] = {}
        self.values: dict[fx.Node, Any] = {}
        self.calls: dict[fx.Node, Call] = {}

    def run(self) -> tuple[dict[fx.Node, Any], dict[fx.Node, Call]]:
        self._find_masks()
        for node in self.canonical.nodes():
            with self.emitter.at(node.meta.get(ORIGIN), "value"):
                if node in self.choices.guarded and self.masks[node] is not None:
                    self._guard(node)
                elif any(n in self.values for n in node.all_input_nodes):
                    self._rewrite(node)
        return self.values, self.calls

    # --- what is live -----------------------------------------------------------------------------

    def _find_masks(self) -> None:
        """Masks ``[*batch, *event]`` of the guarded nodes, and of what lies between them and the
        output; None where all is live."""
        wanted = set(self.choices.guarded)
        for node in self.canonical.nodes():
            if node in self.choices.chosen and any(o in wanted for o in operands(node)):
                wanted.add(node)
        for node in reversed(list(self.canonical.nodes())):
            if node in wanted:
                with self.emitter.at(node.meta.get(ORIGIN), "value"):
                    self.masks[node] = self._mask(node)

    def _mask(self, node: fx.Node) -> Var | None:
        total: Any = None
        for user, i in self.users[node]:
            part = self._through(user, i, self.masks.get(user))
            if part is None:
                return None
            total = part if total is None else total | part
        return total  # type: ignore[no-any-return]

    def _through(self, node: fx.Node, i: int, mask: Var | None) -> Var | None:
        """The entries of operand i that the live ones of the node are made of; None for all."""
        kind = known_fact(node).kind
        if isinstance(kind, Linear) and not kind.fold:
            weights = self.harmless.weights(node)
            g = weights if mask is None else weights * mask.to(weights.dtype)
            parts = kind.pull(g, self.raw.call(node))
            part = parts[i] if isinstance(parts, (tuple, list)) else parts
            return part != 0  # type: ignore[no-any-return]
        if isinstance(kind, Elementwise) and is_piecewise_linear(kind, i):
            slope = self.raw.partial(node, (i,))
            if isinstance(slope, Var):
                chosen: Any = slope != 0
                mask = chosen if mask is None else mask & chosen
        return None if mask is None else self.harmless.spread(self.raw, node, i, mask)

    # --- harmless values --------------------------------------------------------------------------

    def _value(self, node: fx.Node) -> Any:
        return self.values[node] if node in self.values else self.raw.values[node]

    def _guard(self, node: fx.Node) -> None:
        """An operation that is singular itself, at harmless arguments where it is not live."""
        known = known_fact(node)
        mask = self.masks[node]
        replaced: dict[fx.Node, Any] = {}
        given = self._given(node) if self._decides(node) else {}
        for i, operand in enumerate(known.operands):
            value = given.get(operand, self._value(operand))
            dtype = operand.meta[VAL].dtype
            if not (dtype.is_floating_point or dtype.is_complex):
                replaced[operand] = value
            elif isinstance(known.kind, Smooth):
                own = self.harmless.spread(self.raw, node, i, mask) if mask is not None else None
                replaced[operand] = self._masked(own, value, self.harmless.regular(operand))
            else:
                replaced[operand] = self._masked(mask, value, self.choices.guarded[node][i])
        if is_repeatable(node) or not isinstance(known.kind, Smooth):
            self._set(node, replaced)
        else:
            self._set(node, replaced, self._masked(mask, self.raw.values[node], 0.0))

    def _rewrite(self, node: fx.Node) -> None:
        """An operation that comes after a guarded one."""
        if fact(node) is not None and not is_active(node):
            return  # it may decide something: by the true values
        if fact(node) is None or not self._decides(node):
            self.values[node] = self.write(node, self._value)
            return
        if any(fact(n) is not None and n not in operands(node) for n in node.all_input_nodes):
            self.calls[node] = self.raw.call(node)  # one of several results: no operation to repeat
            self.values[node] = self._masked(self.masks.get(node), self.raw.values[node], 0.0)
            return
        self._set(node, self._given(node))
        self.values[node] = self._masked(self.masks.get(node), self.values[node], 0.0)

    def _given(self, node: fx.Node) -> dict[fx.Node, Any]:
        """Operands of an operation that decides by their values: the true ones where they are not
        chosen, as constants."""
        given = {}
        for i, operand in enumerate(operands(node)):
            if operand in self.values:
                own = self._through(node, i, self.masks.get(node))
                true = self.raw.values[operand].detach()
                given[operand] = self._masked(own, self.values[operand], true)
        return given

    def _set(self, node: fx.Node, replaced: dict[fx.Node, Any], y: Any = None) -> None:
        def lookup(n: fx.Node) -> Any:
            return replaced[n] if n in replaced else self._value(n)

        known = known_fact(node)
        self.values[node] = self.write(node, lookup) if y is None else y
        self.calls[node] = Call(
            fx.node.map_arg(known.args, lookup),  # type: ignore[arg-type]
            fx.node.map_arg(dict(known.kwargs), lookup),  # type: ignore[arg-type]
            tuple(map(lookup, known.operands)),
            self.values[node],
        )

    def _masked(self, mask: Var | None, value: Any, other: Any) -> Any:
        return value if mask is None else torch.where(mask, value, other)  # type: ignore[arg-type]

    def _decides(self, node: fx.Node) -> bool:
        """Whether the values of its operands decide what the operation leaves out."""
        known = known_fact(node)
        if isinstance(known.kind, Linear):
            return known.kind.push is not None and not is_linear(self.canonical, known)
        return isinstance(known.kind, Elementwise) and any(
            is_piecewise_linear(known.kind, i) for i in range(len(known.kind.first))
        )
