"""Sparse layouts of what depends on x: a program of derivatives holds dense tensors only.

A tensor made sparse has the same entries as before; what only a sparse layout has (its indices, a
softmax over the entries that are stored) fails as it does for a dense tensor.
"""

from __future__ import annotations

from typing import Any

import torch

from fxhess.registry import substitute


@substitute(
    torch.Tensor.to_sparse,
    torch.Tensor.to_sparse_coo,
    torch.Tensor.to_sparse_csr,
    torch.Tensor.to_sparse_csc,
    torch.Tensor.to_sparse_bsr,
    torch.Tensor.to_sparse_bsc,
)
def to_sparse(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return self


@substitute(torch.sparse.mm)
def mm(sparse: torch.Tensor, dense: torch.Tensor, *reduce: str) -> torch.Tensor:
    if sparse.layout != torch.strided or dense.layout != torch.strided or reduce:
        result: torch.Tensor = torch.sparse.mm(sparse, dense, *reduce)
        return result
    return torch.mm(sparse, dense)
