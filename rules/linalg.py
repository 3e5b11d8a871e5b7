"""Matrices: what can be said in products.  The rest has PyTorch's own derivatives."""

from __future__ import annotations

from typing import Any

import torch

from fxhess.registry import aten, composite


def _minor(a: torch.Tensor, rows: tuple[int, int], columns: tuple[int, int]) -> torch.Tensor:
    (i, j), (k, l) = rows, columns  # noqa: E741
    return a[..., i, k] * a[..., j, l] - a[..., i, l] * a[..., j, k]


@composite(aten._linalg_det.default)
def det(A: torch.Tensor) -> Any:
    """Small determinants as the polynomials that they are: exact also for singular matrices.  Two
    rows at a time for size 4 (Laplace's expansion)."""
    n = A.shape[-1]
    if n == 1:
        result = A[..., 0, 0]
    elif n == 2:
        result = _minor(A, (0, 1), (0, 1))
    elif n == 3:
        minors = [_minor(A, (1, 2), c) for c in ((1, 2), (0, 2), (0, 1))]
        result = A[..., 0, 0] * minors[0] - A[..., 0, 1] * minors[1] + A[..., 0, 2] * minors[2]
    elif n == 4:
        pairs = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
        signs = (1, -1, 1, 1, -1, 1)
        terms = [
            _minor(A, (0, 1), p) * _minor(A, (2, 3), q) * s
            for p, q, s in zip(pairs, reversed(pairs), signs, strict=True)
        ]
        result = terms[0] + terms[1] + terms[2] + terms[3] + terms[4] + terms[5]
    else:
        return NotImplemented
    LU, pivots, _ = aten.linalg_lu_factor_ex.default(A)
    return result, LU, pivots


@composite(aten.linalg_lstsq.default)
def lstsq(
    self: torch.Tensor,
    b: torch.Tensor,
    rcond: float | None = None,
    *,
    driver: str | None = None,
) -> Any:
    """The solution of least norm: ``pinv(A) b``, whose derivatives hold where the rank is constant.
    Residuals, which the default driver of CPUs does not tell, as for full rank."""
    driver = driver or ("gelsy" if self.device.type == "cpu" else "gels")
    m, n = self.shape[-2:]
    vector = b.ndim == self.ndim - 1 and b.shape == self.shape[:-1]
    right = b.unsqueeze(-1) if vector else b
    solution = torch.linalg.pinv(self, rtol=rcond) @ right
    empty = self.new_empty(0)
    missed = empty
    if m > n and driver != "gelsy":
        missed = torch.sum(torch.square((self @ solution - right).abs()), -2)
    rank = torch.linalg.matrix_rank(self.detach())
    values = torch.linalg.svdvals(self.detach()) if driver in ("gelsd", "gelss") else empty
    return solution.squeeze(-1) if vector else solution, missed, rank, values
