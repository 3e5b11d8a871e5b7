"""The module that ``transform`` returns: it finds its program by a key of plain values, gathers the
model's live tensors and runs generated code."""

from __future__ import annotations

import threading
from collections import namedtuple
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import fx, nn

from fxhess import _torch
from fxhess.apart import Apart
from fxhess.binding import Binding, bind, first, keep
from fxhess.cache import programs
from fxhess.capture import capture
from fxhess.checks import check_input, check_model, check_out
from fxhess.closures import FunctionModule, as_module
from fxhess.collector import collector_paused
from fxhess.errors import CaptureError, InputError, SampleStructureError
from fxhess.execute import PLAIN, Execution, Running
from fxhess.explain import Explanation
from fxhess.outputs import (
    NOTHING_GIVEN,
    Given,
    check_entries,
    given_for,
    is_detailed,
    parse,
)
from fxhess.pipeline import Options
from fxhess.repeat import Repeat
from fxhess.rows import hessian_by_rows
from fxhess.sources import traced, tracing_elsewhere
from fxhess.verify import Verification, verify

_NONE: list[Any] = []
_FIRST = "call it once, or hess.specialize(x), before torch.compile or torch.export"


@cache
def result_type(outputs: tuple[str, ...]) -> Any:
    """The named tuple that holds several outputs."""
    return namedtuple("Derivatives", outputs)


class HessianModule(nn.Module):
    """Per-sample derivatives of a model, as a module.  Made by :func:`fxhess.transform`."""

    def __init__(
        self,
        model: nn.Module | Callable[..., Any],
        outputs: Any,
        event_ndim: int,
        strategy: str = "auto",
        fallback: str = "allow",
        running: Running = PLAIN,
    ) -> None:
        super().__init__()
        self.model = as_module(model)
        self.outputs = outputs
        self.single = isinstance(outputs, str) or is_detailed(outputs)
        self.options = Options(parse(outputs, event_ndim), event_ndim, strategy, fallback)
        self._takes_vector = any(output.takes_vector for output in self.options.outputs)
        self.running = running
        self._bindings: dict[Any, list[Any]] = {}
        self._products: list[HessianModule] = []  # in a list, so that it is no submodule
        self._lock = threading.RLock()
        self._last: Repeat | None = None
        self._follows = isinstance(self.model, FunctionModule)
        self.training = self.model.training

    # --- calling --------------------------------------------------------------------------------

    def forward(
        self,
        x: torch.Tensor,
        *,
        vector: torch.Tensor | None = None,
        metric: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> Any:
        """Derivatives at ``x: [*batch, *event]``: Hessians ``[*batch, *event, *event]``, or
        ``[*batch, m, *event, *event]`` for a model with m outputs; several outputs as a named
        tuple.

        Args:
            x: real floating-point, dense, of the model's dtype and device.
            vector: for ``hvp`` and ``quadratic``: of x's shape, or of one sample's for all, or
                several along a leading axis, ``[k, *batch, *event]``.
            metric: for ``laplacian``, which becomes trace(metric H): ``[*event, *event]``, or one
                for each sample, ``[*batch, *event, *event]``; only its symmetric part counts.
            out: a tensor that the (only) output is written into and that is returned; no
                gradient flows through it.

        Raises:
            InputError: x, ``vector``, ``metric`` or ``out`` do not fit.
            CaptureError, SampleMixingError, UnsupportedOpError: at the first call for a shape,
                dtype, device and mode: see :func:`fxhess.transform`.
        """
        if torch.compiler.is_compiling():
            pass  # below, everything is looked at by name: that is what a compiler can prove
        elif self._last is not None and vector is None and metric is None and out is None:
            if self._follows:
                self.model.refresh()  # type: ignore[operator]
            results = self._last.call(x)
            if results is not None:
                return self._named(results)
        described, given = NOTHING_GIVEN
        if vector is not None or metric is not None or self._takes_vector:
            described, given = self._given(x, vector, metric)
        binding = self._find(x, described)
        if binding is None:
            binding = self._specialize(x, described)
        if isinstance(binding, Apart):
            results = binding.run(x, given)
            if out is not None:
                return self._copied(results, binding, x, out)
            return self._named(results)
        tensors = binding.read()
        if not binding.fits(tensors):
            self._bindings.clear()  # the model was changed: trace it again
            return self.forward(x, vector=vector, metric=metric, out=out)
        if binding.structure is not None and traced():
            binding.structure.demand(x)
        if out is not None:
            self._check_out(binding, x, out)
        if self.running.max_memory is not None and self._exceeds(binding, x, tensors, out is None):
            return self._row_by_row(x, self.running.max_memory, out)
        if out is not None:
            program = binding.program
            with torch.no_grad(), _torch.as_written(x.device):
                execution = program.execution
                if execution is None:
                    return out.copy_(program.graph_module(x, *given, *tensors))
                return execution(x, tensors, [out], binding.hoisted, self.running, given)[0]
        results = binding.run(x, given, tensors, self.running)
        if not given and not torch.compiler.is_compiling():
            self._last = binding.repeat(self.model, x, tensors, self.running)
        return self._named(results)

    def _exceeds(
        self, binding: Binding, x: torch.Tensor, tensors: list[torch.Tensor], fresh: bool
    ) -> bool:
        """Whether a Hessian has to be made row by row to stay within the given memory."""
        execution = binding.program.execution
        limit = self.running.max_memory
        if execution is None or limit is None or self.options.names != ("hessian",):
            return False
        if traced() or not execution.tiled or binding.structure is not None:
            return False
        wanted = fresh and torch.is_grad_enabled()
        if wanted and (x.requires_grad or any(t.requires_grad for t in tensors)):
            return False
        return not execution.fits(x, fresh, limit)

    def _row_by_row(self, x: torch.Tensor, limit: int, out: torch.Tensor | None) -> torch.Tensor:
        options = self.options
        if not self._products:
            child = HessianModule(
                self.model, "hvp", options.event_ndim, options.strategy, options.fallback,
                replace(self.running, max_memory=None),
            )  # fmt: skip
            self._products.append(child)
        (products,) = self._products

        def prepare(x: torch.Tensor, v: torch.Tensor) -> Execution:
            binding = products._specialized(x, v)
            assert isinstance(binding, Binding) and binding.program.execution is not None
            return binding.program.execution

        def product(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return products(x, vector=v)  # type: ignore[no-any-return]

        with torch.no_grad():
            return hessian_by_rows(x, options.event_ndim, limit, product, prepare, out)

    def _given(
        self, x: torch.Tensor, vector: torch.Tensor | None, metric: torch.Tensor | None
    ) -> tuple[tuple[Given, ...], Sequence[torch.Tensor]]:
        n = self.options.event_ndim
        check_input(x, n)
        return given_for(self.options.outputs, x, n, vector, metric)

    def _named(self, results: Sequence[Any]) -> Any:
        return results[0] if self.single else result_type(self.options.names)(*results)

    def _check_out(self, binding: Binding, x: torch.Tensor, out: torch.Tensor) -> None:
        if len(self.options.outputs) != 1:
            raise InputError("out= needs a transform with one output")
        (result,) = next(
            n for n in binding.program.graph_module.graph.nodes if n.op == "output"
        ).args
        assert isinstance(result, fx.Node)
        nb = x.ndim - self.options.event_ndim
        summed = binding.program.summed and self.options.names == ("value",)
        (lead,) = binding.program.leads
        after = result.meta["val"].shape[len(lead) + nb :]
        shape = [] if summed else [*lead, *x.shape[:nb], *after]
        tensors = [source.read(self.model) for source in binding.sources]
        check_out(out, shape, result.meta["val"].dtype, x, tensors)

    def _copied(
        self, results: list[Any], binding: Apart, x: torch.Tensor, out: torch.Tensor
    ) -> torch.Tensor:
        """Results that were put together of parts, in the tensor given for them."""
        if len(results) != 1:
            raise InputError("out= needs a transform with one output")
        check_out(out, list(results[0].shape), results[0].dtype, x, binding.tensors())
        with torch.no_grad():
            return out.copy_(results[0])

    # --- programs -------------------------------------------------------------------------------

    def _key(self, x: torch.Tensor, given: tuple[Given, ...] = ()) -> Any:
        # Modules by identity: one that was replaced may compute something else.
        modules = tuple([(id(m), m.training) for m in self.model.modules()])
        nb = x.ndim - self.options.event_ndim
        event = x.shape[nb:] if nb >= 0 else None
        casts = _torch.autocasting(x.device)
        return (nb, event, x.dtype, x.device, x.layout, casts, modules, given)

    def _find(self, x: torch.Tensor, given: tuple[Given, ...] = ()) -> Binding | Apart | None:
        if not isinstance(x, torch.Tensor):
            return None
        if self._follows and not torch.compiler.is_compiling():
            self.model.refresh()  # type: ignore[operator]
        known = self._bindings.get(self._key(x, given), _NONE)
        for binding in known:
            if binding.generation == programs.generation and (
                binding.unconditional or binding.serves(x)
            ):
                if binding is not known[0] and not torch.compiler.is_compiling():
                    first(known, binding)
                return binding  # type: ignore[no-any-return]
        return None

    def specialize(
        self,
        x: torch.Tensor,
        *,
        vector: torch.Tensor | None = None,
        metric: torch.Tensor | None = None,
    ) -> HessianModule:
        """Make the program for inputs like these (any batch size) now; returns the module itself.
        Where the structure of the model depends on values: for values like these.  Without a
        ``vector``, where one is needed: for a single one."""
        self._specialized(x, vector, metric)
        return self

    def _specialized(
        self,
        x: torch.Tensor,
        vector: torch.Tensor | None = None,
        metric: torch.Tensor | None = None,
    ) -> Binding | Apart:
        check_input(x, self.options.event_ndim)
        if vector is None and self._takes_vector:
            vector = torch.zeros_like(x)
        described, given = self._given(x, vector, metric)
        binding = self._find(x, described) or self._specialize(x, described)
        if isinstance(binding, Apart):
            binding.run(x, given)
        return binding

    @torch.compiler.disable(reason=f"no program for such an x yet: {_FIRST}")
    def _specialize(self, x: torch.Tensor, given: tuple[Given, ...]) -> Binding | Apart:
        check_input(x, self.options.event_ndim)
        for output in self.options.outputs:
            check_entries(output, x.shape[x.ndim - self.options.event_ndim :])
        options = replace(self.options, given=given)
        if tracing_elsewhere():
            raise InputError(
                "this module has no program for such an x yet, and none can be made while"
                " PyTorch traces it",
                hint=_FIRST,
            )
        with self._lock, collector_paused():
            binding = self._find(x, given)
            if binding is not None:
                return binding
            known = self._bindings.setdefault(self._key(x, given), [])
            known[:] = [b for b in known if b.generation == programs.generation]
            try:
                captured = capture(self.model, x, x.ndim - self.options.event_ndim)
                binding = bind(self.model, captured, x, options)
                keep(known, binding)
            except SampleStructureError as error:
                binding = Apart(self.model, options, x, error.where, self.running)
                known[:] = [binding]
            except CaptureError:
                check_model(self.model, x)
                raise
            return binding

    # --- looking at it --------------------------------------------------------------------------

    def _found(self, x: torch.Tensor) -> Binding:
        """The program for inputs like x, made now if need be; where samples have programs of their
        own, that of the first."""
        binding = self._specialized(x)
        return binding.of_first(x) if isinstance(binding, Apart) else binding

    def graph_module(self, x: torch.Tensor) -> fx.GraphModule:
        """The generated code for inputs like x, as a ``torch.fx.GraphModule`` whose inputs are x
        and the model's tensors in the order of :meth:`tensors`."""
        return self._found(x).program.graph_module

    def tensors(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """The model's tensors that the generated code takes besides x, by name, in order."""
        return {
            ".".join(source.path) or f"constant {i}": source.read(self.model)
            for i, source in enumerate(self._found(x).sources)
        }

    def explain(self, x: torch.Tensor) -> Explanation:
        """What the compiler did for inputs like x: print it.  Calls the module a few times, for
        about 0.3 s, to show the measured time beside the predicted one."""
        found = self._specialized(x)
        binding = self._found(x)
        notes = [] if binding.structure is None else binding.structure.notes(binding.captures)
        shown = x
        if isinstance(found, Apart):
            notes += found.notes()
            shown = found.shown(x)
        vector = torch.zeros_like(shown) if self._takes_vector else None
        _, given = self._given(shown, vector, None)
        return Explanation.of(
            binding.program, shown, self.options, lambda _: self._called(x),
            [*given, *binding.read()], notes, self.running,
        )  # fmt: skip

    def _called(self, x: torch.Tensor) -> Any:
        return self(x, vector=torch.zeros_like(x)) if self._takes_vector else self(x)

    def verify(self, x: torch.Tensor, *, samples: int = 8) -> Verification:
        """Compare with double backward of one sample at a time in float64, on at most
        ``samples`` samples, and check symmetry.

        Raises:
            VerificationError: the Hessian is wrong or not exactly symmetric.
        """
        return verify(self, x, samples)

    # --- copying --------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_products"] = []
        state["_last"] = None
        state["_bindings"] = {}  # found again in the cache, or made anew, at the next call
        del state["_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._lock = threading.RLock()

    def extra_repr(self) -> str:
        return f"outputs={self.outputs!r}, event_ndim={self.options.event_ndim}"


__all__ = ["CaptureError", "HessianModule", "result_type"]
