"""First forms of one operation, by kind: how tangents and adjoints pass it.

For a node ``y = op(x_1 .. x_k)`` of a canonical graph:

- ``push``: tangents of the operands -> tangent of y
- ``pull``: adjoint of y -> adjoints of the operands

(the second form is ``curvature`` in the file of that name).

Pointwise and multilinear operations do both by contracting labelled factors, so structure
and batch-free factors survive; linear and smooth ones by the functions of their rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxhess.contraction import Factor, contract
from fxhess.emit import ORIGIN, Var
from fxhess.errors import InternalError
from fxhess.facts import Canonical, Fact, fact, is_active, windows_of
from fxhess.kinds import Call, Elementwise, Label, Linear, Multilinear, Smooth, Window
from fxhess.structure import SAME, Algebra, Places, Structured

RESULT = -1  # in place of an operand's number


class Forms:
    """Writes first forms of canonical nodes, given their values; ``calls``: what the rules of some
    of them see instead."""

    def __init__(
        self,
        canonical: Canonical,
        algebra: Algebra,
        values: Mapping[fx.Node, Any],
        calls: Mapping[fx.Node, Call] | None = None,
    ) -> None:
        self.canonical = canonical
        self.algebra = algebra
        self.emitter = algebra.emitter
        self.values = values
        self._calls = calls or {}
        self.nb = canonical.batch_ndim
        self._partials: dict[tuple[fx.Node, tuple[int, ...]], Any] = {}

    # --- what a rule sees ---------------------------------------------------------------------

    def call(self, node: fx.Node) -> Call:
        if node in self._calls:
            return self._calls[node]
        known = self.fact(node)
        args = fx.node.map_arg(known.args, self.values.__getitem__)
        kwargs = fx.node.map_arg(dict(known.kwargs), self.values.__getitem__)
        operands = tuple(self.values[o] for o in known.operands)
        return Call(args, kwargs, operands, self.values[node])  # type: ignore[arg-type]

    def fact(self, node: fx.Node) -> Fact:
        known = fact(node)
        if known is None:
            raise InternalError(f"no fact on {node}", where=node.meta.get(ORIGIN))
        return known

    def partial(self, node: fx.Node, order: tuple[int, ...]) -> Any:
        """A first or second partial derivative of a pointwise operation, or one by the result
        (``(i, RESULT)``): a Var or a number."""
        key = (node, order)
        if key not in self._partials:
            known = self.fact(node)
            assert isinstance(known.kind, Elementwise)
            kind, i, *j = known.kind, *order
            rule = kind.second.get((i, j[0]), 0) if j else kind.first[i]
            rule = kind.by_result[i] if j == [RESULT] else rule
            if callable(rule):
                call = self.call(node)
                rule = rule(call.y, *(self._tensor(a, call.y) for a in call.args), **call.kwargs)
            self._partials[key] = rule
        return self._partials[key]

    def _tensor(self, value: Any, y: Var) -> Any:
        """A number that depends on the batch size as a tensor: dividing by 0 is no error then.
        Integers, and numbers of fewer digits than the result's, in its type: 1 / 3 would be
        single else."""
        if not isinstance(value, Var):
            return value
        if not isinstance(value.val, torch.Tensor):
            like = self.algebra.like
            return self.algebra.emitter.call(torch.Tensor.new_full, like, (), value)
        exact = value.dtype in (y.dtype, torch.bool) or not y.dtype.is_floating_point
        if exact or torch.promote_types(value.dtype, y.dtype) != y.dtype:
            return value
        return value.to(y.dtype)

    # --- labelled operations ------------------------------------------------------------------

    def batch(self) -> list[Label]:
        return [f"b{i}" for i in range(self.nb)]

    def labelled(self, node: fx.Node) -> tuple[list[list[Label]], list[Label], dict[Label, int]]:
        """See :func:`labelled`."""
        return labelled(self.canonical, node)

    def _jacobian(self, node: fx.Node, i: int) -> list[Factor]:
        """Factors of d y / d x_i besides the identity on shared labels."""
        known = self.fact(node)
        if isinstance(known.kind, Multilinear):
            return self.others(node, {i})
        return [self.pointwise(node, (i,))]

    def others(self, node: fx.Node, without: set[int]) -> list[Factor]:
        """The operands of a product, but some, and its scale."""
        known = self.fact(node)
        assert isinstance(known.kind, Multilinear)
        factors: list[Factor] = [
            (self.values[operand], known.kind.inputs[k])
            for k, operand in enumerate(known.operands)
            if k not in without
        ]
        scale = known.args[3]
        scale = self.values[scale] if isinstance(scale, fx.Node) else scale
        return [*factors, (scale, ())]

    def pointwise(self, node: fx.Node, order: tuple[int, ...]) -> Factor:
        value = self.partial(node, order)
        if not isinstance(value, Var):
            return (float(value), ())
        labels = [*self.batch(), *(("e", k) for k in range(len(self.canonical.event(node))))]
        return (value, tuple(labels[len(labels) - value.ndim :]))

    # --- push -----------------------------------------------------------------------------------

    def push(self, node: fx.Node, tangents: Sequence[Structured | None]) -> Structured:
        """The tangent of the node, given those of its operands (None: zero)."""
        kind = self.fact(node).kind
        if isinstance(kind, (Elementwise, Multilinear)):
            return self._push_labelled(node, tangents)
        return self._push_function(node, tangents)

    def _push_labelled(self, node: fx.Node, tangents: Sequence[Structured | None]) -> Structured:
        inputs, output, sizes = self.labelled(node)
        event = self.canonical.event(node)
        terms = []
        for i, t in enumerate(tangents):
            if t is None or self._is_zero(node, i):
                continue
            t = self._distinct(t, inputs[i])
            factors = self._jacobian(node, i)
            terms.append(self._transport(t, factors, inputs[i], output, sizes, event))
        return self.algebra.add(terms)

    def _is_zero(self, node: fx.Node, i: int) -> bool:
        kind = self.fact(node).kind
        return (
            isinstance(kind, Elementwise)
            and isinstance(kind.first[i], (int, float))
            and (kind.first[i] == 0)
        )

    def _distinct(self, s: Structured, labels: Sequence[Label]) -> Structured:
        """Untie axes that an equation reads along a diagonal."""
        repeated = [e for e, a in enumerate(labels) if list(labels).count(a) > 1]
        return self.algebra.mix(s, repeated) if repeated else s

    def _transport(
        self,
        s: Structured,
        factors: Sequence[Factor],
        source: Sequence[Label],
        target: Sequence[Label],
        sizes: Mapping[Label, int],
        event: tuple[int, ...],
    ) -> Structured:
        """Contract a derivative with factors, from the axes ``source`` to the axes ``target``."""
        s, near = self.algebra.carried(s, source, target)
        free_labels: list[Label] = [("t", k) for k in range(len(s.basis))]
        basis = s.basis_labels(free_labels, source)
        ties = tuple(s.ties[list(source).index(a)] if a in source else None for a in target)
        out_free = [basis[k] for k in range(len(basis)) if k not in ties]
        core: Factor = (s.core, s.labels(free_labels, self.batch(), source))
        universe = {a: n for a, n in sizes.items() if a in source and a not in target}
        out = contract(
            self.emitter,
            [core, *factors],
            [*out_free, *self.batch(), *target],
            universe,
            self.batch_size,
        )
        return Structured(out, ties, s.basis, event, near)

    def batch_size(self, label: Label) -> Var:
        """The size of a batch label as a value of the graph."""
        assert isinstance(label, str)
        return self.algebra.batch_size(int(label[1:]))

    def _push_function(self, node: fx.Node, tangents: Sequence[Structured | None]) -> Structured:
        known = self.fact(node)
        kind = known.kind
        assert isinstance(kind, (Linear, Smooth))
        event = self.canonical.event(node)
        given = [t for t in tangents if t is not None]
        filled = [
            t if t is not None else self._zero_like(given[0], operand, len(axes))
            for t, operand, axes in zip(tangents, known.operands, known.axes, strict=True)
        ]
        call = self.call(node)
        meets = windows_of(self.canonical, node, call)
        places: dict[int, tuple[int | None, Window]] = {
            e: (out, SAME) for e, out in enumerate(known.axes[0]) if out is not None
        }
        places |= {e: (out, window) for e, out, window in meets}
        ready = self._unmixed(filled, known.axes, places)
        cores = [self.algebra.tensor(t) for t in ready]
        lead = len(ready[0].free) + self.nb
        if kind.push is None:

            def apply(*tensors: Var) -> Var:
                return self._again(node, tensors)
        else:
            push = kind.push

            def apply(*tensors: Var) -> Var:
                return push(call, *tensors)  # type: ignore[no-any-return]

        if isinstance(kind, Linear) and kind.fold:
            core = self._folded(apply, cores, len(ready[0].free), known.mixed)
        else:
            core = apply(*cores)
        ties: list[int | None] = [None] * len(event)
        for e, out in enumerate(known.axes[0]):
            if out is not None:
                ties[out] = ready[0].ties[e]
        self.check_rank(node, core, lead + len(event))
        near = self.algebra.arrived(ready[0], places)
        return Structured(core, tuple(ties), ready[0].basis, event, near)

    def _zero_like(self, t: Structured, operand: fx.Node, rank: int) -> Structured:
        """The zero tangent of an operand of so many event axes, tied as ``t`` is.  A constant may
        have fewer axes (they broadcast), or batch axes too."""
        shape = (1,) * rank + tuple(operand.meta["val"].shape)
        event = tuple(int(n) for n in shape[len(shape) - rank :])
        ties: tuple[int | None, ...] = (None,) * rank
        if len(t.ties) == rank:  # an axis that is mixed may be longer than the basis axis
            ties = tuple(
                k if k is not None and n in (1, t.basis[k]) else None
                for k, n in zip(t.ties, event, strict=True)
            )
        near = tuple(n for n in t.near if n.event is None and n.basis in ties)
        return Structured(0.0, ties, t.basis, event, near)

    def _unmixed(
        self,
        items: Sequence[Structured],
        axes: Sequence[Sequence[int | None]],
        places: Places,
    ) -> list[Structured]:
        """Untie and widen the axes that the operation mixes; one set of ties for all.  ``places``:
        axes that something can stay near."""
        own = [[e for e, out in enumerate(a) if out is None] for a in axes]
        ready = [self._opened(t, mixed, places) for t, mixed in zip(items, own, strict=True)]
        ready = self.algebra.unify(ready) if len(ready) > 1 else ready
        ready = [self.algebra.widen(t, mixed) for t, mixed in zip(ready, own, strict=True)]
        return self.algebra.spread(ready, own) if len(ready) > 1 else ready

    def _opened(self, s: Structured, axes: Sequence[int], places: Places) -> Structured:
        """Untie the axes that an operation mixes."""
        s = self.algebra.mix(s, [e for e in axes if e not in places])
        return self.algebra.moved(self.algebra.untie(s, axes), places)

    def _again(self, node: fx.Node, tensors: Sequence[Var]) -> Var:
        """The operation itself applied to tangents."""
        known = self.fact(node)
        replaced = dict(zip(known.operands, tensors, strict=True))
        lookup = lambda n: replaced.get(n, self.values[n])  # noqa: E731
        args = fx.node.map_arg(known.args, lookup)
        kwargs = fx.node.map_arg(dict(known.kwargs), lookup)
        return self.emitter.call(known.operator, *args, **kwargs)  # type: ignore[arg-type, misc]

    def _folded(
        self, apply: Callable[..., Var], cores: Sequence[Var], free: int, mixed: int
    ) -> Var:
        """Run a function that takes one leading axis, with all leading axes folded into it."""
        shape = cores[0].val.shape
        leading = len(shape) - mixed
        if leading == 1:
            return apply(*cores)
        if leading == 0:
            return apply(*(c[None] for c in cores))[0]  # type: ignore[return-value]
        sizes = [
            self.algebra.batch_size(k - free) if free <= k < free + self.nb and n != 1 else int(n)
            for k, n in enumerate(shape[:leading])
        ]
        out = apply(*(torch.flatten(c, 0, leading - 1) for c in cores))
        return torch.unflatten(out, 0, tuple(sizes))  # type: ignore[return-value]

    def check_rank(self, node: fx.Node, core: Var, rank: int) -> None:
        if core.ndim != rank:
            raise InternalError(
                f"the rule of {node.target} gave {core.ndim} axes where {rank} were expected",
                where=node.meta.get(ORIGIN),
            )

    # --- pull -----------------------------------------------------------------------------------

    def pull(self, node: fx.Node, g: Structured) -> list[tuple[fx.Node, Structured]]:
        """Adjoints of the active operands, given that of the node."""
        known = self.fact(node)
        if isinstance(known.kind, (Elementwise, Multilinear)):
            inputs, output, sizes = self.labelled(node)
            results = []
            for i, operand in enumerate(known.operands):
                if not is_active(operand) or self._is_zero(node, i):
                    continue
                factors = self._jacobian(node, i)
                event = self.canonical.event(operand)
                target = inputs[i]
                if len(set(target)) != len(target):
                    raise InternalError("a repeated label", where=node.meta.get(ORIGIN))
                g_i = self._transport(g, factors, output, target, sizes, event)
                results.append((operand, g_i))
            return results
        return self._pull_function(node, g)

    def _pull_function(self, node: fx.Node, g: Structured) -> list[tuple[fx.Node, Structured]]:
        known = self.fact(node)
        kind = known.kind
        assert isinstance(kind, (Linear, Smooth))
        passed = [out for out in known.axes[0] if out is not None]
        rank = len(self.canonical.event(node))
        mixed = [e for e in range(rank) if e not in passed]
        call = self.call(node)
        meets = windows_of(self.canonical, node, call)
        places: dict[int, tuple[int | None, Window]] = {}
        if g.near:
            places = dict.fromkeys(passed, (None, SAME))
            places |= {out: (e, window.reversed()) for e, out, window in meets}
        g = self.algebra.widen(self._opened(g, mixed, places), mixed)
        core = self.algebra.tensor(g)

        def apply(core: Var) -> Any:
            return kind.pull(core, call)

        if isinstance(kind, Linear) and kind.fold:
            results: Any = self._folded(apply, [core], len(g.free), len(mixed))
        else:
            results = apply(core)
        parts = results if isinstance(results, (tuple, list)) else [results]
        found = []
        for operand, axes, part in zip(known.operands, known.axes, parts, strict=True):
            if not is_active(operand):
                continue
            ties = tuple(None if out is None else g.ties[out] for out in axes)
            event = self.canonical.event(operand)
            self.check_rank(node, part, len(g.free) + self.nb + len(event))
            own = {out: (e, SAME) for e, out in enumerate(axes) if out is not None}
            near = self.algebra.arrived(g, {**places, **own})
            found.append((operand, Structured(part, ties, g.basis, event, near)))
        return found


def labelled(
    canonical: Canonical, node: fx.Node
) -> tuple[list[list[Label]], list[Label], dict[Label, int]]:
    """Labels of the event axes of each operand and of the result, and their sizes."""
    known = fact(node)
    assert known is not None
    sizes: dict[Label, int] = {}
    inputs: list[list[Label]] = []
    event = canonical.event(node)
    if isinstance(known.kind, Multilinear):
        output = list(known.kind.output[canonical.batch_ndim :])
        for operand, given in zip(known.operands, known.kind.inputs, strict=True):
            batched = fact(operand) is not None
            inputs.append(list(given[canonical.batch_ndim :] if batched else given))
    else:
        output = [("e", i) for i in range(len(event))]
        for operand in known.operands:
            shape = tuple(operand.meta["val"].shape)
            if fact(operand) is not None:
                shape = shape[canonical.batch_ndim :]
            tail = output[len(output) - min(len(shape), len(output)) :]
            own: list[Label] = [("lead", i) for i in range(len(shape) - len(tail))]
            for i, (label, size) in enumerate(zip(tail, shape[len(own) :], strict=True)):
                wide = event[len(output) - len(tail) + i] != size
                own.append(("one", i) if wide else label)
            inputs.append(own)
    for operand, labels in zip(known.operands, inputs, strict=True):
        shape = tuple(operand.meta["val"].shape)
        for label, size in zip(labels, shape[len(shape) - len(labels) :], strict=True):
            if not isinstance(label, str):
                sizes[label] = max(sizes.get(label, 1), int(size))
    sizes.update(zip(output, event, strict=True))
    return inputs, output, sizes
