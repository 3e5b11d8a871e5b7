"""Matrices: what can be said in products.  The rest has PyTorch's own derivatives."""

from __future__ import annotations

from typing import Any

import torch

from fxhess.kinds import Call, Trailing
from fxhess.registry import aten, composite, smooth


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


# --- eigenvalues and singular values ------------------------------------------------------------
# The second derivative of a function F of eigenvalues l, with gradient g, along a symmetric T with
# P = V^T T V, is  sum_ij F_ij P_ii P_jj  +  sum_i!=j  (g_i - g_j) / (l_i - l_j)  P_ij^2  (Lewis and
# Sendov 2001).  Where l_i = l_j and g_i = g_j, as for every symmetric F, F is smooth and the
# quotient has a limit, the derivative of the numerator along the denominator's gradient, which the
# second derivative h of F tells.


def _quotient(num: Any, den: Any, limit: Any, noise: Any, small: Any) -> Any:
    """``num / den``, or its limit at 0 / 0 where the two agree but for rounding (``noise`` of the
    numerator); 0 where the denominator is as good as 0 (``small``) and the numerator not: a kink,
    as of a norm at 0."""
    agree = (num - limit * den).abs() <= noise
    none = den.abs() <= small
    return torch.where(
        agree, limit, torch.where(none, 0.0, num / torch.where(none | agree, 1.0, den))
    )


def _pairs(v: Any) -> tuple[Any, Any]:
    return v[..., :, None], v[..., None, :]


def _scales(l: Any, g: Any, h: Any) -> tuple[Any, Any]:  # noqa: E741
    """What rounding may do to differences of g (for each pair), and of l."""
    eps = 8 * l.size(-1) * torch.finfo(l.dtype).eps
    largest = l.abs().amax(-1)[..., None, None]
    slopes = h.abs().amax((-2, -1), True)
    a, b = _pairs(g.abs())
    return eps * (a + b + slopes * largest), eps * largest


def _gaps(l: Any, g: Any, h: Any, sign: int) -> Any:  # noqa: E741
    """``(g_i + s g_j) / (l_i + s l_j)`` for the sign s, ``[.., n, n]``."""
    noise, small = _scales(l, g, h)
    (a, b), (c, d) = _pairs(g), _pairs(l)
    p, q = _pairs(torch.diagonal(h, 0, -2, -1))
    limit = 0.5 * (p + q) + sign * h
    return _quotient(a + sign * b, c + sign * d, limit, noise, small)


def _matmul(a: Any, b: Any) -> Any:
    """Of types that may differ: a double inside of a float32 model."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    a = a if a.dtype == dtype else a.to(dtype)
    return torch.matmul(a, b if b.dtype == dtype else b.to(dtype))


def _off_diagonal(P: Any) -> Any:
    return P - torch.diag_embed(torch.diagonal(P, 0, -2, -1))


def _eigh(call: Call) -> tuple[Any, Any]:
    result = aten._linalg_eigh.default(call.operands[0], call.args[1], True)
    return result[0], result[1]


def _eigenvalue_push(call: Call, t: Any) -> Any:
    _, V = _eigh(call)
    return torch.sum(V * _matmul(_symmetric(t), V), -2)


def _symmetric(t: Any) -> Any:
    """PyTorch reads one triangle and differentiates as if it read the mean of both."""
    return 0.5 * (t + torch.transpose(t, -2, -1))


def _eigenvalue_pull(g: Any, call: Call) -> Any:
    _, V = _eigh(call)
    return _matmul(V * g[..., None, :], torch.transpose(V, -2, -1))


def _eigenvalue_curve(call: Call, g: Any, i: int, j: int, t: Any, h: Any) -> Any:
    l, V = _eigh(call)  # noqa: E741
    W = torch.transpose(V, -2, -1)
    P = _matmul(_matmul(W, _symmetric(t)), V)
    return _matmul(_matmul(V, _off_diagonal(_gaps(l, g, h, -1) * P)), W)


smooth(
    aten._linalg_eigh.default,
    Trailing(2),
    push=_eigenvalue_push,
    pull=_eigenvalue_pull,
    curve=_eigenvalue_curve,
    output=0,
    later=True,
    alone=True,
)


def _svd(call: Call) -> tuple[Any, Any, Any]:
    """``U: [.., m, k]``, the k = min(m, n) singular values, ``V^T: [.., k, n]``."""
    result = aten._linalg_svd.default(call.operands[0], False, True)
    return result[0], result[1], result[2]


def _singular_push(call: Call, t: Any) -> Any:
    U, _, W = _svd(call)
    return torch.sum(torch.transpose(U, -2, -1) * _matmul(W, torch.transpose(t, -2, -1)), -1)


def _singular_pull(g: Any, call: Call) -> Any:
    U, _, W = _svd(call)
    return _matmul(U * g[..., None, :], W)


def _singular_curve(call: Call, g: Any, i: int, j: int, t: Any, h: Any) -> Any:
    """With ``P = U^T T V``: quotients of differences for its symmetric part, of sums for its
    antisymmetric part, ``g_i / s_i`` for what lies outside of the columns of U or the rows of
    V^T."""
    U, s, W = _svd(call)
    below, right = _matmul(torch.transpose(U, -2, -1), t), _matmul(t, torch.transpose(W, -2, -1))
    P = _matmul(below, torch.transpose(W, -2, -1))
    across = torch.transpose(P, -2, -1)
    R = 0.5 * (_gaps(s, g, h, -1) * (P + across) + _gaps(s, g, h, 1) * (P - across))
    moved = _matmul(_matmul(U, _off_diagonal(R)), W)
    noise, small = _scales(s, g, h)
    own = torch.diagonal(noise, 0, -2, -1)
    ratio = _quotient(g, s, torch.diagonal(h, 0, -2, -1), own, small[..., 0])
    if U.size(-2) > U.size(-1):
        moved = moved + _matmul((right - _matmul(U, P)) * ratio[..., None, :], W)
    if W.size(-1) > W.size(-2):
        moved = moved + _matmul(U, ratio[..., None] * (below - _matmul(P, W)))
    return moved


smooth(
    aten._linalg_svd.default,
    Trailing(2),
    push=_singular_push,
    pull=_singular_pull,
    curve=_singular_curve,
    output=1,
    later=True,
    alone=True,
)
