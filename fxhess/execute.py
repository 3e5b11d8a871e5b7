"""Running a program without autograd: weights' work once, the batch in tiles that fit the cache,
each tile writing into its rows of one preallocated result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxhess import cost, memory
from fxhess.emit import VAL
from fxhess.kernels import use_fast_kernels, write_results
from fxhess.passes.hoist import hoist
from fxhess.passes.simplify import is_repeatable

_WORTHWHILE = 5_000_000  # operations


_WORTH_KEEPING = 8  # operations of the prologue for each entry of the tensors it depends on


class Hoisted:
    """What a prologue gave, kept until a tensor that it depends on changes.

    A change is seen by comparing contents with a copy (one pass over the tensors), so one that
    leaves no trace (through ``.data``, in another process's shared memory) is seen too.
    """

    def __init__(self) -> None:
        # Copies and values as one object, replaced at once: other threads see both or neither.
        self._kept: tuple[list[torch.Tensor], Any] | None = None

    def get(self, tensors: Sequence[torch.Tensor], make: Callable[..., Any]) -> Any:
        """``make(*tensors)``, or what it gave when the tensors were the same."""
        kept = self._kept
        if kept is None or not all(map(torch.equal, tensors, kept[0])):
            copies = [t.clone() for t in tensors]
            kept = self._kept = (copies, make(*copies))
        return kept[1]


@dataclass
class Execution:
    """A program split for running without autograd.

    ``prologue`` maps the model's tensors to what the body needs of them; ``body`` takes x, these
    and the results to write into.  ``per_sample``: bytes of working memory a sample needs at the
    peak; ``flops`` and ``prologue_flops``: operations a sample and the prologue take; estimates.
    ``tiled``: whether samples may be run apart (no random numbers).
    """

    prologue: fx.GraphModule
    body: fx.GraphModule
    shapes: list[tuple[int, ...]]
    dtypes: list[torch.dtype]
    per_sample: int
    flops: int
    prologue_flops: int
    tiled: bool

    def worthwhile(self, x: torch.Tensor, batch_ndim: int) -> bool:
        """Whether the work is large enough for its fixed cost, a few more microseconds."""
        return x.shape[:batch_ndim].numel() * self.flops >= _WORTHWHILE

    @classmethod
    def of(cls, module: fx.GraphModule, batch_ndim: int, summed: bool) -> Execution | None:
        """The split program; None where the whole program cannot be cut by samples (a result
        that sums over the batch)."""
        graph = module.graph
        (values,) = next(n for n in graph.nodes if n.op == "output").args
        results = [values] if isinstance(values, fx.Node) else list(values)  # type: ignore[arg-type]
        if batch_ndim == 0 or any(r.op == "placeholder" for r in results):  # type: ignore[union-attr]
            return None
        vals = [r.meta[VAL] for r in results]  # type: ignore[union-attr]
        if any(v.ndim < batch_ndim for v in vals):
            return None
        calls = [n for n in graph.nodes if n.op.startswith("call")]
        prologue, body = hoist(graph)
        nominal = next(iter(graph.nodes)).meta[VAL].shape[:batch_ndim].numel()
        peak = cost.peak_bytes([n for n in body.nodes if n.op.startswith("call")])
        write_results(use_fast_kernels(body))
        empty = torch.nn.Module()
        return cls(
            fx.GraphModule(empty, prologue, "Prologue"),
            fx.GraphModule(empty, body, "Body"),
            [tuple(v.shape[batch_ndim:]) for v in vals],
            [v.dtype for v in vals],
            max(1, peak // max(1, nominal)),
            sum(map(cost.flops, calls)) // max(1, nominal),
            sum(map(cost.flops, prologue.nodes)),
            all(is_repeatable(n) for n in calls if n.op == "call_function") and not summed,
        )

    def __call__(
        self,
        x: torch.Tensor,
        tensors: Sequence[torch.Tensor],
        batch_ndim: int,
        out: Sequence[torch.Tensor] | None = None,
        kept: Hoisted | None = None,
    ) -> list[torch.Tensor]:
        """All results, written into ``out`` or into fresh tensors; ``kept`` holds what the
        prologue gave from call to call."""
        batch = x.shape[:batch_ndim]
        if out is None:
            out = [
                memory.empty((*batch, *shape), dtype, x.device)
                for shape, dtype in zip(self.shapes, self.dtypes, strict=True)
            ]
        if batch.numel() == 0:
            return list(out)
        if x.device.type == "cpu":
            memory.keep_freed_blocks()
        hoisted = self._hoisted(tensors, kept)
        rows = batch[0]
        step = self._tile(x, batch_ndim)
        if step >= rows:
            self.body.forward(x, *hoisted, *out)
            return list(out)
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            self.body.forward(x[start:stop], *hoisted, *(o[start:stop] for o in out))
        return list(out)

    def _hoisted(self, tensors: Sequence[torch.Tensor], kept: Hoisted | None) -> Any:
        entries = sum(t.numel() for t in tensors)
        small = self.prologue_flops < _WORTH_KEEPING * entries
        if kept is None or small or not self.tiled:
            return self.prologue.forward(*tensors)
        return kept.get(tensors, self.prologue.forward)

    def _tile(self, x: torch.Tensor, batch_ndim: int) -> int:
        """How many entries of the first batch axis make one tile."""
        budget = cost.TILE_BYTES.get(x.device.type)
        if budget is None or not self.tiled:
            return x.shape[0]
        inner = x.shape[1:batch_ndim].numel()
        count = -(-x.shape[0] * inner * self.per_sample // budget)  # tiles, rounded up
        return -(-x.shape[0] // max(1, count))


def run_whole(
    module: fx.GraphModule, x: torch.Tensor, tensors: Sequence[torch.Tensor]
) -> list[Any]:
    """All results of the plain program."""
    result = module(x, *tensors)
    return list(result) if isinstance(result, tuple) else [result]
