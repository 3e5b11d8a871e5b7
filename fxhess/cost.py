"""What an operation costs, in seconds on a device, by its rates.

The planner compares programs by these seconds, not by operation counts: a flat matrix product, a
batched one and a pass over memory differ several times in what they get out of the machine.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Sequence

import torch
from torch import fx

from fxhess.emit import ROLE, VAL, VARIES
from fxhess.rates import Curve, Rates

# Working memory of a tile, about: less than half of the outer cache that a few cores share.
TILE_BYTES = {"cpu": 12 << 20}

_KEPT = 0.1  # the share of calls that find hoisted work outdated
_CACHED = 1 << 21  # bytes that a tile's products find in the cache again
_PRODUCTS = frozenset({"matmul", "mm", "bmm", "linear", "flat_product"})
_SPECIAL = frozenset(
    {"tanh", "exp", "expm1", "log", "log1p", "sigmoid", "softplus", "erf", "erfc", "sin", "cos",
     "tan", "atan", "sinh", "cosh", "pow", "logsigmoid", "gelu", "silu", "softmax", "log_softmax"}
)  # fmt: skip
_GATHERS = frozenset({"index_select", "unpack", "gather", "index", "index_add", "scatter_add",
                      "index_put", "embedding", "take_along_dim"})  # fmt: skip

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
    if name_of(node) in _PRODUCTS:
        first = node.all_input_nodes[0].meta[VAL]
        return 2 * value.numel() * int(first.shape[-1])
    if name_of(node) == "convolution":
        given, weight = (n.meta[VAL] for n in node.all_input_nodes[:2])
        steps = given.numel() if _is_transposed(node) else value.numel()
        return 2 * steps * math.prod(int(s) for s in weight.shape[1:])
    return int(value.numel())


def _is_transposed(convolution: fx.Node) -> bool:
    return len(convolution.args) > 6 and convolution.args[6] is True


def side(*sizes: int) -> float:
    """The size of a product that its rate depends on: between its smallest side and the side of
    the cube of equal volume."""
    volume = math.prod(float(min(n, 256)) for n in sizes)
    return math.sqrt(max(1, min(sizes)) * max(1.0, volume) ** (1 / len(sizes)))


def _rate(curve: Curve, size: float) -> float:
    """The rate at a size, between measured ones linear in logarithms."""
    at = bisect.bisect_left(curve, (size, 0.0))
    if at == 0:
        return curve[0][1] * min(1.0, size / curve[0][0])
    if at == len(curve):
        return curve[-1][1]
    (x0, y0), (x1, y1) = curve[at - 1], curve[at]
    return y0 * (y1 / y0) ** (math.log(size / x0) / math.log(x1 / x0))


def seconds(node: fx.Node, rates: Rates) -> float:
    """Estimated time of one operation on its stand-ins' sizes, run tile by tile."""
    value = node.meta.get(VAL)
    if node.op not in ("call_function", "call_method") or not isinstance(value, torch.Tensor):
        return 0.0
    name = name_of(node)
    if name in _VIEWS:
        return rates.launch / 3
    operands = [n for n in node.all_input_nodes if isinstance(n.meta.get(VAL), torch.Tensor)]
    passes = sum(_reading(n.meta[VAL], rates) for n in operands)
    own = value.numel() * value.element_size()
    passes += own / (rates.memory if node.meta.get(ROLE) == "result" else rates.stream)
    if name in _PRODUCTS:
        return rates.launch + passes / 2 + _product(value, operands, flops(node), rates)
    if name == "convolution":
        scatters = _is_transposed(node) and any(s != 1 for s in node.args[3])  # type: ignore[union-attr]
        rate = rates.transposed if scatters else rates.convolution
        return rates.launch + passes + flops(node) / rate
    if name in _GATHERS:
        return rates.launch + passes + value.numel() / rates.gather
    if name in _SPECIAL:
        return rates.launch + passes + value.numel() / rates.special
    return rates.launch + passes


def _product(value: torch.Tensor, operands: Sequence[fx.Node], work: int, rates: Rates) -> float:
    left, right = (n.meta[VAL] for n in [operands[0], operands[-1]])
    k, columns = int(left.shape[-1]), int(value.shape[-1]) if right.ndim > 1 else 1
    if min(left.ndim, right.ndim) > 2:
        return work / _rate(rates.batched, side(int(value.shape[-2]), k, columns))
    time = work / _rate(rates.flat, side(k, columns))
    matrix = right.numel() * right.element_size()
    if matrix > _CACHED:  # every tile reads it again
        tiles = max(1.0, 3 * value.numel() * value.element_size() / TILE_BYTES["cpu"])
        time += tiles * matrix / rates.memory
    return time


def _reading(value: torch.Tensor, rates: Rates) -> float:
    size = value.numel() * value.element_size()
    return size / (rates.stream if value.is_contiguous() else rates.scattered)


def total(nodes: Iterable[fx.Node], rates: Rates) -> float:
    """Estimated time of a program.  What does not depend on x is computed once and kept, so it
    counts for a fraction only."""
    return sum(
        seconds(node, rates) * (1.0 if node.meta.get(VARIES, True) else _KEPT) for node in nodes
    )


def own_bytes(node: fx.Node) -> int:
    """Bytes of memory that an operation's result takes, 0 where it is a view."""
    value = node.meta.get(VAL)
    if not isinstance(value, torch.Tensor) or not flops(node):
        return 0
    return value.numel() * value.element_size()


def peak_bytes(nodes: Sequence[fx.Node]) -> int:
    """Bytes alive at once, if each value dies after its last use."""
    last: dict[fx.Node, int] = {}
    for i, node in enumerate(nodes):
        for operand in node.all_input_nodes:
            last[operand] = i
    alive = peak = 0
    sizes: dict[fx.Node, int] = {}
    for i, node in enumerate(nodes):
        own = sizes[node] = own_bytes(node)
        alive += own
        peak = max(peak, alive)
        for operand in node.all_input_nodes:
            if last.get(operand) == i:
                alive -= sizes.pop(operand, 0)
    return peak
