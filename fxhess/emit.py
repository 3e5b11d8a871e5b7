"""Writing graphs: an :class:`Emitter` appends nodes to a ``torch.fx.Graph`` and knows their shapes.

Rules and passes write ordinary PyTorch on :class:`Var` objects (``1 - y * y``,
``torch.cumsum(t, -1)``); each operation becomes one ``call_function`` node.  Shape and dtype of
every node are found by running the operation on *meta* tensors with a nominal batch size, so no
shape function is ever written by hand.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch.fx.proxy import TracerBase

from fxhess.errors import InternalError, Origin

VAL = "val"  # node.meta[VAL]: a meta tensor (or plain number) standing for the node's value
ORIGIN = "origin"  # node.meta[ORIGIN]: fxhess.errors.Origin of the user's operation
VARIES = "varies"  # node.meta[VARIES]: whether the value depends on x, so that it cannot be hoisted
SYMMETRIC = "symmetric"  # node.meta[SYMMETRIC]: a sum A + A^T whose A is symmetric but for rounding
ROLE = "role"  # node.meta[ROLE]: 'value', 'adjoint', 'tangent', 'curvature' or 'result'


# To a type checker a Var passes wherever a tensor does: rules write ordinary PyTorch on it.
_Base: Any = fx.Proxy


# Stand-ins have these batch sizes, whatever the first call's: one plan serves every batch.  Primes,
# so that a size that is one of them is a batch size.
_NOMINAL = {1: (509,), 2: (61, 59), 3: (17, 19, 23)}


def nominal_batch(batch_ndim: int) -> tuple[int, ...]:
    """The batch sizes of stand-ins."""
    return _NOMINAL.get(batch_ndim, (11,) * batch_ndim)


class Var(_Base):
    """A value in a graph under construction; every operator on it appends a node.

    ``val`` is a meta tensor; its batch axes have the nominal batch size, so read batch sizes
    from it only to tell 'all samples' from 'the same for every sample' (size 1).
    """

    @property
    def val(self) -> torch.Tensor:
        value: torch.Tensor = self.node.meta[VAL]
        return value

    @property
    def ndim(self) -> int:
        return self.val.ndim

    def dim(self) -> int:
        """As ``ndim``: other packages replace functions of ``torch`` by ones that ask for it."""
        return self.val.ndim

    @property
    def dtype(self) -> torch.dtype:
        return self.val.dtype

    def size(self, dim: int) -> int:
        """Static size of an *event* axis; meaningless on batch axes."""
        return self.val.shape[dim]

    def __iter__(self) -> Iterator[Any]:
        return iter([self[i] for i in range(len(self.val))])

    def __repr__(self) -> str:
        return f"Var({self.node.name})"

    @classmethod
    def __torch_function__(
        cls,
        orig_method: Any,
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """One node for one call, as ``fx.Proxy`` writes it, at a third of the time: most of what
        planning does is to write graphs."""
        kwargs = kwargs or {}
        tracer = _tracer_of(args) or _tracer_of(tuple(kwargs.values()))
        if tracer is None:
            return super().__torch_function__(orig_method, types, args, kwargs)
        if _is_method(orig_method):
            return tracer.create_proxy("call_method", orig_method.__name__, args, kwargs)
        return tracer.create_proxy("call_function", orig_method, args, kwargs)


def _tracer_of(values: Any) -> Emitter | None:
    """The emitter of the first Var among (nested) arguments."""
    for value in values:
        if isinstance(value, Var):
            return value.tracer  # type: ignore[no-any-return]
        if isinstance(value, (list, tuple)):
            found = _tracer_of(value)
            if found is not None:
                return found
    return None


@functools.cache
def _is_method(function: Any) -> bool:
    return bool(torch.overrides.is_tensor_method_or_property(function))


def to_meta(value: Any) -> Any:
    """The stand-in for ``value`` in shape computations."""
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="meta")
    return value


class Emitter(TracerBase):
    """Appends operations to ``graph`` and computes the stand-in value of each.

    Errors of PyTorch while computing a stand-in are reported as :class:`InternalError` with the
    origin that was current: the generated program would have failed in the same way.
    """

    def __init__(self, graph: fx.Graph | None = None) -> None:
        super().__init__()
        self.graph = graph if graph is not None else fx.Graph()
        self.origin: Origin | None = None
        self.role = "value"

    @contextmanager
    def at(self, origin: Origin | None = None, role: str | None = None) -> Iterator[None]:
        """Label the nodes written inside with where they come from and what they are for."""
        before = self.origin, self.role
        self.origin = origin if origin is not None else self.origin
        self.role = role if role is not None else self.role
        try:
            yield
        finally:
            self.origin, self.role = before

    def placeholder(self, name: str, val: Any, varies: bool = False) -> Var:
        node = self.graph.placeholder(name)
        node.meta[VAL] = to_meta(val)
        node.meta[VARIES] = varies or name == "x"
        return Var(node, self)

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Var:
        """Append ``target(*args, **kwargs)``; arguments may hold Vars, nested in lists."""
        return self.create_proxy("call_function", target, args, kwargs)

    def create_proxy(  # type: ignore[override]
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any | None = None,
        proxy_factory_fn: Any = None,
    ) -> Var:
        node = self.graph.create_node(
            kind, target, fx.node.map_aggregate(args, _node), fx.node.map_aggregate(kwargs, _node)
        )
        node.meta[VAL] = self._run(node)
        node.meta[ORIGIN] = self.origin
        node.meta[ROLE] = self.role
        node.meta[VARIES] = any(operand.meta[VARIES] for operand in node.all_input_nodes)
        return Var(node, self)

    def _run(self, node: fx.Node) -> Any:
        quick = _broadcast(node)
        if quick is not None:
            return quick
        args = fx.node.map_arg(node.args, _value)
        kwargs = fx.node.map_arg(node.kwargs, _value)
        if "device" in kwargs:  # a tensor made from nothing: its stand-in is a meta tensor too
            kwargs = {**kwargs, "device": torch.device("meta")}
            kwargs.pop("pin_memory", None)
        try:
            with torch.no_grad():
                if node.op == "call_method":
                    return getattr(args[0], str(node.target))(*args[1:], **kwargs)
                assert callable(node.target)
                return node.target(*args, **kwargs)
        except Exception as error:
            raise InternalError(
                f"cannot write {node.target}: {error}\n  operands: {args}, {kwargs}",
                where=self.origin,
            ) from error

    def to_bool(self, obj: fx.Proxy) -> bool:
        raise InternalError("a rule branched on the value of a tensor", where=self.origin)


_ARITHMETIC = frozenset({operator.add, operator.sub, operator.mul, operator.truediv})


def _broadcast(node: fx.Node) -> torch.Tensor | None:
    """The stand-in of plain arithmetic, most of what is ever written, without asking PyTorch
    (whose own shape functions take a hundred times longer)."""
    if node.target not in _ARITHMETIC or node.kwargs:
        return None
    values = [a.meta[VAL] if isinstance(a, fx.Node) else a for a in node.args]
    tensors = [v for v in values if isinstance(v, torch.Tensor)]
    if not tensors:
        return None
    dtype = torch.result_type(*values)  # type: ignore[arg-type]
    if not dtype.is_floating_point:
        return None
    shape: list[int] = []
    rank = max(t.ndim for t in tensors)
    for axis in range(-rank, 0):
        sizes = {t.shape[axis] for t in tensors if t.ndim >= -axis} - {1}
        if len(sizes) > 1:
            return None  # let PyTorch say what is wrong
        shape.append(sizes.pop() if sizes else 1)
    return torch.empty(shape, dtype=dtype, device="meta")


def _node(value: Any) -> Any:
    return value.node if isinstance(value, Var) else value


def _value(node: fx.Node) -> Any:
    return node.meta[VAL]


def getitem(var: Var, index: int) -> Var:
    """One output of an operation with several."""
    emitter = var.tracer
    assert isinstance(emitter, Emitter)
    return emitter.call(operator.getitem, var, index)


def sibling(var: Var, index: int) -> Var:
    """Another output of the operation that ``var`` is an output of."""
    parent, _ = var.node.args
    assert isinstance(parent, fx.Node)
    return getitem(Var(parent, var.tracer), index)
