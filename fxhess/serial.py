"""Programs as plain data, and back: JSON of a closed set of things, nothing of which is code.

A file may hold numbers, strings, PyTorch's types, a few frozen dataclasses of these, and nodes that
call functions with a name in :mod:`fxhess.naming`.  Reading makes a graph of them and lets
``torch.fx`` write the code: every name that comes to stand in it is an identifier, checked here.
What a program holds besides (autograd at run time, the user's own operators) cannot be written.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import keyword
import math
import struct
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from fxhess import _kept
from fxhess.emit import ORIGIN, ROLE, SYMMETRIC, VAL, VARIES
from fxhess.errors import Origin
from fxhess.naming import UnknownNameError, function_of, is_method, name_of
from fxhess.outputs import Given, Output
from fxhess.pipeline import Program
from fxhess.steps import Ending, Step, Tangent

_CLASSES: dict[str, type] = {
    cls.__name__: cls for cls in (Given, Origin, Output, Step, Tangent, Ending)
}
_NAMES: dict[type, tuple[str, dict[str, Any]]] = {
    kind: (tag, {str(v): v for v in vars(torch).values() if isinstance(v, kind)})
    for kind, tag in (
        (torch.dtype, "dtype"),
        (torch.layout, "layout"),
        (torch.memory_format, "memory"),
    )
}
_ROLES = ("value", "adjoint", "tangent", "curvature", "result")


class NotPlainError(ValueError):
    """A program that holds what no file may hold, or a file that holds no program."""


def dumps(program: Program) -> str:
    """The program as text.

    Raises:
        NotPlainError: it holds something outside of the closed set.
    """
    fields = {f.name: getattr(program, f.name) for f in dataclasses.fields(program)}
    del fields["graph_module"]
    document = graph_to_data(program.graph_module.graph, fields)
    return json.dumps(document, separators=(",", ":"), allow_nan=False)


def loads(text: str) -> Program:
    """The program that :func:`dumps` wrote.

    Raises:
        NotPlainError: the text is anything else.
    """
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise NotPlainError(f"no JSON: {error}") from error
    graph, fields = graph_from_data(document)
    if set(fields) != {f.name for f in dataclasses.fields(Program)} - {"graph_module"}:
        raise NotPlainError("other fields than a program's")
    module = _kept.module_of(graph, "GeneratedDerivative")
    return Program(graph_module=module, **fields)


def graph_to_data(graph: fx.Graph, fields: Mapping[str, Any]) -> dict[str, Any]:
    """A graph and values by name, as what JSON can hold.

    Raises:
        NotPlainError: something in it is outside of the closed set.
    """
    writer = _Writer()
    nodes = [writer.node(node) for node in graph.nodes]
    return {
        "fields": {name: writer.value(value) for name, value in fields.items()},
        "functions": list(writer.functions),
        "stand-ins": [json.loads(text) for text in writer.vals],
        "origins": [json.loads(text) for text in writer.origins],
        "nodes": nodes,
    }


def graph_from_data(document: Any) -> tuple[fx.Graph, dict[str, Any]]:
    """The graph and the values that :func:`graph_to_data` wrote.

    Raises:
        NotPlainError: the document is anything else.
    """
    try:
        reader = _Reader(document)
        graph = reader.graph(document["nodes"])
        return graph, {name: reader.value(value) for name, value in document["fields"].items()}
    except NotPlainError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, RuntimeError) as e:
        raise NotPlainError(f"not a program: {type(e).__name__}: {e}") from e


# --- writing --------------------------------------------------------------------------------------


class _Writer:
    """Tables of what nodes share, in order of appearance."""

    def __init__(self) -> None:
        self.functions: dict[str, int] = {}
        self.vals: dict[str, int] = {}
        self.origins: dict[str, int] = {}
        self.index: dict[fx.Node, int] = {}

    def node(self, node: fx.Node) -> list[Any]:
        target: Any = None
        if node.op == "call_function":
            try:
                name = name_of(node.target)
            except UnknownNameError as error:
                raise NotPlainError(str(error)) from error
            target = self.functions.setdefault(name, len(self.functions))
        elif node.op == "call_method":
            target = str(node.target)
            if not is_method(target):
                raise NotPlainError(f"no plain method: {target}")
        elif node.op not in ("placeholder", "output"):
            raise NotPlainError(f"a node {node.op}")
        if node.op == "placeholder" and (node.args or node.type is not None):
            raise NotPlainError("an input with a default")
        written = [
            node.op,
            node.name,
            target,
            [self.value(a) for a in node.args],
            {k: self.value(v) for k, v in node.kwargs.items()},
            self.value(node.meta.get(VAL)),
            self._in(self.origins, self.value(node.meta.get(ORIGIN))),
            node.meta.get(ROLE),
            node.meta.get(VARIES),
            bool(node.meta.get(SYMMETRIC)),
        ]
        self.index[node] = len(self.index)
        return written

    def value(self, value: Any) -> Any:
        """Plain values as they are, lists as lists, anything else as ``{tag: ..}``."""
        if value is None or isinstance(value, (bool, str)):
            return value
        if type(value) is int:
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {"float": struct.pack(">d", value).hex()}
        if isinstance(value, fx.Node):
            return {"n": self.index[value]}
        if isinstance(value, torch.Size):
            return {"size": [self.value(v) for v in value]}
        if isinstance(value, tuple) and not hasattr(value, "_fields"):
            return {"t": [self.value(v) for v in value]}
        if isinstance(value, list):
            return [self.value(v) for v in value]
        if isinstance(value, dict) and all(type(k) is str for k in value):
            return {"dict": [[k, self.value(v)] for k, v in value.items()]}
        if isinstance(value, slice):
            return {"slice": [self.value(v) for v in (value.start, value.stop, value.step)]}
        if value is Ellipsis:
            return {"ellipsis": 0}
        if type(value) is complex:
            return {"complex": [self.value(value.real), self.value(value.imag)]}
        if isinstance(value, torch.device):
            return {"device": str(value)}
        if type(value) in _NAMES:
            tag, names = _NAMES[type(value)]
            return {tag: next(name for name, own in names.items() if own == value)}
        if isinstance(value, torch.Tensor):
            if value.device.type != "meta" or value.layout != torch.strided:
                raise NotPlainError("a tensor with values")
            spec = [str(value.dtype), list(value.shape), list(value.stride())]
            return {"v": self._in(self.vals, spec)}
        if type(value) is _CLASSES.get(type(value).__name__):
            fields = dataclasses.fields(value)  # type: ignore[arg-type]
            return {type(value).__name__: [self.value(getattr(value, f.name)) for f in fields]}
        raise NotPlainError(f"a {type(value).__name__}")

    def _in(self, table: dict[str, int], written: Any) -> int:
        return table.setdefault(json.dumps(written), len(table))


# --- reading --------------------------------------------------------------------------------------


class _Reader:
    """Values and graphs of a document."""

    def __init__(self, document: Any) -> None:
        self.functions = [function_of(_string(name)) for name in document["functions"]]
        self.vals = [_stand_in(*spec) for spec in document["stand-ins"]]
        self.nodes: list[fx.Node] = []
        self.origins = [self.value(origin) for origin in document["origins"]]

    def graph(self, written: list[Any]) -> fx.Graph:
        graph = fx.Graph()
        names: set[str] = set()
        ops = [item[0] for item in written]
        inputs = ops.count("placeholder")
        if ops[:inputs] != ["placeholder"] * inputs or ops.index("output") != len(ops) - 1:
            raise NotPlainError("inputs come first, the output last")
        for op, name, target, args, kwargs, val, origin, role, varies, *more in written:
            _identifier(name)
            if name in names:
                raise NotPlainError(f"two nodes of the name {name!r}")
            names.add(name)
            function: Any = "output"
            if op == "call_function":
                function = self.functions[target]
            elif op == "call_method":
                if not is_method(_string(target)):
                    raise NotPlainError(f"a method {target!r}")
                function = target
            elif op == "placeholder":
                if args or kwargs:
                    raise NotPlainError("an input with a default")
                function = name
            elif op != "output":
                raise NotPlainError(f"a node {op!r}")
            for key in kwargs:
                _identifier(key)
            node = graph.create_node(
                op,
                function,
                tuple([self.value(a) for a in args]),
                {k: self.value(v) for k, v in kwargs.items()},
            )
            node.name = name
            self.nodes.append(node)
            meta = node.meta
            if val is not None:
                meta[VAL] = self.value(val)
            found = self.origins[origin]
            if found is not None:
                meta[ORIGIN] = found
                if found.line:
                    meta["stack_trace"] = found.stack_trace
            if role is not None:
                meta[ROLE] = _ROLES[_ROLES.index(role)]
            if varies is not None:
                meta[VARIES] = bool(varies)
            if more and more[0] is True:  # files of earlier versions do not say
                meta[SYMMETRIC] = True
        return graph

    def value(self, written: Any) -> Any:
        if not isinstance(written, (dict, list)):
            return written
        if isinstance(written, list):
            return [self.value(v) for v in written]
        ((tag, inner),) = written.items()
        if tag == "n":
            return self.nodes[_index(inner)]
        if tag == "v":
            return self.vals[_index(inner)]
        if tag == "t":
            return tuple([self.value(v) for v in inner])
        return _TAGS[tag](self, inner)


def _dataclass(cls: type, reader: _Reader, values: list[Any]) -> Any:
    names = [f.name for f in dataclasses.fields(cls)]
    found = dict(zip(names, map(reader.value, values), strict=True))
    if cls is Origin and not all(isinstance(v, (str, int)) for v in found.values()):
        raise NotPlainError("an origin is made of strings and numbers")
    return cls(**found)


def _named(names: dict[str, Any], _: _Reader, name: str) -> Any:
    return names[name]


_TAGS: dict[str, Callable[[_Reader, Any], Any]] = {
    "float": lambda _, bits: struct.unpack(">d", bytes.fromhex(bits))[0],
    "complex": lambda reader, parts: complex(*map(reader.value, parts)),
    "size": lambda reader, sizes: torch.Size(map(reader.value, sizes)),
    "slice": lambda reader, parts: slice(*map(reader.value, parts)),
    "ellipsis": lambda *_: Ellipsis,
    "dict": lambda reader, items: {_string(k): reader.value(v) for k, v in items},
    "device": lambda _, name: torch.device(_string(name)),
    **{tag: functools.partial(_named, names) for tag, names in _NAMES.values()},
    **{name: functools.partial(_dataclass, cls) for name, cls in _CLASSES.items()},
}


def _stand_in(dtype: str, shape: list[int], stride: list[int]) -> torch.Tensor:
    kind = _NAMES[torch.dtype][1][dtype]
    return torch.empty_strided(shape, stride, dtype=kind, device="meta")


def _index(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise NotPlainError("an index counts from 0")
    return value


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise NotPlainError(f"a name, not {value!r}")
    return value


def _identifier(name: Any) -> None:
    """Names that come to stand in generated code."""
    if not (isinstance(name, str) and name.isascii() and name.isidentifier()):
        raise NotPlainError(f"no name for a value: {name!r}")
    if keyword.iskeyword(name):
        raise NotPlainError(f"no name for a value: {name!r}")
