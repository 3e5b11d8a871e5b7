"""Models and inputs as a command line names them: ``package.module:factory``, ``500,200``."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

_DTYPES = ("float32", "float64", "float16", "bfloat16")


class UsageError(Exception):
    """What was asked for on the command line does not exist or does not fit."""


def find_model(name: str) -> nn.Module | Callable[..., Any]:
    """The model of a name: ``package.module:factory`` or ``path/file.py:factory``.

    ``factory`` (dots lead into classes) is a module, or is called without arguments and returns
    one; a function that takes an argument is itself the model.

    Raises:
        UsageError: there is no such thing, or it is no model.
    """
    place, colon, path = name.rpartition(":")
    if not colon or not place or not path:
        raise UsageError(f"{name!r} names no model: package.module:factory, or file.py:factory")
    found: Any = _file(place) if place.endswith(".py") else _module(place)
    walked = place
    for part in path.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            known = [n for n in dir(found) if not n.startswith("_")][:12]
            raise UsageError(f"{walked} has no {part!r}; it has: {', '.join(known)}") from None
        walked = f"{walked}:{part}" if walked == place else f"{walked}.{part}"
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise UsageError(f"{name} is a {type(found).__name__}, no module and no function")
    needed = _needed(found)
    if needed and not inspect.isclass(found):
        return found  # type: ignore[no-any-return]
    if needed:
        raise UsageError(
            f"{name} needs {', '.join(needed)}: name a function without arguments that returns it"
        )
    made = found()
    if not (isinstance(made, nn.Module) or callable(made)):
        raise UsageError(
            f"{name}() returns a {type(made).__name__}, neither a module nor a function"
        )
    return made  # type: ignore[no-any-return]


def _needed(function: Callable[..., Any]) -> list[str]:
    """Names of the arguments that have to be given."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in kinds]


def _module(name: str) -> ModuleType:
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)  # as `python -m` does, and a console script does not
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise  # a module that the model's own module misses
        raise UsageError(f"there is no module {name!r} (looked in {here} and sys.path)") from None


def _file(name: str) -> ModuleType:
    path = Path(name).resolve()
    if not path.is_file():
        raise UsageError(f"there is no file {name}")
    folder = str(path.parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # for what stands beside it
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # for pickling, dataclasses, ...
    spec.loader.exec_module(module)
    return module


# --- types of arguments ---------------------------------------------------------------------------


def shape(text: str) -> tuple[int, ...]:
    """``500,200`` (or ``500x200``) as a shape."""
    parts = [part.strip() for part in text.replace("x", ",").replace("×", ",").split(",")]
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no shape: sizes, as in 500,200")
    return tuple(map(int, parts))


def dtype(text: str) -> torch.dtype:
    """A type of floating-point numbers by name."""
    if text not in _DTYPES:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(_DTYPES)}")
    return getattr(torch, text)  # type: ignore[no-any-return]


def device(text: str) -> torch.device:
    """A device by name, one that is here."""
    try:
        found = torch.device(text)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {str(error).splitlines()[0]}") from None
    return found


def size(text: str) -> int:
    """Bytes: ``64M``, ``1.5G``, ``4096``."""
    units = {"K": 10, "M": 20, "G": 30}
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].upper() in units else (text, "")
    try:
        found = int(float(number) * (1 << units.get(unit, 0)))
    except ValueError:
        found = 0
    if found <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: 64M, 1.5G, or bytes")
    return found


def outputs(text: str) -> str | tuple[str, ...]:
    """``hessian``, or several: ``value,gradient,hessian``."""
    names = tuple(name.strip() for name in text.split(","))
    return names[0] if len(names) == 1 else names


__all__ = ["UsageError", "device", "dtype", "find_model", "outputs", "shape", "size"]
