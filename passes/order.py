"""Order: no large value is made before something needs it, where that holds less memory.

*Needs* a simplified graph and its results.  *Gives* the same operations in another order: depth
first, so that a large value meets its last use before the next one is made, if by the estimate less
is allocated at the peak then::

    J1 = f(x); J2 = g(J1); a = J1 @ J1; b = J2 @ J2; H = a + b
                              ==>      J1 = f(x); a = J1 @ J1; J2 = g(J1); b = J2 @ J2; H = a + b

Small values come first, as they were written: holding them costs little, and an allocator would
cut them out of the memory that a large one gave back and the next one needs.  Operations that draw
random numbers keep their order; a graph in which one writes into its operands is left as it is.
(An order of least memory is hard to find: Sethi, Complete Register Allocation Problems, SIAM
Journal on Computing 4, 1975.)
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from fxhess.cost import held_bytes, own_bytes
from fxhess.emit import VARIES
from fxhess.passes.simplify import CALLS, changes_operands, is_repeatable

_SMALL = 1 / 8  # of the largest value


def order(graph: fx.Graph, results: Sequence[fx.Node]) -> fx.Graph:
    """Move the operations, in place; returns the graph."""
    written = [n for n in graph.nodes if n.op in CALLS]
    if not written or any(map(changes_operands, written)):
        return graph
    found = _depth_first(graph, written, [*_small(written), *results])
    # What depends on weights alone runs apart, once a call.
    if held_bytes(_varying(found)) < held_bytes(_varying(written)):
        last = next(n for n in reversed(list(graph.nodes)) if n.op not in CALLS)
        for node in found:
            last.append(node)
            last = node
    return graph


def _varying(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    return [n for n in nodes if n.meta.get(VARIES, True)]


def _small(written: Sequence[fx.Node]) -> list[fx.Node]:
    """The small values that are made of small values alone."""
    limit = _SMALL * max(map(own_bytes, _varying(written)), default=0)
    large: set[fx.Node] = set()
    for node in written:
        if own_bytes(node) > limit or any(n in large for n in node.all_input_nodes):
            large.add(node)
    return [n for n in written if n not in large]


def _depth_first(
    graph: fx.Graph, written: Sequence[fx.Node], results: Sequence[fx.Node]
) -> list[fx.Node]:
    """All operations, each right before the first that needs it."""
    random = [n for n in written if not is_repeatable(n)]
    before = dict(zip(random[1:], random, strict=False))
    found: dict[fx.Node, None] = dict.fromkeys(n for n in graph.nodes if n.op not in CALLS)
    given = len(found)
    queue = [*reversed(results)]
    while queue:
        node = queue[-1]
        needed = [before[node]] if node in before else []
        missing = [n for n in (*needed, *node.all_input_nodes) if n not in found]
        if missing:
            queue += reversed(missing)
        else:
            found.setdefault(queue.pop())
    return list(found)[given:]
