"""How each axes signature is rewritten to canonical axes: one function a signature.

Each takes a bound operation (arguments by name, those that depend on x as :class:`Laid`) and
returns its canonical result.  Here, and only here, batch axes are told from event axes: an
operation that would let samples see each other is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from fxhess import _torch
from fxhess.emit import VAL, Var
from fxhess.errors import UnsupportedOpError
from fxhess.facts import fact
from fxhess.kinds import (
    Along,
    Elementwise,
    Equation,
    Linear,
    Multilinear,
    Trailing,
    Zero,
)
from fxhess.registry import Rule
from fxhess.passes.layout import Atom, Group, Laid, Layouts, fresh


@dataclass
class Bound:
    """A captured operation with its arguments by name; ``result`` is its captured stand-in."""

    rule: Rule
    arguments: dict[str, Any]
    result: Any
    layouts: Layouts

    def stand_ins(self) -> dict[str, Any]:
        """The arguments with tensors replaced by tensors of the captured rank and shape."""
        return {name: _stand_in(value) for name, value in self.arguments.items()}

    def tensors(self) -> list[tuple[str, int | None, Any]]:
        """All tensor arguments: (name, position in a list argument or None, value)."""
        found: list[tuple[str, int | None, Any]] = []
        for name, value in self.arguments.items():
            if is_tensor(value):
                found.append((name, None, value))
            elif isinstance(value, (list, tuple)):
                found += [(name, i, v) for i, v in enumerate(value) if is_tensor(v)]
        return found

    def replace(self, name: str, index: int | None, value: Any) -> None:
        if index is None:
            self.arguments[name] = value
        else:
            items = list(self.arguments[name])
            items[index] = value
            self.arguments[name] = items

    def canonical(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The (by now canonical) arguments, as the operator's schema orders them."""
        schema = self.rule.op._schema.arguments
        args = tuple(self.arguments[a.name] for a in schema if not a.kwarg_only)
        kwargs = {
            a.name: self.arguments[a.name]
            for a in schema
            if a.kwarg_only and self.arguments[a.name] is not None
        }
        return args, kwargs

    def emit(self) -> Var:
        """Write the operation."""
        args, kwargs = self.canonical()
        return self.layouts.emitter.call(self.rule.op, *args, **kwargs)

    def emit_folded(self, name: str, leading: int) -> tuple[Var, Callable[[Var], Var]]:
        """Write an operation that takes one leading axis only, over ``leading`` of them; the
        function returned restores them on each result."""
        if leading == 1:
            return self.emit(), lambda var: var
        operand = self.arguments[name]
        nb = self.layouts.nb
        sizes = [self.layouts.batch_size(i) for i in range(nb)]
        sizes += [int(s) for s in operand.val.shape[nb:leading]]
        folded = torch.flatten(operand, 0, leading - 1) if leading else operand[None]
        self.arguments[name] = folded
        var = self.emit()
        self.arguments[name] = operand
        if leading == 0:
            return var, lambda v: v[0]
        return var, lambda v: torch.unflatten(v, 0, tuple(sizes))


@dataclass(frozen=True, eq=False)
class Raw:
    """A tensor that does not depend on x, in the layout that the model gave it; ``shape`` is its
    captured (possibly symbolic) shape."""

    var: Var
    shape: tuple[Any, ...]


def is_tensor(value: Any) -> bool:
    return isinstance(value, (Laid, Raw))


class _Captured:
    """Rank and shape of a captured tensor argument."""

    def __init__(self, value: Laid | Raw, shape: tuple[Any, ...]) -> None:
        self.shape = shape
        self.ndim = len(shape)
        self.dtype = value.var.dtype


def _stand_in(value: Any) -> Any:
    if isinstance(value, Raw):
        return _Captured(value, value.shape)
    if isinstance(value, Laid):
        shape = tuple(
            math.prod(a.size for a in g) if all(a.batch is None for a in g) else None
            for g in value.groups
        )
        return _Captured(value, shape)
    if isinstance(value, (list, tuple)):
        return [_stand_in(v) for v in value]
    return value


# --- labels to groups -----------------------------------------------------------------------


class _Unifier:
    """Finds for each label of an equation the one group of atoms that all operands can share."""

    def __init__(self, layouts: Layouts) -> None:
        self.layouts = layouts
        self.groups: dict[Any, Group] = {}
        self.batch_home: dict[int, Any] = {}

    def learn(self, operand: Laid, labels: Sequence[Any]) -> None:
        for label, group in zip(labels, operand.groups, strict=True):
            if label is None:
                continue
            for atom in group:
                if atom.batch is not None:
                    if self.batch_home.setdefault(atom.batch, label) != label:
                        raise self.layouts.mixing("combines the batch with itself")
            self.groups[label] = (
                self._refine(self.groups[label], group) if label in self.groups else group
            )

    def learn_raw(self, operand: Raw, labels: Sequence[Any]) -> None:
        for label, size in zip(labels, operand.shape, strict=True):
            if label is None or label in self.groups:
                continue
            if not isinstance(size, int):
                raise self.layouts.mixing("gives each sample an axis as long as the batch")
            self.groups[label] = (Atom(size),)

    def _refine(self, a: Group, b: Group) -> Group:
        """The coarsest group that cuts at every place where a or b does."""
        left, right = list(a), list(b)
        result: list[Atom] = []
        while left and right:
            p, q = left.pop(0), right.pop(0)
            if p.batch is not None or q.batch is not None:
                if p.batch != q.batch:
                    raise self.layouts.mixing("combines values whose batch axes do not match")
                result.append(p)
            elif p.size == q.size:
                result.append(p)
            elif p.size % q.size == 0 and q.size > 1:
                result.append(Atom(q.size))
                left.insert(0, Atom(p.size // q.size))
            elif q.size % p.size == 0 and p.size > 1:
                result.append(Atom(p.size))
                right.insert(0, Atom(q.size // p.size))
            else:
                raise self.layouts.mixing("combines values whose merged axes do not match")
        return tuple(result)

    def conform(self, operand: Laid, labels: Sequence[Any]) -> tuple[Var, list[Any]]:
        """The operand cut like the groups, and a label for each canonical axis of it."""
        at_axis = dict(enumerate(labels))
        for axis, label in at_axis.items():
            if label is None:
                continue
            want = list(self.groups[label])
            for atom in operand.groups[axis]:
                if atom.batch is not None:
                    want.pop(0)
                    continue
                sizes = []
                while math.prod(sizes) != atom.size or not sizes:
                    sizes.append(want.pop(0).size)
                if len(sizes) > 1:
                    operand, _ = self.layouts.split(operand, atom, sizes)
        names: list[Any] = [f"b{i}" for i in range(self.layouts.nb)]
        for axis, group in enumerate(operand.groups):
            label = at_axis[axis]
            for position, atom in enumerate(group):
                if atom.batch is None:
                    dropped = label is None
                    names.append(("one", axis, position) if dropped else (label, position))
        return operand.var, names

    def conform_raw(self, operand: Raw, labels: Sequence[Any]) -> tuple[Var, list[Any]]:
        """Likewise for a constant: its axes are cut as the groups say, batch axes first."""
        var = operand.var
        sizes: list[Any] = []
        names: list[Any] = []
        for axis, (label, size) in enumerate(zip(labels, operand.shape, strict=True)):
            group = () if label is None else self.groups[label]
            if label is None or (isinstance(size, int) and size == 1):
                sizes.append(1)
                names.append(("one", axis, 0))
                continue
            if self.layouts.extent(group) != _sympy(size):
                raise self.layouts.mixing(
                    f"combines an axis of {self.layouts.extent(group)} with one of {size}"
                )
            for position, atom in enumerate(group):
                batch = atom.batch is not None
                sizes.append(self.layouts.batch_size(atom.batch) if batch else atom.size)
                names.append(f"b{atom.batch}" if batch else (label, position))
        if len(sizes) != len(operand.shape):
            var = torch.reshape(var, sizes)
        return var, names

    def event_names(self, labels: Sequence[Any]) -> list[Any]:
        """A name for each event axis of a value whose axes read as ``labels``."""
        return [
            (label, position)
            for label in labels
            for position, atom in enumerate(self.groups[label])
            if atom.batch is None
        ]


def _sympy(size: Any) -> Any:
    return size if isinstance(size, sympy.Basic) else _torch.size_expression(size)


def _combined_sums(operands: Sequence[Laid], layouts: Layouts) -> frozenset[int]:
    """Batch axes over which the result is a sum; refuses sums that go back to the samples."""
    summed = frozenset[int]().union(*(o.summed for o in operands))
    if summed & frozenset[int]().union(*(o.batches for o in operands)):
        raise layouts.mixing("feeds a sum over the batch back to the samples")
    return summed


# --- the signatures -------------------------------------------------------------------------


def pointwise(bound: Bound) -> Any:
    """All operands broadcast to the axes of the result."""
    layouts = bound.layouts
    rank = bound.result.ndim
    tensors = bound.tensors()
    unifier = _Unifier(layouts)
    labelled = [
        (name, index, value, _broadcast_labels(value, bound.result.shape))
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
    summed = _combined_sums(laid, layouts)
    event = unifier.event_names(range(rank))
    batch = [f"b{i}" for i in range(layouts.nb)]
    operands = []
    for name, index, value, labels in labelled:
        var, names = _conform(unifier, value, labels)
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
        kind = Elementwise(tuple(kind.first[k] for k in kept), second)
    return kind, [given.index(names[k]) for k in kept]


def _is_affine(kind: Any, depends: Sequence[bool]) -> bool:
    if isinstance(kind, Zero):
        return False
    if isinstance(kind, Elementwise):
        return not any(
            value != 0 and depends[i] and depends[j] for (i, j), value in kind.second.items()
        )
    return isinstance(kind, Linear)


def _broadcast_labels(value: Laid | Raw, shape: Sequence[Any]) -> list[Any]:
    """The axis of the result for each axis of an operand, None where it is broadcast."""
    if isinstance(value, Laid):
        ones = [all(a.batch is None and a.size == 1 for a in g) for g in value.groups]
    else:
        ones = [isinstance(s, int) and s == 1 for s in value.shape]
    offset = len(shape) - len(ones)
    wide = [not (isinstance(s, int) and s == 1) for s in shape[offset:]]
    return [None if o and w else offset + i for i, (o, w) in enumerate(zip(ones, wide, strict=True))]


def _conform(unifier: _Unifier, value: Laid | Raw, labels: Sequence[Any]) -> tuple[Var, list[Any]]:
    if isinstance(value, Laid):
        return unifier.conform(value, labels)
    return unifier.conform_raw(value, labels)


def einsum(bound: Bound) -> Any:
    """A product summed over labels; a label that holds the batch may be summed ("a plain sum over
    the batch"), never crossed with itself."""
    layouts = bound.layouts
    assert not isinstance(bound.rule.axes, (Along, Trailing))
    equation: Equation = bound.rule.axes.equation(bound.stand_ins())  # type: ignore[union-attr]
    values = [value for _, _, value in bound.tensors()]
    laid = [v for v in values if isinstance(v, Laid)]
    unifier = _Unifier(layouts)
    for value, labels in zip(values, equation.inputs, strict=True):
        if isinstance(value, Laid):
            unifier.learn(value, labels)
    for value, labels in zip(values, equation.inputs, strict=True):
        if isinstance(value, Raw):
            unifier.learn_raw(value, labels)
    summed = _combined_sums(laid, layouts)
    if summed and len(laid) > 1:
        raise layouts.mixing("is nonlinear in a sum over the batch")
    vars_, inputs = [], []
    for value, labels in zip(values, equation.inputs, strict=True):
        var, names = _conform(unifier, value, labels)
        vars_.append(var)
        inputs.append(names)
    kept = {a for label in equation.output if label is not None for a in _batches(unifier, label)}
    contracted = frozenset(unifier.batch_home) - kept
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
    batch = [
        f"b{i}" if i in kept else ("sum", i) for i in range(layouts.nb)
    ]
    sizes.update({name: 1 for name in batch if not isinstance(name, str)})
    output = [*batch, *event]
    scale: Any = equation.scale
    if not bound.result.is_floating_point() and isinstance(scale, float) and scale.is_integer():
        scale = int(scale)
    if equation.mean:
        inputs_labels = {a for labels in equation.inputs for a in labels if a is not None}
        terms = [unifier.groups[a] for a in inputs_labels if a not in equation.output]
        scale = scale / layouts.size_of(tuple(a for group in terms for a in group))
    groups = tuple(output_groups)
    if len(vars_) == 1 and inputs[0] == output and isinstance(scale, (int, float)) and scale == 1:
        return Laid(vars_[0], groups, laid[0].summed)
    if len(vars_) == 1 and any(isinstance(n, tuple) and n[0] == "one" for n in inputs[0]):
        pass  # a squeeze: dropped axes are summed over their one entry
    var = layouts.equation(vars_, inputs, output, scale=scale, sizes=sizes)
    return Laid(var, groups, summed | contracted)


def _batches(unifier: _Unifier, label: Any) -> list[int]:
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
        if isinstance(value, Laid) and not _is_plain(value, layouts):
            raise UnsupportedOpError(
                f"argument '{name}' of {bound.rule.op} depends on x, and its rule takes it as"
                " a constant",
                where=layouts.origin,
                hint="register a rule that names it in `aligned`, or one of kind Smooth",
            )
        bound.replace(name, index, value.var)
    rank = len(members[0][2].groups if isinstance(members[0][2], Laid) else members[0][2].shape)
    dims = _mixed_dims(axes, bound.arguments, rank)
    laid = [v for _, _, v in members if isinstance(v, Laid)]
    summed = _combined_sums(laid, layouts)
    if summed:
        raise layouts.mixing("is not plainly linear in a sum over the batch")
    unifier = _Unifier(layouts)
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
        var, names = _conform(unifier, value, labels)
        event = unifier.event_names(labels)
        is_laid = isinstance(value, Laid)
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
            [places[d] for d in dims] if isinstance(given, (list, tuple)) or given is None
            else places[dims[0]]
        )
    restore: Callable[[Var], Var] = lambda v: v  # noqa: E731
    if isinstance(bound.rule.kind, Linear) and bound.rule.kind.fold:
        leading = layouts.nb + len(event) - len(dims)
        var, restore = bound.emit_folded(first_name, leading)
    else:
        var = bound.emit()
    return _mixed_results(bound, var, labelled, vars_, event, dims, unifier, restore)


def _is_plain(value: Laid, layouts: Layouts) -> bool:
    """Whether the canonical value is the captured one, with no derivative: an integer index
    where x is one sample, with no batch axes."""
    return not layouts.nb and not value.var.dtype.is_floating_point and (
        all(len(group) == 1 for group in value.groups)
    )


def _mixed_dims(
    axes: Along | Trailing, arguments: Mapping[str, Any], rank: int
) -> list[int]:
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
    unifier: _Unifier,
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
    results = []
    for i, result in enumerate(bound.result):
        if not isinstance(result, torch.Tensor):
            results.append(None)
            continue
        kind = rule.kind if i == rule.output else Zero()
        results.append(finish(var[i], result, kind))
    return tuple(results)


def reshape(bound: Bound) -> Any:
    """Split and merge axes; the batch stays whole."""
    layouts = bound.layouts
    ((_, _, laid),) = bound.tensors()
    sizes = [_sympy(s) for s in bound.result.shape]
    atoms = [a for group in laid.groups for a in group]
    groups: list[Group] = []
    kept: list[Atom] = []
    while sizes or atoms:
        taken, wanted = _block(layouts, atoms, sizes)
        laid, block = _regroup(layouts, laid, taken, wanted)
        groups += block
        kept += [a for group in block for a in group]
    target = [a for a in kept if a.batch is None]
    names: list[Any] = [f"b{i}" for i in range(layouts.nb)]
    current: list[Any] = [*names, *laid.event]
    var = layouts.arrange(laid.var, current, [*names, *target], laid=True)
    return Laid(var, tuple(groups), laid.summed)


def _block(
    layouts: Layouts, atoms: list[Atom], sizes: list[Any]
) -> tuple[list[Atom], list[Any]]:
    """Cut the shortest heads of equal product off both lists (in place)."""
    taken: list[Atom] = []
    wanted: list[Any] = []
    have: Any = sympy.Integer(1)
    want: Any = sympy.Integer(1)
    if sizes:
        wanted.append(sizes.pop(0))
        want = wanted[0]
    elif atoms:
        taken.append(atoms.pop(0))
        have = layouts.extent((taken[0],))
    while have != want:
        if atoms and (not sizes or not _exceeds(have, want)):
            taken.append(atoms.pop(0))
            have = sympy.expand(have * layouts.extent((taken[-1],)))
        elif sizes:
            wanted.append(sizes.pop(0))
            want = sympy.expand(want * wanted[-1])
        else:
            raise layouts.mixing("reshapes the batch into other axes")
    return taken, wanted


def _exceeds(have: Any, want: Any) -> bool:
    """Whether ``have`` is larger, for batches that are large (sizes are monomials)."""
    probe = {s: 1_000_003 for s in have.free_symbols | want.free_symbols}
    return bool(have.subs(probe) > want.subs(probe))


def _regroup(
    layouts: Layouts, laid: Laid, taken: list[Atom], wanted: list[Any]
) -> tuple[Laid, list[Group]]:
    """The atoms ``taken`` as axes of the sizes ``wanted`` (of equal product)."""
    if wanted and all(w == 0 for w in wanted):
        raise UnsupportedOpError("reshapes an empty axis", where=layouts.origin)
    queue = [a for a in taken if a.batch is not None or a.size != 1]
    groups: list[Group] = []
    cuts: dict[Atom, list[Atom]] = {}
    parent = {a: a for a in queue}
    for want in wanted:
        group: list[Atom] = []
        have: Any = sympy.Integer(1)
        while have != want:
            if not queue:
                return _reflow(layouts, laid, taken, wanted)
            atom = queue.pop(0)
            rest = sympy.cancel(want / have)
            need = int(rest.as_coeff_Mul()[0]) if rest.as_coeff_Mul()[0].is_Integer else 0
            if atom.batch is None and need and atom.size > need and atom.size % need == 0:
                if need == 1:
                    return _reflow(layouts, laid, taken, wanted)
                head, tail = Atom(need), Atom(atom.size // need)
                owner = parent[atom]
                parent[head] = parent[tail] = owner
                cuts.setdefault(owner, [owner])
                at = cuts[owner].index(atom)
                cuts[owner][at : at + 1] = [head, tail]
                queue.insert(0, tail)
                atom = head
            group.append(atom)
            have = sympy.expand(have * layouts.extent((atom,)))
            if _exceeds(have, want):
                return _reflow(layouts, laid, taken, wanted)
        groups.append(tuple(group) if group else (Atom(1),))
    replaced: dict[Atom, Atom] = {}
    for owner, parts in cuts.items():
        laid, made = layouts.split(laid, owner, [p.size for p in parts])
        replaced.update(zip(parts, made, strict=True))
    return laid, [tuple(replaced.get(a, a) for a in group) for group in groups]


def _reflow(
    layouts: Layouts, laid: Laid, taken: list[Atom], wanted: list[Any]
) -> tuple[Laid, list[Group]]:
    """A general reshape of adjacent event axes: merge them all, then cut."""
    if any(a.batch is not None for a in taken):
        raise layouts.mixing("reshapes the batch into other axes")
    one = Laid(laid.var, (tuple(taken),), laid.summed)
    others = [a for a in laid.event if a not in taken]
    at = laid.event.index(taken[0])
    before, after = laid.event[:at], laid.event[at + len(taken) :]
    assert len(before) + len(after) == len(others)
    whole = Laid(laid.var, (before, tuple(taken), after), laid.summed)
    merged = layouts.merge(whole, 1) if len(taken) > 1 else one
    if len(taken) == 1:
        merged = Laid(laid.var, (before, (taken[0],), after), laid.summed)
    sizes = [int(w) for w in wanted]
    if len(sizes) == 1:
        return merged, [merged.groups[1]]
    cut, parts = layouts.split(merged, merged.groups[1][0], sizes)
    return cut, [(p,) for p in parts]


def constant_shape(var: Var) -> tuple[Any, ...]:
    """The captured shape of a raw value."""
    return tuple(var.node.meta[VAL].shape)


def depends_on_x(var: Var) -> bool:
    return fact(var.node) is not None


def is_multilinear(rule: Rule) -> bool:
    return isinstance(rule.kind, Multilinear)
