"""Adapter: what running generated programs needs of PyTorch's internals.

``torch.ops.mkldnn`` (oneDNN's products) and ``torch._dynamo`` (which axes a compiler takes for
variable); without them the public ``F.linear`` and ``torch.compile`` do the same, slower.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def _find_onednn_linear() -> Callable[..., torch.Tensor] | None:
    if not torch.backends.mkldnn.is_available():
        return None
    try:
        op = torch.ops.mkldnn._linear_pointwise
        one = torch.ones(2, 2)
        op(one, one, None, "none", [], "")
    except (AttributeError, RuntimeError):
        return None
    return lambda rows, weight: op(rows, weight, None, "none", [], "")


_onednn_linear = _find_onednn_linear()


def onednn_linear(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``rows @ weight.T`` by oneDNN for float32 on CPUs, otherwise by ``F.linear``.  Has no
    derivative formula."""
    if _onednn_linear is not None and rows.device.type == "cpu":
        return _onednn_linear(rows, weight)
    return torch.nn.functional.linear(rows, weight)


def compiled(module: torch.nn.Module, batch_ndim: int) -> Callable[..., Any]:
    """The module through ``torch.compile``, run without autograd: one compilation for all batch
    sizes (the leading axes of the tensors that have the first one's batch shape) but 1."""
    fast = torch.compile(module.forward, fullgraph=True)
    mark = getattr(torch._dynamo, "maybe_mark_dynamic", None)
    marked = False

    def run(x: torch.Tensor, *rest: Any) -> Any:
        nonlocal marked
        if not marked and mark is not None and 1 not in x.shape[:batch_ndim]:
            batch = x.shape[:batch_ndim]
            for tensor in (x, *rest):
                if isinstance(tensor, torch.Tensor) and tensor.shape[:batch_ndim] == batch:
                    for axis in range(batch_ndim):
                        mark(tensor, axis)
            marked = True
        return fast(x, *rest)

    return run


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on whatever device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
