"""Samples whose structure depends on their own values: neighbour lists, ``x[x > 0]``, branches.

The model is captured for one sample, in a batch of that sample alone, at the values seen.  The
program serves every sample for which it would have seen the same: these run together, as one batch
without any coupling, since it was made from one sample.  Samples of other structures are captured
in turn.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import fx, nn

from fxhess import _kept, _outside
from fxhess.binding import Binding, bind, keep
from fxhess.cache import programs
from fxhess.capture import capture
from fxhess.collector import collector_paused
from fxhess.errors import CaptureError, InputError, Origin, SampleMixingError
from fxhess.execute import Running
from fxhess.form import Call
from fxhess.guards import split
from fxhess.interrupts import between_operations
from fxhess.locks import making
from fxhess.outputs import Given, Output, leading_axes
from fxhess.pipeline import Options, batched, compile_guard
from fxhess.reads import transformed
from fxhess.sources import traced
from fxhess.splice import agree

_NOTHING = fx.GraphModule(nn.Module(), fx.Graph())  # to compute, of values of x


@dataclass(eq=False)
class Variant(Binding):
    """The program for samples of one structure.  ``matcher`` computes what their guard asks about,
    for a batch of them; where there is none, samples run one at a time."""

    matcher: fx.GraphModule | None = None

    def matches(self, xs: torch.Tensor, constants: Sequence[torch.Tensor]) -> torch.Tensor:
        """For each sample of ``xs: [n, *event]``, with these constants, whether the program is
        right."""
        n = len(xs)
        right = torch.ones(n, dtype=torch.bool, device=xs.device)
        if self.structure is None:
            return right
        constant, varying = self.structure.constant, self.structure.varying
        if constant is not None and not constant.holds((xs, *constants)):
            return ~right
        if varying is None:
            return right
        found = None
        if self.matcher is not None:
            tensors = [t.detach() for t in varying.read()]
            with contextlib.suppress(RuntimeError, IndexError):  # one sample may spoil it for all
                found = split(self.matcher(xs, *constants, *tensors), varying.reads)
        if found is None:
            described = list(zip(self.program.given, constants, strict=False))
            each = [
                varying.holds((x, *(_one(g, c, i) for g, c in described))) for i, x in enumerate(xs)
            ]
            return torch.tensor(each, device=xs.device)
        for read, own in zip(varying.reads, found, strict=True):
            right = right & read.holds_for_each(own, n)
        return right

    def run_each(
        self, xs: torch.Tensor, given: Sequence[torch.Tensor], running: Running
    ) -> list[torch.Tensor]:
        """All results, for ``xs: [n, *event]``."""
        tensors = self.read()
        if self.matcher is not None:
            return self.run(xs, given, tensors, running)
        n = len(xs)
        if not n:
            xs = xs.new_zeros((1, *xs.shape[1:]))
            given = [
                t if g.batch_axis is None else t.new_zeros((*g.leading, 1, *g.event))
                for g, t in zip(self.program.given, given, strict=True)
            ]
        each = [
            self.run(x, [_one(g, t, i) for g, t in self._described(given)], tensors, running)
            for i, x in enumerate(xs)
        ]
        places = map(len, self.program.leads)
        return [
            torch.stack(results, at).narrow(at, 0, n)
            for at, results in zip(places, zip(*each, strict=True), strict=True)
        ]

    def _described(self, given: Sequence[torch.Tensor]) -> list[tuple[Given, torch.Tensor]]:
        return list(zip(self.program.given, given, strict=True))


def _one(description: Given, tensor: torch.Tensor, i: int) -> torch.Tensor:
    """What is given for one sample."""
    axis = description.batch_axis
    return tensor if axis is None else tensor.select(axis, i)


def _some(description: Given, tensor: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """What is given for some samples."""
    axis = description.batch_axis
    return tensor if axis is None else tensor.index_select(axis, places)


class Apart:
    """All programs of a model that is captured sample by sample, for inputs like those of ``call``:
    since its structure depends on the sample, or since all samples share what is differentiated."""

    unconditional = True

    def __init__(
        self,
        model: nn.Module,
        options: Options,
        call: Call,
        where: Origin | str | None,
        running: Running,
    ) -> None:
        self.model = model
        self.form = call.form
        self.asked = options
        outputs = (*options.outputs, Output("value"))
        self.options = replace(options, outputs=tuple(dict.fromkeys(outputs)))
        self.leads = leading_axes(self.options.outputs, options.given)
        self.where = where
        self.running = running
        self.generation = programs.generation
        self.variants: list[Variant] = []
        self.batch_ndim = call.x.ndim - options.event_ndim
        self.summed = self.averaged = False

    # --- running --------------------------------------------------------------------------------

    def run(self, x: torch.Tensor, given: Sequence[torch.Tensor] = ()) -> list[torch.Tensor]:
        """The results, in the order of the outputs."""
        if traced():
            return self._traced(x, given)
        if _outside.transforming():
            raise transformed()
        batch, event = x.shape[: self.batch_ndim], x.shape[self.batch_ndim :]
        xs = x.reshape(-1, *event)
        whole = given
        given = self._flat(given, len(xs))
        parts, order = [], []
        for variant, places in self._groups(xs.detach(), self._constants(given)):
            every = len(places) == len(xs)
            own = given
            if not every:
                described = zip(self.options.given, given, strict=True)
                own = [_some(g, t, places) for g, t in described]
            parts.append(variant.run_each(xs if every else xs[places], own, self.running))
            order.append(places)
        results = parts[0]
        if len(parts) > 1:
            back = torch.argsort(torch.cat(order))
            results = [
                torch.cat(r, len(lead)).index_select(len(lead), back)
                for r, lead in zip(zip(*parts, strict=True), self.leads, strict=True)
            ]
        return self._finish(x, whole, self._unflat(results, batch))

    def _constants(self, given: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What the model takes, of what is given."""
        return list(given[: len(self.form.constants)])

    def _flat(self, given: Sequence[torch.Tensor], n: int) -> list[torch.Tensor]:
        """With one batch axis of n samples."""
        return [
            t.reshape(*g.leading, n, *g.event) if g.batched else t
            for g, t in zip(self.options.given, given, strict=True)
        ]

    def _unflat(self, results: Sequence[torch.Tensor], batch: torch.Size) -> list[torch.Tensor]:
        return [
            r.reshape(*lead, *batch, *r.shape[len(lead) + 1 :])
            for r, lead in zip(results, self.leads, strict=True)
        ]

    def _finish(
        self, x: torch.Tensor, given: Sequence[torch.Tensor], results: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        named = dict(zip(self.options.names, results, strict=True))
        if self.averaged:
            n = max(1, x.shape[: self.batch_ndim].numel())
            named = {name: result / n for name, result in named.items()}
        if self.summed:
            named["value"] = named["value"].sum()
        if not traced():
            self._check(x, self._constants(given), named["value"])
        return [named[name] for name in self.asked.names]

    def _traced(self, x: torch.Tensor, given: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """While PyTorch traces the call: the program run last, for all samples; that it is right
        becomes a part of what is traced."""
        variant = self.variants[0] if self.variants else None
        if variant is None or variant.matcher is None:
            raise InputError(
                "the structure of the model depends on the values of x, and no one program can"
                " serve a batch",
                hint="call it once before, on samples of one structure, or leave it uncompiled:"
                " torch.compiler.disable",
            )
        batch, event = x.shape[: self.batch_ndim], x.shape[self.batch_ndim :]
        xs = x if self.batch_ndim == 1 else x.reshape(-1, *event)
        flat = self._flat(given, xs.shape[0])
        if variant.structure is not None:
            variant.structure.demand((xs, *self._constants(flat)), variant.matcher)
        results = variant.run(xs, flat, variant.read(), self.running)
        return self._finish(x, given, self._unflat(results, batch))

    def tensors(self) -> list[torch.Tensor]:
        """All tensors of the model that its programs take."""
        return [s.read(self.model) for variant in self.variants for s in variant.sources]

    def of_first(self, call: Call) -> Variant:
        """The program of the first sample."""
        x = call.x.detach()
        xs = x.reshape(-1, *x.shape[self.batch_ndim :])
        described = zip(self.options.given, self._flat(call.given, len(xs)), strict=True)
        first = [_some(g, t, torch.arange(1, device=x.device)) for g, t in described]
        ((variant, _),) = self._groups(xs[:1], self._constants(first))
        return variant

    # --- grouping -------------------------------------------------------------------------------

    def _groups(
        self, xs: torch.Tensor, constants: Sequence[torch.Tensor]
    ) -> list[tuple[Variant, torch.Tensor]]:
        """The samples by structure: programs, and the positions of those they serve."""
        described = list(zip(self.options.given, constants, strict=False))

        def of(places: torch.Tensor) -> list[torch.Tensor]:
            return [_some(g, c, places) for g, c in described]

        with making, between_operations(), torch.no_grad():
            left = torch.arange(len(xs), device=xs.device)
            if not len(xs):
                variant = self.variants[0] if self.variants else None
                if variant is None:
                    zeros = [c.new_zeros(g.event) if g.batched else c for g, c in described]
                    variant = self._capture(xs.new_zeros(xs.shape[1:]), zeros)
                return [(variant, left)]
            groups: list[tuple[Variant, torch.Tensor]] = []
            self.variants[:] = [v for v in self.variants if self._fits(v)]
            for variant in list(self.variants):
                right = variant.matches(*((xs[left], of(left)) if groups else (xs, constants)))
                if bool(right.any()):
                    groups.append((variant, left[right]))
                    left = left[~right]
                if not len(left):
                    break
            while len(left):
                one = [_one(g, c, int(left[0])) for g, c in described]
                variant = self._capture(xs[left[0]], one)
                right = variant.matches(xs[left], of(left))
                right[0] = True
                groups.append((variant, left[right]))
                left = left[~right]
            for variant, _ in reversed(groups):  # most recent first
                self.variants.remove(variant)
                self.variants.insert(0, variant)
            return groups

    def _fits(self, variant: Variant) -> bool:
        return variant.fits(variant.read())

    def _capture(self, x: torch.Tensor, constants: Sequence[torch.Tensor]) -> Variant:
        """A program for samples like x, one that is batched where that can be."""
        with collector_paused(), _kept.traces():
            return self._captured(x, constants)

    def _captured(self, x: torch.Tensor, constants: Sequence[torch.Tensor]) -> Variant:
        nb = self.batch_ndim
        given = [g for g in self.options.given if g.constant]
        try:
            captured = capture(self.model, x, 0, nb, self.form, constants, given)
        except CaptureError:
            self._try_with(x, constants, 1)
            raise
        if not self.variants:
            self._find_sum(x, constants)
        varying = captured.structure.varying if captured.structure is not None else None
        try:
            binding = bind(self.model, batched(captured), x[None], self.options)
            matcher = _NOTHING
            if varying is not None:
                matcher = compile_guard(captured, varying, x[None])
        except Exception:  # whatever the reason, the exact way one at a time is left
            binding = bind(self.model, captured, x, self.options)
            matcher = None
        known = {f.name: getattr(binding, f.name) for f in fields(binding) if f.init}
        variant = Variant(**known, matcher=matcher)
        self.variants[:] = [v for v in self.variants if v.generation == programs.generation]
        keep(self.variants, variant)
        return variant

    def _find_sum(self, x: torch.Tensor, constants: Sequence[torch.Tensor]) -> None:
        """Whether the model returns one number for a batch, the sum or the mean over its samples:
        seen on a batch of equal ones."""
        two = self._try_with(x, constants, 2)
        self.summed = two.ndim == 0
        if self.summed and self.batch_ndim:
            one = self._try_with(x, constants, 1)
            self.averaged = agree(two, one) and not agree(two, 2**self.batch_ndim * one)

    def _try_with(
        self, x: torch.Tensor, constants: Sequence[torch.Tensor], count: int
    ) -> torch.Tensor:
        """What the model returns for a batch of ``count`` times x, along each batch axis.

        Raises:
            SampleMixingError: it takes no such batch.
        """
        sizes = [count] * self.batch_ndim
        many = [
            c.expand(*sizes, *c.shape).clone() if g.batched else c
            for g, c in zip(self.options.given, constants, strict=False)
        ]
        try:
            return self._value(x.expand(*sizes, *x.shape).clone(), many)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise SampleMixingError(
                "samples of the batch see each other, or the model was written for one batch size:"
                f" it does not take a batch of {count} ({reason})",
                where=self.where,
                hint="compute each sample on its own, for a batch of any size",
            ) from error

    def _value(self, x: torch.Tensor, constants: Sequence[torch.Tensor]) -> torch.Tensor:
        """What the model returns; its buffers stay as they are."""
        buffers = {name: t.clone() for name, t in self.model.named_buffers()}
        args, kwargs, own = self.form.whole(x, constants)
        with torch.no_grad():
            result: torch.Tensor = torch.func.functional_call(
                self.model, {**buffers, **own}, args, kwargs, tie_weights=False
            )
        return result

    def _check(
        self, x: torch.Tensor, constants: Sequence[torch.Tensor], value: torch.Tensor
    ) -> None:
        """Each sample was looked at alone: the model must give the same for the batch.

        Raises:
            SampleMixingError: it does not.
        """
        if x.shape[: self.batch_ndim].numel() < 2 or any(v.random for v in self.variants):
            return
        want = self._value(x.detach(), constants)
        if want.numel() != value.numel() or not agree(value.detach().reshape(want.shape), want):
            raise SampleMixingError(
                "samples of the batch see each other: the model gives them other values together"
                " than alone, and its structure depends on values",
                where=self.where,
                hint="decide for each sample by itself (a mask with torch.where instead of `if`),"
                " or name more trailing axes as one sample with event_ndim=",
            )

    def shown(self, call: Call) -> list[torch.Tensor]:
        """x and what is given as the program of the first sample takes them."""
        x = call.x
        xs = x.reshape(-1, *x.shape[self.batch_ndim :])
        flat = self._flat(call.given, len(xs))
        if self.of_first(call).matcher is not None:
            return [xs, *flat]
        described = zip(self.options.given, flat, strict=True)
        return [xs[0], *(_one(g, t, 0) for g, t in described)]

    def notes(self) -> list[str]:
        """For ``explain``."""
        if self.form.alone and all(v.structure is None for v in self.variants):
            return ["captured for one sample: all of them share what is differentiated"]
        single = sum(v.matcher is None for v in self.variants)
        notes = [
            f"the structure depends on the values of each sample: {len(self.variants)} structures"
            " so far, each captured for one sample; the samples of one structure run as a batch"
        ]
        if single:
            notes.append(f"slower: those of {single} of the structures run one at a time")
        return notes


__all__: Sequence[Any] = ["Apart", "Variant"]
