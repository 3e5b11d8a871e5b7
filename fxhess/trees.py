"""Nested arguments as lists of leaves: tuples, lists, dictionaries and dataclasses of tensors.

A *spec* is the structure of a value as plain, hashable data: ``TENSOR``, ``(STATIC, type, mark)``
for a value of Python that is a part of the program, or ``(type, keys, specs)`` for a container.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from fxhess.errors import InputError

TENSOR = "tensor"
STATIC = "static"
Path = tuple[str, ...]

_PLAIN = (
    type(None), bool, int, float, complex, str, bytes, enum.Enum, range, slice, torch.Size,
    torch.dtype, torch.device, torch.layout, torch.memory_format, type,
)  # fmt: skip


class Flat:
    """The leaves of a nested value: tensors with their paths, and values of Python."""

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []
        self.paths: list[Path] = []
        self.statics: list[Any] = []

    def add(self, value: Any, path: Path) -> Any:
        """Append the leaves of ``value``, which stands at ``path``; returns its spec.

        Raises:
            InputError: something in it is no tensor, no container and no plain value of Python.
        """
        if isinstance(value, torch.Tensor):
            self.tensors.append(value)
            self.paths.append(path)
            return TENSOR
        kind = type(value)
        if isinstance(value, _PLAIN):
            self.statics.append(value)
            return (STATIC, kind, _mark(value))
        if dataclasses.is_dataclass(value):
            keys: tuple[Any, ...] = tuple(f.name for f in dataclasses.fields(value))
            parts = [getattr(value, key) for key in keys]
        elif isinstance(value, Mapping):
            keys = tuple(value)
            parts = [value[key] for key in keys]
        elif isinstance(value, (tuple, list)):
            keys = tuple(getattr(value, "_fields", ())) or tuple(range(len(value)))
            parts = list(value)
        elif callable(value):
            self.statics.append(value)
            return (STATIC, kind, value)
        else:
            where = ".".join(path)
            raise InputError(
                f"argument '{where}' is or holds a {kind.__name__}, which fxhess cannot look into",
                hint="pass tensors (torch.from_numpy), alone or in tuples, dictionaries and"
                " dataclasses, or keep it as an attribute of the model",
            )
        specs = [self.add(p, (*path, str(key))) for key, p in zip(keys, parts, strict=True)]
        return (kind, keys, tuple(specs))


def _mark(value: Any) -> Any:
    """What tells one value of Python from another of its type."""
    if isinstance(value, float):
        return value.hex()  # tells -0.0 from 0.0, and one nan is like another
    if isinstance(value, complex):
        return value.real.hex(), value.imag.hex()
    if isinstance(value, slice):
        return repr(value)
    return value


def build(spec: Any, tensors: Iterator[Any], statics: Iterator[Any], own: bool = True) -> Any:
    """The nested value of this structure; unless it is to be of the user's ``own`` types,
    dataclasses and mappings become dictionaries."""
    if spec == TENSOR:
        return next(tensors)
    if spec[0] == STATIC:
        return next(statics)
    kind: Any
    kind, keys, specs = spec
    parts = [build(s, tensors, statics, own) for s in specs]
    if issubclass(kind, (tuple, list)):
        return kind(*parts) if hasattr(kind, "_fields") else kind(parts)
    named = dict(zip(keys, parts, strict=True))
    if not own or kind is dict:
        return named
    if issubclass(kind, Mapping):  # possibly a dataclass as well
        return kind(**named) if "__dataclass_fields__" in vars(kind) else kind(named)
    made = object.__new__(kind)  # not through __init__, which may do more than to take fields
    for key, part in named.items():
        object.__setattr__(made, key, part)
    return made


def at(spec: Any, path: Path) -> Any:
    """The spec of what stands at a path below, None where there is nothing."""
    for name in path:
        if spec == TENSOR or spec[0] == STATIC:
            return None
        _, keys, specs = spec
        names = [str(key) for key in keys]
        if name not in names:
            return None
        spec = specs[names.index(name)]
    return spec


def count(spec: Any, leaf: str) -> int:
    """How many leaves of a sort there are: ``TENSOR`` or ``STATIC``."""
    if spec == TENSOR:
        return int(leaf == TENSOR)
    if spec[0] == STATIC:
        return int(leaf == STATIC)
    return sum(count(s, leaf) for s in spec[2])


def only_tensors(spec: Any) -> Any:
    """The spec without its values of Python."""
    if spec == TENSOR:
        return spec
    kind, keys, specs = spec
    kept = [(k, only_tensors(s)) for k, s in zip(keys, specs, strict=True) if count(s, TENSOR)]
    if len(kept) < len(keys) and issubclass(kind, tuple):
        kind = tuple if not hasattr(kind, "_fields") else dict
    return (kind, tuple(k for k, _ in kept), tuple(s for _, s in kept))


def map_leaves(function: Callable[[int], Any], spec: Any) -> Any:
    """The nested value whose tensors are ``function(0)``, ``function(1)``, ..."""
    return build(spec, map(function, range(count(spec, TENSOR))), iter(()), own=False)


__all__ = ["STATIC", "TENSOR", "Flat", "Path", "at", "build", "count", "map_leaves", "only_tensors"]
