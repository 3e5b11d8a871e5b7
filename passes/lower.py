"""Lowering: the finished graph as a ``GraphModule`` that a person can read.

*Needs* a simplified graph and its results.  *Gives* a ``torch.fx.GraphModule`` of the same program,
with names that say what a value is (``g_tanh`` the adjoint of tanh's result, ``J_mm`` a tangent,
``C_..`` part of a closing, ``H`` the result) and, in ``print_readable()``, the user's line::

    mul_17 = matmul_2 * sub_1          ==>      g_tanh = g_mm_1 * d_tanh
"""

from __future__ import annotations

import keyword
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from fxhess import _kept
from fxhess.cost import name_of
from fxhess.emit import ORIGIN, ROLE, SYMMETRIC, VAL, VARIES, Var
from fxhess.errors import Origin

_PREFIX = {"value": "v", "adjoint": "g", "tangent": "J", "curvature": "C", "result": "H"}


def lower(graph: fx.Graph, results: Mapping[str, Var]) -> fx.GraphModule:
    """Name the nodes, add the output and build the module.  The results are returned in their
    order, as a tuple if there are several."""
    values = [v.node for v in results.values()]
    out = graph.output(values[0] if len(values) == 1 else tuple(values))
    fresh = fx.Graph()
    mapped: dict[fx.Node, fx.Node] = {}
    names = _Names()
    for node in graph.nodes:
        copy = fresh.node_copy(node, mapped.__getitem__)
        mapped[node] = copy
        if node is not out and node.op != "placeholder":
            copy.name = names.pick(_name(node))
        else:
            names.taken.add(copy.name)
        copy.meta = _meta(node)
    for (name, _), node in zip(results.items(), values, strict=True):
        if mapped[node].op != "placeholder":
            mapped[node].name = names.pick({"hessian": "H", "gradient": "g"}.get(name, name))
    for node in fresh.nodes:
        _plain_methods(node)
    return _kept.module_of(fresh, "GeneratedDerivative")


def _meta(node: fx.Node) -> dict[str, Any]:
    meta: dict[str, Any] = {}
    origin = node.meta.get(ORIGIN)
    if isinstance(origin, Origin):
        meta[ORIGIN] = origin
        if origin.line:
            meta["stack_trace"] = origin.stack_trace
    for key in (ROLE, SYMMETRIC, VAL, VARIES):
        if key in node.meta:
            meta[key] = node.meta[key]
    return meta


def _plain_methods(node: fx.Node) -> None:
    """Methods of Tensor read better as methods: ``x.new_zeros(..)``; and sizes are asked as Python
    code asks them, which functional transforms understand."""
    if node.target is torch.ops.aten.sym_size.int:
        node.op, node.target = "call_method", "size"
        return
    name = getattr(node.target, "__name__", "")
    if node.op == "call_function" and getattr(torch.Tensor, name, None) is node.target:
        node.op, node.target = "call_method", name


def _name(node: fx.Node) -> str:
    origin = node.meta.get(ORIGIN)
    own = name_of(node) if node.op == "call_function" else str(node.target)
    if not isinstance(origin, Origin):
        return f"{_PREFIX.get(node.meta.get(ROLE, 'value'), 'v')}_{own}"
    source = origin.op.removeprefix("aten.").split(".")[0].strip("_") or own
    return f"{_PREFIX.get(node.meta.get(ROLE, 'value'), 'v')}_{source}"


class _Names:
    """Hands out each name once, numbering repetitions by position."""

    def __init__(self) -> None:
        self.taken: set[str] = set()
        self.counts: dict[str, int] = {}

    def pick(self, name: str) -> str:
        clean = "".join(c if c.isascii() and (c.isalnum() or c == "_") else "_" for c in name)
        if keyword.iskeyword(clean) or not clean or clean[0].isdigit():
            clean = f"_{clean}"
        while True:
            count = self.counts.get(clean, 0)
            self.counts[clean] = count + 1
            candidate = clean if count == 0 else f"{clean}_{count}"
            if candidate not in self.taken:
                self.taken.add(candidate)
                return candidate
