"""Curvature: the second form of one operation, ``C = sum_o g_o d2 op_o / d x_i d x_j``.

Pointwise and multilinear operations give products of labelled factors, so that structure and
factors that do not depend on the batch survive until the contraction; smooth ones give a map.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import fx

from fxhess.contraction import Factor
from fxhess.emit import Var
from fxhess.facts import is_active
from fxhess.kinds import Call, Elementwise, Label, Multilinear, Smooth
from fxhess.passes.forms import RESULT, Forms
from fxhess.structure import Structured


@dataclass(frozen=True)
class Curvature:
    """One term of an operation's second form, between operands i and j (or its own result).

    The form is the product of ``factors`` summed over all labels but those of ``left`` (the event
    axes of operand i), ``right`` (of operand j), the batch and ``outputs`` (the axes of the vector
    of outputs, none for scalar models).  ``weight`` is 1/2 on the diagonal i = j: the Hessian is
    the sum of all terms plus its transpose.  ``symmetric``: whether ``J^T C J`` is, as it is.
    """

    i: fx.Node
    j: fx.Node
    factors: tuple[Factor, ...]
    outputs: tuple[Label, ...]
    left: tuple[Label, ...]
    right: tuple[Label, ...]
    weight: float
    symmetric: bool = False

    def sides(self) -> list[Curvature]:
        """All of the symmetric form that this is a part of, as maps from operand j to operand i."""
        if self.i is self.j and self.weight == 0.5:
            return [replace(self, weight=1.0)]
        return [self, replace(self, i=self.j, j=self.i, left=self.right, right=self.left)]


@dataclass(frozen=True)
class Moved:
    """The second form of a smooth operation, as a map: ``apply(t)`` is ``C_ij t`` for a tangent t
    of operand j, with the leading axes ``[outputs.., basis.., *batch, *event of i]``."""

    i: fx.Node
    j: fx.Node
    apply: Callable[[Structured], Structured]
    weight: float
    swapped: Callable[[Structured], Structured] | None = None  # from i to j, where they differ
    symmetric: bool = False

    def sides(self) -> list[Moved]:
        """All of the symmetric form that this is a part of, as maps from operand j to operand i."""
        if self.swapped is None:
            return [replace(self, weight=1.0)]
        return [self, Moved(self.j, self.i, self.swapped, self.weight, self.apply)]


def curvature(
    forms: Forms, node: fx.Node, g: Structured, h: Var | None = None
) -> list[Curvature | Moved]:
    """The terms of the node's second form for the adjoint g; ``h``: the second derivative of what
    follows, ``[*outputs, *batch, *event, *mixed]``, for kinds that ask for it."""
    known = forms.fact(node)
    kind = known.kind
    if isinstance(kind, Smooth):
        return _smooth(forms, node, g, h)
    if not isinstance(kind, (Elementwise, Multilinear)):
        return []
    inputs, output, _ = forms.labelled(node)
    labels, values = [*inputs, output], [*known.operands, node]
    free: list[Label] = [("m", k) for k in range(len(g.basis))]
    adjoint: Factor = (g.core, g.labels(free, forms.batch(), output))
    outputs = tuple(g.basis_labels(free, output))
    terms: list[Curvature | Moved] = []
    if isinstance(kind, Elementwise):
        pairs = [(i, RESULT) for i in sorted(kind.by_result)] or sorted(kind.second)
    else:
        pairs = [(i, j) for j in range(len(inputs)) for i in range(j)]
    for i, j in pairs:
        a, b = values[i], values[j]
        if not (is_active(a) and is_active(b)):
            continue
        if isinstance(kind, Elementwise):
            if not isinstance(forms.partial(node, (i, j)), Var) and (
                forms.partial(node, (i, j)) == 0
            ):
                continue
            factors = [forms.pointwise(node, (i, j))]
        else:
            factors = forms.others(node, {i, j})
        terms.append(
            Curvature(
                a,
                b,
                (adjoint, *factors),
                outputs,
                tuple(labels[i]),
                tuple(labels[j]),
                0.5 if i == j else 1.0,
                a is b and labels[i] == labels[j],
            )
        )
    return terms


def _smooth(forms: Forms, node: fx.Node, g: Structured, h: Var | None) -> list[Curvature | Moved]:
    known = forms.fact(node)
    kind = known.kind
    assert isinstance(kind, Smooth)
    passed = [out for out in known.axes[0] if out is not None]
    mixed = [e for e in range(len(forms.canonical.event(node))) if e not in passed]
    g = forms.algebra.widen(forms.algebra.untie(g, range(len(g.ties))), mixed)
    call = forms.call(node)
    terms: list[Curvature | Moved] = []
    for j in range(len(known.operands)):
        for i in range(j + 1):
            a, b = known.operands[i], known.operands[j]
            if is_active(a) and is_active(b):
                apply = _moving(forms, node, g, call, i, j, h)
                swapped = None if i == j else _moving(forms, node, g, call, j, i, h)
                terms.append(Moved(a, b, apply, 0.5 if i == j else 1.0, swapped))
    return terms


def _moving(
    forms: Forms, node: fx.Node, g: Structured, call: Call, i: int, j: int, h: Var | None
) -> Callable[[Structured], Structured]:
    known = forms.fact(node)
    kind = known.kind
    assert isinstance(kind, Smooth)
    curve = kind.curve
    own = [e for e, out in enumerate(known.axes[j]) if out is None]
    labels = [
        [("own", e) if out is None else ("out", out) for e, out in enumerate(axes)]
        for axes in known.axes
    ]
    through = {out: e for e, out in enumerate(known.axes[j]) if out is not None}

    def apply(t: Structured) -> Structured:
        """Where an axis passes through the operation, a tie of the tangent does too."""
        t = forms.algebra.widen(forms.algebra.mix(t, own), own)
        t, near = forms.algebra.carried(t, labels[j], labels[i], len(g.basis))
        tied = [None if out is None else t.ties[through[out]] for out in known.axes[i]]
        adjoint, tangent = forms.algebra.tensor(g), forms.algebra.tensor(t)
        m, n = len(g.free), len(t.free)
        lift = (slice(None),) * m + (None,) * n
        if m and n:
            adjoint = adjoint[lift]  # type: ignore[assignment]
        given = () if h is None else (h[lift] if n else h,)
        core = curve(call, adjoint, i, j, tangent, *given)
        event = forms.canonical.event(known.operands[i])
        forms.check_rank(node, core, m + n + forms.nb + len(event))
        ties = tuple(None if k is None else len(g.basis) + k for k in tied)
        return Structured(core, ties, (*g.basis, *t.basis), event, near)

    return apply
