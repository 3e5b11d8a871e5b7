"""A sketch of a model: what a capture would see, a tenth of its time, told apart by a digest.

The model runs once, on tensors without memory, under two observers: all calls of PyTorch's Python
functions and all operators are written down with their arguments, in order, and with them what else
a capture depends on (the line that called, whether gradients are recorded, the weights' shapes and
ties).  Two models of one sketch give a capture the same graph, so the program of the one is that of
the other.  What is not seen from here, or could differ for another batch size, gives no sketch: a
tensor of unknown origin, an operator that is not PyTorch's own, a condition on a batch size, a
module that changes.  Adapter: touches tracing internals of PyTorch.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fxhess import _outside, _settings, _torch, _traced, registry
from fxhess.closures import tensor_paths
from fxhess.form import PLAIN, Form
from fxhess.functions import whole_functions
from fxhess.intake import one_tensor
from fxhess.lines import calling_line
from fxhess.naming import LIBRARIES
from fxhess.outputs import Given
from fxhess.sources import Source, exclusive

try:
    from torch._subclasses.fake_tensor import FakeTensorMode
except ImportError:  # pragma: no cover - a future PyTorch that moved it: no sketches
    FakeTensorMode = None  # type: ignore[assignment, misc]

# Batch sizes to run with: primes, so that a size that one of them divides came from the batch.
_BATCH = (1009, 1013, 1019)
_MANY = 100_000  # calls; a model that makes more is captured without a sketch


class _NoSketchError(Exception):
    """What is seen of the model does not tell all that a capture depends on."""

    count = 0  # so that it is known of those that the model itself catches

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        _NoSketchError.count += 1


@dataclass(frozen=True)
class Sketch:
    """The digest of what was seen, and the places of the model's tensors: parameters and buffers
    in order, then other attributes as they were met."""

    digest: str
    places: tuple[tuple[str, ...], ...]

    def index(self, sources: Sequence[Source]) -> list[int] | None:
        """The sources as numbers of places; None where one is no place (a constant)."""
        numbers = {place: i for i, place in enumerate(self.places)}
        found = [numbers.get(s.path) if s.constant is None else None for s in sources]
        return None if None in found else found  # type: ignore[return-value]


class _Batch(int):
    """A batch size, or a multiple of one: it may be multiplied and passed on, but not asked about
    (a capture would note a condition)."""

    def __mul__(self, other: Any) -> Any:
        return sized(int(self) * int(other)) if isinstance(other, int) else NotImplemented

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Any:
        if isinstance(other, int) and int(other) and int(self) % int(other) == 0:
            return sized(int(self) // int(other))
        raise _NoSketchError("a batch size was divided")

    def __eq__(self, other: object) -> bool:
        if isinstance(other, _Batch) and int(self) == int(other):
            return True
        raise _NoSketchError("a batch size was compared")

    def __ne__(self, other: object) -> bool:
        return not self == other

    def _asked(self, *_: Any) -> Any:
        raise _NoSketchError("a batch size was asked about")

    def __int__(self) -> int:
        return int.__add__(self, 0)


_ASKING = """
    hash bool float lt le gt ge add radd sub rsub truediv rtruediv rfloordiv mod rmod divmod rdivmod
    pow rpow neg abs and rand or ror xor rxor lshift rlshift rshift rrshift invert round trunc floor
    ceil str repr format
"""
for _slot in _ASKING.split():
    setattr(_Batch, f"__{_slot}__", _Batch._asked)


class _Shape(tuple[int, ...]):
    """The sizes of a tensor, which keep what they are when taken apart or multiplied."""

    def __getitem__(self, at: Any) -> Any:
        found = tuple.__getitem__(self, at)
        return _Shape(found) if isinstance(at, slice) else found

    def numel(self) -> int:
        return math.prod(self)


def sized(n: int) -> int:
    """A size, marked where it is one of a batch."""
    return _Batch(n) if n and any(n % prime == 0 for prime in _BATCH) else n


class _Notes:
    """What is seen, as a running digest; tensors are numbered as they appear."""

    def __init__(self, paths: Callable[[], dict[int, tuple[str, ...]]]) -> None:
        self.digest = hashlib.sha256()
        self.places: list[tuple[str, ...]] = []
        self.count = 0
        self._paths = paths
        self._numbers: dict[int, int] = {}
        self._alive: list[torch.Tensor] = []

    def write(self, *parts: str) -> None:
        self.count += 1
        if self.count > _MANY:
            raise _NoSketchError("too many calls")
        self.digest.update("\x1f".join(parts).encode() + b"\x1e")

    def made(self, value: Any) -> str:
        """Number the tensors in a result."""
        if isinstance(value, torch.Tensor):
            if id(value) not in self._numbers:
                self._numbers[id(value)] = len(self._alive)
                self._alive.append(value)
            return f"%{self._numbers[id(value)]}:{_spec(value)}"
        if isinstance(value, (list, tuple)):
            return f"({','.join(map(self.made, value))})"
        return self.told(value)

    def told(self, value: Any) -> str:
        """An argument as text."""
        if isinstance(value, torch.Tensor):
            if id(value) not in self._numbers:
                self._meet(value)
            return f"%{self._numbers[id(value)]}"
        if isinstance(value, _Batch):
            return f"batch {int.__repr__(value)}"
        if value is None or type(value) in _PLAIN:
            return f"{type(value).__name__} {value!r}"
        if isinstance(value, (list, tuple)):
            return f"{type(value).__name__}({','.join(map(self.told, value))})"
        if isinstance(value, dict):
            items = (f"{self.told(k)}:{self.told(v)}" for k, v in value.items())
            return f"{{{','.join(items)}}}"
        if isinstance(value, slice):
            return f"slice{self.told((value.start, value.stop, value.step))}"
        raise _NoSketchError(f"an argument of type {type(value).__name__}")

    def _meet(self, tensor: torch.Tensor) -> None:
        """A tensor that no call made: it has to be an attribute of the model."""
        place = self._paths().get(id(tensor))
        if place is None:
            raise _NoSketchError("a tensor of unknown origin")
        self.places.append(place)
        self.write("attribute", ".".join(place), self.made(tensor))


_PLAIN = (
    bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format,
    type(Ellipsis),
)  # fmt: skip


def _spec(t: torch.Tensor) -> str:
    return f"{t.dtype}{tuple(t.shape)}{t.stride()}{t.device}{t.requires_grad}"


class _Functions(TorchFunctionMode):
    """Notes calls of PyTorch's Python functions, and hands out sizes of the batch as such."""

    def __init__(self, notes: _Notes) -> None:
        super().__init__()
        self.notes = notes

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any | None = None
    ) -> Any:
        notes = self.notes
        given = notes.told((args, kwargs or {}))
        notes.write(_name(func), given, calling_line(), str(torch.is_grad_enabled()))
        result = registry.substituted(func)(*_plain(args), **_plain(kwargs or {}))
        if isinstance(result, int) and not isinstance(result, bool):
            if func is torch.Tensor.__len__ and isinstance(sized(result), _Batch):
                raise _NoSketchError("len() of a batch")  # makes it a plain number
            return sized(result)
        if isinstance(result, torch.Size):
            return _Shape(map(sized, result))
        if type(result) is tuple and all(type(n) is int for n in result):
            return tuple(map(sized, result))
        notes.write("gives", notes.made(result))
        return result


class _Operators(TorchDispatchMode):
    """Notes calls of operators."""

    def __init__(self, notes: _Notes) -> None:
        super().__init__()
        self.notes = notes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any | None = None
    ) -> Any:
        if func.namespace not in (*LIBRARIES, "prim"):
            raise _NoSketchError(f"the operator {func}")
        self.notes.write(str(func), self.notes.told((args, kwargs or {})))
        result = func(*args, **(kwargs or {}))
        self.notes.write("gives", self.notes.made(result))
        return result


def _name(func: Any) -> str:
    """The name of a function of PyTorch's own."""
    owner = getattr(func, "__self__", None)
    if isinstance(owner, (types.GetSetDescriptorType, property)):  # an attribute of tensors
        inner = owner.fget if isinstance(owner, property) else owner
        return f"attribute {getattr(inner, '__name__', inner)!s}"
    own = getattr(func, "__qualname__", None) or getattr(func, "__name__", None)
    home = getattr(func, "__module__", None) or getattr(
        getattr(func, "__objclass__", None), "__module__", "torch"
    )
    if own is None or str(home).partition(".")[0] != "torch":
        raise _NoSketchError(f"the function {func!r}")
    return f"{home}.{own}"


def _plain(value: Any) -> Any:
    """Arguments with plain numbers for sizes of the batch."""
    if isinstance(value, _Batch):
        return int(value)
    if type(value) in (list, tuple):
        return type(value)(map(_plain, value))
    if isinstance(value, (torch.Size, _Shape)):
        return torch.Size(map(_plain, value))
    if type(value) is dict:
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, slice):
        return slice(*map(_plain, (value.start, value.stop, value.step)))
    return value


def sketch(
    model: nn.Module,
    x: torch.Tensor,
    batch_ndim: int,
    form: Form = PLAIN,
    constants: Sequence[torch.Tensor] = (),
    described: Sequence[Given] = (),
) -> Sketch | None:
    """The sketch of the model for calls of this ``form`` and all sizes of the first ``batch_ndim``
    axes (see :func:`fxhess.capture.capture`); None where it cannot be told."""
    if FakeTensorMode is None or batch_ndim > len(_BATCH) or _outside.transforming():
        return None
    if _modes() or _torch.autocasting(x.device):
        return None
    if any(isinstance(sized(n), _Batch) for t in (x, *constants) for n in t.shape[batch_ndim:]):
        return None
    notes = _Notes(functools.cache(lambda: tensor_paths(model)))
    try:
        with _unchanged(model), exclusive():
            before = _NoSketchError.count
            _run(model, x, batch_ndim, form, list(zip(constants, described, strict=True)), notes)
            if _NoSketchError.count != before:
                return None
    except Exception:  # whatever the reason: a capture tells it, or does better
        return None
    return Sketch(notes.digest.hexdigest(), tuple(notes.places))


def _modes() -> bool:
    """Whether somebody else watches what is called."""
    stacks = ("_len_torch_function_stack", "_len_torch_dispatch_stack")
    return any(getattr(torch._C, name, lambda: 1)() for name in stacks)


def _run(
    model: nn.Module,
    x: torch.Tensor,
    batch_ndim: int,
    form: Form,
    constants: Sequence[tuple[torch.Tensor, Given]],
    notes: _Notes,
) -> None:
    for name, module in model.named_modules():
        kind = type(module)
        notes.write(name, kind.__module__, kind.__qualname__, str(module.training))
    notes.write(str(torch.get_default_dtype()), str(batch_ndim))
    plain = replace(form, statics=())  # values of Python are told one by one
    notes.write(repr(plain), notes.told(form.statics))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes: dict[str, torch.Tensor] = {}
    known: dict[int, torch.Tensor] = {}
    for named in (nn.Module.named_parameters, nn.Module.named_buffers):  # as in a capture
        for path, module in model.named_modules():
            for name, tensor in named(module, recurse=False, remove_duplicate=False):
                place = (*path.split("."), name) if path else (name,)
                if id(tensor) not in known:
                    known[id(tensor)] = mode.from_tensor(tensor, static_shapes=True).detach()
                fakes[".".join(place)] = known[id(tensor)]
                notes.places.append(place)
                notes.write(".".join(place), notes.made(known[id(tensor)]), str(tensor.layout))
    with (
        _settings.plain_attention(),
        _settings.exporting(),
        _traced.unrolled(),
        torch.compiler.set_stance("force_eager"),
        _settings.plain_layers(),
        torch.enable_grad(),
        whole_functions(),
        _torch.quiet(),
        mode,
    ):
        batch = _BATCH[:batch_ndim]
        shape = (*batch, *x.shape[batch_ndim:])
        example = torch.empty(shape, dtype=x.dtype, device=x.device)
        notes.write("x", notes.made(example))
        others = []
        for tensor, given in constants:
            shape = (*batch, *given.event) if given.batched else given.event
            others.append(torch.empty(shape, dtype=tensor.dtype, device=tensor.device))
            notes.write(repr(given), notes.made(others[-1]), str(tensor.stride()))
        with _Operators(notes), _Functions(notes):
            args, kwargs, own = form.arguments(example, others)
            result = torch.func.functional_call(
                model, {**fakes, **own}, args, kwargs, tie_weights=False
            )
            result = form.reduced(one_tensor(result))
        notes.write("result", notes.told(result))


@contextlib.contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Put back what the model writes into attributes of its own modules, and refuse it."""
    before = [(module, dict(vars(module))) for module in model.modules()]
    inside = [(held, held.copy()) for _, own in before for held in own.values() if _holds(held)]
    try:
        yield
    finally:
        changed = False
        for held, copy in inside:
            if not _same(held, copy):
                changed = True
                held.clear()
                held.extend(copy) if isinstance(held, list) else held.update(copy)
        for module, own in before:
            if not _same(vars(module), own):
                changed = True
                vars(module).clear()
                vars(module).update(own)
    if changed:
        raise _NoSketchError("the model changes when it is called")


def _holds(value: Any) -> bool:
    return isinstance(value, (dict, list, set))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return len(a) == len(b) and all(k in b and v is b[k] for k, v in a.items())
    if isinstance(a, set):
        return bool(a == b)
    return len(a) == len(b) and all(v is w for v, w in zip(a, b, strict=True))


__all__ = ["Sketch", "sketch"]
