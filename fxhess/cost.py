"""What an operation costs, in seconds on a kind of device: a small table of rates.

The planner compares programs by these seconds, not by operation counts: a flat matrix product, a
batched one and a pass over memory differ several times in what they get out of the machine.
Built-in rates are those of two cores of a server CPU and of one data-centre GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from fxhess.emit import VAL, VARIES


@dataclass(frozen=True)
class Rates:
    """``flat``, ``batched``: multiply-adds of a matrix product a second, times two, in float32
    (halved for float64); ``bandwidth``: bytes a second of a pointwise pass; ``launch``: seconds
    an operation costs whatever its size."""

    flat: float
    batched: float
    bandwidth: float
    launch: float


RATES = {
    "cpu": Rates(flat=3.5e11, batched=1.2e11, bandwidth=2e10, launch=6e-6),
    "cuda": Rates(flat=4e13, batched=2e13, bandwidth=3e12, launch=6e-6),
}

_SCATTERED = 3.0  # reading in another order than that of memory, against reading in order
_KEPT = 0.1  # the share of calls that find hoisted work outdated

# Operations that only describe memory differently.
_VIEWS = frozenset(
    {"getitem", "permute", "expand", "unflatten", "squeeze", "unsqueeze", "t", "alias", "movedim",
     "transpose", "sym_size", "view", "detach", "narrow", "slice"}
)  # fmt: skip


def name_of(node: fx.Node) -> str:
    """The operation's plain name: ``aten.add.Tensor`` and ``operator.add`` are both ``add``."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[1].rstrip("_")
    return getattr(target, "__name__", str(target))


def flops(node: fx.Node) -> int:
    """Multiply-adds (times two) of a matrix product, entries of any other operation."""
    value = node.meta.get(VAL)
    if not isinstance(value, torch.Tensor) or name_of(node) in _VIEWS:
        return 0
    if name_of(node) in ("matmul", "mm", "bmm", "linear"):
        first = node.all_input_nodes[0].meta[VAL]
        return 2 * value.numel() * int(first.shape[-1])
    if name_of(node) == "convolution":
        weight = node.all_input_nodes[1].meta[VAL]
        return 2 * value.numel() * math.prod(int(s) for s in weight.shape[1:])
    return int(value.numel())


def seconds(node: fx.Node, rates: Rates) -> float:
    """Estimated time of one operation at the nominal batch size."""
    value = node.meta.get(VAL)
    if node.op != "call_function" or not isinstance(value, torch.Tensor):
        return 0.0
    name = name_of(node)
    if name in _VIEWS:
        return rates.launch / 3
    size = value.element_size()
    operands = [v for n in node.all_input_nodes if isinstance(v := n.meta.get(VAL), torch.Tensor)]
    moved = value.numel() * size + sum(v.numel() * v.element_size() * _stride(v) for v in operands)
    if name in ("matmul", "mm", "bmm", "linear", "convolution"):
        shapes = [n.meta[VAL].ndim for n in node.all_input_nodes[:2]]
        rate = rates.batched if min(shapes) > 2 else rates.flat
        return (
            rates.launch
            + flops(node) / (rate if size <= 4 else rate / 2)
            + (moved / rates.bandwidth / 4)
        )
    return rates.launch + moved / rates.bandwidth


def _stride(value: torch.Tensor) -> float:
    """How much longer reading a value takes for lying in memory in another order."""
    return 1.0 if value.is_contiguous() else _SCATTERED


def total(nodes: Iterable[fx.Node], rates: Rates) -> float:
    """Estimated time of a program.  What does not depend on x is computed once and kept, so it
    counts for a fraction only."""
    return sum(
        seconds(node, rates) * (1.0 if node.meta.get(VARIES, True) else _KEPT) for node in nodes
    )


def rates_for(device: torch.device) -> Rates:
    """The rates of a device's kind."""
    return RATES.get(device.type, RATES["cpu"])


def peak_bytes(nodes: Sequence[fx.Node]) -> int:
    """Bytes alive at once, if each value dies after its last use."""
    last: dict[fx.Node, int] = {}
    for i, node in enumerate(nodes):
        for operand in node.all_input_nodes:
            last[operand] = i
    alive = peak = 0
    sizes: dict[fx.Node, int] = {}
    for i, node in enumerate(nodes):
        value = node.meta.get(VAL)
        own = 0
        if isinstance(value, torch.Tensor) and flops(node):
            own = value.numel() * value.element_size()
        sizes[node] = own
        alive += own
        peak = max(peak, alive)
        for operand in node.all_input_nodes:
            if last.get(operand) == i:
                alive -= sizes.pop(operand, 0)
    return peak
