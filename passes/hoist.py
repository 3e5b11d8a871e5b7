"""Hoisting: what depends on parameters alone is computed once a call, not once a tile.

*Needs* a lowered graph with placeholders x, what else differs from sample to sample, then the
model's tensors.  *Gives* two graphs of the
same program: a prologue over the tensors, and a body over x and whatever it needs of them::

    f(x, W): a = W * W;  return x @ a      ==>      prologue(W): return W * W
                                                    body(x, a): return x @ a
"""

from __future__ import annotations

import torch
from torch import fx

from fxhess.emit import VAL, VARIES


def hoist(graph: fx.Graph) -> tuple[fx.Graph, fx.Graph]:
    """Split ``graph`` into (prologue, body); see the module's docstring."""
    nodes = list(graph.nodes)
    inputs = [n for n in nodes if n.op == "placeholder" and n.meta[VARIES]]
    depends = set(inputs)
    for node in nodes:
        if any(operand in depends for operand in node.all_input_nodes):
            depends.add(node)
    crossing = [
        node
        for node in nodes
        if node not in depends
        and node.op != "output"
        and any(user in depends or user.op == "output" for user in node.users)
    ]
    prologue = fx.Graph()
    early: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        if node not in depends and node.op != "output":
            early[node] = prologue.node_copy(node, early.__getitem__)
    prologue.output(tuple(_dense(prologue, node, early[node], depends) for node in crossing))
    body = fx.Graph()
    late = {node: body.node_copy(node) for node in inputs}
    for node in crossing:
        late[node] = body.placeholder(node.name)
        late[node].meta = dict(node.meta)
    for node in nodes:
        if node not in late and (node in depends or node.op == "output"):
            late[node] = body.node_copy(node, late.__getitem__)
    return prologue, body


def _dense(prologue: fx.Graph, node: fx.Node, made: fx.Node, depends: set[fx.Node]) -> fx.Node:
    """A transposed weight that pointwise operations read is stored in its own order of axes: they
    would give all their results the weight's order, and every product after them a copy to
    undo it."""
    pointwise = any(user in depends and user.target is not torch.matmul for user in node.users)
    if not pointwise or not isinstance(node.meta.get(VAL), torch.Tensor):
        return made
    dense = prologue.call_method("contiguous", (made,))
    dense.meta = dict(node.meta)
    return dense
