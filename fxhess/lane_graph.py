"""Facts of a lowered graph that a program of one sample a lane is written from."""

from __future__ import annotations

from typing import Any

from torch import fx


def several(values: Any) -> list[fx.Node]:
    """The results that a graph gives, one or more."""
    return [values] if isinstance(values, fx.Node) else list(values)


def uses(graph: fx.Graph) -> dict[fx.Node, int]:
    """How often each node is an operand."""
    counts = dict.fromkeys(graph.nodes, 0)

    def count(node: fx.Node) -> fx.Node:
        counts[node] += 1
        return node

    for node in graph.nodes:
        fx.node.map_arg((node.args, node.kwargs), count)
    return counts


def constants(graph: fx.Graph) -> dict[fx.Node, Any]:
    """What is made of no input, evaluated."""
    found: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op != "call_function" and (node.op != "call_method" or not node.all_input_nodes):
            continue
        if any(n not in found for n in node.all_input_nodes):
            continue
        args: Any = fx.node.map_arg(node.args, found.__getitem__)
        kwargs: Any = fx.node.map_arg(dict(node.kwargs), found.__getitem__)
        method = node.op == "call_method"
        target: Any = getattr(args[0], str(node.target)) if method else node.target
        found[node] = target(*args[method:], **kwargs)
    return found
