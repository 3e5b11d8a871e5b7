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

from fxhess.cost import flops
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


def divide(prologue: fx.Graph, worth: int) -> tuple[fx.Graph, fx.Graph, list[int], list[bool]]:
    """Divide a prologue into what is worth keeping from call to call, as long as what it is made of
    stays the same, and the rest, which is made anew.  To see that nothing changed all of that is
    read: it has to be worth ``worth`` operations an entry.  Constants made of nothing need no look.

    Returns both graphs (the first takes only the tensors that it needs), the positions of these
    tensors, and for each result whether it is kept.
    """
    nodes = list(prologue.nodes)
    (results,) = nodes[-1].args
    assert isinstance(results, tuple)
    sources = [n for n in nodes if n.op == "placeholder"]
    needs = [_ancestors(result) for result in results]  # type: ignore[arg-type]
    keeps = [
        worth * max(1, sum(n.meta[VAL].numel() for n in needed if n.op == "placeholder"))
        <= sum(map(flops, needed))
        for needed in needs
    ]  # fmt: skip
    read = {n for needed, keep in zip(needs, keeps, strict=True) if keep for n in needed}
    for i, needed in enumerate(needs):  # what is made of the same alone costs nothing to keep
        own = {n for n in needed if n.op == "placeholder"}
        keeps[i] = keeps[i] or (bool(own) and own <= read and any(map(flops, needed)))
    taken = [i for i, source in enumerate(sources) if source in read]
    parts = []
    for kept in (True, False):
        chosen = [r for r, keep in zip(results, keeps, strict=True) if keep is kept]
        inside = {n for r in chosen for n in _ancestors(r)}  # type: ignore[arg-type]
        part = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for node in nodes[:-1]:
            if node in inside or (node.op == "placeholder" and not kept):
                copies[node] = part.node_copy(node, copies.__getitem__)
        part.output(tuple(copies[r] for r in chosen))  # type: ignore[index]
        parts.append(part)
    return parts[0], parts[1], taken, keeps


def _ancestors(node: fx.Node) -> dict[fx.Node, None]:
    """The node and all that it is made of."""
    found: dict[fx.Node, None] = {}
    queue = [node]
    while queue:
        last = queue.pop()
        if last not in found:
            found[last] = None
            queue += last.all_input_nodes
    return found


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
