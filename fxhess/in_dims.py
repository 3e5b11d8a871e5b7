"""Which arguments have batch axes: as ``in_dims`` tells, or as their shapes do."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from fxhess.errors import InputError
from fxhess.trees import Flat, Path
from fxhess.wrt import Names

AUTO = "auto"  # nothing is said of a tensor's batch axis


def told(in_dims: Any, flat: Flat, names: Names, known: Collection[str]) -> list[Any]:
    """What ``in_dims`` says of each tensor: an axis, None, or ``AUTO``."""
    axes: list[Any] = [AUTO] * len(flat.tensors)
    if in_dims is None:
        return axes

    def spread(given: Any, path: Path) -> None:
        if given is None or (isinstance(given, int) and not isinstance(given, bool)):
            for i, p in enumerate(flat.paths):
                if p[: len(path)] == path:
                    axes[i] = given
        elif isinstance(given, Mapping):
            for key, value in given.items():
                spread(value, (*path, str(key)))
        elif isinstance(given, (tuple, list)):
            for key, value in enumerate(given):
                spread(value, (*path, str(key)))
        else:
            raise InputError(
                f"cannot read in_dims={in_dims!r}",
                hint="an axis or None for each argument, in a tuple or a dictionary by name",
            )

    given = in_dims
    if isinstance(given, (tuple, list)):
        given = {names.at(i): value for i, value in enumerate(given)}
    if isinstance(given, Mapping):
        for key, value in given.items():
            path = names.path((str(key),))
            if path[0] not in known:
                raise InputError(f"in_dims names argument {key!r}, which this call lacks")
            spread(value, path)
    else:
        spread(given, ())
    return axes


def batch_axes(
    flat: Flat, chosen: Sequence[int], said: Sequence[Any], event_ndim: int
) -> tuple[list[int | None], list[int], torch.Size]:
    """The batch axis of each tensor (None: shared), which of them were guessed from shapes, and
    the batch sizes."""
    axes: list[int | None] = [None] * len(said)
    guessed: list[int] = []
    leader = next((i for i in chosen if i >= 0 and said[i] is not None), None)
    nb = 1  # where all samples share what is differentiated
    if leader is not None:
        nb = flat.tensors[leader].ndim - event_ndim
        if nb < 0:
            raise InputError(
                f"{_name(flat, leader)} has {flat.tensors[leader].ndim} axes, a sample"
                f" {event_ndim}",
                hint="event_ndim= counts the axes of one sample of what is differentiated",
            )
    batch: torch.Size | None = None
    for i in sorted(range(len(said)), key=lambda i: (i != leader, i)):
        tensor, axis = flat.tensors[i], said[i]
        if axis == AUTO and i not in chosen:
            lead = tensor.shape[:nb]
            if not nb or tensor.ndim < nb or (batch is not None and lead != batch):
                continue
            guessed.append(i)
        if axis is None or not nb:
            continue
        axis = axes[i] = _checked_axis(0 if axis == AUTO else axis, tensor, nb, _name(flat, i))
        lead = leading(tensor, axis).shape[:nb]
        if batch is not None and lead != batch:
            raise InputError(
                f"arguments disagree on the batch: {_name(flat, i)} has {list(lead)}, others"
                f" have {list(batch)}",
                hint="in_dims= says which have a batch axis, and where",
            )
        batch = lead
    return axes, guessed, batch if batch is not None else torch.Size()


def leading(tensor: torch.Tensor, axis: int | None) -> torch.Tensor:
    return tensor.movedim(axis, 0) if axis else tensor


def _checked_axis(axis: int, tensor: torch.Tensor, nb: int, name: str) -> int:
    if axis != 0 and nb != 1:
        raise InputError(
            f"in_dims gives axis {axis} for {name}, but there are {nb} batch axes",
            hint="other axes than the leading ones can be the batch where there is one of it:"
            " event_ndim= counts the axes of a sample",
        )
    if not -tensor.ndim <= axis < tensor.ndim or tensor.ndim < nb:
        raise InputError(f"in_dims gives axis {axis} for {name}, which has {tensor.ndim} axes")
    return axis % tensor.ndim


def _name(flat: Flat, i: int) -> str:
    return f"argument '{'.'.join(flat.paths[i])}'"
