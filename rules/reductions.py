"""Reductions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fxhess.kinds import Equation
from fxhess.registry import aten, multilinear


def _reduce(a: Mapping[str, Any], mean: bool) -> Equation:
    rank = a["self"].ndim
    dims = {d % max(rank, 1) for d in (a.get("dim") or range(rank))}
    keep = a.get("keepdim", False)
    output = tuple(None if i in dims else i for i in range(rank) if keep or i not in dims)
    return Equation((tuple(range(rank)),), output, mean=mean)


multilinear(aten.sum.default, lambda a: _reduce(a, False))
multilinear(aten.sum.dim_IntList, lambda a: _reduce(a, False))
multilinear(aten.mean.default, lambda a: _reduce(a, True))
multilinear(aten.mean.dim, lambda a: _reduce(a, True))
