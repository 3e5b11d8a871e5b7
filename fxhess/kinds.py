"""The closed sets: how an operation's axes relate (*axes signatures*) and how it differentiates
(*kinds*).

A rule is one line of data: an operator, an axes signature and a kind.  Batch-dimension
propagation reads only the signature; differentiation reads only the kind.  No pass ever names an
operator.

Notation used by every rule: for one sample, ``y = op(x_1 .. x_k)``; ``t_i`` is a tangent of
operand i, ``g`` an adjoint of y.  Tangents and adjoints carry extra *leading* axes, so a rule
addresses axes from the right, by negative numbers, only.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil, floor
from typing import Any, TypeAlias

from fxhess.emit import Var

# --- axes signatures ------------------------------------------------------------------------


@dataclass(frozen=True)
class Pointwise:
    """All tensor operands broadcast together; no axis sees another position of itself."""


@dataclass(frozen=True)
class Along:
    """Mixes positions along the axes named by argument ``dim`` (an int or a list); every other
    axis is passed through.  ``aligned``: further tensor arguments of the same rank, whose other
    axes correspond one to one (an index, a source).  Tensor arguments that are not named in
    ``aligned`` are passed as they are and must not depend on x; except the one whose axes these
    are: the one named by ``of``, or the first tensor argument."""

    dim: str = "dim"
    aligned: tuple[str, ...] = ()
    of: str = ""


@dataclass(frozen=True)
class Trailing:
    """Mixes the last ``rank`` axes (a number, or a function of the operation's arguments by
    name); every axis before them is passed through.  Other tensor arguments are as in
    :class:`Along`."""

    rank: int | Callable[[Mapping[str, Any]], int]
    aligned: tuple[str, ...] = ()
    of: str = ""


@dataclass(frozen=True)
class Reshape:
    """Splits and merges axes, keeping the order of elements (``view``, ``reshape``)."""


Label: TypeAlias = Hashable


@dataclass(frozen=True)
class Equation:
    """An einsum equation over the axes of the captured operands.

    ``inputs``: a tuple of labels for each tensor operand; ``output``: labels of the result.
    ``None`` in an input marks an axis of size 1 to be dropped, ``None`` in the output a new axis
    of size 1; an output label in no input is a broadcast axis.  ``scale`` multiplies the result;
    with ``mean`` it is also divided by the number of terms summed.
    """

    inputs: tuple[tuple[Label | None, ...], ...]
    output: tuple[Label | None, ...]
    scale: float = 1.0
    mean: bool = False


@dataclass(frozen=True)
class Einsum:
    """The axes are related by an equation, computed from the operation's arguments by name (with
    every tensor argument replaced by its stand-in, of which rank and shape may be read)."""

    equation: Callable[[Mapping[str, Any]], Equation]


Axes: TypeAlias = Pointwise | Along | Trailing | Reshape | Einsum

# --- windows --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """Which positions of one axis belong to position o of another, at most: from
    ``step * o + first`` to ``step * o + last``, inclusive; positions beyond the axis do not count.
    """

    step: Fraction
    first: Fraction
    last: Fraction

    @classmethod
    def of(cls, step: float, first: float, last: float) -> Window:
        return cls(Fraction(step), Fraction(first), Fraction(last))

    @property
    def width(self) -> int:
        """How many positions it has at most."""
        return floor(self.last - self.first) + 1

    def ends(self, o: int) -> tuple[int, int]:
        """The first and the last position that belong to o."""
        return ceil(self.step * o + self.first), floor(self.step * o + self.last)

    def then(self, next: Window) -> Window:
        """All that belongs by ``next`` to what belongs to a position."""
        low, high = next.step * self.first + next.first, next.step * self.last + next.last
        return Window(self.step * next.step, low, high)

    def reversed(self) -> Window:
        """The positions that a position belongs to."""
        return Window(1 / self.step, -self.last / self.step, -self.first / self.step)

    def joined(self, other: Window) -> Window | None:
        """Both together; None where they move apart."""
        if self.step != other.step:
            return None
        return Window(self.step, min(self.first, other.first), max(self.last, other.last))


# --- kinds ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """One operation as a rule function sees it: the values of its arguments and of its result.

    ``args`` and ``kwargs`` are the canonical ones: axes are negative numbers.  ``operands`` are
    the differentiable tensor arguments, in order.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    operands: tuple[Var, ...]
    y: Var


Partial: TypeAlias = float | int | Callable[..., Any]


@dataclass(frozen=True)
class Zero:
    """No derivative flows through (comparisons, indices, rounding, ``detach``)."""


@dataclass(frozen=True)
class Elementwise:
    """``y = f(x_1 .. x_k)`` position by position.

    ``first[i]`` is df/dx_i and ``second[i, j]`` (i <= j) is d2f/dx_i dx_j: a number, or a
    function ``(y, *args, **kwargs)`` of the result and the operation's own arguments.  A missing
    second derivative is zero.

    ``by_result[i]``, if there are any, write the same second form with the differential of y,
    ``sum_i by_result[i] (dx_i dy + dy dx_i)``, and are used for it.  For y whose equation is
    simpler than its formula, where the terms of ``second`` would cancel: from y b = a follows
    d2y = -2 dy db / b, instead of 2 y (db / b)^2 - 2 da db / b^2.
    """

    first: tuple[Partial, ...]
    second: Mapping[tuple[int, int], Partial] = field(default_factory=dict)
    by_result: Mapping[int, Partial] = field(default_factory=dict)


@dataclass(frozen=True)
class Multilinear:
    """``y = scale * einsum(inputs -> output)``: linear in each operand; the equation is the rule.

    The rule itself declares nothing; canonicalization fills in labels, one for each canonical
    axis (batch axes included), with ``sizes`` of the event axes' labels.
    """

    inputs: tuple[tuple[Label, ...], ...] = ()
    output: tuple[Label, ...] = ()
    scale: Any = 1.0
    sizes: Mapping[Label, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Linear:
    """Jointly (or piecewise) linear in its differentiable operands.

    ``pull(g, call)`` returns the cotangent of each operand (a tuple, or one value for one
    operand).  ``push(call, *tangents)`` returns the tangent of y, with zeros for tangents of
    operands that do not depend on x; where it is missing, the operation itself is applied to the
    tangent of its one operand.  With ``fold`` the functions (and the operation) accept exactly
    one leading axis before the mixed ones, and the caller folds all leading axes into it.
    ``moves``: each entry of y is an entry of an operand, in a place that no value decides.
    ``windows(call)``, of operations whose one operand has as many mixed axes as y: for each of
    them, which positions of the operand's axis a position of y's reads, or None (all).
    """

    pull: Callable[..., Any]
    push: Callable[..., Any] | None = None
    fold: bool = False
    moves: bool = False
    windows: Callable[[Call], Sequence[Window | None]] | None = None


@dataclass(frozen=True)
class Smooth:
    """Its own first and second forms, over the mixed axes of its signature.

    ``push(call, *tangents)`` and ``pull(g, call)`` as in :class:`Linear`;
    ``curve(call, g, i, j, t)`` is the derivative of operand i's cotangent (for the adjoint g)
    when operand j moves along t: ``C_ij t``.  All three act on tensors with any leading axes,
    which broadcast against each other.

    With ``later``, curve is given one thing more: h, the second derivative of all that follows by
    y along the mixed axes, everything else fixed, ``[*lead of g, *batch, *y, *mixed of y]``.  For
    quotients of differences of g, of which h tells the limit where they are 0 / 0.  ``finite``:
    so are its derivatives wherever its value is.
    """

    push: Callable[..., Any]
    pull: Callable[..., Any]
    curve: Callable[..., Any]
    later: bool = False
    finite: bool = False


@dataclass(frozen=True)
class Composite:
    """Rewritten at capture into simpler operations: ``rewrite`` is a plain PyTorch function with
    the operator's own signature."""

    rewrite: Callable[..., Any]


Kind: TypeAlias = Zero | Elementwise | Multilinear | Linear | Smooth | Composite


def is_curved(kind: Kind) -> bool:
    """Whether the second derivative of an operation of this kind can be other than zero."""
    match kind:
        case Elementwise(second=second):
            return any(value != 0 for value in second.values())
        case Multilinear(inputs=inputs):
            return len(inputs) > 1
        case Smooth():
            return True
    return False


def broadcast_equation(ranks: Sequence[int], shapes: Sequence[Sequence[Any]]) -> Equation:
    """The equation of a product of operands that broadcast against each other."""
    rank = max(ranks)
    inputs = []
    full = [False] * rank
    for own, shape in zip(ranks, shapes, strict=True):
        offset = rank - own
        labels: list[Label | None] = []
        for axis, size in enumerate(shape):
            one = isinstance(size, int) and size == 1
            labels.append(None if one else offset + axis)
            full[offset + axis] |= not one
        inputs.append(tuple(labels))
    return Equation(tuple(inputs), tuple(i if full[i] else None for i in range(rank)))
