"""Legal graphs: what must hold between any two passes, checked after each of them."""

from __future__ import annotations

import torch
from torch import fx

from fxhess.emit import ORIGIN, VAL
from fxhess.errors import InternalError
from fxhess.facts import Canonical, fact, is_active


def check_graph(graph: fx.Graph, after: str) -> None:
    """Definitions before uses, and a stand-in on every value.

    Raises:
        InternalError: naming the pass after which the graph is broken.
    """
    seen: set[fx.Node] = set()
    for node in graph.nodes:
        missing = [n.name for n in node.all_input_nodes if n not in seen]
        if missing:
            raise InternalError(f"after {after}: {node} uses {missing} before their definition")
        if node.op in ("call_function", "placeholder") and VAL not in node.meta:
            raise InternalError(f"after {after}: {node} has no stand-in value")
        seen.add(node)


def check_canonical(canonical: Canonical, after: str) -> None:
    """Also: every fact fits its node, and activity comes from operands only."""
    check_graph(canonical.graph, after)
    nb = canonical.batch_ndim
    full = tuple(canonical.x.meta[VAL].shape[:nb])
    for node in canonical.nodes():
        known = fact(node)
        value = node.meta[VAL]
        if known is None or not isinstance(value, torch.Tensor):
            continue
        where = node.meta.get(ORIGIN)
        head = tuple(value.shape[:nb])
        if value.ndim < nb or any(s not in (1, f) for s, f in zip(head, full, strict=True)):
            raise InternalError(f"after {after}: {node} lost its batch axes: {head}", where=where)
        for operand, axes in zip(known.operands, known.axes, strict=False):
            rank = len(canonical.event(operand)) if fact(operand) else operand.meta[VAL].ndim
            if fact(operand) and len(axes) != rank:
                raise InternalError(f"after {after}: {node}: axes of {operand}", where=where)
        if known.active and node is not canonical.x and not any(map(is_active, known.operands)):
            raise InternalError(f"after {after}: {node} is active by itself", where=where)
