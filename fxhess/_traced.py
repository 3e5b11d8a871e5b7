"""What is known of a tensor inside a trace: the node that made it, and what that depends on.

The third place that touches tracing internals of PyTorch (``get_proxy_mode``, ``get_proxy_slot``),
and the one that unrolls PyTorch's control flow operators while a model is captured.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
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


# --- notes on traced tensors --------------------------------------------------------------------


def _notes(kind: str) -> dict[Any, torch.Tensor]:
    """What is noted in the trace under way, which they live as long as; nothing outside of one."""
    tracer = getattr(get_proxy_mode(), "tracer", None)
    return {} if tracer is None else vars(tracer).setdefault(f"_fxhess {kind}", {})


def _slot(tensor: Any) -> fx.Node | None:
    mode: Any = get_proxy_mode()
    if mode is None or not isinstance(tensor, torch.Tensor):
        return None
    slot = get_proxy_slot(tensor, mode.tracer, None)
    return None if slot is None else slot.proxy.node


def same(a: Any, b: Any) -> bool:
    """Whether two traced tensors are the same value."""
    node = _slot(a)
    return node is not None and node is _slot(b)


def note(tensor: torch.Tensor, kind: str, what: torch.Tensor, op: Any = None) -> None:
    """Note another tensor of the trace at this one, or at ``op`` of it."""
    node = _slot(tensor)
    if node is not None:
        _notes(kind)[node if op is None else (op, node)] = what


def followed(
    tensor: Any, kind: str, step: Callable[[Any, torch.Tensor, tuple[Any, ...]], Any]
) -> torch.Tensor | None:
    """What is noted at the tensor, or at one that it was made of: then what ``step(op, noted,
    rest)`` makes of it, for every operation ``op(that, *rest)`` in between; None where it makes
    nothing."""
    known = _notes(kind)
    node = _slot(tensor) if known else None
    if node is not None and writes_in_place(node.graph):
        return None  # what was noted may have been overwritten, through any view of it
    path: list[tuple[Any, tuple[Any, ...]]] = []
    what = None
    while node is not None and what is None:
        what = known.get(node)
        if what is None:
            first, *others = node.args or (None,)
            rest = tuple(map(_value, others))
            if node.kwargs or not isinstance(first, fx.Node) or _UNKNOWN in map(type, rest):
                return None
            path.append((node.target, rest))
            what = known.get((node.target, first))
            node = first
    for op, rest in reversed(path):
        what = None if what is None else step(op, what, rest)
    return what


class _UNKNOWN:
    """No value, or none that is still there."""


def _value(argument: Any) -> Any:
    """A number or numbers as they are, a traced tensor by its node."""
    if isinstance(argument, fx.Node):
        mode: Any = get_proxy_mode()
        if argument.op == "get_attr":
            return getattr(mode.tracer.root, str(argument.target), _UNKNOWN())
        tracked = mode.tracer.tensor_tracker.items()
        found = (t for t, slot in tracked if slot.proxy.node is argument)
        return next(found, _UNKNOWN())
    if isinstance(argument, (list, tuple)):
        return _UNKNOWN() if any(isinstance(a, fx.Node) for a in argument) else argument
    return argument


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
