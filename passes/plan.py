"""Planning: how each term of the Hessian's sum ends, chosen by estimated seconds.

*Needs* canonical facts with activity.  *Gives* a :class:`Plan`: the pieces for differentiation.

A base must be a value that every path from x passes through (a dominator in the dataflow graph).
Between two curved operations only the narrowest such value is a candidate.  Dynamic programming
runs from the output back to x: the best program that starts at a base is the cheapest piece up to
some later base, plus the best program from there; within a piece, the first terms may be pulled
and the others closed.  Pieces are costed by writing them on scratch paper.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import networkx as nx
import torch
from torch import fx

from fxhess import symmetric
from fxhess.cost import total
from fxhess.emit import VAL
from fxhess.errors import InputError
from fxhess.facts import Canonical, dataflow, known_fact
from fxhess.kinds import is_curved
from fxhess.outputs import Output
from fxhess.passes.colours import colours
from fxhess.passes.differentiate import start_of
from fxhess.passes.draft import Draft, Piece, Start
from fxhess.passes.half import Half
from fxhess.rates import Rates, rates_for

STRATEGIES = ("auto", "close", "pull", "rebase")
_WINDOW = 5  # how many candidates ahead the next base is looked for, at most
_EFFORT = 4000  # how many values may be differentiated on scratch paper, about
_FEW = 3  # up to so many terms, every cut between pulled and closed ones is tried
_NEAR = 2  # how many numbers of colours are tried
_ALL = 1 << 30


@dataclass(frozen=True)
class Plan:
    """The pieces, from x on, and the estimated seconds of the whole (0 where it was not
    estimated)."""

    pieces: tuple[Piece, ...]
    estimate: float = 0.0


HESSIAN = Output("hessian")


def plan(
    canonical: Canonical,
    strategy: str = "auto",
    output: Output = HESSIAN,
    given: Mapping[str, torch.Tensor] | None = None,
    compiled: bool = False,
) -> Plan:
    """Choose the pieces for an output of second order; ``given`` as for ``differentiate``;
    ``compiled``: see :func:`fxhess.cost.seconds`.

    ``strategy``: "auto" by cost; "close" and "pull" end all terms in this way, "rebase" closes
    them at every candidate.

    Raises:
        InputError: an unknown strategy.
    """
    if strategy not in STRATEGIES:
        raise InputError(
            f"unknown strategy {strategy!r}", hint=f"one of {', '.join(map(repr, STRATEGIES))}"
        )
    places = candidates(canonical)
    if strategy == "rebase":
        return Plan(tuple(Piece(base) for base in (canonical.x, *places)))
    if strategy != "auto" or not has_curvature(canonical):
        pulls = strategy == "pull" and output.name == "hessian"
        return Plan((Piece(canonical.x, _ALL if pulls else 0),))
    rates = rates_for(canonical.device, canonical.x.meta[VAL].dtype)
    return _cheapest(canonical, output, given, places, rates, compiled)


def has_curvature(canonical: Canonical) -> bool:
    """Whether any active operation is curved."""
    return any(is_curved(known_fact(n).kind) for n in dataflow(list(canonical.nodes())))


def candidates(canonical: Canonical) -> list[fx.Node]:
    """Values that all of the derivative passes through, one between any two curved operations."""
    graph = dataflow(list(canonical.nodes()))
    if canonical.output not in graph or canonical.x not in graph:
        return []
    graph = graph.subgraph(nx.ancestors(graph, canonical.output) | {canonical.output})
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
    curved = sorted(order[n] for n in graph if is_curved(known_fact(n).kind))
    best: dict[int, fx.Node] = {}
    for node in chain:
        before = bisect.bisect_right(curved, order[node])
        if before == len(curved):  # nothing curved follows
            continue
        size = math.prod(canonical.event(node))
        if before not in best or size <= math.prod(canonical.event(best[before])):
            best[before] = node
    return [best[k] for k in sorted(best)]


@dataclass
class _Best:
    """The best known program that starts at a base."""

    cost: float
    pieces: tuple[Piece, ...]
    half: Half


def _cheapest(
    canonical: Canonical,
    output: Output,
    given: Mapping[str, torch.Tensor] | None,
    places: Sequence[fx.Node],
    rates: Rates,
    compiled: bool,
) -> Plan:
    draft = Draft(canonical, given)
    draft.reverse()
    first = start_of(draft, output)
    bill = _Bill(draft, rates, compiled)
    window = _window(len(draft.path))
    starts = [canonical.x, *_thinned(canonical, places, 2 * window + 2)]
    best: list[_Best | None] = [None] * len(starts)
    for i in reversed(range(len(starts))):
        for j in _ends(i, len(starts), window):
            later, end = (None, None) if j is None else (best[j], starts[j])
            start = first if i == 0 else draft.start(starts[i])
            tried = _trial(draft, start, starts[i], end, later, bill)
            if i == 0:
                tried = (_finished(draft, program, bill) for program in tried)
            known = best[i]
            for candidate in tried:
                if known is None or candidate.cost < known.cost:
                    known = candidate
            best[i] = known
    chosen = best[0]
    assert chosen is not None
    return Plan(chosen.pieces, chosen.cost)


def _finished(draft: Draft, program: _Best, bill: _Bill) -> _Best:
    """The program with its result, of whose last product one triangle may do."""
    result = draft.halves.whole(program.half).node
    cost = program.cost + bill.of([result], program.half.values()) - bill.saved(result)
    return replace(program, cost=cost)


def _window(values: int) -> int:
    """How far ahead to look, so that planning stays linear in the number of values: every value
    lies between w (w + 1) / 2 pairs of bases, and about three cuts are tried for each pair."""
    w = _WINDOW
    while w > 1 and values * 3 * w * (w + 1) // 2 > _EFFORT:
        w -= 1
    return w


def _thinned(canonical: Canonical, places: Sequence[fx.Node], count: int) -> list[fx.Node]:
    """At most ``count`` candidates: the narrowest, then those that lie farthest apart."""
    if len(places) <= count:
        return list(places)
    size = [math.prod(canonical.event(p)) for p in places]
    kept: list[int] = []
    while len(kept) < count:
        rest = [i for i in range(len(places)) if i not in kept]
        far = {i: min(abs(i - k) for k in [*kept, -1, len(places)]) for i in rest}
        kept.append(min(rest, key=lambda i: (size[i], -far[i], i)))
    return [places[i] for i in sorted(kept)]


def _ends(i: int, count: int, window: int) -> Iterator[int | None]:
    """Later bases that a piece may end at, the farthest first, so that of equal programs the one of
    fewest pieces is taken; None is the output itself."""
    if i == 0 or count - i <= window + 1:
        yield None
    yield from reversed(range(i + 1, min(count, i + 1 + window)))


def _trial(
    draft: Draft,
    start: Start,
    base: fx.Node,
    following: fx.Node | None,
    later: _Best | None,
    bill: _Bill,
) -> Iterator[_Best]:
    """Programs that start at ``base`` and go on from ``following``, costed.  Pulled terms are rows
    of the whole form, so they are tried for that only."""
    cuts, done = [Piece(base)], 0
    while done < len(cuts):
        piece = cuts[done]
        half, terms = draft.piece(piece, following, later.half if later else None, start)
        cost = bill.of(half.values(), later.half.values() if later else ())
        if later is not None:
            yield _Best(cost + later.cost, (piece, *later.pieces), half)
        else:
            yield _Best(cost, (piece,), half)
        if done == 0 and terms and not start.key:
            pulled = range(1, terms + 1) if terms <= _FEW else [terms]
            cuts += [Piece(base, count) for count in pulled]
            near = colours(draft, base, following, later.half if later else None)
            cuts += [Piece(base, count, n) for n in near[:_NEAR] for count in (0, terms)]
        done += 1


class _Bill:
    """Estimated seconds of what was written into a draft after its values and adjoints."""

    def __init__(self, draft: Draft, rates: Rates, compiled: bool) -> None:
        self._free = set(draft.emitter.graph.nodes)
        self._rates = rates
        self._compiled = compiled
        self._seconds: dict[fx.Node, float] = {}

    def of(self, results: Iterable[fx.Node], paid: Iterable[fx.Node]) -> float:
        """Seconds of all that the results need and ``paid`` does not."""
        seen = set(paid)
        queue = list(results)
        cost = 0.0
        while queue:
            node = queue.pop()
            if node in seen or node in self._free:
                continue
            seen.add(node)
            if node not in self._seconds:
                self._seconds[node] = total([node], self._rates, self._compiled)
            cost += self._seconds[node]
            queue += node.all_input_nodes
        return cost

    def saved(self, result: fx.Node) -> float:
        """Seconds that a symmetric product saves."""
        product = symmetric.product_of(result)
        if product is None:
            return 0.0
        share = symmetric.share(product.meta[VAL].shape[-1])
        return (1 - share) * total([product], self._rates, self._compiled)
