"""Choices: which entries of a value may be left out of all that follows.

*Needs* canonical facts.  *Gives* the operations to guard: singular somewhere, and of results that
may not be chosen::

    where(x > 0, log(x), x)      ==>      log
    log(x)[:, :2].sum()          ==>      log          log(x).sum()      ==>      none

Every entry of a value has a level: 1, it has a path to the output; 0, it may have none; 1/2, it
may have none because something piecewise linear turned it off, which counts as long as nothing is
summed on the way (that all ReLUs of a layer are off is no case to pay for in every network).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxhess.emit import VAL
from fxhess.facts import Canonical, Fact, fact, is_active, known_fact, operands
from fxhess.kinds import Call, Elementwise, Label, Linear, Multilinear, Smooth
from fxhess.passes.forms import labelled
from fxhess.passes.singular import safe_point


class Choices:
    """``guarded``: the operations to guard, with a harmless argument for each operand (none where
    the kind has no numbers to try); ``chosen``: all nodes of which an entry may be left out;
    ``reaching``: all from the first singular one on that reach the output."""

    def __init__(self, canonical: Canonical) -> None:
        self.canonical = canonical
        self.guarded: dict[fx.Node, tuple[float, ...]] = {}
        self.chosen: set[fx.Node] = set()
        self.reaching: set[fx.Node] = set()
        points = {n: p for n in canonical.nodes() if (p := _point(n)) is not None}
        if not points:
            return
        levels = self._levels(next(iter(points)))
        self.reaching = set(levels)
        self.chosen = {n for n, level in levels.items() if bool((level < 1).any())}
        self.guarded = {
            n: p for n, p in points.items() if n in self.chosen and self._is_dropped(n, levels[n])
        }

    def _is_dropped(self, node: fx.Node, level: torch.Tensor) -> bool:
        """Whether all that some arguments are used for may be left out: a smooth operation makes
        several entries of the same arguments."""
        known = known_fact(node)
        if isinstance(known.kind, Smooth):
            mixed = [e for e in range(level.ndim) if e not in known.axes[0]]
            level = level.amax(mixed) if mixed and level.numel() else level
        return bool((level < 1).any())

    def _levels(self, first: fx.Node) -> dict[fx.Node, torch.Tensor]:
        """Levels ``[*event]`` of the nodes from ``first`` on that reach the output."""
        nodes = list(self.canonical.nodes())
        output = self.canonical.output
        levels = {output: torch.ones(self.canonical.event(output))}
        for node in reversed(nodes[nodes.index(first) :]):
            if node not in levels:
                continue
            for i, operand in enumerate(operands(node)):
                if fact(operand) is None or (is_active(operand) and not is_active(node)):
                    continue  # a constant, or no derivative flows this way
                level = self._through(node, i, levels[node])
                before = levels.get(operand)
                levels[operand] = level if before is None else torch.maximum(before, level)
        return levels

    def _through(self, node: fx.Node, i: int, level: torch.Tensor) -> torch.Tensor:
        """Levels of operand i, of the node's uses alone."""
        known = known_fact(node)
        kind = known.kind
        event = self.canonical.event(known.operands[i])
        if isinstance(kind, Linear) and not kind.fold:
            if any(n not in known.operands for n in node.all_input_nodes):
                return torch.zeros(event)  # chosen by other tensors
            return self._pulled(known, i, level).reshape(event)
        if isinstance(kind, Elementwise) and is_piecewise_linear(kind, i):
            level = level.clamp_max(0.5)
        if isinstance(kind, (Elementwise, Multilinear)):
            inputs, output, _ = labelled(self.canonical, node)
            return _spread(level, output, inputs[i], event)
        output = [("e", k) for k in range(level.ndim)]
        return _spread(level, output, moved(known.axes[i]), event)

    def _pulled(self, known: Fact, i: int, level: torch.Tensor) -> torch.Tensor:
        """Through a linear operation of its operands alone: tried on numbers."""
        kind = known.kind
        assert isinstance(kind, Linear)
        event = self.canonical.event(known.operands[i])
        call = tried(self.canonical, known)
        if call is None:  # it wants more than numbers
            return torch.zeros(event)
        found = torch.zeros(event)
        for least in (0.5, 1.0):
            g = (level >= least).to(call.y.dtype)
            parts = kind.pull(g[(None,) * self.canonical.batch_ndim].expand(call.y.shape), call)
            part = parts[i] if isinstance(parts, (tuple, list)) else parts
            part = (part != 0).expand(call.operands[i].shape).reshape(event)
            found = torch.where(part, least, found)
        return found if is_linear(self.canonical, known) else found.clamp_max(0.5)


def _spread(
    level: torch.Tensor, output: Sequence[Label], target: Sequence[Label], event: Sequence[int]
) -> torch.Tensor:
    """Levels of an operand with the axes ``target``: the largest of its uses; a sum turns nothing
    off, nor does an entry's use in several places."""
    if len(set(target)) != len(target):
        return torch.ones(tuple(event))
    single = {a for a, n in zip(target, event, strict=True) if n == 1}
    for k in reversed(range(len(output))):
        if (output[k] not in target or output[k] in single) and level.shape[k] != 1:
            level = level.amax(k, keepdim=True)
            level = torch.where(level > 0, 1.0, 0.0)
    kept = [a for a in output if a in target]
    level = level.reshape([level.shape[k] for k, a in enumerate(output) if a in target])
    order = [a for a in target if a in kept]
    level = level.permute([kept.index(a) for a in order])
    shape = iter(level.shape)
    level = level.reshape([next(shape) if a in kept else 1 for a in target])
    return level.expand(tuple(event))


def moved(axes: Sequence[int | None]) -> list[Label]:
    """Labels of the axes of an operand, where ``("e", k)`` are those of the result."""
    return [("x", e) if o is None else ("e", o) for e, o in enumerate(axes)]


def is_piecewise_linear(kind: Elementwise, i: int) -> bool:
    """Whether the derivative by operand i is a choice: not a number, and never curved."""
    return callable(kind.first[i]) and not any(i in pair for pair in kind.second)


def is_linear(canonical: Canonical, known: Fact) -> bool:
    """Whether a linear operation is so whatever its operands are, not piece by piece as a maximum
    is: tried on numbers."""
    first, second = (tried(canonical, known, seed) for seed in (0, 1))
    if first is None or second is None:
        return False
    both = dict(zip(known.operands, map(torch.add, first.operands, second.operands), strict=True))
    total = tried(canonical, known, 0, both)  # type: ignore[arg-type]
    return total is not None and torch.allclose(total.y, first.y + second.y)  # type: ignore[operator]


def tried(
    canonical: Canonical,
    known: Fact,
    seed: int = 0,
    given: dict[fx.Node, torch.Tensor] | None = None,
    position: int = 0,
) -> Call | None:
    """The operation on random operands of one sample, and one position wherever it takes a
    position (or a condition); None where it does not run on such."""
    generator = torch.Generator().manual_seed(seed)
    batch = canonical.x.meta[VAL].shape[: canonical.batch_ndim]
    made: dict[fx.Node, Any] = dict(given or {})

    def numbers(node: fx.Node) -> Any:
        if node not in made:
            value = node.meta[VAL]
            if not isinstance(value, torch.Tensor):
                return value
            shape = list(value.shape)
            for axis, size in enumerate(batch):
                if fact(node) or shape[axis : axis + 1] == [size]:  # constants may have batch axes
                    shape[axis] = 1
            if value.dtype.is_floating_point or value.dtype.is_complex:
                made[node] = torch.randn(shape, generator=generator).to(value.dtype)
                made[node] = made[node].to(torch.promote_types(value.dtype, torch.float64))
            else:
                made[node] = torch.full(shape, position, dtype=value.dtype)
        return made[node]

    try:
        for operand in known.operands:
            numbers(operand)
        args = fx.node.map_arg(known.args, numbers)
        kwargs = fx.node.map_arg(dict(known.kwargs), numbers)
        assert known.operator is not None
        y = known.operator(*args, **kwargs)
    except Exception:
        return None
    operands = tuple(made[n] for n in known.operands)
    return Call(args, kwargs, operands, y) if isinstance(y, torch.Tensor) else None  # type: ignore[arg-type]


def _point(node: fx.Node) -> tuple[float, ...] | None:
    """Harmless arguments of an operation that is singular elsewhere; None for others."""
    known = fact(node)
    if known is None or node.op == "placeholder":
        return None
    if isinstance(known.kind, Smooth):
        return ()
    if not isinstance(known.kind, Elementwise):
        return None
    return safe_point(known, tuple(map(is_active, known.operands)))
