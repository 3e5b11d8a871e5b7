"""Kernels for runs in which no gradient through the result is wanted.

On CPUs, oneDNN's float32 product with a plain matrix reaches about twice the rate of the default
one for all but tiny sizes (two cores of an AMD EPYC).  It has no derivative formula, so it replaces
``torch.matmul`` only in programs that run without autograd.  Of the transposed convolution there
are three forms, each the fastest somewhere: in float64 the adjoint of the plain one is 2 to 10
times faster, into one or two channels a product and a sum over overlapping patches twice.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from fxhess import _running, triangle
from fxhess.emit import VAL
from fxhess.passes.fuse import fuse
from fxhess.symmetric import symmetric_product

# Below this many entries of the matrix, the default product's lower overhead wins.
_SMALL_MATRIX = 1024
_SMALL_ROWS = 16
# A compiler's own product, fused with what surrounds it, wins below this.
_LARGE_MATRIX = 4096
_FEW_CHANNELS = 2


def flat_product(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """``rows @ matrix`` for rows ``[.., k]`` and a matrix ``[k, n]``."""
    if rows.numel() >= _SMALL_ROWS * rows.shape[-1]:
        return _running.onednn_linear(rows, matrix.t())
    return torch.matmul(rows, matrix)


def transposed_convolution(
    g: torch.Tensor,
    weight: torch.Tensor,
    bias: None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    extra: Sequence[int],
    groups: int,
) -> torch.Tensor:
    """``torch.convolution`` with ``transposed=True``, for g: ``[n, channels, *image]``."""
    image = [
        (g.shape[2 + d] - 1) * stride[d] - 2 * padding[d]
        + dilation[d] * (weight.shape[2 + d] - 1) + 1 + extra[d]
        for d in range(weight.ndim - 2)
    ]  # fmt: skip
    channels = weight.shape[1] * groups
    if g.device.type == "cpu" and g.dtype == torch.float64:
        like = g.new_empty((g.shape[0], channels, *image))
        return torch.ops.aten.convolution_backward.default(
            g, like, weight, None, stride, padding, dilation, False, [0] * len(image), groups,
            [True, False, False],
        )[0]  # fmt: skip
    if g.device.type == "cpu" and channels <= _FEW_CHANNELS and len(image) == 2 and groups == 1:
        patches = torch.matmul(weight.flatten(1).t(), g.flatten(2))
        kernel = tuple(weight.shape[2:])
        return F.fold(patches, tuple(image), kernel, tuple(dilation), tuple(padding), tuple(stride))
    return torch.convolution(g, weight, None, stride, padding, dilation, True, extra, groups)


def use_fast_kernels(graph: fx.Graph) -> fx.Graph:
    """Replace flat products and transposed convolutions by the fastest exact kernel of the device,
    in place."""
    for node in graph.nodes:
        if node.target is torch.convolution and node.args[6] is True:
            node.target = transposed_convolution
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


torch.library.define(
    "fxhess::symmetric_product", "(Tensor rows, Tensor matrix, int axis) -> Tensor"
)
torch.library.impl("fxhess::symmetric_product", "CompositeExplicitAutograd", symmetric_product)


@torch.library.register_fake("fxhess::symmetric_product")
def _symmetric_product_like(rows: torch.Tensor, matrix: torch.Tensor, axis: int) -> torch.Tensor:
    return rows.new_empty((rows.shape[1 - axis], matrix.shape[-1], matrix.shape[-1]))


torch.library.define(
    "fxhess::transposed_convolution",
    "(Tensor g, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding, SymInt[] dilation,"
    " bool transposed, SymInt[] extra, SymInt groups) -> Tensor",
)
torch.library.impl(
    "fxhess::transposed_convolution", "CompositeExplicitAutograd", transposed_convolution
)


@torch.library.register_fake("fxhess::transposed_convolution")
def _transposed_convolution_like(*args: Any) -> torch.Tensor:
    return torch.convolution(*args)


def for_compiler(graph: fx.Graph) -> fx.Graph:
    """A copy for compiling: kernels that PyTorch's compiler does not know as operators of their
    own where they win over its own choice, and tiny products as sums, which it fuses.  Results are
    written with ``copy_`` alone, which it makes part of what computes them."""
    copy = fuse(graph)
    for node in copy.nodes:
        if "out" in node.kwargs:
            target = node.kwargs["out"]
            node.kwargs = {}
            with copy.inserting_after(node):
                copy.call_method("copy_", (target, node))
        if node.target is flat_product:
            large = node.args[1].meta[VAL].numel() >= _LARGE_MATRIX
            node.target = torch.ops.fxhess.flat_product.default if large else torch.matmul
        elif node.target is symmetric_product:
            node.target = torch.ops.fxhess.symmetric_product.default
        elif node.target is transposed_convolution:
            node.target = torch.ops.fxhess.transposed_convolution.default
    return copy


_IN_PLACE_FORMS = {
    operator.add: torch.add,
    operator.mul: torch.mul,
    triangle.unpack: triangle.unpack,
    symmetric_product: symmetric_product,
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
