"""Running a program without autograd: weights' work once, the batch in tiles that fit the cache or
a given memory, each tile writing into its rows of one preallocated result."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import fx

from fxhess import _kept, _lanes, _running, cost, memory
from fxhess._direct import Direct
from fxhess.emit import VAL
from fxhess.errors import InputError
from fxhess.kernels import for_compiler, use_fast_kernels, write_results
from fxhess.outputs import Given
from fxhess.overwrite import overwrite
from fxhess.passes.hoist import divide, hoist
from fxhess.passes.simplify import is_repeatable
from fxhess.progress import advance
from fxhess.symmetric import use_symmetric_products

_WORTHWHILE = 5_000_000  # operations; below, the fixed cost of this way of running shows
_WORTH_A_CALL = 30_000  # operations a sample; below, a compiler does better with all it can see
_WORTH_KEEPING = 8  # operations for each entry of the tensors that something depends on
_AT_ONCE = 40_000_000_000  # operations of a call that takes no tiles: Ctrl-C waits for its end
_UNSEEN = 6 << 20  # bytes that kernels and the allocator use for themselves
_LOOSE = 1.5  # what a tile takes at most, against the estimate


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


@dataclass(frozen=True)
class Keeping:
    """A prologue in two: ``kept`` gives what is worth keeping, from the tensors at the positions
    ``taken``, ``rest`` the others, from all; ``which``: for each result, whether it is kept."""

    kept: fx.GraphModule
    rest: fx.GraphModule
    taken: list[int]
    which: list[bool]


@dataclass(frozen=True)
class Running:
    """How to run: ``compile`` the generated code with ``torch.compile``; ``max_memory``: bytes
    that a call may take besides x and a given result, None for what suits the device."""

    compile: bool = False
    max_memory: int | None = None


PLAIN = Running()


@dataclass
class Execution:
    """A program split for running without autograd.

    ``prologue`` maps the model's tensors to what the body needs of them; ``body`` takes x, these
    and the results to write into, and overwrites what it needs no more, where ``functional``, for
    compilers, does not.  ``leads`` and ``shapes``: sizes of each result's axes before
    and after the batch; ``per_sample``: bytes of working memory a sample needs at the peak,
    ``allocated``: those allocated then, views and copies considered;
    ``hoisted``: bytes of what the prologue gives, and of copies of what it is made of where it is
    worth keeping (``keeping``); ``flops``: operations a sample takes; estimates.  ``tiled``:
    whether samples may be run apart (no random numbers).
    """

    prologue: fx.GraphModule
    body: fx.GraphModule
    functional: fx.Graph
    leads: list[tuple[int, ...]]
    shapes: list[tuple[int, ...]]
    dtypes: list[torch.dtype]
    batch_ndim: int
    given: tuple[Given, ...]
    per_sample: int
    allocated: int
    hoisted: int
    flops: int
    keeping: Keeping
    tiled: bool

    def worthwhile(self, x: torch.Tensor) -> bool:
        """Whether the work is large enough for its fixed cost, a few more microseconds."""
        return x.shape[: self.batch_ndim].numel() > self.most_samples_whole

    @property
    def most_samples_whole(self) -> int:
        """How many samples at most are not worth it."""
        return (_WORTHWHILE - 1) // max(1, self.flops)

    @property
    def most_samples_at_once(self) -> int:
        """How many samples at most run without tiles where none are needed."""
        return _AT_ONCE // max(1, self.flops)

    def _without_tiles(self, x: torch.Tensor, least: int) -> int:
        """How many entries of the first batch axis run at once where no tiles are needed: parts of
        equal size, no larger than that Ctrl-C may wait for."""
        parts = -(-x.shape[: self.batch_ndim].numel() // max(1, self.most_samples_at_once))
        return max(least, -(-x.shape[0] // max(1, parts)))

    @property
    def worth_a_call(self) -> bool:
        """Whether a compiler that meets it does better to call it as one operator."""
        return self.flops >= _WORTH_A_CALL and self.batch_ndim > 0

    @classmethod
    def of(
        cls,
        module: fx.GraphModule,
        batch_ndim: int,
        whole: bool,
        given: Sequence[Given] = (),
        leads: Sequence[tuple[int, ...]] | None = None,
    ) -> Execution | None:
        """The split program; None where the whole program cannot be cut by samples (a result
        that sums over the batch).  ``whole``: samples must not be run apart."""
        graph = module.graph
        (values,) = next(n for n in graph.nodes if n.op == "output").args
        results = [values] if isinstance(values, fx.Node) else list(values)  # type: ignore[arg-type]
        if any(r.op == "placeholder" for r in results):  # type: ignore[union-attr]
            return None
        vals = [r.meta[VAL] for r in results]  # type: ignore[union-attr]
        if any(v.ndim < batch_ndim for v in vals):
            return None
        before = list(leads or [()] * len(vals))
        calls = [n for n in graph.nodes if n.op.startswith("call")]
        prologue, body = hoist(graph)
        use_symmetric_products(body)
        nominal = next(iter(graph.nodes)).meta[VAL].shape[:batch_ndim].numel()
        crossing = {n.name for n in body.nodes if n.op == "placeholder"}
        made = [n for n in calls if n.name in crossing]
        sources = [n for n in prologue.nodes if n.op == "placeholder"]
        kept, rest, taken, keeps = divide(prologue, _WORTH_KEEPING)
        held = sum(map(cost.own_bytes, made)) + sum(_bytes(sources[i]) for i in taken)
        write_results(use_fast_kernels(body))
        plain = overwrite(body)
        once, inner = ([n for n in part.nodes if n.op.startswith("call")]
                       for part in (prologue, plain))  # fmt: skip
        peak, allocated = cost.peak_bytes(inner), cost.held_bytes(inner)
        return cls(
            _kept.module_of(prologue, "Prologue"),
            _kept.module_of(plain, "Body"),
            body,
            before,
            [tuple(v.shape[len(k) + batch_ndim :]) for k, v in zip(before, vals, strict=True)],
            [v.dtype for v in vals],
            batch_ndim,
            tuple(given),
            max(1, peak // max(1, nominal)),
            max(1, -(-allocated // max(1, nominal))),
            held,
            sum(map(cost.flops, [*once, *inner])) // max(1, nominal),
            Keeping(
                _kept.module_of(kept, "Kept"),
                _kept.module_of(rest, "Rest"),
                taken,
                keeps,
            ),
            all(is_repeatable(n) for n in calls if n.op == "call_function") and not whole,
        )

    @cached_property
    def compiled(self) -> _running.Fastest:
        """A compiled call of x, what is given, the step of tiles, what the prologue gave and the
        results: tiles as they are, all at once with one sample a lane, or compiled tiles."""
        written = len(self.leads)
        lanes = Direct(
            self.body, self.batch_ndim, self.body.forward, written,
            lambda inputs: _lanes.compiled(
                self.functional, inputs, self.batch_ndim, written,
                [i for i, keep in enumerate(self.keeping.which, 1) if keep],
            ),
        )  # fmt: skip
        plain, compiled = self.compiled_tiles.ways
        free = not self.given and not any(self.leads)

        def in_lanes(x: torch.Tensor, given: Any, step: int, hoisted: Any, out: Any) -> None:
            self._in_tiles(lanes, x, given, self._without_tiles(x, step), hoisted, out)

        def can(x: torch.Tensor, given: Any, step: int, hoisted: Any, out: Any) -> bool:
            return free and lanes.has(x, *hoisted, *out)

        return _running.Fastest(plain, _running.Way("lanes", in_lanes, can), compiled)

    @cached_property
    def compiled_tiles(self) -> _running.Fastest:
        """The same by tiles only, with the memory that a tile is known to take."""
        body = _kept.module_of(for_compiler(self.functional), "CompiledBody")
        fast = _running.compiled(body, self.batch_ndim, self.given)
        if not self.given and not any(self.leads):
            fast = Direct(body, self.batch_ndim, fast, len(self.leads))
        return _running.Fastest(
            _running.Way("plain tiles", partial(self._in_tiles, self.body.forward)),
            _running.Way("tiles", partial(self._in_tiles, fast)),
        )

    def __call__(
        self,
        x: torch.Tensor,
        tensors: Sequence[torch.Tensor],
        out: Sequence[torch.Tensor] | None = None,
        kept: Hoisted | None = None,
        running: Running = PLAIN,
        given: Sequence[torch.Tensor] = (),
    ) -> list[torch.Tensor]:
        """All results, written into ``out`` or into fresh tensors; ``kept`` holds what the
        prologue gave from call to call; ``given``: what the program takes besides x.

        Raises:
            InputError: ``running.max_memory`` does not suffice for one sample.
        """
        batch = x.shape[: self.batch_ndim]
        step = self._tile(x, batch, out is None, running.max_memory)
        if x.device.type == "cpu":
            memory.keep_freed_blocks()
        if out is None:
            out = [memory.empty(shape, dtype, x.device) for shape, dtype in self.results(batch)]
        if batch.numel() == 0:
            return list(out)
        hoisted = self._prologue(x, tensors, kept)
        if not running.compile:
            self._in_tiles(self.body.forward, x, given, step, hoisted, out)
        elif running.max_memory is None:
            self.compiled(x, given, step, hoisted, out)
        else:
            self.compiled_tiles(x, given, step, hoisted, out)
        return list(out)

    def _in_tiles(
        self,
        body: Callable[..., Any],
        x: torch.Tensor,
        given: Sequence[torch.Tensor],
        step: int,
        hoisted: Sequence[Any],
        out: Sequence[torch.Tensor],
    ) -> None:
        """Run ``body`` on so many entries of the first batch axis at a time."""
        batch = x.shape[: self.batch_ndim]
        if not batch or step >= batch[0]:
            body(x, *given, *hoisted, *out)
            return
        axes = [0, *(g.batch_axis for g in self.given)]
        places = [len(lead) for lead in self.leads]
        into = list(zip(out, places, strict=True))
        _fill(body, [x, *given], axes, hoisted, into, step, batch[1:].numel())

    def results(self, batch: Sequence[int]) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of every result for a batch of these sizes."""
        return [
            ((*lead, *batch, *shape), dtype)
            for lead, shape, dtype in zip(self.leads, self.shapes, self.dtypes, strict=True)
        ]

    def _prologue(
        self, x: torch.Tensor, tensors: Sequence[torch.Tensor], kept: Hoisted | None
    ) -> Any:
        """What the body needs of the model's tensors.  Elsewhere than on CPUs it is made anew:
        seeing that nothing changed would mean to wait for the device."""
        keeping = self.keeping
        if kept is None or not any(keeping.which) or not self.tiled or x.device.type != "cpu":
            return self.prologue.forward(*tensors)
        old = iter(kept.get([tensors[i] for i in keeping.taken], keeping.kept.forward))
        new = iter(keeping.rest.forward(*tensors))
        return [next(old) if keep else next(new) for keep in keeping.which]

    def needs(self, x: torch.Tensor) -> tuple[int, int]:
        """Estimated bytes of a call: those that do not depend on the tile's size (results, what
        the prologue gives), and those of one entry of the first batch axis."""
        batch = x.shape[: self.batch_ndim]
        results = sum(
            torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.results(batch)
        )
        return results + self.hoisted + _UNSEEN, batch[1:].numel() * self.allocated

    def spare(self, x: torch.Tensor, fresh: bool, max_memory: int) -> int:
        """Bytes that are left for tiles; ``fresh``: the results are still to be allocated."""
        fixed, _ = self.needs(x)
        return max_memory - (fixed if fresh else self.hoisted + _UNSEEN)

    def fits(self, x: torch.Tensor, fresh: bool, max_memory: int) -> bool:
        """Whether the smallest tile takes no more than ``max_memory`` leaves."""
        least = self._least(x)
        return least == 0 or self.spare(x, fresh, max_memory) >= least

    def tiles(self, x: torch.Tensor, max_memory: int | None = None) -> int:
        """In how many slices of the batch a call with a fresh result runs."""
        batch = x.shape[: self.batch_ndim]
        if not self.fits(x, True, max_memory or sys.maxsize):
            return batch[0] if batch else 1
        rows = batch[0] if batch else 1
        return -(-rows // max(1, self._tile(x, batch, True, max_memory)))

    def _least(self, x: torch.Tensor) -> int:
        rows = x.shape[0] if self.batch_ndim else 1
        _, one = self.needs(x)
        return min(rows, 1 if self.tiled else rows) * one

    def _tile(self, x: torch.Tensor, batch: torch.Size, fresh: bool, max_memory: int | None) -> int:
        """How many entries of the first batch axis make one tile."""
        rows = batch[0] if batch else 1
        _, one = self.needs(x)
        cached = cost.TILE_BYTES.get(x.device.type)
        # The cache's size is no sharp limit, and each tile reads the weights again.
        worked_on = rows * batch[1:].numel() * self.per_sample
        count = round(worked_on / cached) if cached else 1
        if max_memory is not None:
            spare = self.spare(x, fresh, max_memory)
            least = self._least(x)
            if not self.fits(x, fresh, max_memory):
                raise InputError(
                    f"max_memory={max_memory} bytes do not suffice:"
                    f" {'the result and ' if fresh else ''}one tile take about"
                    f" {max_memory - spare + least}",
                    hint="a smaller batch, out= for the result, or outputs that need less than H",
                )
            fitting = max(1, least, int(spare / _LOOSE))
            count = max(count, -(-rows * one // fitting))
        if not self.tiled or rows == 0:
            return rows
        return -(-rows // min(rows, max(1, count)))


def _bytes(node: fx.Node) -> int:
    value = node.meta.get(VAL)
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0


def _fill(
    body: Callable[..., None],
    inputs: Sequence[torch.Tensor],
    axes: Sequence[int | None],
    hoisted: Sequence[Any],
    out: Sequence[tuple[torch.Tensor, int]],
    step: int,
    samples: int,
) -> None:
    """Run tile by tile, along these axes of the inputs and of the results; where memory runs out,
    once more with tiles half as large.  ``samples``: how many each row of x holds."""
    start, halved = 0, False
    rows = inputs[0].shape[0]
    while start < rows:
        stop = min(rows, start + step)
        tile = [
            t if axis is None else t.narrow(axis, start, stop - start)
            for t, axis in zip(inputs, axes, strict=True)
        ]
        try:
            body(*tile, *hoisted, *(o.narrow(axis, start, stop - start) for o, axis in out))
        except Exception as error:
            if halved or step == 1 or not _running.is_out_of_memory(error):
                raise
            step, halved = step // 2, True
            continue
        advance((stop - start) * samples)
        start = stop


def run_whole(
    module: Callable[..., Any],
    x: torch.Tensor,
    given: Sequence[torch.Tensor],
    tensors: Sequence[torch.Tensor],
) -> list[Any]:
    """All results of the plain program."""
    result = module(x, *given, *tensors)
    return list(result) if isinstance(result, tuple) else [result]
