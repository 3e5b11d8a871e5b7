"""Tracing a function of tensors for all batch sizes at once.

The second place that touches tracing internals of PyTorch, with a fallback where they are gone.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from fxhess import _kept
from fxhess._torch import (
    functional,
    newest_node,
    nodes_since,
    quiet,
    size_expression,
    writes_in_place,
)

try:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import (
        DimDynamic,
        StatelessSymbolicContext,
    )
except ImportError:  # pragma: no cover - then nothing is traced here: derivatives at run time
    FakeTensorMode = None  # type: ignore[assignment, misc]

KEPT = "kept"  # node.meta[KEPT]: a detach that the user wrote, not autograd's own


class _KeepDetach(TorchFunctionMode):
    """Marks what Python code detaches, inside of a trace."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any | None = None
    ) -> Any:
        before = newest_node()
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.detach:
            for node in nodes_since(before):
                node.meta[KEPT] = True
        return result


# Batch sizes for which the conditions of a trace are tried; and to trace with: no other size.
_TRIED_SIZES = (2, 3, 4, 5, 7, 8, 16, 17, 64, 1000, 1009)
_UNLIKELY_SIZES = (1009, 1013, 1019, 1021, 1031, 1033, 1039, 1049)
_OTHER_SIZES = (2003, 2011, 2017, 2027, 2029, 2039, 2053, 2063)


def trace_batched(
    function: Callable[..., Any],
    symbols: Sequence[Any],
    shapes: Sequence[Sequence[Any]],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    numbers: set[str] | None = None,
) -> fx.GraphModule:
    """Trace ``function`` on tensors whose sizes are numbers and expressions in ``symbols`` (the
    batch sizes, in the order of the first tensor's leading axes), of any sizes 2 and above.
    ``numbers``: not empty once a trace of the same operations has found that these know sizes as
    numbers only, so that none is tried with symbols again.

    Raises:
        RuntimeError: the trace holds for some batch sizes only.
    """

    def traced(mode: FakeTensorMode, sizes: Mapping[Any, Any]) -> fx.GraphModule:
        with quiet(), mode:
            inputs = [
                torch.empty([evaluate(n, sizes) for n in shape], dtype=dtype, device=device)
                for shape, dtype in zip(shapes, dtypes, strict=True)
            ]
            with _KeepDetach():
                run = make_fx(function, tracing_mode="real", _allow_non_fake_inputs=True)
                graph_module = _kept.generated(run(*inputs))
            if writes_in_place(graph_module.graph):
                graph_module = functional(graph_module, {}, (KEPT,))
            if writes_in_place(graph_module.graph):
                raise RuntimeError("the trace writes into its operands")
            return graph_module

    numbers = set() if numbers is None else numbers
    if not (numbers and symbols):
        try:
            return _trace_symbolic(traced, symbols)
        except Exception as error:
            if not symbols:
                raise
            numbers.add(str(error))
    # Shape functions of some operations know numbers only: what differs between two traces is
    # what depends on the batch.
    first, second = (
        traced(FakeTensorMode(allow_non_fake_inputs=True), dict(zip(symbols, sizes, strict=False)))
        for sizes in (_UNLIKELY_SIZES, _OTHER_SIZES)
    )
    return _generalized(first, second, len(symbols))


def _trace_symbolic(
    traced: Callable[[FakeTensorMode, Mapping[Any, Any]], fx.GraphModule], symbols: Sequence[Any]
) -> fx.GraphModule:
    env = _kept.shape_env()
    mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)
    hints = torch.empty(_UNLIKELY_SIZES[: len(symbols)], device="meta")
    context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * len(symbols))
    sizes = mode.from_tensor(hints, symbolic_context=context).shape
    graph_module = traced(mode, dict(zip(symbols, sizes, strict=True)))
    own = [size_expression(n) for n in sizes]
    for n in _TRIED_SIZES:
        point = {s: n + 2 * i for i, s in enumerate(own)}
        if not all(bool(guard.expr.subs(point)) for guard in env.guards):
            raise RuntimeError("the trace holds for some batch sizes only")
    return graph_module


def _generalized(first: fx.GraphModule, second: fx.GraphModule, count: int) -> fx.GraphModule:
    """The program of which ``first`` and ``second`` are traces at two choices of batch sizes."""
    pairs = list(zip(first.graph.nodes, second.graph.nodes, strict=True))
    twins = {b: a for a, b in pairs}
    x = pairs[0][0]
    last = [n for n in first.graph.nodes if n.op == "placeholder"][-1]
    made: dict[tuple[int, ...], fx.Node] = {}

    def size(factor: int, axes: tuple[int, ...]) -> fx.Node:
        if (factor, *axes) not in made:
            with first.graph.inserting_before(last.next):
                total: Any = factor
                for k in axes:
                    n = first.graph.call_function(torch.ops.aten.sym_size.int, (x, k))
                    if total == 1 and isinstance(total, int):
                        total = n
                    else:
                        total = first.graph.call_function(operator.mul, (total, n))
            made[(factor, *axes)] = total
        return made[(factor, *axes)]

    def unified(a: Any, b: Any) -> Any:
        if isinstance(a, (list, tuple)) and type(a) is type(b) and len(a) == len(b):
            return type(a)(unified(p, q) for p, q in zip(a, b, strict=True))
        if isinstance(b, fx.Node) and twins.get(b) is a:
            return a
        if type(a) is not type(b) or isinstance(b, fx.Node):
            raise RuntimeError("two traces differ")
        if a == b:
            return a
        if type(a) is int:
            axes = tuple(k for k in range(count) if a % _UNLIKELY_SIZES[k] == 0)
            factor = a // math.prod(_UNLIKELY_SIZES[k] for k in axes)
            if axes and factor * math.prod(_OTHER_SIZES[k] for k in axes) == b:
                return size(factor, axes)
        raise RuntimeError("two traces differ")

    for a, b in pairs:
        if a.op != b.op or (a.op == "call_function" and a.target != b.target):
            raise RuntimeError("two traces differ")
        args = unified(tuple(a.args), tuple(b.args))
        if list(a.kwargs) != list(b.kwargs):
            raise RuntimeError("two traces differ")
        values = unified(tuple(a.kwargs.values()), tuple(b.kwargs.values()))
        a.args, a.kwargs = args, dict(zip(a.kwargs, values, strict=True))
    return _kept.recompiled(first)


def evaluate(size: Any, sizes: Mapping[Any, Any]) -> Any:
    """A size (a number or a polynomial in the batch symbols) at the given batch sizes."""
    if not isinstance(size, sympy.Basic):
        return size
    if size in sizes:
        return sizes[size]
    if size.is_Integer:
        return int(size)
    if not isinstance(size, (sympy.Add, sympy.Mul, sympy.Pow)):
        raise NotImplementedError(f"a size of {size}")
    total, *rest = (evaluate(part, sizes) for part in size.args)
    for part in rest:
        if isinstance(size, sympy.Add):
            total = total + part
        else:
            total = total * part if isinstance(size, sympy.Mul) else total**part
    return total
