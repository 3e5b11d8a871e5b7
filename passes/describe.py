"""Description: what became of each operation of the model, as plain data for people.

*Needs* a canonical graph, its derivative and the lowered program.  *Gives* one
:class:`~fxhess.steps.Step` for each operation of the model that depends on x::

    tanh: elementwise, tangents diagonal ==> dense, closed at x, 7 operations of the program
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from torch import fx

from fxhess.contraction import evaluate
from fxhess.cost import name_of
from fxhess.emit import ORIGIN, Var
from fxhess.errors import Origin
from fxhess.facts import Canonical, Fact, fact, is_active, known_fact
from fxhess.kinds import Multilinear, is_curved
from fxhess.passes.differentiate import Derivative
from fxhess.steps import Ending, Step, Tangent
from fxhess.structure import Structured


def describe(canonical: Canonical, derivative: Derivative, program: fx.Graph) -> tuple[Step, ...]:
    """One step for each operation that depends on x, in order; x itself comes first."""
    members = _members(canonical)
    number = {node: n for n, nodes in members.items() for node in nodes}
    endings: dict[int, list[Ending]] = {}
    for term in derivative.terms:
        distinct = len(set(term.pattern))
        structure = "diagonal" if distinct < len(term.pattern) else "dense"
        endings.setdefault(number[term.node], []).append(
            Ending(
                "rebase" if term.carried else term.ending,
                number[term.base],
                structure if term.pattern else "-",
            )
        )
    lost: dict[int, list[int]] = {}
    for origin, size in derivative.losses:
        if origin is not None:
            lost.setdefault(origin.step, []).append(size)
    written: dict[int, list[str]] = {}
    for node in program.nodes:
        origin = node.meta.get(ORIGIN)
        if node.op.startswith("call") and isinstance(origin, Origin):
            written.setdefault(origin.step, []).append(node.name)
    found = []
    for n, nodes in members.items():
        last = next((node for node in reversed(nodes) if known_fact(node).active), nodes[-1])
        origin = nodes[0].meta.get(ORIGIN)
        inputs = dict.fromkeys(
            number[o] for node in nodes for o in node.all_input_nodes if o in number
        )
        adjoint = derivative.adjoints.get(last)
        found.append(
            Step(
                n,
                origin.op.removeprefix("aten.") if origin and n else "x",
                origin.module if origin else "",
                origin.line if origin else "",
                "input" if nodes[0] is canonical.x else _kind(nodes),
                tuple(_part(node) for node in nodes if node is not canonical.x),
                canonical.event(last),
                tuple(i for i in inputs if i != n),
                known_fact(last).active,
                str(adjoint) if adjoint is not None else "",
                tuple(_tangents(canonical, derivative.tangents, last, number)),
                tuple(endings.get(n, ())),
                tuple(lost.get(n, ())),
                tuple(written.get(n, ())),
            )
        )
    return tuple(found)


def _members(canonical: Canonical) -> dict[int, list[fx.Node]]:
    """The canonical nodes that depend on x and that the output needs, by step, in order."""
    needed = {canonical.output}
    for node in reversed(list(canonical.nodes())):
        if node in needed:
            needed.update(node.all_input_nodes)
    members: dict[int, list[fx.Node]] = {0: [canonical.x]}
    for node in canonical.nodes():
        if node is canonical.x or node not in needed or fact(node) is None:
            continue
        origin = node.meta.get(ORIGIN)
        step = origin.step if isinstance(origin, Origin) and origin.step >= 0 else -1
        # What has no place of its own belongs to what came before.
        members.setdefault(step if step > 0 else next(reversed(members)), []).append(node)
    return members


def _kind(nodes: Sequence[fx.Node]) -> str:
    """The kind that an operation shows: that of its only part, or what its parts make together."""
    facts = [known_fact(node) for node in nodes]
    active = [known for known in facts if known.active]
    if not active:
        return "zero"
    if any(known.derived for known in active):
        return "opaque"
    kinds = {_own(known) for known in active}
    if len(kinds) == 1:
        return kinds.pop()
    return (
        "composite" if any(_own(k) != "linear" and is_curved(k.kind) for k in active) else "linear"
    )


def _own(known: Fact) -> str:
    """The kind's name; a product of which one factor depends on x is linear."""
    if isinstance(known.kind, Multilinear) and sum(map(is_active, known.operands)) == 1:
        return "linear"
    return type(known.kind).__name__.lower()


def _part(node: fx.Node) -> str:
    return "einsum" if node.target is evaluate else name_of(node)


def _tangents(
    canonical: Canonical,
    tangents: Mapping[tuple[fx.Node, object], Mapping[fx.Node, Structured]],
    node: fx.Node,
    number: Mapping[fx.Node, int],
) -> Iterator[Tangent]:
    """The tangents of a value, each once."""
    seen = set()
    for (base, _), values in tangents.items():
        if node not in values:
            continue
        s = values[node]
        found = Tangent(
            number[base], _structure(s), _shared(canonical, s), _entries(canonical, s),
            math.prod(s.basis) * math.prod(s.event),
        )  # fmt: skip
        if found not in seen:
            seen.add(found)
            yield found


def _structure(s: Structured) -> str:
    tied = [k for k in s.ties if k is not None]
    long = [n for n in s.basis if n != 1]
    if not s.basis:
        return "vector"
    if len(tied) == len(long):
        return "diagonal" if isinstance(s.core, Var) else "identity"
    if tied:
        return "tied"
    return "near" if s.places else "dense"


def _shared(canonical: Canonical, s: Structured) -> bool:
    if not isinstance(s.core, Var):
        return True
    lead = len(s.free)
    return all(n == 1 for n in s.core.val.shape[lead : lead + canonical.batch_ndim])


def _entries(canonical: Canonical, s: Structured) -> int:
    """How many numbers one sample's core holds."""
    if not isinstance(s.core, Var):
        return 1
    lead = len(s.free)
    shape = s.core.val.shape
    return math.prod([*shape[:lead], *shape[lead + canonical.batch_ndim :]])


__all__ = ["describe"]
