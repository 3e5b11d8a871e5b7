"""Rows of docs/conventions.md: even powers of roots, which are smooth where the root is 0."""

from __future__ import annotations

import torch

from tests.conventions import SMOOTH, Z4, D, Row

TWO = (2, 0, 0, 2)
AT = (0.0, 0.0)
WIDTH = torch.tensor([2.0], dtype=D)


def _norm(x: torch.Tensor) -> torch.Tensor:
    return x.norm(dim=1)


ROOTS = [
    Row("`x.norm() ** 2` at 0", lambda x: _norm(x) ** 2, AT, AT, TWO, SMOOTH),
    Row("`r * r`, r a norm, at 0", lambda x: (lambda r: r * r)(_norm(x)), AT, AT, TWO, SMOOTH),
    Row("4th power of a norm at 0", lambda x: _norm(x).pow(4), AT, AT, Z4, SMOOTH),
    Row("`exp(-(r / 2)² / 2)`, r a norm, at 0", lambda x: torch.exp(-0.5 * (_norm(x) / WIDTH) ** 2),
        AT, AT, (-0.25, 0, 0, -0.25), SMOOTH),
    Row("square of `sqrt(sum(x²))` at 0", lambda x: x.square().sum(1, True).sqrt().square()[:, 0],
        AT, AT, TWO, SMOOTH),
    Row("`std(x) ** 2` of equal entries", lambda x: x.std(1) ** 2, (1.0, 1.0), AT,
        (1, -1, -1, 1), SMOOTH),
    Row("square of `cdist` of equal points",
        lambda x: torch.cdist(x[:, None, :1], x[:, None, 1:]).square().sum((1, 2)), (1.0, 1.0), AT,
        (2, -2, -2, 2), SMOOTH),
    Row("4th power of `sqrt(sum(x²))` at 0",
        lambda x: x.square().sum(1, True).sqrt().pow(4)[:, 0], AT, AT, Z4, SMOOTH),
    Row("3rd power of a norm at 0", lambda x: _norm(x) ** 3, AT, AT, Z4, SMOOTH),
]  # fmt: skip
