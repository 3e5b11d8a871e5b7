"""Half Hessians: sums of contracted terms that keep their structure, A with ``H = A + A^T``.

A half relative to a basis is a sum of cores, one for each *pattern*.  A pattern names, for each of
the axes ``(outputs.., basis.., basis again..)``, the core's axis that stands for it; two axes with
one name are tied: the core is diagonal over them.  Adding the transpose at the very end makes the
result exactly symmetric, bit for bit.

A part that is symmetric as it is, and a long sum of products that are the same for every sample, is
kept *packed*: only its upper triangle is ever computed.  So is one of which few entries differ from
zero, those of a *band*.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from fxhess import triangle, windows
from fxhess.contraction import Factor, Same, contract
from fxhess.emit import SYMMETRIC, VAL, VARIES, Var
from fxhess.kinds import Label
from fxhess.passes.band import band_of, pack
from fxhess.passes.curvature import Curvature, Moved
from fxhess.passes.forms import Forms
from fxhess.passes.half import FULL, Half, Pattern
from fxhess.structure import Structured

# Sums shorter than this are not worth a pass that unpacks the result.
_LONG = 96


class Halves:
    """Writes the contractions that make halves, and a half's Hessian."""

    def __init__(self, forms: Forms) -> None:
        self.forms = forms
        self.algebra = forms.algebra
        self.emitter = forms.emitter
        self.nb = forms.nb

    # --- terms ----------------------------------------------------------------------------------

    def later_terms(self, base: fx.Node, half: Half) -> list[Curvature]:
        """The half at a base as terms of a second form of that base's value."""
        m, n = len(half.outputs), len(half.basis)
        terms = []
        for pattern, core in half.cores.items():
            names: list[Label] = [("c", name) for name in pattern]
            distinct = list(dict.fromkeys(names))
            factor: Factor = (core, [*self.forms.batch(), *distinct])
            terms.append(
                Curvature(
                    base, base, (factor,), tuple(names[:m]),
                    tuple(names[m : m + n]), tuple(names[m + n :]), 1.0, half.symmetric,
                )
            )  # fmt: skip
        for unpacked in self._unpacked(half):
            axes: list[Label] = [("c", k) for k in range(m + 2 * n)]
            whole: Factor = (unpacked, [*self.forms.batch(), *axes])
            terms.append(
                Curvature(
                    base, base, (whole,), tuple(axes[:m]),
                    tuple(axes[m : m + n]), tuple(axes[m + n :]), 0.5, True,
                )
            )  # fmt: skip
        return terms

    def _unpacked(self, half: Half) -> list[Var]:
        """The packed parts as ``[*batch, *outputs, *basis, *basis]``."""
        device = self.algebra.device
        found = []
        for band, packed in half.packed.items():
            if band is None:
                places = self.emitter.call(triangle.positions, math.prod(half.basis), device=device)
            else:
                places = self.emitter.call(windows.places, half.basis, band, device=device)
            found.append(self.emitter.call(triangle.unpack, packed, places, half.basis))
        return found

    def close(
        self, half: Half, term: Curvature | Moved, left: Structured, right: Structured
    ) -> Pattern:
        """Add ``J_i^T C J_j``; the pattern that it has."""
        left, right = (
            (self.algebra.dense(left),) * 2
            if left is right
            else (self.algebra.dense(left), self.algebra.dense(right))
        )
        if isinstance(term, Curvature):
            if left is right and self._packs(half, term, left):
                return self._close_packed(half, term, left)
            return self._sandwich(half, term, left, right)
        moved = self.apply(half, term, right)
        labels = self._axes(half, moved)
        as_form = Curvature(
            term.i, term.i, ((moved.core, self._labels(half, moved)),), labels[0], labels[2],
            labels[1], 1.0,
        )  # fmt: skip
        return self._sandwich(half, as_form, left, None)

    def _packs(self, half: Half, term: Curvature, tangent: Structured) -> bool:
        """Whether the term is a long sum of squares of tangents that are the same for every
        sample, weighted differently for each: worth the packed form."""
        if half.part != FULL or term.left != term.right or len(set(term.left)) < len(term.left):
            return False
        if not isinstance(tangent.core, Var) or set(tangent.ties) != {None}:
            return False
        shape = tangent.core.val.shape
        n = len(half.basis)
        alone = all(size == 1 for size in shape[n : n + self.nb])
        full = tuple(shape[:n]) == half.basis and math.prod(half.basis) > 1
        summed = math.prod(int(size) for size in shape[n + self.nb :])
        varies = any(isinstance(v, Var) and v.node.meta[VARIES] for v, _ in term.factors)
        return alone and full and summed >= _LONG and varies

    def _close_packed(self, half: Half, term: Curvature, tangent: Structured) -> Pattern:
        """``sum_k c_k J_k J_k^T`` as one product of c with the packed squares."""
        n, m = len(half.basis), len(half.outputs)
        size = math.prod(half.basis)
        core: Any = self.algebra.tensor(tangent)
        flat = torch.flatten(core, 0, n - 1) if n > 1 else core
        ends = self.emitter.call(triangle.ends, size, device=self.algebra.device)
        rows, columns = (torch.index_select(flat, 0, ends[i]) for i in range(2))  # type: ignore[arg-type]
        batch = self.forms.batch()
        squares: Any = rows * columns
        squared: Factor = (squares, [("p", 0), *batch, *term.left])
        factors: list[Factor] = [*term.factors, (2.0 * term.weight, ()), squared]
        output: list[Label] = [*batch, *term.outputs, ("p", 0)]
        part = contract(self.emitter, factors, output, None, self.forms.batch_size)
        assert isinstance(part, Var)
        half.add_packed(part)
        return tuple(range(m + 2 * n))

    def _axes(
        self, half: Half, s: Structured
    ) -> tuple[tuple[Label, ...], tuple[Label, ...], tuple[Label, ...]]:
        """Labels of the outputs, of the basis and of the event axes of a moved tangent."""
        event: tuple[Label, ...] = tuple(("e", k) for k in range(len(s.event)))
        free: list[Label] = [("f", k) for k in range(len(s.basis))]
        names = s.basis_labels(free, event)
        m = len(half.outputs)
        return tuple(names[:m]), tuple(names[m:]), event

    def _labels(self, half: Half, s: Structured) -> list[Label]:
        event: list[Label] = [("e", k) for k in range(len(s.event))]
        free: list[Label] = [("f", k) for k in range(len(s.basis))]
        return s.labels(free, self.forms.batch(), event)

    def _sandwich(
        self, half: Half, term: Curvature, left: Structured, right: Structured | None
    ) -> Pattern:
        """Contract a second form with tangents on both sides.  Without ``right``, the labels on
        the right are those of the basis already."""
        left = self._distinct(left, term.left)
        batch = self.forms.batch()
        rows: list[Label] = [("t", k) for k in range(len(half.basis))]
        columns: list[Label] = [("u", k) for k in range(len(half.basis))]
        factors: list[Factor] = [*term.factors, (term.weight, ())]
        factors.append((left.core, left.labels(rows, batch, term.left)))
        sizes = dict(zip(term.left, left.event, strict=True))
        t = left.basis_labels(rows, term.left)
        if right is None:
            u = list(term.right)
        else:
            right = self._distinct(right, term.right)
            factors.append((right.core, right.labels(columns, batch, term.right)))
            sizes.update(zip(term.right, right.event, strict=True))
            u = right.basis_labels(columns, term.right)
        same = Same()
        for k in half.part.tied:
            same.join(t[k], u[k])
        sizes.update({t[k]: half.basis[k] for k in half.part.tied})
        names = [*term.outputs]
        if not half.part.traced:
            names += [*t, *(u[k] for k in half.untied)]
        names = [same(a) for a in names]
        factors = [self._merged(factor, same) for factor in factors]
        distinct = list(dict.fromkeys(names))
        universe = {same(a): n for a, n in sizes.items() if same(a) not in distinct}
        core = contract(self.emitter, factors, [*batch, *distinct], universe, self.forms.batch_size)
        pattern = tuple(distinct.index(a) for a in names)
        half.add(pattern, core)
        return pattern

    def _merged(self, factor: Factor, same: Same) -> Factor:
        """The factor with labels that are the same as one."""
        value: Any = factor[0]
        labels = [same(a) for a in factor[1]]
        if not isinstance(value, Var):
            return value, labels
        for label in dict.fromkeys(labels):
            while labels.count(label) > 1:
                i = labels.index(label)
                j = labels.index(label, i + 1)
                sizes = value.val.shape
                if 1 in (sizes[i], sizes[j]):
                    drop = i if sizes[i] == 1 else j
                    value = torch.squeeze(value, (drop,))
                    del labels[drop]
                else:
                    value = torch.diagonal(value, 0, i, j)
                    del labels[j], labels[i]
                    labels.append(label)
        return value, labels

    def _distinct(self, s: Structured, labels: Sequence[Label]) -> Structured:
        repeated = [e for e, a in enumerate(labels) if list(labels).count(a) > 1]
        return self.algebra.mix(s, repeated) if repeated else s

    # --- moved tangents ---------------------------------------------------------------------------

    def apply(self, half: Half, term: Curvature | Moved, right: Structured) -> Structured:
        """``C J_j`` as an adjoint of operand i along (outputs.., basis..)."""
        if isinstance(term, Moved):
            moved = term.apply(right)
            if term.weight == 1.0:
                return moved
            return replace(moved, core=self.algebra.tensor(moved) * term.weight)
        batch = self.forms.batch()
        columns: list[Label] = [("u", k) for k in range(len(half.basis))]
        right = self._distinct(right, term.right)
        right, near = self.algebra.carried(right, term.right, term.left, len(half.outputs))
        names = [*term.outputs, *right.basis_labels(columns, term.right)]
        doubled = [a for a in names if names.count(a) > 1]
        if doubled:  # an output and a basis axis tied to one event axis: give both their own
            tied = [e for e, a in enumerate(term.right) if a in doubled]
            right = self.algebra.mix(right, tied)
            right, near = self.algebra.carried(right, term.right, term.left, len(half.outputs))
            names = [*term.outputs, *right.basis_labels(columns, term.right)]
        factors: list[Factor] = [*term.factors, (term.weight, ())]
        factors.append((right.core, right.labels(columns, batch, term.right)))
        event = self.forms.canonical.event(term.i)
        ties = tuple(
            names.index(a) if a in names and term.left.count(a) == 1 else None for a in term.left
        )
        free = [a for k, a in enumerate(names) if k not in ties]
        universe = {
            a: n
            for a, n in zip(term.right, right.event, strict=True)
            if a not in names and a not in term.left
        }
        core = contract(
            self.emitter, factors, [*free, *batch, *term.left], universe, self.forms.batch_size
        )
        return Structured(core, ties, (*half.outputs, *half.basis), event, near)

    def absorb(self, half: Half, moved: Structured) -> None:
        """Add the sum of moved tangents that arrived at the basis itself."""
        band = band_of(moved, half.basis, len(half.outputs), self.nb) if half.part == FULL else None
        if band is not None:
            half.add_packed(pack(self.algebra, moved, half.basis, band), band)
            return
        moved = self.algebra.dense(moved)
        batch = self.forms.batch()
        outputs, columns, rows = self._axes(half, moved)
        names = [*outputs, *rows, *columns]
        distinct = list(dict.fromkeys(names))
        factor: Factor = (moved.core, self._labels(half, moved))
        core = contract(self.emitter, [factor], [*batch, *distinct], None, self.forms.batch_size)
        half.add(tuple(distinct.index(a) for a in names), core)

    # --- the result -------------------------------------------------------------------------------

    def whole(self, half: Half) -> Var:
        """``A + A^T`` as ``[*batch, *outputs, *basis, *basis without tied axes]``, at its full
        size; ``[*batch, *outputs]`` where it is traced."""
        m = len(half.outputs)
        rows = [m + k for k in half.untied]
        columns = [m + len(half.basis) + k for k in range(len(rows))]
        if half.part.traced:
            rows = columns = []
        if not half.cores and not half.packed:
            return self.zeros(half.sizes)
        total: Var | None = None
        result: Var | None = None
        diagonal: list[Var] = []
        for pattern, core in half.cores.items():
            if [pattern[k] for k in rows] == [pattern[k] for k in columns]:  # symmetric as it is
                twice: Any = core + core if half.part.doubled else core  # type: ignore[operator]
                diagonal.append(self._dense(half, pattern, twice))
            else:
                dense = self._dense(half, pattern, core)
                total = dense if total is None else total + dense
        if total is not None:
            order = list(range(total.ndim))
            for i, j in zip(rows, columns, strict=True):
                order[self.nb + i], order[self.nb + j] = self.nb + j, self.nb + i
            whole: Any = total + torch.permute(total, order)
            if half.symmetric and half.part == FULL:
                whole.node.meta[SYMMETRIC] = True
            result = whole
        diagonal += self._unpacked(half)
        for dense in diagonal:
            result = dense if result is None else result + dense
        assert result is not None
        return self.full_size(result, half.sizes)

    def _dense(self, half: Half, pattern: Pattern, core: Var | float) -> Var:
        """The core with an axis of its own for every axis of the result."""
        sizes = half.sizes
        batch = self.forms.batch()
        distinct = max(pattern, default=-1) + 1
        factors: list[Factor] = [(core, [*batch, *(("c", i) for i in range(distinct))])]
        output: list[Label] = []
        for axis, name in enumerate(pattern):
            if name not in pattern[:axis]:
                output.append(("c", name))
                continue
            output.append(("d", axis))
            if sizes[axis] != 1:
                factors.append((self.algebra.eye(sizes[axis]), [("c", name), ("d", axis)]))
        out = contract(self.emitter, factors, [*batch, *output], None, self.forms.batch_size)
        return (
            out if isinstance(out, Var) else self.algebra.full([1] * (self.nb + len(output)), out)
        )

    def zeros(self, sizes: Sequence[int]) -> Var:
        batch = [self.algebra.batch_size(i) for i in range(self.nb)]
        return self.emitter.call(
            torch.zeros, (*batch, *sizes), dtype=self.algebra.like.dtype,
            device=self.algebra.device,
        )  # fmt: skip

    def full_size(self, var: Var, sizes: Sequence[int]) -> Var:
        """The value at its full size, in memory of its own."""
        shape = var.val.shape
        full = self.forms.canonical.x.meta[VAL].shape[: self.nb]
        want: list[Any] = []
        for i in range(var.ndim):
            n = full[i] if i < self.nb else sizes[i - self.nb]
            size = self.algebra.batch_size(i) if i < self.nb else int(n)
            want.append(size if shape[i] != n else -1)
        if all(isinstance(n, int) and n == -1 for n in want):
            return var
        return torch.clone(var.expand(want), memory_format=torch.contiguous_format)  # type: ignore[return-value]
