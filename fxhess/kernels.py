"""Kernels for runs in which no gradient through the result is wanted.

On CPUs, oneDNN's float32 product with a plain matrix reaches about twice the rate of the default
one for all but tiny sizes (see the README's table).  It has no derivative formula, so it replaces
``torch.matmul`` only in programs that run without autograd.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fxhess import _running, triangle
from fxhess.emit import VAL
from fxhess.passes.fuse import fuse

# Below this many entries of the matrix, the default product's lower overhead wins.
_SMALL_MATRIX = 1024
_SMALL_ROWS = 16
# A compiler's own product, fused with what surrounds it, wins below this.
_LARGE_MATRIX = 4096


def flat_product(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """``rows @ matrix`` for rows ``[.., k]`` and a matrix ``[k, n]``."""
    if rows.numel() >= _SMALL_ROWS * rows.shape[-1]:
        return _running.onednn_linear(rows, matrix.t())
    return torch.matmul(rows, matrix)


def use_fast_kernels(graph: fx.Graph) -> fx.Graph:
    """Replace flat products by the fastest exact kernel of the device, in place."""
    for node in graph.nodes:
        if node.op != "call_function" or node.target is not torch.matmul:
            continue
        rows, matrix = (n.meta[VAL] for n in node.args)
        plain = matrix.ndim == 2 and rows.ndim >= 2 and rows.dtype == matrix.dtype == torch.float32
        if plain and matrix.numel() >= _SMALL_MATRIX:
            node.target = flat_product
    return graph


torch.library.define("fxhess::flat_product", "(Tensor rows, Tensor matrix) -> Tensor")
torch.library.impl("fxhess::flat_product", "CompositeExplicitAutograd", flat_product)


@torch.library.register_fake("fxhess::flat_product")
def _flat_product_like(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    return rows.new_empty((*rows.shape[:-1], matrix.shape[-1]))


def for_compiler(graph: fx.Graph) -> fx.Graph:
    """A copy for compiling: kernels that PyTorch's compiler does not know as operators of their
    own where they win over its own choice, and tiny products as sums, which it fuses."""
    copy = fuse(graph)
    for node in copy.nodes:
        if node.target is flat_product:
            large = node.args[1].meta[VAL].numel() >= _LARGE_MATRIX
            node.target = torch.ops.fxhess.flat_product.default if large else torch.matmul
    return copy


_IN_PLACE_FORMS = {
    operator.add: torch.add,
    operator.mul: torch.mul,
    triangle.unpack: triangle.unpack,
}


def write_results(graph: fx.Graph) -> fx.Graph:
    """Give the program a further input for each result, and write the results into them."""
    (values,) = next(n for n in graph.nodes if n.op == "output").args
    results = [values] if isinstance(values, fx.Node) else list(values)  # type: ignore[arg-type]
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    out = next(n for n in graph.nodes if n.op == "output")
    for i, result in enumerate(results):
        assert isinstance(result, fx.Node)
        with graph.inserting_after(placeholders[-1]):
            target = graph.placeholder(f"out_{i}")
        placeholders.append(target)
        form: Any = _IN_PLACE_FORMS.get(result.target)  # type: ignore[arg-type]
        first = result.args[0] if result.args else None
        tensor = isinstance(first, fx.Node) and isinstance(first.meta.get(VAL), torch.Tensor)
        if form is not None and tensor and len(result.users) == 1:
            result.target, result.kwargs = form, {"out": target}
        else:
            source = result
            if result.target in (torch.clone, torch.ops.aten.clone.default):
                source = result.args[0]  # type: ignore[assignment]
            with graph.inserting_before(out):
                graph.call_method("copy_", (target, source))
    out.args = (None,)
    for node in reversed(list(graph.nodes)):
        if not node.users and node.target in (torch.clone, torch.ops.aten.clone.default):
            graph.erase_node(node)
    return graph
