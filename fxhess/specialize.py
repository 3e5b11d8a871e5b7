"""The programs of one transform: found by a key of plain values, or made."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fxhess import _kept, _outside, _torch
from fxhess.apart import Apart
from fxhess.arguments import Arguments
from fxhess.binding import Binding, first, keep
from fxhess.cache import programs
from fxhess.checks import check_input, check_model
from fxhess.closures import FunctionModule
from fxhess.collector import collector_paused
from fxhess.errors import (
    CaptureError,
    FxhessError,
    InputError,
    SampleMixingError,
    SampleStructureError,
)
from fxhess.execute import Running
from fxhess.form import PLAIN, Call
from fxhess.interrupts import between_operations
from fxhess.locks import making
from fxhess.outputs import check_entries, parse, refuse_details
from fxhess.pipeline import Options
from fxhess.recall import bound
from fxhess.sources import traced

_NONE: list[Any] = []
_FIRST = "call it once, or hess.specialize(x), before torch.compile or torch.export"


class Programs:
    """Programs of ``model`` for the ``outputs`` that a user named.  ``options`` are those for a
    plain x; ``running`` is how programs are to run."""

    def __init__(
        self,
        model: nn.Module,
        outputs: Any,
        arguments: Arguments,
        options: Options,
        running: Running,
    ) -> None:
        self.model = model
        self.outputs = outputs
        self.arguments = arguments
        self.plain = options
        self.running = running
        self.follows = isinstance(model, FunctionModule)
        self.bindings: dict[Any, list[Any]] = {}

    def options(self, call: Call) -> Options:
        """The options as they are for what this call differentiates.

        Raises:
            InputError: an output speaks of axes that it does not have.
        """
        if call.form is PLAIN:
            return self.plain
        event_ndim = call.form.packing.event_ndim
        outputs = parse(self.outputs, event_ndim if call.form.plain else None)
        if not call.form.plain:
            refuse_details(outputs)
        return replace(self.plain, event_ndim=event_ndim, outputs=outputs)

    def samples(self, call: Call) -> int:
        """How many samples the call has, 1 where x has too few axes to tell."""
        batch_ndim = call.x.ndim - self.options(call).event_ndim
        return call.x.shape[: max(0, batch_ndim)].numel()

    def find(self, call: Call) -> Binding | Apart | None:
        """The program for a call, if there is one."""
        if self.follows and not torch.compiler.is_compiling():
            self.model.refresh()  # type: ignore[operator]
        known = self.bindings.get(self._key(call), _NONE)
        for binding in known:
            if binding.generation == programs.generation and (
                binding.unconditional or binding.serves(call.x, call.constants)
            ):
                if binding is not known[0] and not torch.compiler.is_compiling():
                    first(known, binding)
                return binding  # type: ignore[no-any-return]
        return None

    def _key(self, call: Call) -> Any:
        # Modules by identity: one that was replaced may compute something else.
        modules = tuple([(id(m), m.training) for m in self.model.modules()])
        x = call.x
        form = None if call.form is PLAIN else call.form
        nb = x.ndim - self.plain.event_ndim if form is None else form.batch_ndim
        event = x.shape[nb:] if nb >= 0 else None
        casts = _torch.autocasting(x.device)
        return (nb, event, x.dtype, x.device, x.layout, casts, modules, call.described, form)

    @torch.compiler.disable(reason=f"no program for such an x yet: {_FIRST}")
    def make(self, call: Call) -> Binding | Apart:
        """The program for a call, made now if there is none.

        Raises:
            FxhessError: see :func:`fxhess.transform`.
        """
        x = call.x
        options = replace(self.options(call), given=call.described)
        check_input(x, options.event_ndim)
        for output in options.outputs:
            check_entries(output, x.shape[x.ndim - options.event_ndim :])
        if any(isinstance(n, torch.SymInt) for n in x.shape[x.ndim - options.event_ndim :]):
            raise InputError(
                f"the shape of a sample is not known while PyTorch traces this call: {x.shape}",
                hint="trace or export it with no axes dynamic but those of the batch",
            )
        with making, between_operations(), collector_paused(), _kept.traces():
            if self.follows:
                self.model.discover()  # type: ignore[operator]
            found = self.find(call)
            if found is not None:
                return found
            known = self.bindings.setdefault(self._key(call), [])
            known[:] = [b for b in known if b.generation == programs.generation]
            try:
                if call.form.alone:
                    return self._alone(known, call, options)
                binding = self._bound(call, options)
            except SampleStructureError as error:
                return self._apart(known, call, options, error.where)
            except (CaptureError, SampleMixingError) as error:
                other = self._other_reading(call)
                if other is not None:
                    return other
                if isinstance(error, CaptureError):
                    check_model(self.model, x)
                if call.form.constants:
                    raise type(error)(
                        error.what, where=error.where, hint=f"{error.hint}\n  {call.told()}"
                    ) from error
                raise
            keep(known, binding)
            return binding

    def _bound(self, call: Call, options: Options) -> Binding:
        with _outside.outside():
            x, *given = map(_outside.plain, (call.x, *call.constants))
            return bound(self.model, Call(call.form, x, given, call.described), options)

    def _apart(self, known: list[Any], call: Call, options: Options, where: Any = None) -> Apart:
        known[:] = [Apart(self.model, options, call, where, self.running)]
        return known[0]  # type: ignore[no-any-return]

    def _alone(self, known: list[Any], call: Call, options: Options) -> Apart:
        """As :meth:`_apart`.  Samples that are captured alone do not show whether a constant is one
        for each of them: the reading is right by which the model gives the same for all together.

        Raises:
            FxhessError: that of the first reading, where none is.
        """
        if not call.form.guessed or traced() or _outside.transforming():
            return self._apart(known, call, options)
        failure: FxhessError | None = None
        for other in (call, *self.arguments.other_readings(call)):
            found = self._apart(known, other, replace(options, given=other.described))
            try:
                with torch.no_grad():
                    found.run(other.x, other.given)
            except FxhessError as error:
                failure = failure or error
                continue
            if other is not call:
                self.arguments.learn(call, other)
            return found
        assert failure is not None
        known.clear()
        raise type(failure)(
            failure.what, where=failure.where, hint=f"{failure.hint}\n  {call.told()}"
        ) from failure

    def _other_reading(self, call: Call) -> Binding | Apart | None:
        """The program for the same arguments, where what was taken for one value a sample by its
        shape alone is shared by all."""
        if not call.form.guessed or call.form.alone:
            return None
        for other in self.arguments.other_readings(call):
            try:
                found = self.make(other)
            except FxhessError:
                continue
            self.arguments.learn(call, other)
            return found
        return None

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["bindings"] = {}  # found again in the cache, or made anew, at the next call
        return state
