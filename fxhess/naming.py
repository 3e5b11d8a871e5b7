"""Names of the functions that generated programs call, and back: a closed set.

A name from a file is looked up among PyTorch's operators that are functions of tensors by their own
schema (nothing but tensors and numbers comes out, nothing is written, and a tensor goes in, or the
name is on a short list of those that make one), a few of Python's operators and our own helpers.
So no file can name ``torch.load``, ``operator.methodcaller`` or ``torch.from_file``.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch

from fxhess import triangle, windows

# Where a function may stand, and how PyTorch's operator of that name begins.
_PLACES: dict[str, tuple[Any, str]] = {
    "torch": (torch, ""),
    "torch.nn.functional": (torch.nn.functional, ""),
    "torch.special": (torch.special, "special_"),
    "torch.linalg": (torch.linalg, "linalg_"),
    "torch.fft": (torch.fft, "fft_"),
}
_OPERATORS = frozenset(
    {"add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "neg", "pos", "abs",
     "invert", "and_", "or_", "xor", "eq", "ne", "lt", "le", "gt", "ge", "getitem"}
)  # fmt: skip
_OWN: dict[str, Callable[..., Any]] = {
    f"{place}.{name}": getattr(module, name)
    for place, module, names in (
        ("triangle", triangle, ("ends", "positions", "unpack")),
        ("windows", windows, ("seeds", "colours", "mask", "pairs", "places")),
    )
    for name in names
}
# Operators that make a tensor from numbers alone.
_MAKERS = frozenset(
    {"arange", "empty", "empty_strided", "eye", "full", "linspace", "ones", "rand", "randn",
     "randint", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros"}
)  # fmt: skip
LIBRARIES = ("aten", "prims")
# Operators that do nothing but to refuse.
_CHECKS = frozenset({"aten::_assert_async.msg", "aten::_assert_scalar"})


class UnknownNameError(ValueError):
    """A function without a name here, or a name without a function."""


def name_of(target: Any) -> str:
    """The name of a function that a node calls: ``aten::add.Tensor``, ``torch.matmul``,
    ``operator.mul``.

    Raises:
        UnknownNameError: it is none of those that a file may name.
    """
    if isinstance(target, torch._ops.OpOverload):
        name = f"{target.namespace}::{target._opname}.{target._overloadname}"
    else:
        name = _place_of(target)
    if function_of(name) is not target:
        raise UnknownNameError(f"no name for {target!r}")
    return name


def _place_of(target: Any) -> str:
    for name, function in _OWN.items():
        if function is target:
            return f"fxhess.{name}"
    own = str(getattr(target, "__name__", ""))
    if getattr(operator, own, None) is target:
        return f"operator.{own}"
    for place, (module, prefix) in _PLACES.items():
        short = own.removeprefix(prefix)
        if getattr(module, short, None) is target:
            return f"{place}.{short}"
    raise UnknownNameError(f"no name for {target!r}")


@functools.cache
def function_of(name: str) -> Callable[..., Any]:
    """The function of a name.

    Raises:
        UnknownNameError: there is none, or it is not among those that a file may name.
    """
    library, double, rest = name.partition("::")
    if double:
        own, _, overload = rest.partition(".")
        found = _overloads(library, own).get(overload)
        if found is not None and _is_pure(found):
            return found
        raise UnknownNameError(f"no function {name!r}")
    place, _, own = name.rpartition(".")
    if place == "operator" and own in _OPERATORS:
        return getattr(operator, own)  # type: ignore[no-any-return]
    if name.removeprefix("fxhess.") in _OWN and name.startswith("fxhess."):
        return _OWN[name.removeprefix("fxhess.")]
    if place in _PLACES:
        module, prefix = _PLACES[place]
        if any(map(_is_pure, _overloads("aten", prefix + own).values())):
            function = getattr(module, own, None)
            if callable(function):
                return function  # type: ignore[no-any-return]
    raise UnknownNameError(f"no function {name!r}")


@functools.cache
def is_method(name: str) -> bool:
    """Whether programs from files may call a tensor's method of this name."""
    pure = any(map(_is_pure, _overloads("aten", name).values()))
    return pure and callable(getattr(torch.Tensor, name, None))


def _overloads(library: str, name: str) -> dict[str, Any]:
    if library not in LIBRARIES or not name.isidentifier():
        return {}
    packet = getattr(getattr(torch.ops, library), name, None)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return {}
    return {overload: getattr(packet, overload) for overload in packet.overloads()}


def _is_pure(op: Any) -> bool:
    """Whether an operator is a function of tensors, by its schema."""
    schema = op._schema
    if f"{schema.name}.{schema.overload_name}".rstrip(".") in _CHECKS:
        return True
    if schema.is_mutable or not schema.returns:
        return False
    if not all(_is_value(r.type) for r in schema.returns):
        return False
    name = op._opname
    return name in _MAKERS or any(_holds_tensor(a.type) for a in schema.arguments)


def _is_value(kind: Any) -> bool:
    if kind.kind() in ("OptionalType", "ListType"):
        return _is_value(kind.getElementType())
    return kind.kind() in (
        "TensorType", "IntType", "SymIntType", "BoolType", "SymBoolType", "FloatType", "NumberType",
        "SymFloatType",
    )  # fmt: skip


def _holds_tensor(kind: Any) -> bool:
    if kind.kind() in ("OptionalType", "ListType"):
        return _holds_tensor(kind.getElementType())
    return bool(kind.kind() == "TensorType")
