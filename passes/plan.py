"""Planning: at which values to start the tangents afresh, chosen by estimated seconds.

*Needs* canonical facts with activity.  *Gives* a :class:`Plan`: the bases for differentiation.

A base must be a value that every path from x passes through (a dominator in the dataflow graph).
Between two curved operations only the narrowest such value is a candidate.  Dynamic programming
runs from the output back to x: the best program that starts at a base is the cheapest piece up to
some later base, plus the best program from there.  Pieces are costed by writing them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import networkx as nx
from torch import fx

from fxhess.cost import Rates, rates_for, total
from fxhess.errors import InputError
from fxhess.facts import Canonical, dataflow, fact
from fxhess.kinds import is_curved
from fxhess.passes.differentiate import Half, Sketch

STRATEGIES = ("auto", "close", "rebase")
_WINDOW = 6  # how many candidates ahead the next base is looked for


@dataclass
class Plan:
    """The bases, in order, and the estimated seconds of each alternative that was considered."""

    bases: list[fx.Node] = field(default_factory=list)
    estimate: float = 0.0
    alternatives: dict[str, float] = field(default_factory=dict)


def plan(canonical: Canonical, strategy: str = "auto") -> Plan:
    """Choose the bases.

    ``strategy``: "auto" by cost; "close" uses none, "rebase" every candidate.

    Raises:
        InputError: an unknown strategy.
    """
    if strategy not in STRATEGIES:
        raise InputError(
            f"unknown strategy {strategy!r}", hint=f"one of {', '.join(map(repr, STRATEGIES))}"
        )
    places = candidates(canonical)
    if strategy == "close" or not places:
        return Plan()
    if strategy == "rebase":
        return Plan(places)
    return _cheapest(Sketch(canonical), places, rates_for(canonical.device))


def candidates(canonical: Canonical) -> list[fx.Node]:
    """Values that all of the derivative passes through, one between any two curved operations."""
    graph = dataflow(list(canonical.nodes()))
    if canonical.output not in graph or canonical.x not in graph:
        return []
    below = nx.ancestors(graph, canonical.output) | {canonical.output}
    graph = graph.subgraph(below)
    if canonical.x not in graph:
        return []
    parent = nx.immediate_dominators(graph, canonical.x)
    chain = []
    node = canonical.output
    while node is not canonical.x:
        chain.append(node)
        node = parent[node]
    chain.reverse()
    order = {n: i for i, n in enumerate(canonical.nodes())}
    curved = sorted(order[n] for n in graph if is_curved(_kind(n)))
    best: dict[int, fx.Node] = {}
    for node in chain:
        after = sum(1 for i in curved if i <= order[node])
        if after == len(curved):  # nothing curved follows
            continue
        size = math.prod(canonical.event(node))
        if after not in best or size <= math.prod(canonical.event(best[after])):
            best[after] = node
    return [best[k] for k in sorted(best)]


def _kind(node: fx.Node):  # type: ignore[no-untyped-def]
    known = fact(node)
    assert known is not None
    return known.kind


def _cheapest(sketch: Sketch, places: list[fx.Node], rates: Rates) -> Plan:
    starts = [sketch.canonical.x, *places]
    n = len(starts)
    best: list[tuple[float, list[int], Half]] = [(math.inf, [], Half((), ()))] * n
    for i in reversed(range(n)):
        ahead = [*range(i + 1, min(n, i + 1 + _WINDOW))]
        options: list[int | None] = [*ahead]
        if i == 0 or n - i <= _WINDOW + 1:
            options.append(None)
        for j in options:
            later = best[j] if j is not None else None
            half, nodes = sketch.piece(
                starts[i], starts[j] if j is not None else None, later[2] if later else None
            )
            cost = total(nodes, rates) + (later[0] if later else 0.0)
            if cost < best[i][0]:
                best[i] = (cost, [j, *later[1]] if later and j is not None else [], half)
    cost, chosen, half = best[0]
    finish = total(sketch.finish(half), rates)
    return Plan([starts[j] for j in chosen], cost + finish)
