"""Squares of roots: ``(sqrt s)^2`` is s, also at 0, where a root has no derivative.

So the square of a norm, or of a standard deviation, is the sum of squares that it is.  While a
model is traced, the rules of roots note what is under them; those of powers and products look it
up, also through what only moves entries or multiplies them by a factor.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from fxhess import _traced
from fxhess.registry import aten

_MOVES = {
    aten.alias.default, aten.clone.default, aten.expand.default, aten.permute.default,
    aten.reshape.default, aten.select.int, aten.slice.Tensor, aten.squeeze.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.t.default, aten.transpose.int,
    aten.unsqueeze.default, aten._unsafe_view.default, aten.view.default,
}  # fmt: skip
_SCALES = {
    aten.div.Scalar, aten.div.Tensor, aten.mul.Scalar, aten.mul.Tensor, aten.neg.default,
}  # fmt: skip
_NOTE = "under roots"
_FLAT = "roots with derivative 0 at 0"


def root_of(square: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
    """``root``, of which ``square`` is the square, with derivative 0 where it is 0."""
    _traced.note(root, _NOTE, square)
    _traced.note(root, _FLAT, root)
    return root


def under_root(self: torch.Tensor) -> Any:
    """What is under a root that stays an operation of its own."""
    if self.is_floating_point():
        _traced.note(self, _NOTE, self, aten.sqrt.default)
    return NotImplemented


def square_of(value: torch.Tensor) -> torch.Tensor | None:
    """The square of a root; None for other values."""
    return _traced.followed(value, _NOTE, _squared)


def _squared(op: Any, square: torch.Tensor, rest: tuple[Any, ...]) -> torch.Tensor | None:
    """The square of ``op(root, *rest)``."""
    if op is aten.sqrt.default:
        return torch.where(square < 0, math.nan, square)
    if op in _MOVES:
        return op(square, *rest)  # type: ignore[no-any-return]
    if op in _SCALES:
        return op(op(square, *rest), *rest)  # type: ignore[no-any-return]
    return None


def squared_root(self: torch.Tensor, other: torch.Tensor) -> Any:
    """A root times itself."""
    square = square_of(self) if _traced.same(self, other) else None
    return NotImplemented if square is None else square


def even_power(self: torch.Tensor, exponent: float) -> torch.Tensor | None:
    """A root to the power 2, 4, ..: None for others.

    Powers above 2 of a root with derivative 0 at 0 have their true derivatives, 0, as they are.
    They stay so: in ``1 - 28 r^6 + 48 r^7 - 21 r^8`` the rounding of r cancels, which that of r^2
    would not."""
    if exponent <= 0 or exponent % 2 or (exponent > 2 and _is_flat(self)):
        return None
    square = square_of(self)
    return square if square is None or exponent == 2 else torch.pow(square, exponent // 2)


def _is_flat(value: torch.Tensor) -> bool:
    def step(op: Any, root: torch.Tensor, rest: tuple[Any, ...]) -> torch.Tensor | None:
        return root if op in _MOVES or op in _SCALES else None

    return _traced.followed(value, _FLAT, step) is not None
