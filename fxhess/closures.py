"""Plain functions as modules: what a function reaches is read from it at every call.

A function reaches what it closes over, its defaults and the globals it names, and through other
functions, partials, bound methods, objects and containers, what these do.  Every tensor and module
found has a *way*: the steps that lead to it, gone again at each call, so that what was put in its
place since is followed.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

Step = tuple[str, Any]  # how to get on, and which: ("cell", "net"), ("item", 0)
Way = tuple[Step, ...]

_FREE = "free:"  # attributes of a FunctionModule that are tensors the function reaches
_NOWHERE = (LookupError, AttributeError, TypeError, ValueError)
_MOST = 10_000  # values looked at: a function may hold a data set
_LIBRARIES = frozenset({*sys.stdlib_module_names, "torch", "numpy", "fxhess"})


class FunctionModule(nn.Module):
    """A plain function as a module: the modules it reaches are submodules, the tensors it reaches
    are read from it at every call."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.discover()

    def discover(self) -> None:
        """Look for all that the function reaches."""
        tensors: dict[str, Way] = {}
        modules: dict[str, Way] = {}
        for name, way, value in reached(self.function):
            if isinstance(value, nn.Module):
                key = name.replace("/", "_").replace(".", "_") or "called"  # by a partial
                while key in self.__dict__ or hasattr(FunctionModule, key):  # taken here
                    key += "_"
                key = _unused(key, modules)
                modules[key] = way
                self._put(key, value)
            else:
                tensors[_unused(name, tensors)] = way
        self._ways = modules, tensors

    def refresh(self) -> None:
        """Follow names that were bound to other modules since."""
        for key, way in self._ways[0].items():
            try:
                value = follow(self.function, way)
            except _NOWHERE:  # it leads there no more
                self.discover()
                return
            if isinstance(value, nn.Module):
                self._put(key, value)

    def _put(self, key: str, module: nn.Module) -> None:
        if self._modules.get(key) is not module:
            self._modules[key] = module

    def tensors(self) -> Iterator[tuple[str, Any]]:
        """Names of attributes of this module, and the tensors that they are."""
        for name, way in self._ways[1].items():
            try:
                yield _FREE + name, follow(self.function, way)
            except _NOWHERE:
                continue

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith(_FREE):
            ways = self._ways[1]
            if name[len(_FREE) :] not in ways:  # of another function of the same structure
                self.discover()
                ways = self._ways[1]
            return follow(self.function, ways[name[len(_FREE) :]])
        return super().__getattr__(name)


def as_module(model: nn.Module | Callable[..., Any]) -> nn.Module:
    """``model`` itself, or a module around a function."""
    return model if isinstance(model, nn.Module) else FunctionModule(model)


def tensor_paths(model: nn.Module) -> dict[int, tuple[str, ...]]:
    """Paths of tensors that are plain attributes of a module or reached by a function."""
    found: dict[int, tuple[str, ...]] = {}
    for prefix, module in model.named_modules():
        base = tuple(prefix.split(".")) if prefix else ()
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                found[id(value)] = (*base, name)
        if isinstance(module, FunctionModule):
            for name, value in module.tensors():
                found.setdefault(id(value), (*base, name))
    return found


# --- what a function reaches ----------------------------------------------------------------------


def reached(function: Any) -> Iterator[tuple[str, Way, Any]]:
    """Names, ways and values of the tensors and modules that a function reaches, each once.

    Of objects, classes and Python modules only what some code on the way names: it is looked for
    again while there are new names.
    """
    names: set[str] = set()
    while True:
        before = len(names)
        found = list(_walk(function, names))
        if len(names) == before:
            yield from found
            return


def _walk(function: Any, names: set[str]) -> Iterator[tuple[str, Way, Any]]:
    seen: dict[int, Any] = {}  # held, so that no identity is taken by another
    queue: list[tuple[str, Way, Any]] = [("", (), function)]
    while queue and len(seen) < _MOST:
        name, way, value = queue.pop(0)
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if way and isinstance(value, (torch.Tensor, nn.Module)):
            yield name, way, value
            continue
        for label, step in _steps(value, names):
            try:
                inner = _take(value, step)
            except _NOWHERE:  # an empty cell
                continue
            joined = "/".join(part for part in (name, label) if part)
            queue.append((joined, (*way, step), inner))


def follow(function: Any, way: Way) -> Any:
    """The value at the end of a way.

    Raises:
        LookupError, AttributeError, TypeError, ValueError: it leads nowhere (any more).
    """
    value = function
    for step in way:
        value = _take(value, step)
    return value


def _steps(value: Any, names: set[str]) -> Iterator[tuple[str, Step]]:
    """Where one can get from a value, with what to call it; names used by code are added."""
    if isinstance(value, functools.partial):
        for i in range(len(value.args)):
            yield f"arg{i}", ("argument", i)
        for name in value.keywords:
            yield name, ("keyword", name)
        yield "", ("attribute", "func")
    elif inspect.ismethod(value):
        yield "self", ("attribute", "__self__")
        yield "", ("attribute", "__func__")
    elif isinstance(value, types.FunctionType):
        yield from _of_function(value, names)
    elif isinstance(value, Mapping):
        for i, key in enumerate(value):
            yield (key if isinstance(key, str) else f"item{i}"), ("item", key)
    elif isinstance(value, (list, tuple)):
        for i in range(len(value)):
            yield f"item{i}", ("item", i)
    elif not _is_library(value):
        yield from _of_object(value, names)


def _of_function(function: types.FunctionType, names: set[str]) -> Iterator[tuple[str, Step]]:
    if _is_library(function):
        return
    code = function.__code__
    own = set(_named(code))
    names |= own
    for name in code.co_freevars:
        yield name, ("cell", name)
    for name in sorted(own):
        if name in function.__globals__:
            yield name, ("global", name)
    for i in range(len(function.__defaults__ or ())):
        yield f"default{i}", ("default", i)
    for name in function.__kwdefaults__ or ():
        yield name, ("keyword default", name)


def _of_object(value: Any, names: set[str]) -> Iterator[tuple[str, Step]]:
    """Attributes that are named, of the object and of its class; and what calls it."""
    held = getattr(value, "__dict__", None) or {}
    for name in sorted({*names, "__wrapped__"} & set(held)):
        yield name, ("attribute", name)
    for base in value.__mro__ if isinstance(value, type) else type(value).__mro__:
        if _is_library(base):
            continue
        slots = base.__dict__.get("__slots__", ())
        for name in sorted({*names, "__call__"} & set(base.__dict__)):
            inner = base.__dict__[name]
            if name in slots or not hasattr(inner, "__get__"):
                yield name, ("attribute", name)
            elif isinstance(inner, property):
                yield name, ("getter", name)
            elif isinstance(inner, (types.FunctionType, staticmethod, classmethod)):
                yield name, ("code", name)


def _named(code: types.CodeType) -> Iterator[str]:
    """Globals and attributes that code names, with the functions written inside."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _named(constant)


def _is_library(value: Any) -> bool:
    """Whether it is code (or of a class) that no model of the user's is part of."""
    if isinstance(value, types.ModuleType):
        home: Any = value.__name__
    elif isinstance(value, (type, types.FunctionType)):
        home = value.__module__
    else:
        home = type(value).__module__
    return isinstance(home, str) and home.split(".")[0] in _LIBRARIES


def _take(value: Any, step: Step) -> Any:
    how, key = step
    match how:
        case "attribute":
            return getattr(value, key)
        case "item":
            return value[key]
        case "global":
            return value.__globals__[key]
        case "cell":
            return value.__closure__[value.__code__.co_freevars.index(key)].cell_contents
        case "default":
            return value.__defaults__[key]
        case "keyword default":
            return value.__kwdefaults__[key]
        case "argument":
            return value.args[key]
        case "keyword":
            return value.keywords[key]
    inner = inspect.getattr_static(value, key)
    if how == "getter":
        return inner.fget
    return getattr(inner, "__func__", inner)


def _unused(name: str, taken: Mapping[str, Any]) -> str:
    while name in taken:
        name += "_"
    return name
