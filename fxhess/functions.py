"""Custom ``torch.autograd.Function`` s, captured whole so that their own derivatives are used.

A trace would record what is inside of ``forward`` and silently ignore the user's ``backward``.
Inside :func:`whole_functions`, ``Function.apply`` is recorded as one node of the operator
``fxhess::function(Tensor[] tensors, int token) -> Tensor[]`` instead; ``call_of(token)`` tells
which function it is, with which other arguments, for as long as a program (or a trace under way)
holds it: see :func:`hold`.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import checkpoint
from torch.utils._pytree import tree_flatten, tree_unflatten

from fxhess import _outside

_library = torch.library.Library("fxhess", "DEF")
_library.define("function(Tensor[] tensors, int token) -> Tensor[]")

Function = torch.autograd.Function
_original = Function.__dict__["apply"]  # a class method, in Python or (from 2.14 on) in C
_local = threading.local()


class FunctionCall:
    """``cls.apply`` with all arguments but the tensors fixed; gives its tensors, in order."""

    def __init__(self, cls: type[Function], arguments: Sequence[Any], spec: Any) -> None:
        self.cls = cls
        self.arguments = list(arguments)  # None where a tensor goes
        self.spec = spec
        self.tensors = [i for i, a in enumerate(arguments) if isinstance(a, _Slot)]
        self.results: tuple[list[Any], Any] | None = None
        self.token = next(_numbers)
        self.__name__ = cls.__name__
        self.__qualname__ = cls.__qualname__
        self.__module__ = cls.__module__

    def __call__(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        if tensors and tensors[0].device.type == "meta":
            return torch.ops.fxhess.function(list(tensors), self.token)  # type: ignore[no-any-return]
        return self.run(*tensors)

    def run(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        flat = list(self.arguments)
        for i, t in zip(self.tensors, tensors, strict=True):
            flat[i] = t
        result = self.cls.apply(*tree_unflatten(flat, self.spec))
        values, spec = tree_flatten(result)
        if self.results is None:
            rest = [None if isinstance(v, torch.Tensor) else v for v in values]
            self.results = (
                [
                    _Slot() if isinstance(v, torch.Tensor) else r
                    for v, r in zip(values, rest, strict=True)
                ],
                spec,
            )
        return [v for v in values if isinstance(v, torch.Tensor)]

    def rebuild(self, outputs: Sequence[torch.Tensor]) -> Any:
        """The results as the function returns them."""
        assert self.results is not None
        slots, spec = self.results
        left = list(outputs)
        return tree_unflatten([left.pop(0) if isinstance(s, _Slot) else s for s in slots], spec)


class _Slot:
    """Stands where a tensor goes."""


CALL = "call of a custom function"  # node.meta[CALL]: the FunctionCall that a node's token is
_numbers = itertools.count()
_calls: weakref.WeakValueDictionary[int, FunctionCall] = weakref.WeakValueDictionary()
_known: weakref.WeakValueDictionary[Any, FunctionCall] = weakref.WeakValueDictionary()


def _apply(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
    return _original.__get__(None, cls)(*args, **kwargs)


def call_of(token: int) -> FunctionCall:
    return _calls[token]


def hold(graph: fx.Graph) -> None:
    """Make the nodes of a trace, and their copies, hold what their tokens stand for."""
    for node in graph.nodes:
        if node.target is torch.ops.fxhess.function.default:
            node.meta[CALL] = call_of(node.args[1])


def called(node: fx.Node) -> FunctionCall | None:
    """The custom function that a captured node calls."""
    if node.target is not torch.ops.fxhess.function.default:
        return None
    return call_of(node.args[1])  # type: ignore[arg-type]


def differentiable(target: Any) -> Any:
    """The operation with the derivatives that are its own."""
    if target is not torch.ops.fxhess.function.default:
        return target
    return lambda tensors, token: call_of(token).run(*tensors)


def _call(cls: type[Function], arguments: list[Any], spec: Any) -> FunctionCall:
    """The same call for the same function and the same arguments that are not tensors."""
    frozen = tuple(
        "tensor" if isinstance(a, _Slot) else (type(a), a if _is_plain(a) else id(a))
        for a in arguments
    )
    key = (cls, frozen, str(spec))
    call = _known.get(key)
    if call is None:
        call = FunctionCall(cls, arguments, spec)
        _known[key] = _calls[call.token] = call
    return call


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(
        value, (bool, int, float, complex, str, torch.dtype, torch.device)
    )


# --- the operator -----------------------------------------------------------------------------


def _fresh(outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Operators return new tensors, never views of their operands."""
    return [t.detach().clone() for t in outputs]


@torch.library.impl(_library, "function", "CompositeExplicitAutograd")
def _run(tensors: list[torch.Tensor], token: int) -> list[torch.Tensor]:
    with _inside():
        return _fresh(call_of(token).run(*tensors))


@torch.library.register_fake("fxhess::function", lib=_library)
def _fake(tensors: list[torch.Tensor], token: int) -> list[torch.Tensor]:
    with _inside():
        try:
            return _fresh(call_of(token).run(*tensors))
        except Exception as error:
            found = _by_running(call_of(token), tensors)
            if found is None:
                raise error
            return found


def _by_running(call: FunctionCall, tensors: list[torch.Tensor]) -> list[torch.Tensor] | None:
    """Shapes of the results of a function that only real tensors can go through (NumPy inside):
    found by running it on ones, at several batch sizes."""

    sizes: list[Any] = []
    for t in tensors:
        sizes += [
            s for s in t.shape if isinstance(s, torch.SymInt) and not any(s is o for o in sizes)
        ]

    def shapes(scale: int) -> list[tuple[list[int], torch.dtype]]:
        with _outside.outside_of_modes():
            real = []
            for t in tensors:
                shape = [scale if isinstance(s, torch.SymInt) else s for s in t.shape]
                real.append(torch.ones(shape, dtype=t.dtype))
            return [(list(t.shape), t.dtype) for t in call.run(*real)]

    try:
        two, three = shapes(2), shapes(3)
    except Exception:
        return None
    symbol: Any = sizes[0] if sizes else 1
    like = tensors[0]
    results = []
    for (a, dtype), (b, _) in zip(two, three, strict=True):
        shape: list[Any] = []
        for p, q in zip(a, b, strict=True):
            if p != q and p * 3 != q * 2:
                return None  # not a multiple of the batch size
            shape.append(p if p == q else symbol * (p // 2))
        results.append(like.new_empty(shape, dtype=dtype))
    return results


# --- capture ------------------------------------------------------------------------------------


@contextlib.contextmanager
def _inside() -> Iterator[None]:
    """Calls inside of a captured function are its own business."""
    before = getattr(_local, "active", False)
    _local.active = False
    try:
        yield
    finally:
        _local.active = before


@contextlib.contextmanager
def whole_functions() -> Iterator[None]:
    """Inside, on this thread, a custom function is recorded as one operation."""
    held: list[FunctionCall] = []  # until the trace is over

    def apply(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
        if not getattr(_local, "active", False) or kwargs:
            return _apply(cls, *args, **kwargs)
        if cls is checkpoint.CheckpointFunction:
            function, _, *rest = args
            return function(*rest)
        flat, spec = tree_flatten(args)
        tensors = [a for a in flat if isinstance(a, torch.Tensor)]
        if not tensors:
            return _apply(cls, *args)
        arguments = [_Slot() if isinstance(a, torch.Tensor) else a for a in flat]
        call = _call(cls, arguments, spec)
        held.append(call)
        return call.rebuild(torch.ops.fxhess.function(tensors, call.token))

    before = getattr(_local, "active", False)
    before_all = Function.__dict__["apply"]
    try:
        _local.active = True
        Function.apply = classmethod(apply)  # type: ignore[assignment, method-assign]
        yield
    finally:
        Function.apply = before_all  # type: ignore[method-assign]
        _local.active = before


__all__ = ["CALL", "FunctionCall", "call_of", "called", "differentiable", "hold", "whole_functions"]
