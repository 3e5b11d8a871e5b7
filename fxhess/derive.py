"""Derivatives of any function, from PyTorch's own double backward alone.

For ``y = f(x_1 .. x_k)``, tangents t_i of the operands and an adjoint g of y::

    pull(g)            the vjp                               J_i^T g  for each i
    push(t_1 .. t_k)   the vjp of the vjp, which is linear   sum_i J_i t_i
    curve(g, i, j, t)  the vjp, along t, of operand j's vjp  C_ij t

All take canonical tensors ``[*lead, *batch, *event]`` with any leading axes.  Each is written once,
on tensors; ``fxhess.splice`` traces it into plain operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxhess.arrangement import Arrangement, Sizes

Tensors = Sequence[torch.Tensor]


@dataclass(frozen=True)
class Way:
    """How to go over leading axes: ``batched`` (vmap) or one by one; ``keep`` the results
    differentiable."""

    batched: bool = False
    keep: bool = False


@dataclass(frozen=True)
class Derivation:
    """A function of captured tensors, seen as one of canonical tensors.

    ``function(tensors, sizes, differentiate)`` gives all outputs, through the functions' own
    derivatives if ``differentiate``.  ``inputs``: how each tensor is arranged (None: passed as it
    is); ``operands``: positions of those that derivatives are taken of; ``outputs``: arrangements;
    ``types``: data types of the outputs.
    """

    function: Callable[[Tensors, Sizes, bool], Sequence[torch.Tensor]]
    inputs: tuple[Arrangement | None, ...]
    operands: tuple[int, ...]
    outputs: tuple[Arrangement, ...]
    types: tuple[torch.dtype, ...]
    batch_ndim: int

    def operand(self, i: int) -> Arrangement:
        arrangement = self.inputs[self.operands[i]]
        assert arrangement is not None
        return arrangement

    def values(self, x: torch.Tensor, tensors: Tensors) -> list[torch.Tensor]:
        """All outputs."""
        sizes = x.shape[: self.batch_ndim]
        results = self.function(self._captured(tensors, sizes), sizes, False)
        return [a.canonical(y, sizes) for a, y in zip(self.outputs, results, strict=True)]

    def pull(
        self, way: Way, k: int, x: torch.Tensor, tensors: Tensors, g: torch.Tensor
    ) -> list[torch.Tensor]:
        """Cotangents of all operands for the adjoint g of output k."""
        sizes, y, xs = self._run(k, x, tensors)
        lead = g.shape[: self.outputs[k].lead(g)]
        rows = self.outputs[k].captured(_flat(g, len(lead)), sizes, 1)
        parts = _each(lambda row: _vjp(y, xs, row, way), [rows], way)
        return [
            _unflat(self.operand(i).canonical(part, sizes, 1), lead) for i, part in enumerate(parts)
        ]

    def push(
        self, way: Way, k: int, x: torch.Tensor, tensors: Tensors, ts: Tensors
    ) -> torch.Tensor:
        """The tangent of output k."""
        sizes, y, xs = self._run(k, x, tensors)
        counts = [self.operand(i).lead(t) for i, t in enumerate(ts)]
        lead = torch.broadcast_shapes(*(t.shape[:n] for t, n in zip(ts, counts, strict=True)))
        rows = [
            self.operand(i).captured(_flat(t.expand([*lead, *t.shape[n:]]), len(lead)), sizes, 1)
            for i, (t, n) in enumerate(zip(ts, counts, strict=True))
        ]
        u = torch.zeros_like(y, requires_grad=True)
        z = torch.autograd.grad(y, xs, u, create_graph=True, allow_unused=True)
        known = [i for i, v in enumerate(z) if v is not None and v.requires_grad]

        def row(*tangents: torch.Tensor) -> list[torch.Tensor]:
            return _vjp([z[i] for i in known], [u], [tangents[i] for i in known], way)

        if known:
            (part,) = _each(row, rows, way)
        else:
            part = y.new_zeros([rows[0].shape[0], *y.shape])
        return _unflat(self.outputs[k].canonical(part, sizes, 1), lead)

    def curve(
        self,
        way: Way,
        k: int,
        i: int,
        j: int,
        x: torch.Tensor,
        tensors: Tensors,
        g: torch.Tensor,
        t: torch.Tensor,
    ) -> torch.Tensor:
        """``C_ij t`` for the adjoint g of output k; leading axes broadcast."""
        sizes, y, xs = self._run(k, x, tensors)
        own, other = self.outputs[k], self.operand(j)
        outer, inner = list(g.shape[: own.lead(g)]), list(t.shape[: other.lead(t)])
        rank = max(len(outer), len(inner))
        g = g[(None,) * (rank - len(outer))]
        t = t[(None,) * (rank - len(inner))]
        outer, inner = [1] * (rank - len(outer)) + outer, [1] * (rank - len(inner)) + inner
        lead = [max(pair) for pair in zip(outer, inner, strict=True)]
        last = max((a for a, n in enumerate(outer) if n != 1), default=-1)
        crossed = all(n == 1 for n in inner[: last + 1])  # every adjoint with every tangent
        if not crossed:
            g, t = g.expand([*lead, *g.shape[rank:]]), t.expand([*lead, *t.shape[rank:]])
        gs = own.captured(_flat(g, rank), sizes, 1)
        ts = other.captured(_flat(t, rank), sizes, 1)

        def moved(row: torch.Tensor, along: torch.Tensor) -> torch.Tensor:
            (p,) = torch.autograd.grad(y, [xs[j]], row, create_graph=True, allow_unused=True)
            if p is None or not p.requires_grad:
                return xs[i].new_zeros([along.shape[0], *xs[i].shape])
            (part,) = _each(lambda v: _vjp(p, [xs[i]], v, way), [along], way)
            return part

        blocks = [
            moved(row, ts if crossed else ts[n : n + 1]) for n, row in enumerate(gs.unbind(0))
        ]
        whole = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
        return _unflat(self.operand(i).canonical(whole, sizes, 1), lead)

    def _captured(self, tensors: Tensors, sizes: Sizes) -> list[torch.Tensor]:
        return [
            t if a is None else a.captured(t, sizes)
            for t, a in zip(tensors, self.inputs, strict=True)
        ]

    def _run(
        self, k: int, x: torch.Tensor, tensors: Tensors
    ) -> tuple[Sizes, torch.Tensor, list[torch.Tensor]]:
        """Batch sizes, output k, and the operands that it was computed from."""
        sizes = x.shape[: self.batch_ndim]
        given = self._captured(tensors, sizes)
        for n in self.operands:
            given[n] = given[n].view_as(given[n])
            if not given[n].requires_grad:
                given[n].requires_grad_()
        y = self.function(given, sizes, True)[k]
        return sizes, y, [given[n] for n in self.operands]


def _flat(t: torch.Tensor, count: int) -> torch.Tensor:
    """All leading axes as one."""
    if count == 1:
        return t
    return t.flatten(0, count - 1) if count else t.unsqueeze(0)


def _unflat(t: torch.Tensor, lead: Sequence[int]) -> torch.Tensor:
    if len(lead) == 1:
        return t
    return t.unflatten(0, tuple(lead)) if lead else t.squeeze(0)


def _vjp(y: Any, xs: Tensors, g: Any, way: Way) -> list[torch.Tensor]:
    found = torch.autograd.grad(
        y, xs, g, retain_graph=True, create_graph=way.keep, allow_unused=True
    )
    return [torch.zeros_like(x) if v is None else v for x, v in zip(xs, found, strict=True)]


def _each(
    function: Callable[..., list[torch.Tensor]], rows: Tensors, way: Way
) -> list[torch.Tensor]:
    """The results of ``function`` for each entry of the first axis of ``rows``, stacked."""
    n = rows[0].shape[0]
    if n == 1:
        return [v.unsqueeze(0) for v in function(*(r.squeeze(0) for r in rows))]
    if way.batched:
        return list(torch.func.vmap(function)(*rows))
    parts = [function(*(r[i] for r in rows)) for i in range(n)]
    return [torch.stack(list(column)) for column in zip(*parts, strict=True)]
