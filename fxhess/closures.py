"""Plain functions as modules: what a function closes over is read from it at every call."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn


class FunctionModule(nn.Module):
    """A plain function as a module: the modules it closes over are submodules, the tensors it
    closes over are read from it at every call."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.refresh()

    def refresh(self) -> None:
        """Follow names that were bound to other modules since."""
        for name, value in free_variables(self.function):
            key = name.replace(".", "_")
            if isinstance(value, nn.Module) and self._modules.get(key) is not value:
                self._modules[key] = value

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("free:"):  # a tensor that the function closes over
            return dict(free_variables(self.function))[name[5:]]
        return super().__getattr__(name)


def as_module(model: nn.Module | Callable[..., Any]) -> nn.Module:
    """``model`` itself, or a module around a function."""
    return model if isinstance(model, nn.Module) else FunctionModule(model)


def free_variables(function: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
    """Names and values of what a function closes over: cells, globals, defaults, partial
    arguments and the object a method is bound to."""
    if isinstance(function, functools.partial):
        yield from ((f"arg{i}", value) for i, value in enumerate(function.args))
        yield from function.keywords.items()
        yield from free_variables(function.func)
        return
    if inspect.ismethod(function):
        yield "self", function.__self__
        function = function.__func__
    code = getattr(function, "__code__", None)
    if code is None:
        return
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # an empty cell
            continue
    scope = function.__globals__
    yield from ((name, scope[name]) for name in code.co_names if name in scope)
    for i, value in enumerate(function.__defaults__ or ()):
        yield f"default{i}", value


def tensor_paths(model: nn.Module) -> dict[int, tuple[str, ...]]:
    """Paths of tensors that are plain attributes of a module or closed over by a function."""
    found: dict[int, tuple[str, ...]] = {}
    for prefix, module in model.named_modules():
        base = tuple(prefix.split(".")) if prefix else ()
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                found[id(value)] = (*base, name)
        if isinstance(module, FunctionModule):
            for name, value in free_variables(module.function):
                if isinstance(value, torch.Tensor):
                    found[id(value)] = (*base, f"free:{name}")
    return found
