"""Dependence: which entries of a value may not depend on x at all.

*Needs* canonical facts.  *Gives* the operations to shelter: singular somewhere, and of operands
with entries that may be constants (put in by ``where`` or an index, or turned off)::

    sqrt(where(m, x, 0))      ==>      sqrt          sqrt(sin(x))      ==>      none

``sqrt'(0) = inf`` meets the tangent 0 of a constant, and inf 0 = nan.  Every entry has a level, as
in ``choice``, but found forwards: 1, it depends on x; 0, it may not; 1/2, it may not because
something piecewise linear turned it off, or a factor may be 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from fxhess.emit import VAL
from fxhess.facts import Canonical, Fact, fact, is_active, known_fact
from fxhess.kinds import Call, Elementwise, Label, Linear, Multilinear, Smooth
from fxhess.passes.choice import is_linear, is_piecewise_linear, moved, tried
from fxhess.passes.forms import labelled
from fxhess.passes.singular import constant_point, finite_at

_LEVELS = (0.5, 1.0)


def _decides(node: fx.Node) -> bool:
    """Whether its own operands decide what the result depends on: others would decide otherwise
    (``remainder(c, x)`` where its quotient is 0)."""
    kind = known_fact(node).kind
    return isinstance(kind, Elementwise) and any(
        is_piecewise_linear(kind, i) for i in range(len(kind.first))
    )


class Dependence:
    """``sheltered``: the operations to shelter, with a harmless argument for each operand (none
    where the kind has no numbers to try); ``varied``: all nodes with an entry that may not depend
    on x."""

    def __init__(self, canonical: Canonical) -> None:
        self.canonical = canonical
        self.sheltered: dict[fx.Node, tuple[float, ...]] = {}
        self.levels: dict[fx.Node, torch.Tensor | None] = {}  # None: all depend on x
        points = {n: p for n in canonical.nodes() if (p := _point(n)) is not None}
        if not points:
            return
        last = max(i for i, n in enumerate(canonical.nodes()) if n in points)
        for node in list(canonical.nodes())[: last + 1]:
            if is_active(node):
                level = None if node is canonical.x else self._level(node)
                whole = level is None or not level.numel() or bool((level == 1).all())
                self.levels[node] = None if whole else level
        self.sheltered = {
            n: p
            for n, p in points.items()
            if self.varied(n) and not self._is_safe(n) and not _decides(n)
        }

    def varied(self, node: fx.Node) -> bool:
        return self.levels.get(node) is not None

    def given(self, operand: fx.Node) -> torch.Tensor:
        """Levels ``[*event]`` of an operand."""
        if not is_active(operand):
            return torch.zeros(())
        level = self.levels[operand]
        return torch.ones(self.canonical.event(operand)) if level is None else level

    # --- constants known by value -----------------------------------------------------------------

    def _is_safe(self, node: fx.Node) -> bool:
        """Whether the constants are numbers at which the operation is not singular."""
        known = known_fact(node)
        numbers = self._numbers(known.operands[0]) if isinstance(known.kind, Elementwise) else None
        return numbers is not None and finite_at(known, sorted(numbers))

    def _numbers(self, node: fx.Node) -> set[float] | None:
        """What the entries that may not depend on x are, where they are numbers of the program and
        were only put in their places since."""
        if not is_active(node):
            return _literals(node)
        if not self.varied(node):
            return set()
        known = known_fact(node)
        if not isinstance(known.kind, Linear) or known.kind.fold or not self._places(known):
            return None
        found: set[float] = set()
        for operand in known.operands:
            numbers = self._numbers(operand)
            if numbers is None:
                return None
            found |= numbers
        return found

    def _places(self, known: Fact) -> bool:
        """Whether the entries of the result are entries of the operands: tried on one number."""
        threes = {
            o: torch.full(o.meta[VAL].shape[self.canonical.batch_ndim if fact(o) else 0 :], 3.0)
            for o in known.operands
        }
        given = {
            o: t.reshape([1] * (self.canonical.batch_ndim if fact(o) else 0) + list(t.shape))
            for o, t in threes.items()
        }
        call = tried(self.canonical, known, given=given)
        return call is not None and bool(torch.eq(call.y, 3).all())

    # --- levels -----------------------------------------------------------------------------------

    def _level(self, node: fx.Node) -> torch.Tensor | None:
        known = known_fact(node)
        kind = known.kind
        event = self.canonical.event(node)
        if isinstance(kind, (Elementwise, Multilinear)):
            inputs, output, _ = labelled(self.canonical, node)
            parts = [
                _forward(self.given(operand), inputs[i], output, event)
                for i, operand in enumerate(known.operands)
                if depends(known, i)
            ]
            return self._joined(node, parts)
        if isinstance(kind, Linear) and not kind.fold:
            return self._pushed(node)
        if all(self.levels.get(o) is None for o in known.operands if is_active(o)):
            return None
        parts = [
            _forward(self.given(o), moved(axes), [("e", k) for k in range(len(event))], event)
            for o, axes in zip(known.operands, known.axes, strict=True)
            if is_active(o)
        ]
        return torch.stack(parts).amax(0)

    def _joined(self, node: fx.Node, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Of a pointwise operation or a product."""
        known = known_fact(node)
        if isinstance(known.kind, Elementwise):
            several = torch.stack(list(parts))
            if not any(is_piecewise_linear(known.kind, i) for i in range(len(known.operands))):
                return several.amax(0)
            # One of several that all depend on x; of one alone, that may be the constant.
            return several.amin(0) if len(parts) > 1 else several[0].clamp_max(0.5)
        level = torch.stack(list(parts)).amax(0)
        return level.clamp_max(0.5) if scales(self.canonical, node) else level

    def _pushed(self, node: fx.Node) -> torch.Tensor:
        """Through a linear operation: tried on numbers, with any other tensors 0 and 1."""
        known = known_fact(node)
        event = self.canonical.event(node)
        found = torch.ones(event)
        chosen = any(n not in known.operands for n in node.all_input_nodes)
        varied = any(self.varied(operand) for operand in known.operands)
        if chosen and varied:
            return torch.zeros(event)
        for position in (0, 1) if chosen else (0,):
            call = tried(self.canonical, known, position=position)
            if call is None:  # the only position is the first, or it wants more than numbers
                found = torch.zeros(event) if varied else found
                continue
            level = torch.zeros(event)
            for least in _LEVELS:
                ts = [
                    (self.given(o) >= least).to(t.dtype).expand(t.shape).clone()
                    for o, t in zip(known.operands, call.operands, strict=True)
                ]
                level = torch.where(_image(known, call, ts).reshape(event), least, level)
            found = torch.minimum(found, level)
        linear = known.kind.push is None or chosen or is_linear(self.canonical, known)  # type: ignore[union-attr]
        return found if linear else found.clamp_max(0.5)


def _literals(node: fx.Node) -> set[float] | None:
    """The numbers that a constant is made of, where the program itself says so, and few."""
    value = node.meta[VAL]
    if node.op != "call_function" or node.all_input_nodes or not isinstance(value, torch.Tensor):
        return None
    if value.numel() > 1 or value.dtype.is_complex:
        return None
    assert callable(node.target)
    made = node.target(*node.args, **{**node.kwargs, "device": torch.device("cpu")})
    return {float(made)}


def depends(known: Fact, i: int) -> bool:
    """Whether a derivative by operand i can be other than zero."""
    kind = known.kind
    return is_active(known.operands[i]) and not (
        isinstance(kind, Elementwise) and isinstance(kind.first[i], (int, float))
        and kind.first[i] == 0
    )  # fmt: skip


def scales(canonical: Canonical, node: fx.Node) -> bool:
    """Whether a product only scales each entry of the one operand that depends on x, by factors
    that do not."""
    known = known_fact(node)
    if not isinstance(known.kind, Multilinear) or sum(map(is_active, known.operands)) != 1:
        return False
    inputs, output, _ = labelled(canonical, node)
    return len(inputs) > 1 and all(a in output for labels in inputs for a in labels)


def _image(known: Fact, call: Call, ts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Where the tangent of the result is not 0."""
    kind = known.kind
    assert isinstance(kind, Linear)
    if kind.push is not None:
        return torch.as_tensor(kind.push(call, *ts) != 0).expand(call.y.shape)
    replaced: Mapping[int, torch.Tensor] = {
        id(o): t for o, t in zip(call.operands, ts, strict=True)
    }
    lookup = lambda v: replaced.get(id(v), v)  # noqa: E731
    args, kwargs = fx.node.map_aggregate((call.args, dict(call.kwargs)), lookup)  # type: ignore[misc]
    assert known.operator is not None
    return torch.as_tensor(known.operator(*args, **kwargs) != 0)


def _forward(
    level: torch.Tensor, source: Sequence[Label], output: Sequence[Label], event: Sequence[int]
) -> torch.Tensor:
    """Levels of a result with the axes ``output``, of those of an operand: the largest of what is
    summed; a sum turns nothing off."""
    level = level.reshape([1] * (len(source) - level.ndim) + list(level.shape))
    for k in reversed(range(len(source))):
        if source[k] not in output and level.shape[k] != 1:
            level = level.amax(k, keepdim=True)
            level = torch.where(level > 0, 1.0, 0.0)
    for k in reversed(range(len(source))):
        if source[k] in source[:k]:  # a diagonal
            first = list(source).index(source[k])
            level = level.diagonal(0, first, k).movedim(-1, first)
            source = [*source[:k], *source[k + 1 :]]
    kept = [a for a in output if a in source]
    level = level.permute(
        [list(source).index(a) for a in kept]
        + [k for k in range(len(source)) if source[k] not in output]
    )
    level = level.reshape(level.shape[: len(kept)])
    shape = iter(level.shape)
    return level.reshape([next(shape) if a in kept else 1 for a in output]).expand(tuple(event))


def _point(node: fx.Node) -> tuple[float, ...] | None:
    """Harmless arguments of an operation of constants that is singular elsewhere."""
    if node.op == "placeholder" or not is_active(node):
        return None
    known = known_fact(node)
    if isinstance(known.kind, Smooth):
        return None if known.kind.finite else ()
    if not isinstance(known.kind, Elementwise):
        return None
    return constant_point(known, tuple(map(is_active, known.operands)))


__all__ = ["Dependence", "depends", "scales"]
