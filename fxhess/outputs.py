"""What can be asked for: the value, and first and second derivatives, whole or in part."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxhess.errors import InputError

Index = tuple[int, ...]

_ORDER = {
    "value": 0, "gradient": 1, "jacobian": 1, "hessian": 2, "diagonal": 2, "laplacian": 2,
    "hvp": 2, "quadratic": 2, "entries": 2, "blocks": 2,
}  # fmt: skip
NAMES = tuple(_ORDER)
_DETAILED = {
    "entries": '("entries", [(0, 1), ...]): pairs of indices into x',
    "blocks": '("blocks", 0): event axes along which only the diagonal is wanted',
}


@dataclass(frozen=True)
class Output:
    """One output: its name, and for ``entries`` the pairs of indices (each a tuple, one number an
    event axis), for ``blocks`` the event axes whose two indices are the same."""

    name: str
    entries: tuple[tuple[Index, Index], ...] = ()
    axes: tuple[int, ...] = ()

    @property
    def order(self) -> int:
        """How many derivatives it takes."""
        return _ORDER[self.name]

    @property
    def takes_vector(self) -> bool:
        """Whether it is asked along a vector that is given at the call."""
        return self.name in ("hvp", "quadratic")


@dataclass(frozen=True)
class Given:
    """An input of a program besides x: its name and the sizes of its axes
    ``[*leading, *batch, *event]``, the batch only where it is given for each sample; its type,
    where that is not x's; whether it is a ``constant`` that the model takes."""

    name: str
    leading: tuple[int, ...]
    batched: bool
    event: tuple[int, ...]
    dtype: torch.dtype | None = None
    constant: bool = False

    @property
    def batch_axis(self) -> int | None:
        """Where its batch axes begin."""
        return len(self.leading) if self.batched else None

    def stand_in(self, batch: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A meta tensor of its shape for a batch of these sizes."""
        middle = tuple(batch) if self.batched else ()
        shape = (*self.leading, *middle, *self.event)
        return torch.empty(shape, dtype=self.dtype or dtype, device="meta")


def parse(outputs: Any, event_ndim: int | None) -> tuple[Output, ...]:
    """The outputs that a user named: one, or a sequence of them; ``event_ndim``: the axes of a
    sample, None where that is not known yet.

    Raises:
        InputError: an unknown name, or details that do not fit.
    """
    single = isinstance(outputs, str) or is_detailed(outputs)
    if not isinstance(outputs, str | Sequence):
        raise InputError(f"cannot read outputs={outputs!r}", hint=_valid())
    found = tuple(_one(o, event_ndim) for o in ([outputs] if single else outputs))
    names = [o.name for o in found]
    if not names or len(set(names)) != len(names):
        raise InputError("outputs must be named, and once each", hint=_valid())
    return found


def is_detailed(output: Any) -> bool:
    """Whether this is one output with details, not a sequence of outputs."""
    return (
        isinstance(output, Sequence)
        and len(output) == 2
        and isinstance(output[0], str)
        and output[0] in _DETAILED
        and not isinstance(output[1], str)
        and not is_detailed(output[1])
    )


def refuse_details(outputs: Sequence[Output]) -> None:
    """Raises InputError for outputs that speak of the axes of one input, where there are
    several."""
    for output in outputs:
        if output.name in _DETAILED:
            raise InputError(
                f"output {output.name!r} is of one input, and wrt names several",
                hint="transform once more with one of them as wrt, or take parts of 'hessian'",
            )


def _one(output: Any, event_ndim: int | None) -> Output:
    if isinstance(output, str) and output in _ORDER:
        if output in _DETAILED:
            raise InputError(f"output {output!r} needs details", hint=_DETAILED[output])
        return Output(output)
    if not is_detailed(output):
        near = difflib.get_close_matches(str(output).lower(), NAMES, 1)
        meant = f"{near[0]!r}? " if near else ""
        raise InputError(f"unknown output {output!r}", hint=meant + _valid())
    name, details = output
    try:
        if name == "blocks":
            return Output(name, axes=_axes(_whole(details), event_ndim))
        pairs = tuple((_index(i, event_ndim), _index(j, event_ndim)) for i, j in details)
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(f"cannot read output {output!r}", hint=_DETAILED[name]) from error
    return Output(name, entries=pairs)


def _axes(axes: Sequence[int], event_ndim: int | None) -> tuple[int, ...]:
    if event_ndim is None:
        return tuple(sorted(set(axes)))
    for axis in axes:
        if not -event_ndim <= axis < event_ndim:
            raise InputError(
                f"blocks along event axis {axis}, but a sample has {event_ndim} axes",
                hint="event_ndim= of transform counts the axes of a sample",
            )
    return tuple(sorted({axis % event_ndim for axis in axes}))


def _whole(given: Any) -> tuple[int, ...]:
    """One whole number, or several, of any type that counts (NumPy's and 0-d tensors included).

    Raises:
        TypeError: it is something else.
    """
    if hasattr(given, "__index__") and getattr(given, "ndim", 0) == 0:
        return (operator.index(given),)
    return tuple(map(operator.index, given))


def _index(index: Any, event_ndim: int | None) -> Index:
    whole = _whole(index)
    if event_ndim is not None and len(whole) != event_ndim:
        raise InputError(
            f"an entry has {len(whole)} numbers where a sample of x has {event_ndim} axes",
            hint=_DETAILED["entries"],
        )
    return whole


def given_for(
    outputs: Sequence[Output],
    x: torch.Tensor,
    event_ndim: int,
    vector: torch.Tensor | None,
    metric: torch.Tensor | None,
) -> tuple[tuple[Given, ...], list[torch.Tensor]]:
    """What is given at a call besides x, described and as tensors of x's batch shape.

    Raises:
        InputError: it is missing, not asked for, or does not fit x.
    """
    nb = x.ndim - event_ndim
    batch, event = tuple(x.shape[:nb]), tuple(x.shape[nb:])
    names = [output.name for output in outputs]
    along = [output.name for output in outputs if output.takes_vector]
    found: list[Given] = []
    tensors: list[torch.Tensor] = []
    if along and vector is None:
        raise InputError(
            f"{along[0]!r} needs a vector",
            hint="hess(x, vector=v) with v of x's shape, or several along a leading axis",
        )
    if vector is not None:
        if not along:
            raise InputError("a vector is given, but no output takes one", hint=_valid())
        _same_kind("vector", vector, x)
        if tuple(vector.shape) == event and nb:
            vector = vector.expand(x.shape)
        leading = tuple(vector.shape[: vector.ndim - x.ndim])
        if tuple(vector.shape) != (*leading, *x.shape) or len(leading) > 1:
            raise InputError(
                f"vector has shape {list(vector.shape)} where x has {list(x.shape)}",
                hint="a vector has x's shape, that of one sample, or x's with one leading axis;"
                " several for all samples: v.reshape(k, *[1] * batch_ndim, *event)"
                ".expand(k, *x.shape)",
            )
        found.append(Given("vector", leading, True, event))
        tensors.append(vector)
    if metric is not None:
        if "laplacian" not in names:
            raise InputError("a metric is given, but no Laplacian is asked for", hint=_valid())
        _same_kind("metric", metric, x)
        whole = (*event, *event)
        if tuple(metric.shape) not in (whole, (*batch, *whole)):
            raise InputError(
                f"metric has shape {list(metric.shape)}; it has to be {list(whole)} for all"
                f" samples or {[*batch, *whole]} for each"
            )
        found.append(Given("metric", (), metric.ndim > len(whole), whole))
        tensors.append(metric)
    return tuple(found), tensors


def leading_axes(outputs: Sequence[Output], given: Sequence[Given]) -> list[tuple[int, ...]]:
    """Sizes of the axes that stand before the batch in each output."""
    vectors = [g.leading for g in given if g.name == "vector"]
    return [vectors[0] if output.takes_vector else () for output in outputs]


def _same_kind(name: str, tensor: torch.Tensor, x: torch.Tensor) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise InputError(
            f"{name} must be a tensor, not {type(tensor).__name__}",
            hint="torch.as_tensor(..), of x's type and device",
        )
    if tensor.dtype != x.dtype or tensor.device != x.device:
        raise InputError(
            f"{name} is {tensor.dtype} on {tensor.device}, x {x.dtype} on {x.device}",
            hint=f"{name}.to(x)",
        )


def check_entries(output: Output, event: Sequence[int]) -> None:
    """Entries within a sample's shape.

    Raises:
        InputError: one is not.
    """
    for pair in output.entries:
        for index in pair:
            if any(not -n <= i < n for i, n in zip(index, event, strict=True)):
                raise InputError(f"entry {index} is outside of a sample of shape {list(event)}")


def flat(index: Index, event: Sequence[int]) -> int:
    """The position of an entry in a sample read as one list."""
    position = 0
    for i, n in zip(index, event, strict=True):
        position = position * n + i % n
    return position


def _valid() -> str:
    plain = ", ".join(repr(name) for name in _ORDER if name not in _DETAILED)
    return f"valid outputs are {plain}, {'; '.join(_DETAILED.values())}"
