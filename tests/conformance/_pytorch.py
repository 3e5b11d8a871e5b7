"""PyTorch's own tables of operators and modules: the only place that touches
``torch.testing._internal``.

An :class:`Entry` is a row of one of the tables, a :class:`Use` one call of it, seen as a function
of one of its operands.
"""

from __future__ import annotations

import importlib.util
import random
import sys
import types
import unittest
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

MAX_ENTRIES = 60  # of x: the referee takes one backward for each
SEED = 20  # of the samples
DRAWS = 42  # of numbers that are drawn at a call: as some entries of the tables seed themselves
WAYS = ("none", "same", "all", "own axis")
# It reads memory that is not its own where the sizes of its operands do not fit (torch 2.13).
WHOLE = {"lu_unpack"}


@dataclass(frozen=True)
class Use:
    """A call of an operator or a module, as a function of one of its operands.

    ``call(x, lift)`` runs it with x in the operand's place: ``x`` of the operand's own shape, or,
    where the operand has too many entries, the first of them in a row (the others stay as they
    are).  For ``x: [B, *shape]``, ``lift`` says what becomes of the others: "none" leaves them,
    "same" gives those of x's rank an axis of B at the front, "all" gives it to all of them.
    """

    label: str
    x: torch.Tensor
    call: Callable[[torch.Tensor, str | None], Any]
    embedded: bool  # whether x is a part of the operand
    modules: tuple[nn.Module, ...] = ()
    ways: tuple[str, ...] = WAYS  # to make a batch: a further axis, or the operand's own first one


@dataclass(frozen=True)
class Entry:
    """A row of a table: ``table`` is "op" or "module"."""

    table: str
    name: str
    source: Callable[[], Iterator[Use | None]]

    def uses(self, limit: int) -> Iterator[Use]:
        """The first ``limit`` uses, spread over what the table offers."""
        seed_all()
        found = [u for u in self.source() if u is not None]
        if self.name in WHOLE:
            found = [replace(u, ways=("all",)) for u in found]
        step = max(1, len(found) // limit)
        yield from found[::step][:limit]


def seed_all() -> None:
    """The same samples however the work is divided."""
    torch.random.default_generator.manual_seed(SEED)
    random.seed(SEED)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(SEED)


def reseed() -> None:
    """PyTorch's own numbers from the start, on the CPU alone: ``torch.manual_seed`` takes a
    millisecond where there is no accelerator."""
    torch.random.default_generator.manual_seed(DRAWS)


class ForEachEntry(TorchFunctionMode):
    """PyTorch's functions that draw a number only for some entries, by their values, drawing one
    for every entry instead: so that what a sample gets does not depend on the others, and that
    double backward sees the numbers that fxhess does."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.rrelu and _trains(*args, **kwargs):
            return _rrelu(*args, **kwargs)
        return func(*args, **kwargs)


def _trains(
    input: Any, lower: Any = 0, upper: Any = 0, training: bool = False, inplace: Any = False
) -> bool:
    return training


def _rrelu(
    input: torch.Tensor, lower: float = 1 / 8, upper: float = 1 / 3, *_: Any, **__: Any
) -> torch.Tensor:
    """In training, as documented."""
    slope = lower + (upper - lower) * torch.rand(input.shape, dtype=input.dtype)
    return torch.where(input >= 0, input, input * slope)


def entries() -> list[Entry]:
    """All rows that PyTorch says can be differentiated twice, and that take float64, or complex
    numbers of it, on the CPU."""
    return [*_operators(), *_modules()]


@cache
def _tables() -> tuple[Any, Any]:
    if "expecttest" not in sys.modules and importlib.util.find_spec("expecttest") is None:
        stub: Any = types.ModuleType("expecttest")  # its base class is all that is needed
        stub.TestCase = unittest.TestCase
        sys.modules.setdefault("expecttest", stub)
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

    return op_db, module_db


# --- operators ----------------------------------------------------------------------------------


def _operators() -> Iterator[Entry]:
    for op in _tables()[0]:
        if not (op.supports_autograd and op.supports_gradgrad):
            continue
        dtype = next((t for t in (torch.float64, torch.complex128) if t in op.dtypes), None)
        if dtype is not None:
            variant = f".{op.variant_test_name}" if op.variant_test_name else ""
            yield Entry("op", f"{op.name}{variant}", lambda op=op, t=dtype: _operator_uses(op, t))


def _operator_uses(op: Any, dtype: torch.dtype) -> Iterator[Use | None]:
    for sample in op.sample_inputs("cpu", dtype, requires_grad=True):
        clean = sample.output_process_fn_grad

        def run(*args: Any, clean: Any = clean, **kwargs: Any) -> Any:
            return clean(op(*args, **kwargs))

        yield _use(run, (sample.input, *sample.args), sample.kwargs)


# --- modules ------------------------------------------------------------------------------------


def _modules() -> Iterator[Entry]:
    for info in _tables()[1]:
        if not info.supports_gradgrad:
            continue
        for training in (True, False) if info.train_and_eval_differ else (False,):
            mode = f" ({'training' if training else 'evaluated'})"
            name = info.name + (mode if info.train_and_eval_differ else "")
            yield Entry("module", name, lambda i=info, t=training: _module_uses(i, t))


def _module_uses(info: Any, training: bool) -> Iterator[Use | None]:
    for sample in info.module_inputs_func(
        info, device="cpu", dtype=torch.float64, requires_grad=True, training=training
    ):
        made, given = sample.constructor_input, sample.forward_input
        module = info.module_cls(*made.args, **made.kwargs).to(torch.float64).train(training)
        if info.is_lazy:
            module(*given.args, **given.kwargs)
        if given is None or not isinstance(module, nn.Module):
            continue

        def run(*args: Any, module: nn.Module = module, **kwargs: Any) -> Any:
            return module(*args, **kwargs)

        use = _use(run, given.args, given.kwargs, (module,))
        yield use if use is not None else _use_of_weights(module, given.args, given.kwargs)


def _use_of_weights(module: nn.Module, args: Any, kwargs: Any) -> Use | None:
    """A module of which no operand is real (an embedding): as a function of its first parameter."""
    named = next(iter(module.named_parameters()), None)
    if named is None:
        return None
    name, weight = named

    def run(weight: torch.Tensor) -> Any:
        return torch.func.functional_call(module, {name: weight}, args, kwargs)

    return _use(run, (weight.detach().clone().requires_grad_(),), {}, (module,))


# --- one call -----------------------------------------------------------------------------------


def _use(
    run: Callable[..., Any], args: Any, kwargs: Any, modules: tuple[nn.Module, ...] = ()
) -> Use | None:
    leaves, spec = tree_flatten((tuple(args), dict(kwargs)))
    place = next((i for i, v in enumerate(leaves) if _differentiable(v)), None)
    if place is None:
        return None
    operand = leaves[place].detach()
    others = [v.detach() if isinstance(v, torch.Tensor) else v for v in leaves]
    embedded = operand.numel() > MAX_ENTRIES
    # A complex operand is made of a real one: its real part, and a multiple of it.
    twist = torch.complex(torch.ones(()), torch.tensor(0.5)).to(operand.dtype)
    real = operand.real if operand.is_complex() else operand
    rest = real.flatten()[MAX_ENTRIES:].clone()

    def call(x: torch.Tensor, lift: str | None = None) -> Any:
        batch = () if lift is None else (x.shape[0],)
        if embedded:
            x = torch.cat([x, rest.expand(*batch, len(rest))], -1).reshape(*batch, *operand.shape)
        if operand.is_complex():
            x = x * twist
        if modules:
            x = x.clone()  # what writes into its operand may do so

        def lifted(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or lift in (None, "none"):
                return value
            if lift == "all" or value.ndim == operand.ndim:
                return value.expand(*batch, *value.shape)
            return value

        now = [x if i == place else lifted(v) for i, v in enumerate(others)]
        given, named = tree_unflatten(now, spec)
        return run(*given, **named)

    x = real.flatten()[:MAX_ENTRIES].clone() if embedded else real.clone()
    return Use(_label(args, kwargs), x, call, embedded, modules)


def _differentiable(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.dtype in (torch.float64, torch.complex128)
        and value.layout == torch.strided
        and value.numel() > 0
        and value.requires_grad
    )


def _label(args: Any, kwargs: Any) -> str:
    def text(value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return "×".join(map(str, value.shape)) or "scalar"
        if isinstance(value, (list, tuple)):
            return "[" + ", ".join(map(text, value)) + "]"
        return str(value)

    return ", ".join([*map(text, args), *(f"{k}={text(v)}" for k, v in kwargs.items())])[:100]
