"""Pooling: averages are linear; maxima are found first, then gathered where they were found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from fractions import Fraction
from typing import Any

import torch

from fxhess.kinds import Call, Linear, Trailing, Window
from fxhess.registry import Rule, aten, composite, linear, register_rule

Ints = Sequence[int]


def _like_operand(g: Any, call: Call, rank: int) -> Any:
    """A stand-in of the operand's shape (it costs nothing), of which the backward kernels of
    pooling read the sizes."""
    corner = g
    for d in range(-rank, 0):
        corner = torch.narrow(corner, d, 0, 1)
    return corner.expand(-1, *(call.operands[0].size(d) for d in range(-rank, 0)))


def _kernels(call: Call, rank: int) -> list[Window | None]:
    """What the kernel covers at each position."""
    _, kernel, stride, padding, *_ = (*call.args, [], 0)[: max(4, len(call.args))]
    every = [(list(v) * rank)[:rank] for v in (kernel, stride or kernel, _listed(padding))]
    return [Window.of(s, -p, k - 1 - p) for k, s, p in zip(*every, strict=True)]


def _listed(value: Any) -> list[int]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _shares(call: Call, rank: int) -> list[Window | None]:
    """What belongs to each position where the image is shared out among them."""
    found: list[Window | None] = []
    for d in range(-rank, 0):
        step = Fraction(call.operands[0].size(d), call.y.size(d))
        even = step.denominator == 1
        found.append(Window(step, Fraction(0 if even else -1), step - 1 if even else step))
    return found


def _averaging(op: Any, backward: Any, rank: int) -> None:
    linear(
        op,
        Trailing(rank),
        pull=lambda g, c: backward(g, _like_operand(g, c, rank), *c.args[1:]),
        fold=True,
        windows=lambda c: _kernels(c, rank),
    )


def _adaptive(op: Any, backward: Any, rank: int) -> None:
    linear(
        op,
        Trailing(rank),
        pull=lambda g, c: backward(g, _like_operand(g, c, rank)),
        fold=True,
        windows=lambda c: _shares(c, rank),
    )


_averaging(aten.avg_pool2d.default, aten.avg_pool2d_backward.default, 2)
_averaging(aten.avg_pool3d.default, aten.avg_pool3d_backward.default, 3)
_adaptive(aten._adaptive_avg_pool2d.default, aten._adaptive_avg_pool2d_backward.default, 2)
_adaptive(aten._adaptive_avg_pool3d.default, aten._adaptive_avg_pool3d_backward.default, 3)


# --- maxima ---------------------------------------------------------------------------------------

_finding: ContextVar[bool] = ContextVar("finding", default=False)


@contextmanager
def _kept() -> Iterator[None]:
    """Inside, a pooling operator is left as it is."""
    token = _finding.set(True)
    try:
        yield
    finally:
        _finding.reset(token)


def _gathering(op: Any, rank: int) -> None:
    def rewrite(self: torch.Tensor, *args: Any) -> Any:
        if _finding.get():
            return NotImplemented
        with _kept():
            places = op(self.detach(), *args)[1]
        image = torch.flatten(self, -rank)
        found = torch.gather(image, -1, torch.flatten(places, -rank))
        return torch.unflatten(found, -1, places.shape[-rank:]), places

    # The operator itself only finds the places; no result of it carries a derivative.
    kind = Linear(pull=_never, fold=True)
    register_rule(Rule(op, Trailing(rank), kind, rewrite=rewrite))


def _never(g: Any, call: Call) -> Any:
    raise AssertionError("the places of maxima have no derivative")


_gathering(aten.max_pool2d_with_indices.default, 2)
_gathering(aten.max_pool3d_with_indices.default, 3)
_gathering(aten.adaptive_max_pool2d.default, 2)
_gathering(aten.adaptive_max_pool3d.default, 3)


@composite(aten.mkldnn_max_pool2d.default)
def mkldnn_max_pool2d(self: torch.Tensor, *args: Any) -> torch.Tensor:
    return aten.max_pool2d_with_indices.default(self, *args)[0]


@composite(aten.mkldnn_max_pool3d.default)
def mkldnn_max_pool3d(self: torch.Tensor, *args: Any) -> torch.Tensor:
    return aten.max_pool3d_with_indices.default(self, *args)[0]


def _unpooled(self: torch.Tensor, indices: torch.Tensor, sizes: Ints) -> torch.Tensor:
    rank, n = len(sizes), 1
    for size in sizes:
        n *= size
    values = torch.flatten(self, -rank)
    image = self.new_zeros((*values.shape[:-1], n))
    image = torch.scatter(image, -1, torch.flatten(indices, -rank), values)
    return torch.unflatten(image, -1, tuple(sizes))


@composite(aten.max_unpool2d.default)
def max_unpool2d(self: torch.Tensor, indices: torch.Tensor, output_size: Ints) -> torch.Tensor:
    return _unpooled(self, indices, output_size)


@composite(aten.max_unpool3d.default)
def max_unpool3d(
    self: torch.Tensor, indices: torch.Tensor, output_size: Ints, stride: Ints, padding: Ints
) -> torch.Tensor:
    return _unpooled(self, indices, output_size)
