"""Symmetric matrices packed as their upper triangles, row by row: ``[.., n (n + 1) / 2]``.

A sum of many terms ``s_k J_k J_k^T`` whose ``J_k`` are the same for all samples is one product with
the packed ``J_k J_k^T``: half the arithmetic, and exactly symmetric once unpacked.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def length(n: int) -> int:
    """Entries of a packed n by n matrix."""
    return n * (n + 1) // 2


def ends(n: int, *, device: torch.device) -> torch.Tensor:
    """``[2, n (n + 1) / 2]``: row and column of every packed entry."""
    return torch.triu_indices(n, n, device=device)


def positions(n: int, *, device: torch.device) -> torch.Tensor:
    """``[n n]``: where every entry of the full matrix lies in the packed one."""
    index = torch.arange(n, device=device)
    low = torch.minimum(index[:, None], index)
    high = torch.maximum(index[:, None], index)
    return (low * (2 * n - 1 - low) // 2 + high).flatten()


def unpack(
    packed: torch.Tensor,
    positions: torch.Tensor,
    sizes: Sequence[int],
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``[.., *sizes, *sizes]`` from the packed ``[.., n (n + 1) / 2]``; n is the product of
    ``sizes``."""
    axes = (*sizes, *sizes)
    if out is None:
        return torch.index_select(packed, -1, positions).unflatten(-1, axes)
    if out.is_contiguous():
        torch.index_select(packed, -1, positions, out=out.flatten(-len(axes)))
        return out
    return out.copy_(unpack(packed, positions, sizes))
