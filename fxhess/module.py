"""The module that ``transform`` returns: it finds its program by a key of plain values, gathers the
model's live tensors and runs generated code."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import fx, nn

from fxhess import _torch
from fxhess.apart import Apart
from fxhess.arguments import Arguments
from fxhess.binding import Binding
from fxhess.checks import check_input, check_out
from fxhess.closures import as_module
from fxhess.errors import (
    CaptureError,
    InputError,
)
from fxhess.execute import PLAIN, Execution, Running, run_whole
from fxhess.explain import Explanation
from fxhess.form import PLAIN as FORM
from fxhess.form import Call
from fxhess.outputs import given_for, is_detailed, parse
from fxhess.pipeline import Options
from fxhess.progress import shown
from fxhess.repeat import Repeat
from fxhess.rows import hessian_by_rows
from fxhess.sources import traced
from fxhess.specialize import Programs
from fxhess.verify import Verification, verify

_ABSENT: Any = None  # nothing differentiated can be None


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
        wrt: Any = 0,
        in_dims: Any = None,
        reduce: str | None = None,
    ) -> None:
        super().__init__()
        self.model = as_module(model)
        self.outputs = outputs
        self.single = isinstance(outputs, str) or is_detailed(outputs)
        self.arguments = Arguments(self.model, wrt, in_dims, event_ndim, reduce)
        own = event_ndim if self.arguments.plain else None
        self.options = Options(
            parse(outputs, own), event_ndim, strategy, fallback, compiled=running.compile
        )
        self.programs = Programs(self.model, outputs, self.arguments, self.options, running)
        self._takes_vector = any(output.takes_vector for output in self.options.outputs)
        self.running = running
        self._products: list[HessianModule] = []  # in a list, so that it is no submodule
        self._last: Repeat | None = None
        self.training = self.model.training

    # --- calling --------------------------------------------------------------------------------

    def forward(
        self,
        x: Any = _ABSENT,
        *args: Any,
        vector: Any = None,
        metric: Any = None,
        out: torch.Tensor | None = None,
        progress: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Derivatives at ``x: [*batch, *event]``: Hessians ``[*batch, *event, *event]``, or
        ``[*batch, m, *event, *event]`` for a model with m outputs; several outputs as a named
        tuple.  With several inputs (``wrt``), gradients, diagonals and products have the structure
        of ``wrt``, Hessians hold such a structure for each of them, and the others are totals.

        Args:
            x, args, kwargs: the model's arguments, by position or name.  What is differentiated is
                real floating-point, dense, of the model's dtype and device.  Arguments of the model
                that are named like those below can be given by position only.
            vector: for ``hvp`` and ``quadratic``: of x's shape, or of one sample's for all, or
                several along a leading axis, ``[k, *batch, *event]``; for several inputs one each.
            metric: for ``laplacian``, which becomes trace(metric H): ``[*event, *event]``, or one
                for each sample, ``[*batch, *event, *event]``; only its symmetric part counts.
            out: a tensor that the (only) output is written into and that is returned; no
                gradient flows through it.
            progress: show a bar (of tqdm, on standard error) that moves after each tile.  Ctrl-C
                stops any call before the next operation: the module stays as it was, ``out`` is
                written in part.

        Raises:
            InputError: an argument, ``vector``, ``metric`` or ``out`` does not fit.
            CaptureError, SampleMixingError, UnsupportedOpError: at the first call for a shape,
                dtype, device and mode: see :func:`fxhess.transform`.

        Shapes and costs of all outputs: the table of :func:`fxhess.transform`.

        Example:
            >>> f = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
            >>> module = fxhess.transform(f, ("laplacian", "hvp"))
            >>> x, v = torch.randn(32, 3), torch.randn(5, 32, 3)
            >>> got = module(x, vector=v, metric=torch.diag(torch.tensor([1.0, 1.0, 0.5])))
            >>> got.laplacian.shape, got.hvp.shape
            (torch.Size([32]), torch.Size([5, 32, 3]))
        """
        if torch.compiler.is_compiling():
            pass  # below, everything is looked at by name: that is what a compiler can prove
        elif self._last is not None and vector is None and metric is None and out is None:
            results = None if args or kwargs or progress else self._as_before(x)
            if results is not None:
                return results
        if x is not _ABSENT:
            args, kwargs = self.arguments.with_first(x, args, kwargs)
        call = self._read(args, kwargs)
        if vector is not None or metric is not None or self._takes_vector:
            self._give(call, vector, metric)
        if progress and not torch.compiler.is_compiling():
            with shown(self.programs.samples(call)):
                return self._named(call, self.results(call, out))
        return self._named(call, self.results(call, out))

    def _as_before(self, x: Any) -> Any:
        """The result where the call is like the last one, otherwise None."""
        if self.programs.follows:
            self.model.refresh()  # type: ignore[operator]
        assert self._last is not None
        results = self._last.call(x)
        return None if results is None else self._result(results)

    def _read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """The arguments of a call."""
        if not kwargs and len(args) == 1 and self.arguments.plain:
            (x,) = args
            if isinstance(x, torch.Tensor):
                return Call(FORM, x)
        return self.arguments(self.model, args, kwargs)

    def _give(self, call: Call, vector: Any, metric: Any) -> None:
        """Add to a call what is given besides the model's arguments."""
        options = self.programs.options(call)
        check_input(call.x, options.event_ndim)
        vector = call.form.packed_vector(vector, call.x)
        metric = call.form.packed_metric(metric, call.x)
        described, given = given_for(options.outputs, call.x, options.event_ndim, vector, metric)
        call.described = (*call.described, *described)
        call.given = [*call.given, *given]

    def results(self, call: Call, out: torch.Tensor | None = None) -> list[Any]:
        """All outputs, for x as one tensor."""
        x, given = call.x, call.given
        binding = self.programs.find(call)
        if binding is None:
            binding = self.programs.make(call)
        if isinstance(binding, Apart):
            results = binding.run(x, given)
            return results if out is None else [self._copied(results, binding, call, out)]
        tensors = binding.read()
        if not binding.fits(tensors):
            self.programs.bindings.clear()  # the model was changed: trace it again
            return self.results(call, out)
        if binding.structure is not None and traced():
            binding.structure.demand(call.inputs)
        if out is not None:
            self._check_out(binding, call, tensors, out)
        if self.running.max_memory is not None and self._exceeds(
            binding, call, tensors, out is None
        ):
            return [self._row_by_row(x, self.running.max_memory, out)]
        if out is not None:
            program = binding.program
            with torch.no_grad(), _torch.as_written(x.device):
                execution = program.execution
                limited = self.running.max_memory is not None
                if execution is None or not (limited or execution.worthwhile(x)):
                    compiles = self.running.compile and not torch.compiler.is_compiling()
                    whole = program.direct if compiles else program.graph_module.forward
                    return [out.copy_(run_whole(whole, x, given, tensors)[0])]
                return execution(x, tensors, [out], binding.hoisted, self.running, given)
        results = binding.run(x, given, tensors, self.running)
        if call.form is FORM and not given and not torch.compiler.is_compiling():
            self._last = binding.repeat(self.model, x, tensors, self.running)
        return results

    def _exceeds(
        self, binding: Binding, call: Call, tensors: list[torch.Tensor], fresh: bool
    ) -> bool:
        """Whether a Hessian has to be made row by row to stay within the given memory."""
        x, execution = call.x, binding.program.execution
        limit = self.running.max_memory
        if execution is None or limit is None or self.options.names != ("hessian",):
            return False
        if traced() or not execution.tiled or binding.structure is not None:
            return False
        if call.form is not FORM:
            return False
        wanted = fresh and torch.is_grad_enabled()
        if wanted and (x.requires_grad or any(t.requires_grad for t in tensors)):
            return False
        return not execution.fits(x, fresh, limit)

    def _row_by_row(self, x: torch.Tensor, limit: int, out: torch.Tensor | None) -> torch.Tensor:
        options = self.options
        if not self._products:
            self._products.append(self.sibling("hvp", replace(self.running, max_memory=None)))
        (products,) = self._products

        def prepare(x: torch.Tensor, v: torch.Tensor) -> Execution:
            binding = products._specialized(products.prepared((x,), {}, v))
            assert isinstance(binding, Binding) and binding.program.execution is not None
            return binding.program.execution

        def product(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return products(x, vector=v)  # type: ignore[no-any-return]

        with torch.no_grad():
            return hessian_by_rows(x, options.event_ndim, limit, product, prepare, out)

    def _named(self, call: Call, results: Sequence[Any]) -> Any:
        if call.form is not FORM:
            pairs = zip(self.options.names, results, strict=True)
            results = [call.form.unpacked(name, result) for name, result in pairs]
        return self._result(results)

    def _result(self, results: Sequence[Any]) -> Any:
        return results[0] if self.single else result_type(self.options.names)(*results)

    def _check_out(
        self, binding: Binding, call: Call, tensors: list[torch.Tensor], out: torch.Tensor
    ) -> None:
        self._check_one(call)
        (result,) = next(
            n for n in binding.program.graph_module.graph.nodes if n.op == "output"
        ).args
        assert isinstance(result, fx.Node)
        x = call.x
        nb = x.ndim - self.programs.options(call).event_ndim
        summed = binding.program.summed and self.options.names == ("value",)
        (lead,) = binding.program.leads
        after = result.meta["val"].shape[len(lead) + nb :]
        shape = [] if summed else [*lead, *x.shape[:nb], *after]
        check_out(out, shape, result.meta["val"].dtype, x, [*call.given, *tensors])

    def _check_one(self, call: Call) -> None:
        """Raises InputError where ``out`` cannot be one tensor."""
        if len(self.options.outputs) != 1:
            raise InputError("out= needs a transform with one output")
        if not call.form.plain:
            raise InputError(
                "out= takes one tensor, and there are several inputs",
                hint="their blocks are views of one result already: nothing is copied",
            )

    def _copied(
        self, results: list[Any], binding: Apart, call: Call, out: torch.Tensor
    ) -> torch.Tensor:
        """Results that were put together of parts, in the tensor given for them."""
        self._check_one(call)
        others = [*call.given, *binding.tensors()]
        check_out(out, list(results[0].shape), results[0].dtype, call.x, others)
        with torch.no_grad():
            return out.copy_(results[0])

    def sibling(self, outputs: Any, running: Running = PLAIN) -> HessianModule:
        """Other outputs of the same model, by the same inputs."""
        options, arguments = self.options, self.arguments
        return HessianModule(
            self.model, outputs, options.event_ndim, options.strategy, options.fallback, running,
            arguments.given, arguments.in_dims, arguments.reduce,
        )  # fmt: skip

    # --- looking at it --------------------------------------------------------------------------

    def is_summed(self, call: Call) -> bool:
        """Whether the model, as it was called, returns the plain sum over the batch."""
        binding = self.programs.find(call)
        return binding is not None and binding.summed

    def specialize(
        self, *args: Any, vector: Any = None, metric: Any = None, **kwargs: Any
    ) -> HessianModule:
        """Make the program for inputs like these (any batch size) now; returns the module itself.
        Where the structure of the model depends on values: for values like these.  Without a
        ``vector``, where one is needed: for a single one."""
        self._specialized(self.prepared(args, kwargs, vector, metric))
        return self

    def prepared(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], vector: Any = None, metric: Any = None
    ) -> Call:
        """A call as programs see it, with a vector in any case where one is needed."""
        call = self._read(args, kwargs)
        check_input(call.x, self.programs.options(call).event_ndim)
        if vector is None and self._takes_vector:
            vector = call.form.unpacked("gradient", torch.zeros_like(call.x))
        self._give(call, vector, metric)
        return call

    def _specialized(self, call: Call) -> Binding | Apart:
        binding = self.programs.find(call) or self.programs.make(call)
        if isinstance(binding, Apart):
            binding.run(call.x, call.given)
        return binding

    def _found(self, call: Call) -> Binding:
        """The program for a call, made now if need be; where samples have programs of their own,
        that of the first."""
        binding = self._specialized(call)
        return binding.of_first(call) if isinstance(binding, Apart) else binding

    def graph_module(
        self, *args: Any, vector: Any = None, metric: Any = None, **kwargs: Any
    ) -> fx.GraphModule:
        """The generated code for inputs like these, as a ``torch.fx.GraphModule`` whose inputs are
        x, the model's other arguments, what is given besides, and the model's tensors in the order
        of :meth:`tensors`."""
        call = self.prepared(args, kwargs, vector, metric)
        return self._found(call).program.graph_module

    def tensors(
        self, *args: Any, vector: Any = None, metric: Any = None, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        """The model's tensors that the generated code takes besides x, by name, in order."""
        call = self.prepared(args, kwargs, vector, metric)
        return {
            ".".join(source.path) or f"constant {i}": source.read(self.model)
            for i, source in enumerate(self._found(call).sources)
        }

    def explain(
        self, *args: Any, vector: Any = None, metric: Any = None, **kwargs: Any
    ) -> Explanation:
        """What the compiler did for inputs like these: print it.  Calls the module a few times, for
        about 0.3 s, to show the measured time beside the predicted one."""
        call = self.prepared(args, kwargs, vector, metric)
        found = self._specialized(call)
        binding = self._found(call)
        notes = [] if binding.structure is None else binding.structure.notes(binding.captures)
        if call.form.constants:
            notes.append(self.arguments.corrected(call).told())
        inputs = [call.x, *call.given]
        if isinstance(found, Apart):
            notes += found.notes()
            inputs = found.shown(call)
        detached = replace(call, x=call.x.detach())
        if self.running.compile:
            self.results(detached)
            way = "as one function, one sample a lane" if binding.program.in_lanes else "by tiles"
            notes.append(f"compiled {way}")
        return Explanation.of(
            binding.program, [*inputs, *binding.read()], self.programs.options(call),
            lambda: self.results(detached), notes, self.running,
        )  # fmt: skip

    def verify(self, *args: Any, samples: int = 8, **kwargs: Any) -> Verification:
        """Compare with double backward of one sample at a time in float64, on at most
        ``samples`` samples, and check symmetry.

        Raises:
            VerificationError: the Hessian is wrong or not exactly symmetric.
        """
        self._specialized(self.prepared(args, kwargs))
        return verify(self, self.arguments.corrected(self._read(args, kwargs)), samples)

    # --- copying --------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_products": [], "_last": None}

    def extra_repr(self) -> str:
        return f"outputs={self.outputs!r}, event_ndim={self.options.event_ndim}{self.arguments}"


__all__ = ["CaptureError", "HessianModule", "result_type"]
