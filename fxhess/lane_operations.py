"""What operations mean in a program of one sample a lane, by name: data for :mod:`fxhess.lanes`.

Of three kinds: an expression of single entries, another way to count the same entries
(:mod:`fxhess.lane_views`), and what is written with sums and products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fxhess.lane_values import NOMINAL, NoLanesError, Value
from fxhess.lane_views import VIEWS, checked, dropped, numbers, transpose, unsqueeze
from fxhess.lanes import Lanes, Operation

# --- expressions of single entries ----------------------------------------------------------------

_UNARY = {
    "neg": "(-{0})",
    "abs": "abs_({0})",
    "sqrt": "sqrt_({0})",
    "rsqrt": "(1 / sqrt_({0}))",
    "reciprocal": "(1 / {0})",
    "sigmoid": "sigmoid_({0})",
    "isneginf": "number({0} == -std::numeric_limits<T>::infinity())",
    "logical_not": "number({0} == 0)",
} | {
    name: name + "_({0})"
    for name in (
        "tanh", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sin", "cos", "tan",
        "asin", "acos", "atan", "sinh", "cosh", "asinh", "acosh", "atanh", "erf", "erfc", "lgamma",
    )
}  # fmt: skip
_BINARY = {
    "mul": "({0} * {1})",
    "truediv": "({0} / {1})",
    "maximum": "maximum({0}, {1})",
    "minimum": "minimum({0}, {1})",
    "lt": "number({0} < {1})",
    "le": "number({0} <= {1})",
    "gt": "number({0} > {1})",
    "ge": "number({0} >= {1})",
    "eq": "number({0} == {1})",
    "ne": "number({0} != {1})",
    "logical_and": "number(({0} != 0) & ({1} != 0))",
    "logical_or": "number(({0} != 0) | ({1} != 0))",
}


def _pointwise(text: str) -> Operation:
    def write(lanes: Lanes, *operands: Any) -> Value:
        return lanes.pointwise(text, *operands)

    return write


def _scaled(text: str) -> Operation:
    """Sum or difference, with a factor for the second operand."""

    def write(lanes: Lanes, a: Any, b: Any, *, alpha: Any = 1) -> Value:
        if alpha == 1:
            return lanes.pointwise(text, a, b)
        return lanes.pointwise(text.replace("{1}", "({2} * {1})"), a, b, alpha)

    return write


def _divided(lanes: Lanes, a: Any, b: Any, *, rounding_mode: str | None = None) -> Value:
    if rounding_mode is not None:
        raise NoLanesError("division with rounding")
    return lanes.pointwise("({0} / {1})", a, b)


def _power(lanes: Lanes, a: Any, b: Any) -> Value:
    if not isinstance(a, Value) or b not in (1, 2, 3, 4, -1, -2, 0.5, -0.5):
        raise NoLanesError("a power")
    text = {
        1: "{0}", 2: "({0} * {0})", 3: "({0} * {0} * {0})", 4: "(({0} * {0}) * ({0} * {0}))",
        -1: "(1 / {0})", -2: "(1 / ({0} * {0}))", 0.5: "sqrt_({0})", -0.5: "(1 / sqrt_({0}))",
    }[b]  # fmt: skip
    return lanes.pointwise(text, lanes.stored(a) if a.work else a)


def _clamp(lanes: Lanes, a: Value, min: Any = None, max: Any = None) -> Value:
    if min is not None:
        a = lanes.pointwise("maximum({0}, {1})", a, min)
    return a if max is None else lanes.pointwise("minimum({0}, {1})", a, max)


def _gelu(lanes: Lanes, a: Value, *, approximate: str = "none") -> Value:
    a = lanes.stored(a) if a.work else a
    if approximate == "none":
        return lanes.pointwise("({0} * (T)0.5 * (1 + erf_({0} * (T)0.70710678118654752440)))", a)
    inner = "(T)0.79788456080286535588 * ({0} + (T)0.044715 * {0} * {0} * {0})"
    return lanes.pointwise(f"({{0}} * (T)0.5 * (1 + tanh_({inner})))", a)


def _relu(lanes: Lanes, a: Value) -> Value:
    return lanes.pointwise("maximum({0}, {1})", a, 0)


def _silu(lanes: Lanes, a: Value) -> Value:
    return lanes.pointwise("({0} * sigmoid_({0}))", lanes.stored(a) if a.work else a)


# --- sums and products ----------------------------------------------------------------------------


def _sum(
    lanes: Lanes, value: Value, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Value:
    dims = range(len(value.axes)) if dim is None else numbers([dim])
    return lanes.reduction(value, list(dims), keepdim, "{0}", "({0} + {1})")


def _mean(
    lanes: Lanes, value: Value, dim: Any = None, keepdim: bool = False, **kwargs: Any
) -> Value:
    dims = list(range(len(value.axes)) if dim is None else numbers([dim]))
    total = lanes.reduction(value, dims, keepdim, "{0}", "({0} + {1})")
    count = math.prod(value.sizes[d] for d in dims)
    return lanes.pointwise("({0} / {1})", total, count)


def _amax(lanes: Lanes, value: Value, dim: Any = (), keepdim: bool = False) -> Value:
    dims = list(numbers([dim])) or list(range(len(value.axes)))
    least = "{0} - std::numeric_limits<T>::infinity()"
    return lanes.reduction(value, dims, keepdim, least, "maximum({0}, {1})")


def _all(lanes: Lanes, value: Value, dim: Any = None, keepdim: bool = False) -> Value:
    dims = list(range(len(value.axes)) if dim is None else numbers([dim]))
    return lanes.reduction(value, dims, keepdim, "{0} + 1", "minimum({0}, number({1} != 0))")


def _softmax(lanes: Lanes, value: Value, dim: int, *args: Any, **kwargs: Any) -> Value:
    value = lanes.stored(value) if value.work else value
    most = _amax(lanes, value, dim, True)
    powers = lanes.stored(lanes.pointwise("exp_({0} - {1})", value, most))
    total = _sum(lanes, powers, dim, True)
    return lanes.pointwise("({0} / {1})", powers, total)


def _log_softmax(lanes: Lanes, value: Value, dim: int, *args: Any, **kwargs: Any) -> Value:
    value = lanes.stored(value) if value.work else value
    most = _amax(lanes, value, dim, True)
    total = _sum(lanes, lanes.pointwise("exp_({0} - {1})", value, most), dim, True)
    return lanes.pointwise(
        "({0} - {1} - {2})", value, most, lanes.stored(lanes.pointwise("log_({0})", total))
    )


def _matmul(lanes: Lanes, a: Value, b: Value) -> Value:
    row, column = len(a.axes) == 1, len(b.axes) == 1
    result = lanes.product(
        unsqueeze(lanes, a, 0) if row else a, unsqueeze(lanes, b, 1) if column else b
    )
    if column:
        result = dropped(result, {len(result.axes) - 1: 0})
    return dropped(result, {len(result.axes) - (1 if column else 2): 0}) if row else result


def _symmetric_product(lanes: Lanes, rows: Value, matrix: Value, axis: int = 1) -> Value:
    rows = transpose(lanes, rows, 0, 1) if axis == 0 else rows
    whole = lanes.product(rows, matrix)
    return lanes.pointwise("({0} + {1})", whole, transpose(lanes, whole, 1, 2))


def _write_symmetric_product(
    lanes: Lanes, number_of: int, rows: Value, matrix: Value, axis: int = 1
) -> None:
    rows = transpose(lanes, rows, 0, 1) if axis == 0 else rows
    lanes.results.symmetric(*lanes.factors(rows, matrix), number_of)


def _stack(lanes: Lanes, values: Sequence[Value], dim: int = 0) -> Value:
    d = dim % (len(values[0].axes) + 1)
    return lanes.joined([unsqueeze(lanes, v, d) for v in values], d)


def _cat(lanes: Lanes, values: Sequence[Value], dim: int = 0) -> Value:
    return lanes.joined(values, dim % len(values[0].axes))


def _full(lanes: Lanes, sizes: Any, value: Any, **kwargs: Any) -> Value:
    return lanes.filled([None if n == NOMINAL else n for n in numbers([sizes])], value)


def _like(value: float) -> Operation:
    return lambda lanes, other, **kwargs: lanes.filled(other.axes, value)


def _write_unpacked(
    lanes: Lanes, number_of: int, packed: Value, positions: Value, sizes: Sequence[int]
) -> None:
    checked(lanes, packed, -1, positions)
    lanes.results.chosen(lanes.in_memory(packed), positions, (*sizes, *sizes), number_of)


OPERATIONS: Mapping[str, Operation] = {
    **{name: _pointwise(text) for name, text in (*_UNARY.items(), *_BINARY.items())},
    **VIEWS,
    "add": _scaled("({0} + {1})"),
    "sub": _scaled("({0} - {1})"),
    "rsub": _pointwise("({1} - {0})"),
    "div": _divided,
    "pow": _power,
    "square": lambda lanes, a: _power(lanes, a, 2),
    "clamp": _clamp,
    "where": _pointwise("where({0}, {1}, {2})"),
    "gelu": _gelu,
    "relu": _relu,
    "silu": _silu,
    "sum": _sum,
    "mean": _mean,
    "amax": _amax,
    "all": _all,
    "_softmax": _softmax,
    "softmax": _softmax,
    "_log_softmax": _log_softmax,
    "log_softmax": _log_softmax,
    "matmul": _matmul,
    "mm": _matmul,
    "bmm": _matmul,
    "flat_product": _matmul,
    "symmetric_product": _symmetric_product,
    "stack": _stack,
    "cat": _cat,
    "full": _full,
    "zeros_like": _like(0.0),
    "ones_like": _like(1.0),
}

# Those that can write a result piece by piece, from its number.
WRITING: Mapping[str, Callable[..., None]] = {
    "symmetric_product": _write_symmetric_product,
    "unpack": _write_unpacked,
}
