"""Adapter: what surrounds a call, and how to be outside of it.

A module of derivatives may be called where PyTorch looks on: under ``torch.func`` transforms, in a
trace (of another model, by ``make_fx`` or ``torch.export``), under other dispatch modes.  Its
program is made outside of all that, from stand-ins: it depends on shapes, types and devices, and
the tensors of such a call have no values, or none that may be looked at.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from fxhess._torch import stand_in

try:
    from torch._dispatch.python import no_python_dispatcher
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
    from torch._guards import tracing
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    _HOLLOW: tuple[type, ...] = (FakeTensor, FunctionalTensor)

    def no_tracing_context() -> contextlib.AbstractContextManager[object]:
        return tracing(None)
except ImportError:  # pragma: no cover - a future PyTorch that moved them
    no_python_dispatcher = contextlib.nullcontext  # type: ignore[assignment, misc]
    temporarily_clear_interpreter_stack = contextlib.nullcontext  # type: ignore[assignment]
    no_tracing_context = contextlib.nullcontext
    _HOLLOW = ()


_SOME = 1009  # the size of a batch, where it is not known


def transforming() -> bool:
    """Whether a functional transform (``torch.func.vmap``, ``grad``, ..) is under way."""
    try:
        return torch._C._functorch.peek_interpreter_stack() is not None
    except AttributeError:  # pragma: no cover - a PyTorch that moved it: take the plain path
        return True


def outside_of_modes() -> contextlib.AbstractContextManager[object]:
    """Inside, no tracing mode sees what is computed; where PyTorch has none such, nothing changes
    and what needs it is not traced."""
    try:
        from torch.utils._python_dispatch import _disable_current_modes
    except ImportError:  # pragma: no cover - a future PyTorch that moved it
        return contextlib.nullcontext()
    return _disable_current_modes()


@contextlib.contextmanager
def outside() -> Iterator[None]:
    """Inside, neither a functional transform nor a tracing mode sees what is computed.  Tensors
    made by them must not be touched there but for their shape, type and device."""
    with (
        temporarily_clear_interpreter_stack(),
        outside_of_modes(),
        no_python_dispatcher(),
        no_tracing_context(),
    ):
        yield


def has_values(tensor: torch.Tensor) -> bool:
    """Whether a tensor is one with values of its own, not one that stands for others in a
    functional transform or a trace."""
    if type(tensor) in (torch.Tensor, nn.Parameter):
        return not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return not isinstance(tensor, _HOLLOW)


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself if it has values, otherwise one like it without any; of some size where
    its own is only a symbol."""
    if has_values(tensor):
        return tensor
    return stand_in(tensor, [_SOME if isinstance(n, torch.SymInt) else n for n in tensor.shape])
