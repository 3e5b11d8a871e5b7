"""What is known of a tensor inside a trace: the node that made it, and what that depends on.

The third place that touches tracing internals of PyTorch (``get_proxy_mode``, ``get_proxy_slot``),
and the one that unrolls PyTorch's control flow operators while a model is captured.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot

from fxhess._torch import writes_in_place


def node_of(tensor: torch.Tensor) -> fx.Node:
    """The node of a traced tensor."""
    mode: Any = get_proxy_mode()
    node: fx.Node = get_proxy_slot(tensor, mode.tracer).proxy.node
    return node


def constants() -> Any:
    """What holds the tensors of the trace under way, as attributes."""
    mode: Any = get_proxy_mode()
    return mode.tracer.root


def ancestors(*nodes: fx.Node) -> set[fx.Node]:
    """What the nodes need, and they themselves."""
    found: set[fx.Node] = set()
    queue = list(nodes)
    while queue:
        node = queue.pop()
        if node not in found:
            found.add(node)
            queue += node.all_input_nodes
    return found


@dataclass(frozen=True)
class Flow:
    """What a traced value depends on: the ``values`` of samples, their batch ``sizes``, other
    ``tensors``, ``random`` numbers; and whether a ``gradient`` flows from x."""

    values: bool
    sizes: bool
    tensors: bool
    random: bool
    gradient: bool


_SAMPLE = "sample"  # in the meta of an input that differs from sample to sample


def mark_samples(inputs: Sequence[int]) -> None:
    """Note on the inputs of the trace under way, which has just begun, which of them differ from
    sample to sample: x, and some of its constants."""
    mode: Any = get_proxy_mode()
    places = list(mode.tracer.graph.nodes)
    for i in inputs:
        places[i].meta[_SAMPLE] = True


def _samples(graph: fx.Graph) -> list[fx.Node]:
    """The inputs that differ from sample to sample."""
    places = [n for n in graph.nodes if n.op == "placeholder"]
    return [n for n in places if n.meta.get(_SAMPLE)] or places[:1]


def dependence(node: fx.Node, known: Collection[int] = ()) -> Flow:
    """What ``node`` depends on.  ``known``: identities of constants that do not count."""
    values = sizes = tensors = random = False
    starts = [node]
    if writes_in_place(node.graph):  # what was written may be read through any view of it
        starts += [n for n in node.graph.nodes if _writes(n)]
    samples = _samples(node.graph)
    x = samples[0]
    root = constants()
    for other in ancestors(*starts):
        if other.op == "get_attr":
            fresh = all(u.target is torch.ops.aten.lift_fresh_copy.default for u in other.users)
            tensors = tensors or not (fresh or id(getattr(root, str(other.target))) in known)
        elif other.op == "placeholder":
            tensors = tensors or other not in samples
        elif torch.Tag.nondeterministic_seeded in getattr(other.target, "tags", ()):
            random = True
        if any(place in other.all_input_nodes for place in samples):
            if isinstance(other.meta.get("val"), torch.Tensor):
                values = True
            else:
                sizes = True
    values = values or node in samples
    return Flow(values, sizes, tensors, random, _differentiable(node, x))


def _differentiable(node: fx.Node, x: fx.Node) -> bool:
    """Whether a derivative with respect to x may flow to ``node``."""
    seen: set[fx.Node] = set()
    queue = [node]
    while queue:
        node = queue.pop()
        if node is x:
            return True
        val = node.meta.get("val")
        constant = isinstance(val, torch.Tensor) and not (
            val.is_floating_point() or val.is_complex()
        )
        if node in seen or constant or node.target is torch.ops.aten.detach.default:
            continue
        seen.add(node)
        queue += node.all_input_nodes
    return False


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def varies(tensor: torch.Tensor) -> bool:
    """Whether a traced tensor depends on the values of x."""
    mode: Any = get_proxy_mode()
    slot = None if mode is None else get_proxy_slot(tensor, mode.tracer, None)
    return slot is not None and dependence(slot.proxy.node).values


def varies_alone(tensor: torch.Tensor) -> bool:
    """Whether a tensor depends on the values of x, in a trace of one sample (one without batch
    axes): an index that has the same shape for other samples, but not the same values."""
    mode: Any = get_proxy_mode()
    if mode is None:
        return False
    x = next(iter(mode.tracer.graph.nodes)).meta["val"]
    return all(isinstance(n, int) for n in x.shape) and varies(tensor)


@contextlib.contextmanager
def unrolled() -> Iterator[None]:
    """Inside, ``torch.cond``, ``while_loop``, ``scan`` and the like do not compile their bodies
    before they call the operator."""
    original = torch.compiler.is_dynamo_compiling

    def pretended() -> bool:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return caller.startswith("torch._higher_order_ops") or original()

    torch.compiler.is_dynamo_compiling = pretended
    try:
        yield
    finally:
        torch.compiler.is_dynamo_compiling = original


def demand(condition: torch.Tensor, message: str) -> None:
    """Make it a part of the program being traced that ``condition`` holds: where it does not, the
    program raises a RuntimeError with this message."""
    torch._assert_async(condition, message)
