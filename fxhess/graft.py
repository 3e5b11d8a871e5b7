"""Copying a trace into a graph under construction."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxhess import _batched, _kept
from fxhess.emit import Emitter, Var, to_meta
from fxhess.errors import FxhessError
from fxhess.functions import call_of


class UntraceableError(Exception):
    """The trace would hold for some batch sizes only, or computes something else."""


_aten = torch.ops.aten
_SAME = frozenset({_aten.detach.default, _aten.alias.default, _aten.lift_fresh_copy.default})
_SCATTERS = frozenset({_aten.slice_scatter.default, _aten.select_scatter.default})
_VIEWS = frozenset({_aten.view.default, _aten._unsafe_view.default})


def tidy(traced: fx.GraphModule) -> fx.GraphModule:
    """The trace as it has to be in another graph, in place: saved results that autograd detached
    are what they are, so that gradients flow through; and a view of a tensor of the traced
    strides is a reshape of one of any strides."""
    for node in list(traced.graph.nodes):
        same = node.target in _SAME and not node.meta.get(_batched.KEPT)
        if same or (node.target in _VIEWS and _shape(node) == _shape(node.args[0])):
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)
        elif node.target in _VIEWS:
            node.target = _aten.reshape.default
        elif node.target is _aten.copy.default:  # it has no derivative of its own
            like, source = node.args[:2]
            if _dtype(like) != _dtype(source):
                with traced.graph.inserting_before(node):
                    source = traced.graph.call_function(
                        _aten._to_copy.default, (source,), {"dtype": _dtype(like)}
                    )
            node.target, node.args = _aten.expand_as.default, (source, like)
        elif node.target in _SCATTERS and node.meta["val"].is_complex():
            _scatter_as_real(traced.graph, node)
    return _kept.recompiled(traced)


def _scatter_as_real(graph: fx.Graph, node: fx.Node) -> None:
    """Writing into a slice of complex numbers has no derivative; of pairs of real ones it has."""
    whole, part, *rest = node.args
    rank = node.meta["val"].ndim
    if rest:
        rest[0] = rest[0] % rank  # type: ignore[operator]
    with graph.inserting_before(node):
        pairs = [
            graph.call_function(
                _aten.view_as_real.default, (graph.call_function(_aten.resolve_conj.default, (v,)),)
            )
            for v in (whole, part)
        ]
        written = graph.call_function(node.target, (*pairs, *rest), dict(node.kwargs))  # type: ignore[arg-type]
        result = graph.call_function(_aten.view_as_complex.default, (written,))
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def splice(emitter: Emitter, traced: fx.GraphModule, inputs: Sequence[Var]) -> Any:
    """Copy the nodes of a tidy trace; the result is a Var or a list of them."""
    values: dict[fx.Node, Any] = {}
    remaining = list(inputs)
    strided = any(n.target is _aten.as_strided.default for n in traced.graph.nodes)
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            value = remaining.pop(0)
            if strided and isinstance(value.val, torch.Tensor):
                value = emitter.call(
                    _aten.clone.default, value, memory_format=torch.contiguous_format
                )
            values[node] = value
            continue
        if node.op == "get_attr":
            values[node] = _constant(emitter, getattr(traced, str(node.target)), inputs[0])
            continue
        args = fx.node.map_arg(node.args, values.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
        if node.op == "output":
            (result,) = args
            return list(result) if isinstance(result, (list, tuple)) else result
        if node.target is operator.getitem and not isinstance(args[0], Var):
            values[node] = args[0][args[1]]
        elif node.target is torch.ops.fxhess.function.default:
            tensors, token = args
            values[node] = emitter.call(call_of(token), *tensors)
        else:
            values[node] = emitter.call(node.target, *args, **kwargs)
    raise UntraceableError("a trace without a result")


def _dtype(node: Any) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else None


def _shape(node: Any) -> tuple[str, ...] | None:
    value = node.meta.get("val")
    return tuple(map(str, value.shape)) if isinstance(value, torch.Tensor) else None


def _constant(emitter: Emitter, tensor: torch.Tensor, like: Var) -> Var:
    """A number that the trace made."""
    if tensor.numel() != 1:
        raise FxhessError("a trace holds a tensor of its own")
    out = emitter.call(
        _aten.full.default,
        list(tensor.shape),
        tensor.item(),
        dtype=tensor.dtype,
        device=tensor.device,
    )
    out.node.meta["val"] = to_meta(tensor)
    return out
