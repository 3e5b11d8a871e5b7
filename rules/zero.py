"""Operations through which no derivative flows: comparisons, rounding, masks, constants, noise.

What is random is drawn once a call, and so is the same for all orders of derivative.
"""

from __future__ import annotations

from typing import Any

import torch

from fxhess.kinds import Trailing
from fxhess.registry import aten, composite, zero

# --- comparisons, logic, bits -------------------------------------------------------------------

for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    zero(getattr(aten, _name).Tensor)
    zero(getattr(aten, _name).Scalar)
for _name in ("logical_and", "logical_or", "logical_xor", "logical_not", "bitwise_not"):
    zero(getattr(aten, _name).default)
for _name in ("bitwise_and", "bitwise_or", "bitwise_xor"):
    zero(getattr(aten, _name).Tensor)
    zero(getattr(aten, _name).Scalar)
    zero(getattr(aten, _name).Scalar_Tensor)
for _name in ("bitwise_left_shift", "bitwise_right_shift"):
    zero(getattr(aten, _name).Tensor)
    zero(getattr(aten, _name).Tensor_Scalar)
for _name in ("__lshift__", "__rshift__"):
    zero(getattr(aten, _name).Tensor)
    zero(getattr(aten, _name).Scalar)
for _name in ("isnan", "isinf", "isposinf", "isneginf", "signbit"):
    zero(getattr(aten, _name).default)


@composite(aten.isin.Tensor_Tensor)
def isin(
    elements: torch.Tensor,
    test_elements: torch.Tensor,
    *,
    assume_unique: bool = False,
    invert: bool = False,
) -> torch.Tensor:
    found = (elements.unsqueeze(-1) == test_elements.reshape(-1)).any(-1)
    return torch.logical_not(found) if invert else found


# --- steps --------------------------------------------------------------------------------------

for _name in ("ceil", "floor", "trunc", "sign", "sgn", "angle", "round"):
    zero(getattr(aten, _name).default)
zero(aten.round.decimals)
zero(aten.heaviside.default)
zero(aten.floor_divide.default)
zero(aten.floor_divide.Scalar)
zero(torch.ops.prims.convert_element_type.default)


def _true_division(self: torch.Tensor, other: Any, *, rounding_mode: str | None = None) -> Any:
    return torch.true_divide(self, other) if rounding_mode is None else NotImplemented


for _op in (aten.div.Tensor_mode, aten.div.Scalar_mode):
    zero(_op, rewrite=_true_division)

# --- constants that take only their shape from a value ------------------------------------------

for _op in (
    aten.detach.default,
    aten.empty_like.default,
    aten.rand_like.default,
    aten.randn_like.default,
    aten.randint_like.default,
    aten.randint_like.low_dtype,
    aten.zero.default,
    aten.fill.Scalar,
):
    zero(_op)


def _like(self: torch.Tensor, dtype: Any, device: Any) -> dict[str, Any]:
    return {"dtype": dtype or self.dtype, "device": device or self.device}


# Of one number, also a sum over the batch (the seed of a backward pass in the model), a constant.


def _full_number(
    self: torch.Tensor, fill_value: Any, *, dtype: Any = None, device: Any = None, **_: Any
) -> Any:
    if self.ndim or isinstance(fill_value, torch.Tensor):
        return NotImplemented
    return torch.full((), fill_value, **_like(self, dtype, device))


zero(aten.full_like.default, rewrite=_full_number)
zero(aten.zeros_like.default, rewrite=lambda self, **given: _full_number(self, 0, **given))
zero(aten.ones_like.default, rewrite=lambda self, **given: _full_number(self, 1, **given))


@composite(aten.new_zeros.default)
def new_zeros(
    self: torch.Tensor, size: Any, *, dtype: Any = None, device: Any = None, **_: Any
) -> torch.Tensor:
    return torch.zeros(size, **_like(self, dtype, device))


@composite(aten.new_ones.default)
def new_ones(
    self: torch.Tensor, size: Any, *, dtype: Any = None, device: Any = None, **_: Any
) -> torch.Tensor:
    return torch.ones(size, **_like(self, dtype, device))


@composite(aten.new_full.default)
def new_full(
    self: torch.Tensor,
    size: Any,
    fill_value: Any,
    *,
    dtype: Any = None,
    device: Any = None,
    **_: Any,
) -> torch.Tensor:
    return torch.full(size, fill_value, **_like(self, dtype, device))


@composite(aten.new_empty.default)
def new_empty(
    self: torch.Tensor, size: Any, *, dtype: Any = None, device: Any = None, **_: Any
) -> torch.Tensor:
    return torch.empty(size, **_like(self, dtype, device))


@composite(aten.new_empty_strided.default)
def new_empty_strided(
    self: torch.Tensor,
    size: Any,
    stride: Any,
    *,
    dtype: Any = None,
    device: Any = None,
    **_: Any,
) -> torch.Tensor:
    return torch.empty(size, **_like(self, dtype, device))


# --- noise --------------------------------------------------------------------------------------

for _op in (
    aten.bernoulli.default,
    aten.bernoulli.p,
    aten.bernoulli.Tensor,
    aten.cauchy.default,
    aten.exponential.default,
    aten.geometric.default,
    aten.log_normal.default,
    aten.normal.Tensor_float,
    aten.normal.Tensor_Tensor,
    aten.normal.float_Tensor,
    aten.normal_functional.default,
    aten.poisson.default,
    aten.random.default,
    aten.random.to,
    aten.uniform.default,
):
    zero(_op)
zero(aten.multinomial.default, Trailing(1))
