"""What a model must be to be captured, and what it must return: errors that say what to do."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fxhess.errors import CaptureError, InputError

# Where wrappers come from that gather weights, or sum gradients, when the wrapped module is called.
_DISTRIBUTED = ("torch.nn.parallel.distributed", "torch.distributed")


def check_model(model: nn.Module) -> None:
    """Refuse modules that cannot be read yet, or not at all.

    Raises:
        InputError: a lazily initialized module that has not seen an input.
        CaptureError: a module compiled by TorchScript, or wrapped for several processes.
    """
    for path, module in model.named_modules():
        name = f"'{path}'" if path else "the model"
        if isinstance(module, torch.jit.ScriptModule):
            raise CaptureError(
                f"{name} is compiled by TorchScript, which hides its operations and weights",
                hint="pass the Python module that it was made from",
            )
        if any(c.__module__.startswith(_DISTRIBUTED) for c in type(module).__mro__):
            raise CaptureError(
                f"{name} is {type(module).__name__}, which communicates when it is called itself;"
                " derivatives are computed without calling it",
                hint="wrap what holds the transformed module, or it itself: DDP(hess),"
                " fully_shard(hess); not the model in it",
            )
        tensors = (*module._parameters.values(), *module._buffers.values())
        if any(nn.parameter.is_lazy(t) for t in tensors):
            raise InputError(
                f"{name} is lazily initialized and has not seen an input yet",
                hint="call model(x) once before",
            )


def one_tensor(result: Any) -> torch.Tensor:
    """The tensor that a model returns, alone or as the only item of a tuple or list.

    Raises:
        CaptureError: it returns something else, and how to pick a tensor of it.
    """
    if isinstance(result, torch.Tensor):
        return result
    pick, items = _items(result)
    if pick == "[0]" and len(items) == 1:
        return one_tensor(result[0])
    if not items:
        raise CaptureError(
            f"the model returns {_kind(result)}, not one tensor that depends on x",
            hint="return a tensor: fxhess.transform(lambda x: ... model(x) ...)",
        )
    listed = ", ".join(items[:8]) + (", ..." if len(items) > 8 else "")
    raise CaptureError(
        f"the model returns several values ({_kind(result)} of {listed}); fxhess cannot know"
        " which one is to be differentiated",
        hint=f"say which: fxhess.transform(lambda x: model(x){pick})",
    )


def _items(result: Any) -> tuple[str, list[str]]:
    """How to pick a tensor out of a result, and what there is to pick."""
    fields = getattr(result, "_fields", None)  # of a named tuple
    if fields is None and dataclasses.is_dataclass(result):
        fields = [f.name for f in dataclasses.fields(result)]
    if fields:
        tensors = [n for n in fields if isinstance(getattr(result, n), torch.Tensor)]
        return f".{(tensors or fields)[0]}", [str(n) for n in tensors or fields]
    if isinstance(result, Mapping):
        keys = [k for k, v in result.items() if isinstance(v, torch.Tensor)] or list(result)
        return (f"[{keys[0]!r}]" if keys else ""), [repr(k) for k in keys]
    if isinstance(result, (tuple, list)):
        return "[0]", [_kind(value) for value in result]
    return "", []


def _kind(value: Any) -> str:
    if value is None or isinstance(value, (bool, int, float, complex)):
        return repr(value)
    if isinstance(value, torch.Tensor):
        return f"a tensor of {value.ndim} axes"
    return f"a {type(value).__name__}"


__all__ = ["check_model", "one_tensor"]
