"""Pointwise operations that write their result where an operand lay that nothing reads any more.

*Needs* a graph that runs without autograd.  *Gives* the same program, which allocates less and
works on memory that is in the cache already::

    b = a * s        # the last use of a        ==>        b = torch.mul(a, s, out=a)

What is overwritten was made by an operation known to give memory of its own, so it is no input;
what may be a view of it, as the result of any other operation may, counts as it.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxhess.emit import VAL
from fxhess.kernels import flat_product
from fxhess.symmetric import symmetric_product

_ARITHMETIC: dict[Any, Callable[..., Any]] = {
    operator.add: torch.add,
    operator.sub: torch.sub,
    operator.mul: torch.mul,
    operator.truediv: torch.div,
    torch.add: torch.add,
    torch.sub: torch.sub,
    torch.mul: torch.mul,
    torch.div: torch.div,
}
_COMMUTING = frozenset({torch.add, torch.mul})
_FRESH = frozenset({*_ARITHMETIC, operator.neg, operator.pow, torch.matmul, flat_product,
                    symmetric_product})  # fmt: skip
_GIVES_ITSELF = "conj_physical"  # of real numbers; its schema does not say so


@functools.cache
def _pointwise(target: Any) -> torch._ops.OpOverload | None:
    """The operator that a function is, where that is pointwise and gives no view."""
    op = target
    if not isinstance(op, torch._ops.OpOverload):
        name = getattr(target, "__name__", "")
        if getattr(torch, name, None) is not target or not hasattr(torch.ops.aten, name):
            return None
        packet = getattr(torch.ops.aten, name)
        op = getattr(packet, "default", None)
    if op is None or torch.Tag.pointwise not in op.tags or op._schema.is_mutable:
        return None
    if _GIVES_ITSELF in op._schema.name:
        return None
    return op if all(r.alias_info is None for r in op._schema.returns) else None


@functools.cache
def _form(target: Any) -> Callable[..., Any] | None:
    """The operation with `out=`; None where there is none."""
    if target in _ARITHMETIC:
        return _ARITHMETIC[target]
    op = _pointwise(target)
    into = getattr(op.overloadpacket, "out", None) if op is not None else None
    if op is None or into is None or torch.Tag.generated in into.tags:  # that copies
        return None
    plain, own = ([(a.name, str(a.type)) for a in o._schema.arguments] for o in (op, into))
    if own[:-1] != plain or own[-1][0] != "out":
        return None
    return into if target is op else target  # type: ignore[no-any-return]


@functools.cache
def _is_fresh(target: Any) -> bool:
    """Whether the operation gives memory of its own."""
    return target in _FRESH or _pointwise(target) is not None


class _Memory:
    """Whose memory each value may lie in."""

    def __init__(self, graph: fx.Graph) -> None:
        self.owners: dict[fx.Node, frozenset[fx.Node]] = {}
        self.whole: dict[fx.Node, fx.Node] = {}  # values that are all of their owner's memory
        self._values: dict[fx.Node, list[fx.Node]] = {}
        self._place = {node: i for i, node in enumerate(graph.nodes)}

    def lies(self, node: fx.Node, owners: frozenset[fx.Node]) -> None:
        self.owners[node] = owners
        for owner in owners:
            self._values.setdefault(owner, []).append(node)

    def lies_alone(self, node: fx.Node, owner: fx.Node) -> None:
        self.whole[node] = owner
        self.lies(node, frozenset([owner]))

    def is_free(self, owner: fx.Node, after: fx.Node) -> bool:
        """Whether nothing after this node reads what lies there."""
        place = self._place
        return all(place[u] <= place[after] for v in self._values[owner] for u in v.users)


def overwrite(graph: fx.Graph) -> fx.Graph:
    """A copy of the graph in which operations overwrite; see the module's docstring."""
    plain = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        copies[node] = plain.node_copy(node, copies.__getitem__)
        copies[node].meta = dict(node.meta)
    memory = _Memory(plain)
    for node in plain.nodes:
        fresh = node.op == "call_function" and _is_fresh(node.target) and "out" not in node.kwargs
        if not fresh:
            operands = (memory.owners[n] for n in node.all_input_nodes)
            memory.lies(node, frozenset[fx.Node]().union(*operands) or frozenset([node]))
            continue
        operand = next((n for n in node.all_input_nodes if _may(node, n, memory)), None)
        written = operand is not None and _write(node, operand)
        memory.lies_alone(node, memory.whole[operand] if written else node)  # type: ignore[index]
    return plain


def _may(node: fx.Node, operand: fx.Node, memory: _Memory) -> bool:
    """Whether the operation may overwrite the operand."""
    owner = memory.whole.get(operand)
    if (
        owner is None
        or _form(node.target) is None
        or not (_is_tensor(operand) and _is_tensor(node))
    ):
        return False
    old, new = operand.meta[VAL], node.meta[VAL]
    others = [n for n in node.all_input_nodes if n is not operand]
    return (
        (old.shape, old.dtype) == (new.shape, new.dtype)
        and not any(owner in memory.owners[n] for n in others)
        and memory.is_free(owner, node)
    )


def _write(node: fx.Node, into: fx.Node) -> bool:
    """Have the operation write there, where it can."""
    form, args = _form(node.target), node.args
    assert form is not None
    if not _is_tensor(args[0]):  # a number
        if form not in _COMMUTING or len(args) != 2:
            return False
        args = args[::-1]
    node.target, node.args, node.kwargs = form, args, {**node.kwargs, "out": into}
    return True


def _is_tensor(value: Any) -> bool:
    return isinstance(value, fx.Node) and isinstance(value.meta.get(VAL), torch.Tensor)
