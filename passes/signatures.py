"""How each axes signature is rewritten to canonical axes: one function a signature.

Each takes a bound operation (arguments by name, those that depend on x as :class:`Laid`) and
returns its canonical result.  Here, and only here, batch axes are told from event axes: an
operation that would let samples see each other is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fxhess.emit import Var
from fxhess.errors import UnsupportedOpError
from fxhess.kinds import Along, Elementwise, Equation, Linear, Trailing, Zero
from fxhess.passes.bound import Bound, Raw
from fxhess.passes.layout import Atom, Group, Laid, fresh
from fxhess.passes.unify import Unifier, broadcast_labels, combined_sums, conform
from fxhess.registry import Rule


def pointwise(bound: Bound) -> Any:
    """All operands broadcast to the axes of the result."""
    layouts = bound.layouts
    rank = bound.result.ndim
    tensors = bound.tensors()
    unifier = Unifier(layouts)
    labelled = [
        (name, index, value, broadcast_labels(value, bound.result.shape))
        for name, index, value in tensors
    ]
    laid = [value for _, _, value, _ in labelled if isinstance(value, Laid)]
    for _, _, value, labels in labelled:
        if isinstance(value, Laid):
            unifier.learn(value, labels)
    for _, _, value, labels in labelled:
        if isinstance(value, Raw):
            unifier.learn_raw(value, labels)
    for axis in range(rank):
        unifier.groups.setdefault(axis, (Atom(1),))
    summed = combined_sums(laid, layouts)
    event = unifier.event_names(range(rank))
    batch = [f"b{i}" for i in range(layouts.nb)]
    operands = []
    for name, index, value, labels in labelled:
        var, names = conform(unifier, value, labels)
        is_laid = isinstance(value, Laid)
        has_batch = is_laid or any(isinstance(n, str) for n in names)
        target = [*batch, *event] if has_batch else event
        if is_laid and isinstance(bound.rule.kind, Linear):
            # A linear rule sees every operand at the full size of the result.
            sizes = {n: unifier.groups[n[0]][n[1]].size for n in event if n not in names}
            if names != target:
                var = layouts.equation([var], [names], target, sizes=sizes)
        else:
            target = [n if n in names else ("new", n) for n in target]
            var = layouts.arrange(var, names, target, laid=is_laid)
        bound.replace(name, index, var)
        operands.append(var)
    var = bound.emit()
    kind, spoken = _spoken(bound.rule, [name for name, _, _, _ in labelled])
    operands = [operands[k] for k in spoken]
    depends = [isinstance(labelled[k][2], Laid) for k in spoken]
    if summed and not _is_affine(kind, depends):
        raise layouts.mixing("is nonlinear in a sum over the batch")
    layouts.annotate(var, kind, operands, [tuple(range(len(event)))] * len(operands))
    groups = tuple(fresh(unifier.groups[axis]) for axis in range(rank))
    return Laid(var, groups, summed)


def _spoken(rule: Rule, given: Sequence[str]) -> tuple[Any, list[int]]:
    """The kind, and which of the tensor arguments ``given`` it speaks of: partial derivatives
    with respect to arguments that are numbers here, or left out, are dropped."""
    schema = rule.op._schema.arguments
    names = rule.differentiable or tuple(a.name for a in schema if "Tensor" in str(a.type))
    kept = [k for k, name in enumerate(names) if name in given]
    kind = rule.kind
    if isinstance(kind, Elementwise):
        second = {
            (kept.index(i), kept.index(j)): value
            for (i, j), value in kind.second.items()
            if i in kept and j in kept
        }
        by_result = {kept.index(i): value for i, value in kind.by_result.items() if i in kept}
        kind = Elementwise(tuple(kind.first[k] for k in kept), second, by_result)
    return kind, [given.index(names[k]) for k in kept]


def _is_affine(kind: Any, depends: Sequence[bool]) -> bool:
    if isinstance(kind, Zero):
        return False
    if isinstance(kind, Elementwise):
        return not any(
            value != 0 and depends[i] and depends[j] for (i, j), value in kind.second.items()
        )
    return isinstance(kind, Linear)


def einsum(bound: Bound) -> Any:
    """A product summed over labels; a label that holds the batch may be summed ("a plain sum over
    the batch"), never crossed with itself."""
    layouts = bound.layouts
    assert not isinstance(bound.rule.axes, (Along, Trailing))
    equation: Equation = bound.rule.axes.equation(bound.stand_ins())  # type: ignore[union-attr]
    values = [value for _, _, value in bound.tensors()]
    laid = [v for v in values if isinstance(v, Laid)]
    unifier = Unifier(layouts)
    for value, labels in zip(values, equation.inputs, strict=True):
        if isinstance(value, Laid):
            unifier.learn(value, labels)
    for value, labels in zip(values, equation.inputs, strict=True):
        if isinstance(value, Raw):
            unifier.learn_raw(value, labels)
    summed = combined_sums(laid, layouts)
    if summed and len(laid) > 1:
        raise layouts.mixing("is nonlinear in a sum over the batch")
    vars_, inputs = [], []
    for value, labels in zip(values, equation.inputs, strict=True):
        var, names = conform(unifier, value, labels)
        vars_.append(var)
        inputs.append(names)
    kept = {a for label in equation.output if label is not None for a in _batches(unifier, label)}
    contracted = frozenset(unifier.batch_home) - kept
    if layouts.implied:
        kept = set(range(layouts.nb))
    output_groups: list[Group] = []
    event: list[Any] = []
    sizes: dict[Any, int] = {}
    for axis, label in enumerate(equation.output):
        if label is None or label not in unifier.groups:
            size = 1 if label is None else bound.result.shape[axis]
            if not isinstance(size, int):
                raise layouts.mixing("repeats each sample once for every sample")
            group: Group = (Atom(size),)
            name = ("new", axis)
            event.append(name)
            sizes[name] = size
        else:
            group = unifier.groups[label]
            event += unifier.event_names([label])
        output_groups.append(fresh(group))
    batch = [f"b{i}" if i in kept else ("sum", i) for i in range(layouts.nb)]
    sizes.update({name: 1 for name in batch if not isinstance(name, str)})
    output = [*batch, *event]
    scale: Any = equation.scale
    if not bound.result.is_floating_point() and isinstance(scale, float) and scale.is_integer():
        scale = int(scale)
    if equation.mean:
        inputs_labels = {a for labels in equation.inputs for a in labels if a is not None}
        terms = [unifier.groups[a] for a in inputs_labels if a not in equation.output]
        scale = scale / layouts.number(layouts.size_of(tuple(a for group in terms for a in group)))
    groups = tuple(output_groups)
    if len(vars_) == 1 and inputs[0] == output and isinstance(scale, (int, float)) and scale == 1:
        return Laid(vars_[0], groups, laid[0].summed)
    if len(vars_) == 1 and any(isinstance(n, tuple) and n[0] == "one" for n in inputs[0]):
        pass  # a squeeze: dropped axes are summed over their one entry
    var = layouts.equation(vars_, inputs, output, scale=scale, sizes=sizes)
    return Laid(var, groups, summed | contracted)


def _batches(unifier: Unifier, label: Any) -> list[int]:
    return [a.batch for a in unifier.groups.get(label, ()) if a.batch is not None]


def mixed(bound: Bound) -> Any:
    """Some axes of the operands are mixed, the others pass through (Along and Trailing)."""
    layouts, axes = bound.layouts, bound.rule.axes
    assert isinstance(axes, (Along, Trailing))
    tensors = bound.tensors()
    first_name = axes.of or tensors[0][0]
    aligned = {first_name, *axes.aligned}
    members = [(n, i, v) for n, i, v in tensors if n in aligned]
    for name, index, value in tensors:
        if name in aligned:
            continue
        if isinstance(value, Laid) and (layouts.nb or value.var.dtype.is_floating_point):
            raise UnsupportedOpError(
                f"argument '{name}' of {bound.rule.op} depends on x, and its rule takes it as"
                " a constant",
                where=layouts.origin,
                hint="register a rule that names it in `aligned`, or one of kind Smooth",
            )
        if isinstance(value, Laid):  # an index where x is one sample, with no batch axes
            for axis in range(len(value.groups)):
                value = layouts.merge(value, axis)
        bound.replace(name, index, value.var)
    rank = len(members[0][2].groups if isinstance(members[0][2], Laid) else members[0][2].shape)
    dims = _mixed_dims(axes, bound.arguments, rank)
    laid = [v for _, _, v in members if isinstance(v, Laid)]
    summed = combined_sums(laid, layouts)
    if summed:
        raise layouts.mixing("is not plainly linear in a sum over the batch")
    unifier = Unifier(layouts)
    labelled = []
    for position, (name, index, value) in enumerate(members):
        if isinstance(value, Laid):
            for dim in dims:
                if any(a.batch is not None for a in value.groups[dim]):
                    raise layouts.mixing("works along the batch axis")
                value = layouts.merge(value, dim)
        labels = [("mixed", position, d) if d in dims else d for d in range(rank)]
        labelled.append((name, index, value, labels))
    for _, _, value, labels in labelled:
        if isinstance(value, Laid):
            unifier.learn(value, labels)
    for _, _, value, labels in labelled:
        if isinstance(value, Raw):
            unifier.learn_raw(value, labels)
    batch = [f"b{i}" for i in range(layouts.nb)]
    vars_: list[Var] = []
    event: list[Any] = []
    for name, index, value, labels in labelled:
        var, names = conform(unifier, value, labels)
        event = unifier.event_names(labels)
        is_laid = isinstance(value, Laid)
        if layouts.implied and laid and not is_laid:  # its captured form lacks the batch axes
            sizes = [layouts.batch_size(i) for i in range(layouts.nb)]
            var = var.expand([*sizes, *(-1 for _ in names)])
            names = [*batch, *names]
        target = [*batch, *event] if is_laid or any(n in batch for n in names) else event
        target = [n if n in names else ("new", n) for n in target]
        if len(names) != len(target) or names != target:
            var = layouts.arrange(var, names, target, laid=True)
        bound.replace(name, index, var)
        vars_.append(var)
    places = {d: event.index((labelled[-1][3][d], 0)) - len(event) for d in dims}
    if isinstance(axes, Along):
        given = bound.arguments[axes.dim]
        bound.arguments[axes.dim] = (
            [places[d] for d in dims]
            if isinstance(given, (list, tuple)) or given is None
            else places[dims[0]]
        )
    restore: Callable[[Var], Var] = lambda v: v  # noqa: E731
    if isinstance(bound.rule.kind, Linear) and bound.rule.kind.fold:
        leading = layouts.nb + len(event) - len(dims)
        var, restore = bound.emit_folded(first_name, leading)
    else:
        var = bound.emit()
    return _mixed_results(bound, var, labelled, vars_, event, dims, unifier, restore)


def _mixed_dims(axes: Along | Trailing, arguments: Mapping[str, Any], rank: int) -> list[int]:
    if isinstance(axes, Trailing):
        count = axes.rank(arguments) if callable(axes.rank) else axes.rank
        return list(range(rank - count, rank))
    given = arguments[axes.dim]
    if given is None or (isinstance(given, (list, tuple)) and not given):
        return list(range(rank))
    dims = list(given) if isinstance(given, (list, tuple)) else [given]
    return [d % max(rank, 1) for d in dims]


def _mixed_results(
    bound: Bound,
    var: Var,
    labelled: Sequence[tuple[str, int | None, Any, list[Any]]],
    vars_: Sequence[Var],
    event: Sequence[Any],
    dims: Sequence[int],
    unifier: Unifier,
    restore: Callable[[Var], Var],
) -> Any:
    """Facts and groups of the result, or of each result of an operation with several."""
    layouts, rule = bound.layouts, bound.rule
    rank = len(labelled[0][3])
    names = rule.differentiable or (labelled[0][0],)
    chosen = [v for (name, *_), v in zip(labelled, vars_, strict=True) if name in names]
    free = [a for a in event if not (isinstance(a[0], tuple) and a[0][0] == "mixed")]

    args, kwargs = bound.canonical()

    def finish(var: Var, result: Any, kind: Any) -> Laid:
        var = restore(var)
        if isinstance(bound.rule.axes, Trailing):
            kept = list(range(rank - len(dims)))
            tail = [Atom(int(s)) for s in result.shape[len(kept) :]]
            groups = [unifier.groups[d] for d in kept] + [(a,) for a in tail]
            out = [*free, *(("out", i) for i in range(len(tail)))]
        else:
            groups, out = [], []
            reduced = result.ndim < rank
            for d in range(rank):
                if d in dims:
                    if not reduced:
                        groups.append((Atom(int(result.shape[d])),))
                        out.append(("out", d))
                    continue
                groups.append(unifier.groups[d])
                out += unifier.event_names([d])
        own = tuple(out.index(a) if a in out else None for a in event)
        layouts.annotate(
            var, kind, chosen, [own] * len(chosen), args, kwargs, len(dims), bound.rule.op
        )
        return Laid(var, tuple(map(fresh, groups)))

    if not isinstance(bound.result, (tuple, list)):
        return finish(var, bound.result, rule.kind)
    layouts.annotate(var, Zero(), [], [])
    results: list[Laid | None] = []
    for i, result in enumerate(bound.result):
        if not isinstance(result, torch.Tensor):
            results.append(None)
            continue
        kind = rule.kind if i == rule.output else Zero()
        results.append(finish(var[i], result, kind))
    return tuple(results)
