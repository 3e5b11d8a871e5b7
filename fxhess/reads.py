"""Values that a model asks for while it is traced.

A model whose program depends on values (``if mask.any()``, ``mask.nonzero()``, ``sizes.tolist()``)
is traced at the values seen.  Whatever asks is an operation whose result has no shape, or no
number, before its operands have values; :class:`Questions` computes these from the graph traced so
far, at the real x and the model's real tensors, and the answer becomes a constant of the program.
A :class:`~fxhess.guards.Guard` computes the operands again at every call and tells whether the
answers are the same.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from fxhess import _outside, _torch, _traced, registry
from fxhess.errors import CaptureError, InputError, Origin, SampleStructureError, UnsupportedOpError

_library = torch.library.Library("fxhess", "FRAGMENT")
_library.define("values(Tensor tensor) -> Tensor")
_VALUES = torch.ops.fxhess.values.default


@torch.library.impl(_library, "values", "CompositeExplicitAutograd")
def _values(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone()


@torch.library.register_fake("fxhess::values", lib=_library)
def _values_fake(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor)


@dataclass(frozen=True)
class Read:
    """One question: ``op`` at ``leaves`` (arguments, flattened; None for each of the ``operands``,
    tensors with the values they had) gave ``seen``.  ``varying``: the operands depend on x."""

    op: Any
    spec: Any
    leaves: tuple[Any, ...]
    operands: tuple[torch.Tensor, ...]
    seen: tuple[Any, ...]
    origin: Origin
    varying: bool

    @property
    def is_number(self) -> bool:
        """Whether the answer is the operand itself, one number."""
        return self.op is torch.ops.aten._local_scalar_dense.default

    @property
    def is_exact(self) -> bool:
        """Whether the answer is made of numbers that hardly ever come again."""
        return any(
            isinstance(v, float) or (isinstance(v, torch.Tensor) and v.is_floating_point())
            for v in self.seen
        )

    def answer(self, operands: Sequence[torch.Tensor]) -> tuple[Any, ...]:
        """The operation at other operands."""
        given = iter(operands)
        leaves = [next(given) if leaf is _OPERAND else leaf for leaf in self.leaves]
        args, kwargs = tree_unflatten(leaves, self.spec)
        return tuple(tree_flatten(self.op(*args, **kwargs))[0])

    def holds(self, operands: Sequence[torch.Tensor]) -> bool:
        """Whether the answer at these operands is the one seen."""
        if self.is_number:
            return _same(operands[0].item(), self.seen[0])
        found = self.answer(operands)
        return len(found) == len(self.seen) and all(map(_same, found, self.seen))

    def holds_for_each(self, operands: Sequence[torch.Tensor], count: int) -> torch.Tensor:
        """For each of ``count`` samples (the leading axis, of size 1 where they share it), whether
        :meth:`holds`."""
        if self.is_number:
            values, want = operands[0].reshape(operands[0].shape[0]), self.seen[0]
            found = values.isnan() if want != want else values == want
            return found.expand(count)
        each = [[t[i if len(t) > 1 else 0] for t in operands] for i in range(count)]
        return torch.tensor([self.holds(own) for own in each], device=operands[0].device)

    def __str__(self) -> str:
        values = ", ".join(_shown(v) for v in self.seen)
        return f"{values} ({self.origin})"


_OPERAND = object()
_local = threading.local()


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        if a.is_floating_point():
            return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
        return torch.equal(a, b)
    return bool(a == b or (a != a and b != b))


def _shown(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return repr(value)
    if value.numel() <= 6:
        return str(value.tolist())
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


# --- asking ---------------------------------------------------------------------------------------

# Operations whose result, or its shape, is not known before the values of their operands are.
_ASKING = (
    "_local_scalar_dense.default",
    "_unique.default",
    "_unique2.default",
    "allclose.default",
    "bincount.default",
    "equal.default",
    "masked_select.default",
    "nonzero.default",
    "repeat_interleave.Tensor",
    "unique_consecutive.default",
    "unique_dim.default",
)


class Questions:
    """Answers what one trace asks.  ``inputs``: x, constants and the model's tensors, as the
    trace's own inputs are ordered, None for those whose values are not known; ``where`` tells what
    runs now; ``apart``: the trace is for many samples at once, so that nothing may depend on their
    values."""

    def __init__(
        self,
        inputs: Sequence[torch.Tensor | None],
        where: Callable[[str], Origin],
        apart: bool,
    ) -> None:
        self.inputs = inputs
        self.where = where
        self.apart = apart
        self.complete: list[Read] = []
        self.start()

    def start(self) -> None:
        """Begin a new trace."""
        self.reads: list[Read] = []
        self.watched: list[list[torch.Tensor]] = []
        self.last: Any = None
        self._values: dict[fx.Node, Any] = {}
        self._answers: set[int] = set()

    def operands(self) -> list[list[torch.Tensor]]:
        """The traced tensors that each read asked about, after the model ran; a trace that fails
        later leaves ``complete`` as it is."""
        self.complete = list(self.reads)
        return [list(tensors) for tensors in self.watched]

    @contextlib.contextmanager
    def asked(self) -> Iterator[None]:
        """Inside, on this thread, values of whole tensors can be asked for: :func:`values_of`."""
        before = getattr(_local, "questions", None)
        _local.questions = self
        try:
            yield
        finally:
            _local.questions = before

    def answers(self, table: Mapping[Any, Callable[..., Any]]) -> dict[Any, Callable[..., Any]]:
        """The table of rewrites, with answers for operations that ask for values and that it does
        not compose of others."""
        asking = {op: self._answering(op, table.get(op)) for op in _asking()}
        return {**table, **asking}

    def _answering(self, op: Any, rewrite: Callable[..., Any] | None) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if rewrite is not None:
                result = rewrite(*args, **kwargs)
                if result is not NotImplemented:
                    return result
            return self.read(op, args, kwargs)

        return run

    def read(self, op: Any, args: Any, kwargs: Any) -> Any:
        """What ``op`` gives at the real values of its operands."""
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        watched = [torch.ops.aten.detach.default(t) for t in tensors]
        nodes = [_traced.node_of(t) for t in watched]
        origin = self.where(str(op))
        flow = [_traced.dependence(node.args[0], self._answers) for node in nodes]  # type: ignore[arg-type]
        constants = _traced.constants()
        if any(f.random for f in flow):
            raise CaptureError(
                "the structure of the model depends on random numbers", where=origin,
                hint="choose with torch.where(draw, a, b)",
            )  # fmt: skip
        varying = any(f.values or f.sizes for f in flow)
        if varying and self.apart:
            raise SampleStructureError("the structure depends on the values of x", where=origin)
        plain = tuple(_OPERAND if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
        try:
            with _outside.outside_of_modes(), torch.no_grad():
                operands = tuple(self._value(node, constants).detach().clone() for node in nodes)
                seen = Read(op, spec, plain, operands, (), origin, varying).answer(operands)
                if op is _VALUES:  # in Python's own types here, where no mode sees it
                    self.last = seen[0].tolist()
        except RuntimeError as error:
            if "vmap" not in str(error):
                raise
            raise transformed() from error
        if any(f.gradient for f in flow) and any(
            isinstance(v, torch.Tensor) and v.is_floating_point() for v in seen
        ):
            raise UnsupportedOpError(
                f"PyTorch has no derivative of {op}", where=origin,
                hint="detach its operand, if its result is meant to be a constant",
            )  # fmt: skip
        if any(f.values or f.sizes or f.tensors for f in flow):
            self.reads.append(Read(op, spec, plain, operands, seen, origin, varying))
            self.watched.append(watched)
        self._answers.update(id(v) for v in seen)
        if len(seen) == 1 and not isinstance(op._schema.returns[0].type, torch.ListType):
            return seen[0]
        return seen

    def _value(self, node: fx.Node, constants: Any) -> Any:
        """The real value of a traced node; ``constants`` holds the tensors of the trace."""
        nodes = list(node.graph.nodes)
        if not self._values:
            places = [n for n in nodes if n.op == "placeholder"]
            given = [None if t is None else t.detach().clone() for t in self.inputs]
            self._values.update(zip(places, given, strict=True))
        writes = _torch.writes_in_place(node.graph)
        needed = None if writes else _traced.ancestors(node)
        for other in nodes:  # in order, so that what is written in place is read after
            if self._values.get(other, other) is None and (needed is None or other in needed):
                raise transformed()
            if other in self._values or (needed is not None and other not in needed):
                continue
            if other.op == "get_attr":
                self._values[other] = getattr(constants, str(other.target)).detach().clone()
                continue
            args = fx.node.map_arg(other.args, self._values.__getitem__)
            kwargs = fx.node.map_arg(other.kwargs, self._values.__getitem__)
            assert callable(other.target)
            self._values[other] = other.target(*args, **kwargs)
        return self._values[node]


def _asking() -> list[Any]:
    found = [_VALUES]
    for name in _ASKING:
        packet, overload = name.split(".")
        op = getattr(getattr(torch.ops.aten, packet, None), overload, None)
        found += [] if op is None else [op]
    return found


def transformed() -> InputError:
    """The refusal to look at values inside of a functional transform."""
    return InputError(
        "the structure of the model depends on the values of x or of weights, which nobody knows"
        " inside of a functional transform (torch.func.vmap, grad, ..) or of another model's trace",
        hint="call it outside: it is batched by itself",
    )


# --- Python values ----------------------------------------------------------------------------


def asking() -> bool:
    """Whether a model is captured on this thread by now."""
    return getattr(_local, "questions", None) is not None


def values_of(tensor: torch.Tensor) -> Any:
    """The real values of a tensor of the model that is captured by now, as nested lists."""
    torch.ops.fxhess.values(tensor)
    return _local.questions.last


@registry.substitute(torch.Tensor.item)
def item(tensor: torch.Tensor) -> Any:
    """A number that is only computed with can stay a tensor, a constant of the derivative; only
    what becomes a number of Python (an index, a branch) is read."""
    if tensor.numel() == 1 and tensor.is_floating_point():
        return tensor.detach().reshape(())
    return torch.Tensor.item(tensor)


@registry.substitute(torch.Tensor.tolist)
def tolist(tensor: torch.Tensor) -> Any:
    """Likewise for all entries."""
    if not tensor.is_floating_point():
        return values_of(tensor)
    if tensor.ndim == 0:
        return tensor.detach()
    return [tolist(entry) for entry in tensor.unbind()]


@registry.substitute(torch.Tensor.numpy)
def numpy(tensor: torch.Tensor, *, force: bool = False) -> Any:
    """An array of its own: nothing is written back into the tensor."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return np.array(values_of(tensor), dtype=dtype).reshape(tensor.shape)


@registry.substitute(torch.Tensor.__array__)
def array(tensor: torch.Tensor, dtype: Any = None, copy: bool | None = None) -> Any:
    found = numpy(tensor)
    return found if dtype is None else found.astype(dtype)


@registry.substitute(torch.tensor)
def tensor(data: Any, **options: Any) -> torch.Tensor:
    """Of tensors, as PyTorch: a constant of the derivative; but not read."""
    leaves = tree_leaves(data) if isinstance(data, (list, tuple)) else []
    if not any(isinstance(leaf, torch.Tensor) for leaf in leaves):
        return torch.tensor(data, **options)
    device = options.get("device") or next(t for t in leaves if isinstance(t, torch.Tensor)).device
    entries = [
        entry.detach().reshape(()) if isinstance(entry, torch.Tensor) else torch.tensor(entry)
        if not isinstance(entry, (list, tuple)) else tensor(entry)
        for entry in data
    ]  # fmt: skip
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in entries))
    rows = torch.stack([t.to(device, dtype) for t in entries])
    return rows.to(options.get("dtype") or dtype)


@registry.substitute(torch.Tensor.__format__)
def formatted(tensor: torch.Tensor, spec: str) -> str:
    """What a model prints while it is traced is of no account."""
    return format(float("nan"), spec) if tensor.ndim == 0 else "nan"


@registry.substitute(torch.tensor_split, torch.Tensor.tensor_split)
def tensor_split(input: torch.Tensor, indices_or_sections: Any, dim: int = 0) -> Any:
    """PyTorch's own reads the indices without asking."""
    if isinstance(indices_or_sections, torch.Tensor):
        indices_or_sections = values_of(indices_or_sections)
    return torch.tensor_split(input, indices_or_sections, dim)
