"""Facts: what passes know about the nodes of a canonical graph, under one declared key.

A *canonical* value has the shape ``[*batch, *event]``: all batch axes lead, each of its full size
or of size 1 ("the same for every sample"); values that do not depend on x may leave the batch
axes out.  A canonical graph is a per-sample program that runs over any leading axes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import networkx as nx
import torch
from torch import fx

from fxhess.emit import VAL
from fxhess.kinds import Call, Kind, Linear, Window

FACT = "fact"


@dataclass(frozen=True)
class Fact:
    """What differentiation needs to know of a node that depends on x.

    ``kind``: how it differentiates; ``operands``: the tensor operands that ``kind`` speaks of;
    ``axes``: for each operand, for each of its event axes, the event axis of the result that it
    becomes, or None where positions along it are mixed; ``operator``, ``args``, ``kwargs``: the
    operation's own, canonical, as rule functions see them; ``mixed``: how many trailing axes a
    rule with ``fold`` needs behind its one leading axis; ``active``: whether a derivative with
    respect to x flows through; ``derived``: whether ``kind`` is no rule but PyTorch's own
    derivatives, traced.
    """

    kind: Kind
    operands: tuple[fx.Node, ...] = ()
    axes: tuple[tuple[int | None, ...], ...] = ()
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    mixed: int = 0
    operator: Callable[..., Any] | None = None
    active: bool = False
    derived: bool = False


@dataclass
class Canonical:
    """A canonical graph: placeholders x, constants and the sources, and one output node.

    ``batch_ndim`` counts the batch axes; ``summed`` tells that the model returns the plain sum
    over the batch of separate terms; ``vector`` that it returns ``[*batch, m]``; ``device`` is
    where it runs; ``outputs``: sizes of the model's own axes, where these are several that are one
    here.
    """

    graph: fx.Graph
    x: fx.Node
    output: fx.Node
    batch_ndim: int
    summed: bool
    vector: bool
    device: torch.device
    outputs: tuple[int, ...] = ()

    def event(self, node: fx.Node) -> tuple[int, ...]:
        """Shape of one sample of the value."""
        return tuple(node.meta[VAL].shape[self.batch_ndim :])

    def nodes(self) -> Iterator[fx.Node]:
        return iter(self.graph.nodes)


def fact(node: fx.Node) -> Fact | None:
    """The fact of a node that depends on x, otherwise None."""
    return node.meta.get(FACT)


def known_fact(node: fx.Node) -> Fact:
    """The fact of a node that is known to depend on x."""
    known = fact(node)
    assert known is not None, node
    return known


def operands(node: fx.Node) -> tuple[fx.Node, ...]:
    """The tensor operands that the node's kind speaks of; none where it does not depend on x."""
    known = fact(node)
    return known.operands if known is not None else ()


def is_repeatable(node: fx.Node) -> bool:
    """Whether the node alone is the whole operation that its fact speaks of: neither one of several
    results nor the last step of several."""
    known = known_fact(node)
    return node.target is known.operator and node.args == known.args


def is_active(node: fx.Node) -> bool:
    """Whether a derivative with respect to x flows through the node's value."""
    known = fact(node)
    return known is not None and known.active


def set_active(node: fx.Node, active: bool) -> None:
    node.meta[FACT] = replace(known_fact(node), active=active)


def dataflow(nodes: Sequence[fx.Node]) -> nx.DiGraph[fx.Node]:
    """The graph of active values: an edge from each active operand to the value made of it."""
    graph: nx.DiGraph[fx.Node] = nx.DiGraph()
    for node in nodes:
        if not is_active(node):
            continue
        graph.add_node(node)
        known = fact(node)
        assert known is not None
        for operand in known.operands:
            if is_active(operand):
                graph.add_edge(operand, node)
    return graph


def windows_of(canonical: Canonical, node: fx.Node, call: Call) -> list[tuple[int, int, Window]]:
    """Mixed axes of the operand of which each position of the result meets a window only, with the
    axes of the result that they become."""
    known = known_fact(node)
    if not isinstance(known.kind, Linear) or known.kind.windows is None:
        return []
    passed = {out for out in known.axes[0] if out is not None}
    own = [e for e, out in enumerate(known.axes[0]) if out is None]
    made = [e for e in range(len(canonical.event(node))) if e not in passed]
    found = zip(own, made, known.kind.windows(call), strict=True)
    return [(e, out, window) for e, out, window in found if window is not None]
