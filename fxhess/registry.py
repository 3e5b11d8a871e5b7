"""The open set of operations: a table from ATen operator to :class:`Rule`.

Rule files fill it with one call an operator::

    elementwise(aten.tanh.default, lambda y, x: 1 - y * y, lambda y, x: -2 * y * (1 - y * y))
    linear(aten.flip.default, Along("dims"), pull=lambda g, c: torch.flip(g, c.args[1]))

``fxhess.register_rule`` is the same table, public.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch._ops import OpOverload  # the type only; it has no public name

from fxhess import _torch, kinds
from fxhess.errors import RuleError
from fxhess.kinds import Axes, Equation, Kind, Partial

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Rule:
    """What fxhess knows about one operator.

    ``differentiable``: names of the tensor arguments (a tensor or a list of tensors each) whose
    derivatives ``kind`` gives, in order; by default all of them for :class:`~fxhess.kinds.
    Elementwise` and :class:`~fxhess.kinds.Multilinear`, otherwise the first one.  ``output``: the
    index of the result that carries derivatives, for operators with several (the others carry
    none); ``alone``: the rule holds only where no other result is used.  ``rewrite``: a plain
    PyTorch function of the operator's own signature, tried first at capture: it returns the result
    in simpler operations, or ``NotImplemented`` to keep the operator (a slice of the whole axis, a
    power of 2).
    """

    op: OpOverload
    axes: Axes
    kind: Kind
    differentiable: tuple[str, ...] = ()
    output: int | None = None
    rewrite: Callable[..., Any] | None = None
    alone: bool = False


_rules: dict[OpOverload, Rule] = {}
_version = 0


def register_rule(rule: Rule, *, override: bool = False) -> Rule:
    """Add ``rule`` to the table, for the whole process.

    Plans made before stay as they are, so register rules before the first call, or call
    ``fxhess.cache_clear()`` after.

    Raises:
        RuleError: the operator has a rule already and ``override`` is false, or ``rule.op`` is no
            ``OpOverload`` (``torch.ops.aten.tanh.default``; not ``torch.tanh``).
    """
    global _version
    if not isinstance(rule.op, OpOverload):
        raise RuleError(
            f"a rule is for one operator overload, not for {rule.op!r}",
            hint="name it like torch.ops.aten.tanh.default",
        )
    if rule.op in _rules and not override:
        raise RuleError(f"{rule.op} has a rule already", hint="pass override=True to replace it")
    _rules[rule.op] = rule
    _version += 1
    return rule


def find(op: object) -> Rule | None:
    """The rule of ``op``, or None."""
    return _rules.get(op) if isinstance(op, OpOverload) else None


def rules() -> Iterator[Rule]:
    """All rules, in order of registration."""
    return iter(tuple(_rules.values()))


def table() -> dict[OpOverload, Rule]:
    """The table as it is now: a copy."""
    return dict(_rules)


def version() -> int:
    """Grows with every registration: part of the key of every plan."""
    return _version


def decompositions() -> dict[OpOverload, Callable[..., Any]]:
    """How operators are rewritten at capture, as ``make_fx`` wants it: by the rules that say so,
    and, operators without a rule, as PyTorch itself composes them of others."""
    table = {op: f for op, f in _torch.standard_decompositions().items() if op not in _rules}
    for rule in rules():
        if isinstance(rule.kind, kinds.Composite):
            table[rule.op] = rule.kind.rewrite
        elif rule.rewrite is not None:
            table[rule.op] = rule.rewrite
    return table


_substitutes: dict[Any, Callable[..., Any]] = {}


def substitute(*functions: Callable[..., Any]) -> Callable[[F], F]:
    """Decorator: where a model calls one of these public functions of PyTorch, this one is traced
    instead.  For the few that cannot be traced for all batch sizes."""

    def register(replacement: F) -> F:
        _substitutes.update(dict.fromkeys(functions, replacement))
        return replacement

    return register


def substituted(function: Callable[..., Any]) -> Callable[..., Any]:
    """What is traced in place of ``function``: itself, as a rule."""
    return _substitutes.get(function, function)


# --- one line a rule ------------------------------------------------------------------------


def zero(
    op: OpOverload, axes: Axes | None = None, *, rewrite: Callable[..., Any] | None = None
) -> Rule:
    """An operation through which no derivative flows."""
    return register_rule(Rule(op, axes or kinds.Pointwise(), kinds.Zero(), rewrite=rewrite))


def elementwise(
    op: OpOverload,
    first: Partial | tuple[Partial, ...],
    second: Partial | Mapping[tuple[int, int], Partial] = 0,
    *,
    by_result: Mapping[int, Partial] | None = None,
    rewrite: Callable[..., Any] | None = None,
) -> Rule:
    """A pointwise operation: f' and f'' as numbers or functions ``(y, *args, **kwargs)``; tuples
    and ``{(i, j): ...}`` with i <= j for several operands."""
    firsts = first if isinstance(first, tuple) else (first,)
    if isinstance(second, Mapping):
        seconds = dict(second)
    else:
        seconds = {} if second == 0 else {(0, 0): second}
    kind = kinds.Elementwise(firsts, seconds, by_result or {})
    return register_rule(Rule(op, kinds.Pointwise(), kind, rewrite=rewrite))


def multilinear(
    op: OpOverload,
    equation: Callable[[Mapping[str, Any]], Equation],
    *,
    rewrite: Callable[..., Any] | None = None,
) -> Rule:
    """An operation that an einsum equation describes wholly."""
    return register_rule(Rule(op, kinds.Einsum(equation), kinds.Multilinear(), rewrite=rewrite))


def linear(
    op: OpOverload,
    axes: Axes,
    *,
    pull: Callable[..., Any],
    push: Callable[..., Any] | None = None,
    fold: bool = False,
    moves: bool = False,
    windows: Callable[[kinds.Call], Sequence[kinds.Window | None]] | None = None,
    differentiable: tuple[str, ...] = (),
    output: int | None = None,
    rewrite: Callable[..., Any] | None = None,
) -> Rule:
    """An operation linear in its differentiable operands: see :class:`fxhess.kinds.Linear`."""
    kind = kinds.Linear(pull, push, fold, moves, windows)
    return register_rule(Rule(op, axes, kind, differentiable, output, rewrite))


def smooth(
    op: OpOverload,
    axes: Axes,
    *,
    push: Callable[..., Any],
    pull: Callable[..., Any],
    curve: Callable[..., Any],
    differentiable: tuple[str, ...] = (),
    output: int | None = None,
    later: bool = False,
    finite: bool = False,
    alone: bool = False,
    rewrite: Callable[..., Any] | None = None,
) -> Rule:
    """An operation with forms of its own: see :class:`fxhess.kinds.Smooth`."""
    kind = kinds.Smooth(push, pull, curve, later, finite)
    return register_rule(Rule(op, axes, kind, differentiable, output, rewrite, alone))


def composite(*ops: OpOverload) -> Callable[[F], F]:
    """Decorator: the function rewrites these operators into simpler ones at capture."""

    def register(rewrite: F) -> F:
        for op in ops:
            register_rule(Rule(op, kinds.Pointwise(), kinds.Composite(rewrite)))
        return rewrite

    return register


aten = torch.ops.aten
