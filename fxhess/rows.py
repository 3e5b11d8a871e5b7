"""Hessians row by row, for samples of which a single one takes more memory than there is: products
with slices of the identity, each as many rows as fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fxhess import memory
from fxhess.errors import InputError
from fxhess.execute import Execution
from fxhess.progress import advance, hidden

_BLOCK = 512  # rows and columns that are made symmetric at once

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Prepare = Callable[[torch.Tensor, torch.Tensor], Execution]


def hessian_by_rows(
    x: torch.Tensor,
    event_ndim: int,
    limit: int,
    product: Product,
    prepare: Prepare,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``[*batch, *outputs, *event, *event]`` within ``limit`` bytes.

    ``product(x, v)`` gives H v for ``x: [1, *event]`` and ``v: [k, 1, *event]`` as ``[k, 1,
    *outputs, *event]``; ``prepare(x, v)`` the execution that would run it.

    Raises:
        InputError: not even one row fits.
    """
    nb = x.ndim - event_ndim
    batch, event = x.shape[:nb], x.shape[nb:]
    samples = x.reshape(-1, *event)
    n = event.numel()
    outputs = prepare(samples[:1], _directions(samples, 0, 1)).shapes[0]
    outputs = outputs[: len(outputs) - event_ndim]
    shape = (*batch, *outputs, *event, *event)
    spare = limit if out is not None else limit - torch.Size(shape).numel() * x.element_size()
    count = min(n, _count(samples[:1], spare, prepare))
    if out is None:
        out = memory.empty(shape, x.dtype, x.device)
    whole = out.contiguous() if not out.is_contiguous() else out
    flat = whole.view(len(samples), -1, n, n)
    for b in range(len(samples)):
        for start in range(0, n, count):
            start = min(start, n - count)  # the last slice reaches back: all have one size
            with hidden():
                rows = product(samples[b : b + 1], _directions(samples, start, count))
            flat[b, :, start : start + count] = rows.reshape(count, -1, n).movedim(0, 1)
            advance(count / n)
        _make_symmetric(flat[b])
    return out if whole is out else out.copy_(whole)


def _directions(samples: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """Rows of the identity: ``[count, 1, *event]``."""
    n = samples[0].numel()
    rows = samples.new_zeros(count, n)
    rows.view(-1)[start :: n + 1][:count] = 1
    return rows.view(count, 1, *samples.shape[1:])


def _count(sample: torch.Tensor, spare: int, prepare: Prepare) -> int:
    """How many rows fit, from what one and two of them take."""
    one, two = (sum(prepare(sample, _directions(sample, 0, k)).needs(sample)) for k in (1, 2))
    if one > spare:
        raise InputError(
            f"max_memory does not suffice: {max(spare, 0)} bytes are left beside the result, and"
            f" one row of the Hessian of one sample takes about {one}",
            hint="a smaller batch, out= for the result, or outputs that need less than H",
        )
    return 1 + (spare - one) // max(1, two - one)


def _make_symmetric(matrices: Any) -> None:
    """The mean of ``[m, n, n]`` and its transpose, in place, block by block."""
    n = matrices.shape[-1]
    for i in range(0, n, _BLOCK):
        for j in range(i, n, _BLOCK):
            upper = matrices[:, i : i + _BLOCK, j : j + _BLOCK]
            lower = matrices[:, j : j + _BLOCK, i : i + _BLOCK]
            mean = (upper + lower.mT) * 0.5
            upper.copy_(mean)
            lower.copy_(mean.mT)
