"""What an operation costs, in seconds on a device, by its rates.

The planner compares programs by these seconds, not by operation counts: a flat matrix product, a
batched one and a pass over memory differ several times in what they get out of the machine.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import fx

from fxhess import symmetric
from fxhess.emit import ROLE, VAL, VARIES
from fxhess.rates import Curve, Rates

# Working memory of a tile, about: less than half of the outer cache that a few cores share.
TILE_BYTES = {"cpu": 12 << 20}

_KEPT = 0.1  # the share of calls that find hoisted work outdated
_CACHED = 1 << 21  # bytes that a tile's products find in the cache again
_SYMMETRIC = "symmetric_product"
_PRODUCTS = frozenset({"matmul", "mm", "bmm", "linear", "flat_product", _SYMMETRIC})
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

# Those that copy where what they are given does not lie in order.
_COPIES = frozenset({"flatten", "reshape", "contiguous", "clone"})
_TINY = 16  # entries of a result's matrix
_STRIDED = 3  # entries out of order that take the time of an inner loop


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
        work = 2 * value.numel() * int(first.shape[-1])
        return (
            round(work * symmetric.share(value.shape[-1])) if name_of(node) == _SYMMETRIC else work
        )
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


def is_tiny_product(node: fx.Node) -> bool:
    """Whether it is a batched product of tiny results, which a compiler does better to sum up: see
    :mod:`fxhess.passes.fuse`."""
    if node.op != "call_function" or node.target is not torch.matmul or node.kwargs:
        return False
    operands = [n.meta[VAL] for n in node.args]  # type: ignore[union-attr]
    value = node.meta[VAL]
    return min(t.ndim for t in operands) > 2 and int(value.shape[-1] * value.shape[-2]) <= _TINY


def seconds(node: fx.Node, rates: Rates, compiled: bool = False) -> float:
    """Estimated time of one operation on its stand-ins' sizes, run tile by tile.  Where the program
    is ``compiled``, tiny products are part of the passes that make their operands."""
    value = node.meta.get(VAL)
    if node.op not in ("call_function", "call_method") or not isinstance(value, torch.Tensor):
        return 0.0
    name = name_of(node)
    operands = [n for n in node.all_input_nodes if isinstance(n.meta.get(VAL), torch.Tensor)]
    free = name in _COPIES and name != "clone" and operands[0].meta[VAL].is_contiguous()
    if name in _VIEWS or free:
        return rates.launch / 3
    passes = sum(_reading(n.meta[VAL], rates) for n in operands)
    own = value.numel() * value.element_size()
    passes += own / (rates.memory if node.meta.get(ROLE) == "result" else rates.stream)
    if compiled and is_tiny_product(node):
        return passes + flops(node) / max(rate for _, rate in rates.flat)
    if name in _PRODUCTS:
        return rates.launch + passes / 2 + _product(value, operands, flops(node), rates)
    if name == "convolution":
        scatters = _is_transposed(node) and any(s != 1 for s in node.args[3])  # type: ignore[union-attr]
        rate = rates.transposed if scatters else rates.convolution
        return rates.launch + passes + flops(node) / rate
    if name in _GATHERS:
        return rates.launch + passes + value.numel() / rates.gather
    passes += _looping(name, value, operands, rates)
    if name in _SPECIAL:
        return rates.launch + passes + value.numel() / rates.special
    return rates.launch + passes


def _product(value: torch.Tensor, operands: Sequence[fx.Node], work: int, rates: Rates) -> float:
    left, right = (n.meta[VAL] for n in [operands[0], operands[-1]])
    k, columns = int(left.shape[-1]), int(value.shape[-1]) if right.ndim > 1 else 1
    if min(left.ndim, right.ndim) > 2:
        # More rows or columns than are summed over make a product no faster.
        rows = int(value.shape[-2])
        return work / _rate(rates.batched, side(min(rows, k), k, min(columns, k)))
    time = work / _rate(rates.flat, side(k, columns))
    matrix = right.numel() * right.element_size()
    if matrix > _CACHED:  # every tile reads it again
        tiles = max(1.0, 3 * value.numel() * value.element_size() / TILE_BYTES["cpu"])
        time += tiles * matrix / rates.memory
    return time


def _looping(name: str, value: torch.Tensor, operands: Sequence[fx.Node], rates: Rates) -> float:
    """Seconds of going through values in an order that is not that of memory: an inner loop runs
    over the axes that lie next to each other in all of them."""
    tensors = [n.meta[VAL] for n in operands]
    if not tensors or all(t.is_contiguous() and t.shape == value.shape for t in (*tensors, value)):
        return 0.0
    shape: Sequence[int] = value.shape
    strides = [value.stride()]
    if name in _COPIES or math.prod(shape) < tensors[0].numel():  # as the operand has its axes
        shape, strides = tensors[0].shape, []
        if name in _COPIES:
            strides = [_dense(shape)]
    for t in tensors:
        if len(t.shape) > len(shape):
            return 0.0
        behind = range(len(shape) - t.ndim, len(shape))
        steps = [0] * len(shape)
        for axis, n, step in zip(behind, t.shape, t.stride(), strict=True):
            steps[axis] = int(step) if n != 1 else 0
        strides.append(tuple(steps))
    entries = math.prod(shape)
    run, in_order = _run(shape, strides)
    return entries / (run if in_order else _STRIDED) / rates.loops


def _dense(shape: Sequence[int]) -> tuple[int, ...]:
    steps = [1]
    for n in reversed(shape[1:]):
        steps.append(steps[-1] * int(n))
    return tuple(reversed(steps))


def _run(shape: Sequence[int], strides: Sequence[Sequence[int]]) -> tuple[int, bool]:
    """How many entries the inner loop takes, and whether it takes all of them in order."""
    axes = sorted((a for a, n in enumerate(shape) if n != 1), key=lambda a: strides[0][a])
    if not axes:
        return 1, True
    inner = [steps[axes[0]] for steps in strides]
    run = int(shape[axes[0]])
    for axis in axes[1:]:
        if any(steps[axis] != step * run for steps, step in zip(strides, inner, strict=True)):
            break
        run *= int(shape[axis])
    return run, all(step in (0, 1) for step in inner)


def _reading(value: torch.Tensor, rates: Rates) -> float:
    size = value.numel() * value.element_size()
    return size / (rates.stream if value.is_contiguous() else rates.scattered)


def total(nodes: Iterable[fx.Node], rates: Rates, compiled: bool = False) -> float:
    """Estimated time of a program.  What does not depend on x is computed once and kept, so it
    counts for a fraction only."""
    return sum(
        seconds(node, rates, compiled) * (1.0 if node.meta.get(VARIES, True) else _KEPT)
        for node in nodes
    )


def own_bytes(node: fx.Node) -> int:
    """Bytes of memory that an operation's result takes, 0 where it is a view or overwrites another
    value (:mod:`fxhess.overwrite`)."""
    value = node.meta.get(VAL)
    if not isinstance(value, torch.Tensor) or not flops(node) or _overwritten(node):
        return 0
    return value.numel() * value.element_size()


def _overwritten(node: fx.Node) -> fx.Node | None:
    """The value that an operation writes into; a program's results are none."""
    into = node.kwargs.get("out")
    return into if isinstance(into, fx.Node) and into.op != "placeholder" else None


def peak_bytes(nodes: Sequence[fx.Node]) -> int:
    """Bytes that are worked on at once: each value counts until its own last use."""
    bases: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        base = _overwritten(node)
        if base is not None:
            bases[node] = bases.get(base, base)
    return _peak(nodes, bases, False)


def held_bytes(nodes: Sequence[fx.Node]) -> int:
    """Bytes allocated at once: a value is there until the last use of its views, and what a product
    or a reshape has to copy comes besides."""
    bases: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        if own_bytes(node) + _copied_bytes(node) == 0 and node.all_input_nodes:
            base = _overwritten(node) or node.all_input_nodes[0]
            bases[node] = bases.get(base, base)
    return _peak(nodes, bases, True)


def _peak(nodes: Sequence[fx.Node], bases: Mapping[fx.Node, fx.Node], copies: bool) -> int:
    last: dict[fx.Node, int] = {}
    for i, node in enumerate(nodes):
        for operand in node.all_input_nodes:
            last[bases.get(operand, operand)] = i
    alive = peak = 0
    sizes: dict[fx.Node, int] = {}
    for i, node in enumerate(nodes):
        own, copied = own_bytes(node), _copied_bytes(node) if copies else 0
        kept = copied if node.op != "placeholder" and not own else 0  # a reshape's is its result
        sizes[node] = own + kept
        alive += own + kept
        peak = max(peak, alive + copied - kept)
        for operand in {bases.get(n, n) for n in node.all_input_nodes}:
            if last.get(operand) == i:
                alive -= sizes.pop(operand, 0)
    return peak


def _is_view(value: torch.Tensor, node: fx.Node) -> bool:
    """Whether the reshaped value needs no copy."""
    try:
        value.view(node.meta[VAL].shape)
    except RuntimeError:
        return False
    return name_of(node) != "contiguous"


_RESHAPES = frozenset({"reshape", "flatten", "contiguous", "_unsafe_view"})


def _copied_bytes(node: fx.Node) -> int:
    """Bytes that an operation allocates for operands that are not laid out as it needs them."""
    name = name_of(node)
    if name not in _RESHAPES and name not in _PRODUCTS:
        return 0
    taken = 0
    if name == _SYMMETRIC:  # one block of rows, before it is added to its transpose
        value = node.meta[VAL]
        start, stop = list(symmetric.blocks(value.shape[-1]))[-1]
        taken = (stop - start) * value[..., 0].numel() * value.element_size()
    for operand in node.all_input_nodes[: 1 if name in _RESHAPES else None]:
        value = operand.meta.get(VAL)
        if not isinstance(value, torch.Tensor) or value.is_contiguous() or value.ndim < 2:
            continue
        if not (value.mT.is_contiguous() if name in _PRODUCTS else _is_view(value, node)):
            taken += value.numel() * value.element_size()
    return taken
