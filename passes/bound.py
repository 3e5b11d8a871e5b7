"""A captured operation on its way to canonical form: its arguments by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fxhess.emit import Var
from fxhess.passes.layout import Laid, Layouts
from fxhess.registry import Rule


@dataclass
class Bound:
    """A captured operation with its arguments by name; ``result`` is its captured stand-in."""

    rule: Rule
    arguments: dict[str, Any]
    result: Any
    layouts: Layouts

    def stand_ins(self) -> dict[str, Any]:
        """The arguments with tensors replaced by tensors of the captured rank and shape."""
        return {name: _stand_in(value) for name, value in self.arguments.items()}

    def tensors(self) -> list[tuple[str, int | None, Any]]:
        """All tensor arguments: (name, position in a list argument or None, value)."""
        found: list[tuple[str, int | None, Any]] = []
        for name, value in self.arguments.items():
            if is_tensor(value):
                found.append((name, None, value))
            elif isinstance(value, (list, tuple)):
                found += [(name, i, v) for i, v in enumerate(value) if is_tensor(v)]
        return found

    def replace(self, name: str, index: int | None, value: Any) -> None:
        if index is None:
            self.arguments[name] = value
        else:
            items = list(self.arguments[name])
            items[index] = value
            self.arguments[name] = items

    def canonical(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The (by now canonical) arguments, as the operator's schema orders them."""
        schema = self.rule.op._schema.arguments
        args = tuple(self.arguments[a.name] for a in schema if not a.kwarg_only)
        kwargs = {
            a.name: self.arguments[a.name]
            for a in schema
            if a.kwarg_only and self.arguments[a.name] is not None
        }
        return args, kwargs

    def emit(self) -> Var:
        """Write the operation."""
        args, kwargs = self.canonical()
        return self.layouts.emitter.call(self.rule.op, *args, **kwargs)

    def emit_folded(self, name: str, leading: int) -> tuple[Var, Callable[[Var], Var]]:
        """Write an operation that takes one leading axis only, over ``leading`` of them; the
        function returned restores them on each result."""
        if leading == 1:
            return self.emit(), lambda var: var
        operand = self.arguments[name]
        nb = self.layouts.nb
        sizes: list[Any] = [self.layouts.batch_size(i) for i in range(nb)]
        sizes += [int(s) for s in operand.val.shape[nb:leading]]
        folded = torch.flatten(operand, 0, leading - 1) if leading else operand[None]
        self.arguments[name] = folded
        var = self.emit()
        self.arguments[name] = operand
        if leading == 0:
            return var, lambda v: v[0]
        return var, lambda v: torch.unflatten(v, 0, tuple(sizes))  # type: ignore[return-value]


@dataclass(frozen=True, eq=False)
class Raw:
    """A tensor that does not depend on x, in the layout that the model gave it; ``shape`` is its
    captured (possibly symbolic) shape."""

    var: Var
    shape: tuple[Any, ...]


def is_tensor(value: Any) -> bool:
    return isinstance(value, (Laid, Raw))


class _Captured:
    """Rank and shape of a captured tensor argument."""

    def __init__(self, value: Laid | Raw, shape: tuple[Any, ...]) -> None:
        self.shape = shape
        self.ndim = len(shape)
        self.dtype = value.var.dtype


def _stand_in(value: Any) -> Any:
    if isinstance(value, Raw):
        return _Captured(value, value.shape)
    if isinstance(value, Laid):
        shape = tuple(
            math.prod(a.size for a in g) if all(a.batch is None for a in g) else None
            for g in value.groups
        )
        return _Captured(value, shape)
    if isinstance(value, (list, tuple)):
        return [_stand_in(v) for v in value]
    return value
