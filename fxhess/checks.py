"""Whether the tensors of a call fit: clear errors instead of PyTorch's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from fxhess.errors import InputError

TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # that x can have


def check_input(x: torch.Tensor, event_ndim: int) -> None:
    """Raises InputError unless x is a batch of samples with ``event_ndim`` axes each."""
    if not isinstance(x, torch.Tensor):
        raise InputError(f"x must be a tensor, not {type(x).__name__}")
    if x.ndim < event_ndim:
        raise InputError(
            f"x has {x.ndim} axes, a sample {event_ndim}",
            hint=f"x is [*batch, *event] with the last {event_ndim} axes one sample"
            f" (event_ndim={event_ndim})",
        )
    if x.dtype not in TYPES:
        raise InputError(
            f"x is {x.dtype}; second derivatives need real floating-point numbers",
            hint="x.float() or x.double(); complex inputs as their real and imaginary parts",
        )
    if x.layout != torch.strided:
        raise InputError(f"x has layout {x.layout}; only dense tensors are supported",
                         hint="x.to_dense()")  # fmt: skip
    if x.device.type == "meta":
        raise InputError("x is on the meta device: it has no values")


def check_model(model: nn.Module, x: torch.Tensor) -> None:
    """:func:`check_tensors` for all parameters and buffers of a model."""
    check_tensors(dict(model.named_parameters()), x)
    check_tensors(dict(model.named_buffers()), x)


def check_tensors(tensors: Mapping[str, torch.Tensor], x: torch.Tensor) -> None:
    """Raises InputError for tensors without values, or elsewhere than x."""
    for name, tensor in tensors.items():
        if tensor.device.type == "meta":
            raise InputError(f"'{name}' is on the meta device: it has no values")
        if tensor.device != x.device and tensor.ndim:
            raise InputError(
                f"x is on {x.device}, '{name}' on {tensor.device}", hint="move one of them"
            )


def check_types(tensors: Mapping[str, torch.Tensor], x: torch.Tensor, model: nn.Module) -> None:
    """All weights of another type than x, no conversion in the model, and an operation in it that
    PyTorch does not run on two types: an oversight."""
    weights = {n: t for n, t in tensors.items() if t.dtype.is_floating_point and t.ndim}
    differ = weights and all(t.dtype != x.dtype for t in weights.values())
    if differ and not _runs(model, x):
        name, tensor = next(iter(weights.items()))
        raise InputError(
            f"x is {x.dtype}, '{name}' {tensor.dtype}",
            hint=f"x.to({tensor.dtype}) or model.to({x.dtype})",
        )


def _runs(model: nn.Module, x: torch.Tensor) -> bool:
    """Whether the model itself takes x."""
    with torch.random.fork_rng(), torch.no_grad():
        try:
            model(x)
        except Exception:
            return False
    return True


def check_out(
    out: torch.Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    x: torch.Tensor,
    tensors: Sequence[torch.Tensor],
) -> None:
    """Raises InputError unless a result of ``shape`` and ``dtype`` can be written into ``out``,
    given x and the model's tensors."""
    if not isinstance(out, torch.Tensor):
        raise InputError(
            f"out must be a tensor, not {type(out).__name__}",
            hint=f"torch.empty({list(shape)}, dtype={dtype}, device={str(x.device)!r})",
        )
    if list(out.shape) != list(shape) or out.dtype != dtype:
        raise InputError(f"out is {out.dtype} {list(out.shape)}, the result {dtype} {list(shape)}")
    if out.device != x.device:
        raise InputError(f"out is on {out.device}, x on {x.device}")
    if out.requires_grad:
        raise InputError("out requires grad; no gradient can flow through a given result")
    if _overlap(out, x) or any(_overlap(out, t) for t in tensors):
        raise InputError("out overlaps x or a tensor of the model in memory")
    if out.numel() and _self_overlapping(out):
        raise InputError("out overlaps itself in memory (an expanded tensor)")


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors share memory (by the ranges of addresses they span)."""
    if a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr() or not (
        a.numel() and b.numel()
    ):
        return False
    spans = []
    for t in (a, b):
        last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
        start = t.storage_offset() * t.element_size()
        spans.append((start, start + (last + 1) * t.element_size()))
    return spans[0][0] < spans[1][1] and spans[1][0] < spans[0][1]


def _self_overlapping(t: torch.Tensor) -> bool:
    """Whether two entries may share memory: each axis has to step over all finer ones."""
    reach = 0
    for step, n in sorted((s, n) for n, s in zip(t.shape, t.stride(), strict=True) if n > 1):
        if step <= reach:
            return True
        reach += step * (n - 1)
    return False
