"""What is differentiated by: arguments of the model, by name or position, and its parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxhess.closures import FunctionModule
from fxhess.errors import InputError
from fxhess.trees import TENSOR, Path

_FORMS = (
    'an argument by name ("x", or "batch.pos" for a part of one) or position (0),'
    " fxhess.parameters(..), or a tuple, list or dictionary of these"
)


@dataclass(frozen=True)
class Parameters:
    """Parameters of the model: see :func:`parameters`."""

    names: tuple[str, ...]


def parameters(*names: str) -> Parameters:
    """Parameters of the model, to differentiate by: ``transform(model, wrt=parameters(..))``.

    Args:
        names: as in ``model.named_parameters()``; the name of a submodule stands for all of its
            parameters, no name at all for all of the model's.

    Derivatives by one parameter (named exactly) are tensors, by several dictionaries by name.

    Example:
        >>> net = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 1))
        >>> hess = fxhess.transform(net, wrt=fxhess.parameters("0.weight", "0.bias"))
        >>> hess(torch.randn(32, 10))["0.weight"]["0.bias"].shape  # of every sample
        torch.Size([32, 8, 10, 8])
    """
    for name in names:
        if not isinstance(name, str):
            raise InputError(f"parameters are named by strings, not {type(name).__name__}")
    return Parameters(names)


@dataclass(frozen=True)
class Wrt:
    """``wrt`` as read: ``spec`` is its structure (see :mod:`fxhess.trees`) with one leaf for each
    of ``choices``, paths to arguments or sets of parameters."""

    spec: Any
    choices: tuple[Path | Parameters, ...]

    @property
    def first_argument(self) -> bool:
        """Whether it is the first argument alone."""
        return self.spec == TENSOR and self.choices == (("0",),)


def parse_wrt(wrt: Any) -> Wrt:
    """Read what a user gave.

    Raises:
        InputError: it is no name, position or parameters, nor made of such.
    """
    choices: list[Path | Parameters] = []

    def read(value: Any) -> Any:
        if isinstance(value, Parameters):
            choices.append(value)
        elif isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            choices.append((str(value),))
        elif isinstance(value, str) and value:
            choices.append(tuple(value.split(".")))
        elif isinstance(value, Mapping) and value:
            return (dict, tuple(value), tuple(map(read, value.values())))
        elif isinstance(value, (tuple, list)) and value:
            return (type(value), tuple(range(len(value))), tuple(map(read, value)))
        else:
            shown = "a tensor" if isinstance(value, torch.Tensor) else repr(value)
            raise InputError(f"cannot read {shown} as wrt", hint=f"wrt is {_FORMS}")
        return TENSOR

    spec = read(wrt)
    return Wrt(spec, tuple(choices))


class Names:
    """The names of a model's arguments, in order of position."""

    def __init__(self, model: nn.Module) -> None:
        function: Callable[..., Any] = model.forward
        if isinstance(model, FunctionModule):
            function = model.function
        self.positional: list[str] = []
        self.known: list[str] = []
        self.open = False  # whether it takes others, by any name
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):
            self.open = True
            return
        for p in parameters:
            if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL):
                self.open = True
                continue
            self.known.append(p.name)
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD):
                self.positional.append(p.name)

    def at(self, position: int) -> str:
        """The name of the argument at a position; the position where it has none."""
        return self.positional[position] if position < len(self.positional) else str(position)

    def path(self, path: Path) -> Path:
        """A path whose first entry is a name, where it has one."""
        first, *rest = path
        return (self.at(int(first)) if first.isdigit() else first, *rest)

    def check(self, model: nn.Module, wrt: Wrt) -> None:
        """Raises InputError where an argument is named that the model does not take."""
        for choice in wrt.choices:
            if isinstance(choice, Parameters) or self.open:
                continue
            name = self.path(choice)[0]
            if name not in self.known:
                what = f"position {name}" if name.isdigit() else f"argument {name!r}"
                raise InputError(
                    f"wrt names {what}, which the model does not take",
                    hint=f"{meant(model, choice)}its arguments are "
                    + (", ".join(self.known) or "none"),
                )


def meant(model: nn.Module, choice: Path) -> str:
    """A hint for who names a parameter as if it were an argument; empty where none has the name."""
    name = ".".join(choice)
    known = name in dict(model.named_parameters(remove_duplicate=False))
    return f"wrt=fxhess.parameters({name!r}) for the model's parameter; " if known else ""


def parameters_of(model: nn.Module, chosen: Parameters) -> dict[str, nn.Parameter]:
    """The parameters that are meant, by name.

    Raises:
        InputError: there is none of a name, or one that is no real floating-point tensor.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    found: dict[str, nn.Parameter] = {}
    for name in chosen.names or tuple(dict(model.named_parameters())):
        own = [name] if name in named else [n for n in named if n.startswith(f"{name}.")]
        if not own:
            listed = ", ".join(list(named)[:12]) + (", .." if len(named) > 12 else "")
            raise InputError(
                f"the model has no parameter {name!r}", hint=f"it has {listed or 'none'}"
            )
        for n in own:
            if not named[n].is_floating_point():
                raise InputError(f"parameter {n!r} is {named[n].dtype}, not real floating-point")
            found[n] = named[n]
    if not found:
        raise InputError("the model has no parameters to differentiate by")
    return found
