"""Adapter: what PyTorch would keep of every trace for as long as the process lives, let go of.

A process that transforms one model after another would grow by each: the functions of a
``ShapeEnv`` are cached in tables of its class, which hold it and all that it knows; the table of
``FakeTensorMode`` has no limit; and the source of each ``GraphModule`` stays in a table that
tracebacks read.  Here each ``ShapeEnv`` has tables of its own, what a trace adds to the second
goes after it, and a source goes with its code.  Where PyTorch's internals have moved, it grows.
"""

from __future__ import annotations

import contextlib
import functools
import linecache
import types
import weakref
from collections.abc import Iterator
from typing import Any

from torch import fx, nn

try:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental import symbolic_shapes
except ImportError:  # pragma: no cover - a future PyTorch that moved them
    FakeTensorMode = None  # type: ignore[assignment, misc]


def shape_env() -> Any:
    """A ``ShapeEnv`` in which no two sizes are one because they are equal; it ends with the last
    trace that uses it."""
    env: Any = symbolic_shapes.ShapeEnv(duck_shape=False, specialize_zero_one=True)
    of_version = getattr(symbolic_shapes, "_lru_cache", None)
    for name, method in vars(type(env)).items():
        plain = getattr(method, "__wrapped__", None)
        if not hasattr(method, "cache_clear") or plain is None:
            continue
        if isinstance(method, functools._lru_cache_wrapper):
            own: Any = functools.lru_cache(method.cache_parameters()["maxsize"])(plain)
        elif of_version is not None:  # emptied whenever more is known of the sizes
            own = of_version(plain)
        else:  # pragma: no cover - a PyTorch that does it in another way
            continue
        setattr(env, name, types.MethodType(own, env))
    return env


@contextlib.contextmanager
def traces() -> Iterator[None]:
    """What is traced inside leaves nothing in the table of all fake tensors.  (Others' entries that
    were added meanwhile are made anew.)"""
    table = getattr(FakeTensorMode, "cache", None)
    if not isinstance(table, dict):  # pragma: no cover - a future PyTorch that moved it
        yield
        return
    mark: Any = object()  # the table is in the order in which entries came
    try:
        table[mark] = mark
        yield
    finally:
        with contextlib.suppress(KeyError):  # somebody emptied it
            while table.popitem()[0] is not mark:
                pass


def module_of(graph: fx.Graph, name: str) -> fx.GraphModule:
    """The graph as a module without attributes, in a class of this name."""
    return generated(fx.GraphModule(nn.Module(), graph, name))


def generated(module: fx.GraphModule) -> fx.GraphModule:
    """The module, whose source is forgotten when its code is."""
    sources = getattr(getattr(fx.graph_module, "_loader", None), "eval_cache", None)
    code = getattr(type(module).forward, "__code__", None)
    if sources is not None and code is not None and code.co_filename in sources:
        weakref.finalize(code, _forget, sources, code.co_filename).atexit = False
    return module


def _forget(sources: dict[str, str], name: str) -> None:
    sources.pop(name, None)
    linecache.cache.pop(name, None)


def recompiled(module: fx.GraphModule) -> fx.GraphModule:
    """The module, after its graph was changed."""
    module.recompile()
    return generated(module)


__all__ = ["generated", "module_of", "recompiled", "shape_env", "traces"]
