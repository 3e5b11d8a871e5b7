"""Uses of writing into parts of a tensor, in place and functional."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fxhess.testing import Sample

BOX = (3, 4)
SQUARE = (4, 4)

INDEX = torch.tensor([2, 0])
TWICE = torch.tensor([2, 0, 2])
GRID = torch.tensor([[0, 2], [1, 3]])


def _rows(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(x.shape[0])


def _into(write: Callable[[torch.Tensor, torch.Tensor], Any], *shape: int) -> Any:
    """``write(out, x)`` into zeros of ``[batch, *shape]``."""

    def function(x: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(x.shape[0], *shape, dtype=x.dtype)
        write(out, x)
        return out

    return function


def _onto(write: Callable[[torch.Tensor, torch.Tensor], Any]) -> Any:
    """``write(y, x)`` onto the value ``y = x sin x``."""

    def function(x: torch.Tensor) -> torch.Tensor:
        y = x * torch.sin(x)
        write(y, x)
        return y

    return function


def _set(*key: Any, value: Callable[[torch.Tensor], Any]) -> Callable[..., None]:
    def write(out: torch.Tensor, x: torch.Tensor) -> None:
        out[key] = value(x)

    return write


def _set_where(key: Callable[[torch.Tensor], Any], value: Callable[..., Any]) -> Any:
    def write(out: torch.Tensor, x: torch.Tensor) -> None:
        out[key(x)] = value(x)

    return write


def _add_to(*key: Any, value: Callable[[torch.Tensor], Any]) -> Callable[..., None]:
    def write(out: torch.Tensor, x: torch.Tensor) -> None:
        out[key] += value(x)

    return write


ALL = slice(None)

SLICES = [
    Sample("column into zeros", _into(_set(ALL, 1, value=lambda x: x[:, 0]), 3)),
    Sample("columns into zeros", _into(_set(ALL, slice(0, 2), value=lambda x: x[:, :2]), 3)),
    Sample("column of a product", _onto(_set(ALL, 1, value=lambda x: x[:, 0] * x[:, 2]))),
    Sample("a number", _onto(_set(ALL, 1, value=lambda x: 2.0))),
    Sample("every second", _onto(_set(ALL, slice(None, None, 2), value=lambda x: x[:, 1::2]))),
    Sample("all", _onto(_set(ALL, value=lambda x: x.exp()))),
    Sample("row of a matrix", _onto(_set(ALL, 1, value=lambda x: x[:, 0].sin())), BOX),
    Sample("block", _onto(_set(ALL, slice(1, 3), slice(2), value=lambda x: x[:, :2, 2:])), BOX),
    Sample("broadcast", _onto(_set(ALL, slice(1, 3), value=lambda x: x[:, :1] ** 2)), BOX),
    Sample("added", _onto(_add_to(ALL, slice(1, 3), value=lambda x: x[:, :2] ** 2)), BOX),
    Sample("one by one", lambda x: _one_by_one(x)),
    Sample("copy_", lambda x: torch.empty_like(x).copy_(x).sin()),
    Sample("copy_ to float32 and back", lambda x: (x * 2).copy_(x.sin())),
    Sample("zero_ and fill_", _onto(lambda y, x: (y[:, 0].zero_(), y[:, 1].fill_(2.0)))),
    Sample("diagonal", _onto(lambda y, x: y.diagonal(0, -2, -1).copy_(x[:, 0])), SQUARE),
    Sample("select_scatter", lambda x: torch.select_scatter(x, x[:, 0] ** 2, 1, -1)),
    Sample("slice_scatter", lambda x: torch.slice_scatter(x, x[:, :2] ** 2, 1, 0, 4, 2)),
    Sample("slice_scatter, inner", lambda x: x.slice_scatter(x[:, :1].exp(), 1, 1, 2), BOX),
    Sample(
        "diagonal_scatter",
        lambda x: torch.diagonal_scatter(x, x[:, 0, :3].sin(), 1, 1, 2),
        SQUARE,
    ),
]


def _one_by_one(x: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(x)
    for i in range(4):
        out[:, i] = x[:, i] * out[:, :i].sum(1) + x[:, i].sin()
    return out


CONSTANT = [
    Sample("index_add", lambda x: x.index_add(1, TWICE, x[:, :3] ** 2)),
    Sample("index_add, alpha", lambda x: x.index_add(1, TWICE, x[:, :3] ** 2, alpha=-2.0), BOX),
    Sample("index_add into zeros", _into(lambda y, x: y.index_add_(1, TWICE, x[:, :3]), 3)),
    Sample("index_copy", lambda x: x.index_copy(1, INDEX, x[:, 1:3].exp())),
    Sample("index_copy, last", lambda x: x.index_copy(-1, INDEX, x[..., 1:3].exp()), BOX),
    Sample("index_fill", lambda x: x.index_fill(1, INDEX, 2.0).sin(), BOX),
    Sample("index_fill, tensor", lambda x: x.index_fill(1, INDEX, torch.tensor(2.0).double())),
    Sample("index_reduce, prod", lambda x: x.index_reduce(1, TWICE, x[:, :3].sin(), "prod")),
    Sample("index_reduce, mean", lambda x: x.index_reduce(1, TWICE, x[:, :3] ** 2, "mean")),
    Sample("put", _onto(_set(ALL, INDEX, value=lambda x: x[:, 1:3].exp()))),
    Sample("put a number", _onto(_set(ALL, INDEX, value=lambda x: 0.5))),
    Sample("put at a grid", _onto(_set(ALL, GRID, value=lambda x: x[:, :2, None])), SQUARE),
    Sample("put at two axes", _onto(_set(ALL, INDEX, INDEX, value=lambda x: x[:, 0, :2])), BOX),
    Sample(
        "put at two axes apart",
        _onto(_set(ALL, INDEX, ALL, INDEX, value=lambda x: x[:, 0, :, :2].permute(2, 0, 1) ** 2)),
        (3, 2, 3),
        batch=2,
    ),
    Sample("put, inner axis", _onto(_set(ALL, ALL, INDEX, value=lambda x: x[:, :, 1:3] ** 2)), BOX),
    Sample(
        "accumulate",
        lambda x: x.index_put((_rows(x)[:, None], TWICE), x[:, :3] ** 2, accumulate=True),
    ),
    Sample("mask of x", _onto(_set_where(lambda x: x < 0, lambda x: 0.5))),
    Sample("mask of x, rows", _onto(_set_where(lambda x: x[:, :, 0] < 0, lambda x: 0.0)), BOX),
    Sample(
        "constant mask",
        _onto(_set(ALL, torch.tensor([True, False, True, False]), value=lambda x: 2.0)),
    ),
]

PER_SAMPLE = [
    Sample("scatter", lambda x: x.scatter(1, x.argsort(1)[:, :2], x[:, :2].exp())),
    Sample("scatter, inner axis", lambda x: x.scatter(1, x.argsort(1), x.exp()), BOX),
    Sample(
        "scatter, short",
        lambda x: x.scatter(1, x.argsort(1)[:, :2, :3], x.exp()),
        BOX,
        reference=lambda x: x.scatter(1, x.argsort(1)[:, :2, :3], x[:, :2, :3].exp()),
    ),
    Sample("scatter a number", lambda x: x.scatter(1, x.argsort(1)[:, :2], 2.0).sin()),
    Sample(
        "scatter into zeros",
        lambda x: torch.zeros_like(x).scatter(1, x.argmax(1, keepdim=True), x[:, :1] ** 2),
    ),
    Sample(
        "scatter, constant",
        lambda x: x.scatter(1, INDEX.expand(x.shape[0], 2), x[:, :2].exp()),
    ),
    Sample(
        "scatter, add",
        lambda x: x.scatter(1, x.argsort(1), x.exp(), reduce="add"),
        reference=lambda x: x.scatter_add(1, x.argsort(1), x.exp()),
    ),
    Sample(
        "scatter, multiply",
        lambda x: x.scatter_reduce(1, x.argsort(1) // 2, x.exp(), "prod"),
    ),
    Sample("scatter_add", lambda x: x.scatter_add(1, x.argsort(1)[:, :2], x[:, 2:])),
    Sample("scatter_add, repeated", lambda x: x.scatter_add(1, x.argsort(1) // 2, x.exp()), BOX),
    Sample(
        "scatter_add, short",
        lambda x: x.scatter_add(1, x.argsort(1)[:, :1, 1:], x**2),
        BOX,
        reference=lambda x: x.scatter_add(1, x.argsort(1)[:, :1, 1:], x[:, :1, :3] ** 2),
    ),
    Sample(
        "scatter, multiply by a number",
        lambda x: x.scatter(1, x.argsort(1)[:, :2], 3.0, reduce="multiply"),
        reference=lambda x: x * (1 + 2 * torch.zeros_like(x).scatter(1, x.argsort(1)[:, :2], 1.0)),
    ),
    *[
        Sample(
            f"scatter_reduce, {reduce}, {own}",
            lambda x, r=reduce, o=own: x.scatter_reduce(  # type: ignore[misc]
                1, x.argsort(1) // 2, x.sin(), r, include_self=o
            ),
        )
        for reduce in ("sum", "mean", "amax", "amin")
        for own in (True, False)
    ],
    Sample(
        "put at argmax", _onto(_set_where(lambda x: (_rows(x), x.argmax(1)), lambda x: x[:, 0]))
    ),
    Sample(
        "put at argmax, rows",
        _onto(_set_where(lambda x: (_rows(x), x[:, :, 0].argmax(1)), lambda x: x[:, 0] ** 2)),
        BOX,
    ),
    Sample(
        "accumulate at argmax",
        lambda x: x.index_put((_rows(x), x.argmax(1)), x[:, 0].sin(), accumulate=True),
    ),
]

UNBATCHED = [
    Sample("scatter of 0-d", lambda x: x.sum().scatter(0, torch.tensor(0), x[0].exp()), batch=None),
    Sample(
        "index_add of 0-d",
        lambda x: x.sum().index_add(0, torch.tensor(0), x[0].exp()),
        batch=None,
    ),
    Sample(
        "index_copy of 0-d",
        lambda x: x.sum().index_copy(0, torch.tensor(0), x[0].exp()),
        batch=None,
    ),
    Sample("masked_scatter", lambda x: x.sin().masked_scatter(x > 0, x.exp()), BOX, batch=None),
    Sample("masked_scatter rows", lambda x: x.masked_scatter(x[:1] > 0, x * x), BOX, batch=None),
    Sample("index_add of one", lambda x: x.index_add(0, torch.tensor(1), x[:1].exp()), batch=None),
]

SAMPLES = [*UNBATCHED, *SLICES, *CONSTANT, *PER_SAMPLE]
