"""Splitting and merging axes: ``view`` and ``reshape``, with the batch kept whole."""

from __future__ import annotations

from typing import Any

import sympy

from fxhess.errors import UnsupportedOpError
from fxhess.passes.bound import Bound
from fxhess.passes.layout import Atom, Group, Laid, Layouts
from fxhess.passes.unify import as_expression


def reshape(bound: Bound) -> Any:
    """Split and merge axes; the batch stays whole."""
    layouts = bound.layouts
    ((_, _, laid),) = bound.tensors()
    sizes = [as_expression(s) for s in bound.result.shape]
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


def _block(layouts: Layouts, atoms: list[Atom], sizes: list[Any]) -> tuple[list[Atom], list[Any]]:
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
    probe = dict.fromkeys(have.free_symbols | want.free_symbols, 1_000_003)
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
