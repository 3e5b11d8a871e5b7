"""Products: the einsum equation is the whole rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fxhess.emit import Var
from fxhess.kinds import Equation, broadcast_equation
from fxhess.registry import aten, composite, multilinear


def _product(a: Mapping[str, Any]) -> Equation:
    """A product of broadcasting tensors, or of a tensor and a number."""
    left, right = a["self"], a["other"]
    if not hasattr(right, "ndim") or isinstance(right, Var):
        axes = tuple(range(left.ndim))
        return Equation((axes,), axes, scale=right)
    return broadcast_equation([left.ndim, right.ndim], [left.shape, right.shape])


multilinear(aten.mul.Tensor, _product)
multilinear(aten.mul.Scalar, _product)
multilinear(aten.mm.default, lambda a: Equation((("i", "k"), ("k", "j")), ("i", "j")))
multilinear(aten.bmm.default, lambda a: Equation((("n", "i", "k"), ("n", "k", "j")), ("n", "i", "j")))
multilinear(aten.dot.default, lambda a: Equation((("k",), ("k",)), ()))
multilinear(aten.mv.default, lambda a: Equation((("i", "k"), ("k",)), ("i",)))


@composite(aten.addmm.default)
def addmm(
    self: torch.Tensor, mat1: torch.Tensor, mat2: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    product = torch.mm(mat1, mat2)
    product = product if alpha == 1 else product * alpha
    return product + (self if beta == 1 else self * beta)
