"""The module that ``transform`` returns: it finds its program by a key of plain values, gathers the
model's live tensors and runs generated code."""

from __future__ import annotations

import threading
from collections import namedtuple
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import fx, nn

from fxhess import _torch
from fxhess.cache import programs
from fxhess.capture import capture
from fxhess.closures import FunctionModule, as_module
from fxhess.collector import collector_paused
from fxhess.errors import CaptureError, InputError
from fxhess.execute import PLAIN, Hoisted, Runner, Running, run_whole
from fxhess.explain import Explanation
from fxhess.pipeline import Options, Program, compile_captured, key_of
from fxhess.sources import Reader, Source, tracing_elsewhere
from fxhess.verify import Verification, verify

OUTPUTS = ("value", "gradient", "hessian")
_FIRST = "call it once, or hess.specialize(x), before torch.compile or torch.export"


@cache
def result_type(outputs: tuple[str, ...]) -> Any:
    """The named tuple that holds several outputs."""
    return namedtuple("Derivatives", outputs)


@dataclass
class Binding:
    """A program as one model uses it: where its tensors are read, and what they must be."""

    program: Program
    sources: list[Source]
    read: Reader
    specs: list[tuple[torch.Size, torch.dtype, torch.device]]
    guards: tuple[Any, ...]
    symbols: tuple[Any, ...]
    generation: int
    hoisted: Hoisted = field(default_factory=Hoisted)
    # The program as one operator, where it can be one; made now: a compiler that traces a call
    # must find it ready.
    runner: Runner | None = None

    def __post_init__(self) -> None:
        if self.program.execution is not None:
            self.runner = Runner(self.program.execution, self.hoisted)

    def holds(self, x: torch.Tensor) -> bool:
        """Whether the batch sizes are among those that the model was traced for."""
        return _torch.conditions_hold(self.symbols, self.guards, x.shape)


class HessianModule(nn.Module):
    """Per-sample derivatives of a model, as a module.  Made by :func:`fxhess.transform`."""

    def __init__(
        self,
        model: nn.Module | Callable[..., Any],
        outputs: str | tuple[str, ...],
        event_ndim: int,
        strategy: str = "auto",
        fallback: str = "allow",
        running: Running = PLAIN,
    ) -> None:
        super().__init__()
        self.model = as_module(model)
        self.outputs = outputs
        names = (outputs,) if isinstance(outputs, str) else outputs
        self.options = Options(names, event_ndim, strategy, fallback)
        self.running = running
        self._bindings: dict[Any, list[Binding]] = {}
        self._lock = threading.RLock()
        self.training = self.model.training

    # --- calling --------------------------------------------------------------------------------

    def forward(self, x: torch.Tensor, *, out: torch.Tensor | None = None) -> Any:
        """Derivatives at ``x: [*batch, *event]``: Hessians ``[*batch, *event, *event]``, or
        ``[*batch, m, *event, *event]`` for a model with m outputs; several outputs as a named
        tuple.

        Args:
            x: real floating-point, dense, of the model's dtype and device.
            out: a tensor that the (only) output is written into and that is returned; no
                gradient flows through it.

        Raises:
            InputError: x or ``out`` do not fit.
            CaptureError, SampleMixingError, UnsupportedOpError: at the first call for a shape,
                dtype, device and mode: see :func:`fxhess.transform`.
        """
        binding = self._find(x)
        if binding is None:
            binding = self._specialize(x)
        tensors = binding.read()
        for tensor, spec in zip(tensors, binding.specs, strict=True):
            if (
                tensor is None
                or tensor.shape != spec[0]
                or tensor.dtype != spec[1]
                or tensor.device != spec[2]
            ):
                self._bindings.clear()  # the model was changed: trace it again
                return self.forward(x, out=out)
        program = binding.program
        if out is not None:
            self._check_out(binding, x, out)
            with torch.no_grad():
                execution = program.execution
                if execution is None:
                    return out.copy_(program.graph_module(x, *tensors))
                return execution(x, tensors, [out], binding.hoisted, self.running)[0]
        results = self._run(binding, x, tensors)
        return results[0] if isinstance(self.outputs, str) else result_type(self.outputs)(*results)

    def _run(
        self, binding: Binding, x: torch.Tensor, tensors: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """All results: in tiles where nothing but numbers is wanted and there is enough work for
        it, otherwise by the plain program, which autograd and functional transforms see."""
        program, running = binding.program, self.running
        wanted = torch.is_grad_enabled() and (
            x.requires_grad or any(t.requires_grad for t in tensors)
        )
        if torch.compiler.is_compiling():
            runner = binding.runner
            whole = wanted or runner is None or not runner.execution.worth_a_call
            if whole or torch.compiler.is_exporting():
                return run_whole(program.fused, x, tensors)
            return runner.traced(x, tensors)  # type: ignore[union-attr]
        if type(x) not in (torch.Tensor, nn.Parameter) or _torch.transforming():
            return run_whole(program.graph_module, x, tensors)
        execution = program.execution
        if running.max_memory is not None:
            program.check_memory(x, wanted, running.max_memory)
        if (
            not wanted
            and execution is not None
            and (running.max_memory is not None or execution.worthwhile(x))
        ):
            return execution(x, tensors, None, binding.hoisted, running)
        return run_whole(program.compiled if running.compile else program.graph_module, x, tensors)

    def _check_out(self, binding: Binding, x: torch.Tensor, out: torch.Tensor) -> None:
        if len(self.options.outputs) != 1:
            raise InputError("out= needs a transform with one output")
        (result,) = next(
            n for n in binding.program.graph_module.graph.nodes if n.op == "output"
        ).args
        assert isinstance(result, fx.Node)
        nb = x.ndim - self.options.event_ndim
        summed = binding.program.summed and self.options.outputs == ("value",)
        shape = [] if summed else [*x.shape[:nb], *result.meta["val"].shape[nb:]]
        if list(out.shape) != shape or out.dtype != result.meta["val"].dtype:
            raise InputError(
                f"out is {out.dtype} {list(out.shape)}, the result {result.meta['val'].dtype}"
                f" {shape}"
            )
        if out.device != x.device:
            raise InputError(f"out is on {out.device}, x on {x.device}")
        if out.requires_grad:
            raise InputError("out requires grad; no gradient can flow through a given result")
        if _overlap(out, x) or any(
            _overlap(out, source.read(self.model)) for source in binding.sources
        ):
            raise InputError("out overlaps x or a tensor of the model in memory")
        if out.numel() and _self_overlapping(out):
            raise InputError("out overlaps itself in memory (an expanded tensor)")

    # --- programs -------------------------------------------------------------------------------

    def _key(self, x: torch.Tensor) -> Any:
        # Modules by identity: one that was replaced may compute something else.
        modules = tuple([(id(m), m.training) for m in self.model.modules()])
        nb = x.ndim - self.options.event_ndim
        return (nb, x.shape[nb:] if nb >= 0 else None, x.dtype, x.device, x.layout, modules)

    def _find(self, x: torch.Tensor) -> Binding | None:
        if not isinstance(x, torch.Tensor):
            return None
        if isinstance(self.model, FunctionModule) and not torch.compiler.is_compiling():
            self.model.refresh()
        for binding in self._bindings.get(self._key(x), ()):
            if binding.generation == programs.generation and (
                not binding.guards or binding.holds(x)
            ):
                return binding
        return None

    def specialize(self, x: torch.Tensor) -> HessianModule:
        """Make the program for inputs like x (any batch size) now; returns the module itself."""
        if self._find(x) is None:
            self._specialize(x)
        return self

    @torch.compiler.disable(reason=f"no program for such an x yet: {_FIRST}")
    def _specialize(self, x: torch.Tensor) -> Binding:
        self._check_input(x)
        if tracing_elsewhere():
            raise InputError(
                "this module has no program for such an x yet, and none can be made while"
                " PyTorch traces it",
                hint=_FIRST,
            )
        with self._lock, collector_paused():
            binding = self._find(x)
            if binding is not None:
                return binding
            nb = x.ndim - self.options.event_ndim
            try:
                captured = capture(self.model, x, nb)
            except CaptureError:
                self._check_tensors(dict(self.model.named_parameters()), x)
                self._check_tensors(dict(self.model.named_buffers()), x)
                raise
            used = {
                ".".join(source.path) or "a tensor made in forward": source.read(self.model)
                for source in captured.sources
            }
            self._check_tensors(used, x)
            if not captured.converts:
                self._check_types(used, x)
            key = key_of(captured, x, self.options)
            program = programs.get(key, lambda: compile_captured(captured, x, self.options))
            tensors = [source.read(self.model) for source in captured.sources]
            binding = Binding(
                program,
                captured.sources,
                Reader(captured.sources, self.model),
                [(t.shape, t.dtype, t.device) for t in tensors],
                captured.guards,
                captured.symbols,
                programs.generation,
            )
            known = self._bindings.setdefault(self._key(x), [])
            known[:] = [b for b in known if b.generation == programs.generation]
            known.append(binding)
            return binding

    def _check_input(self, x: torch.Tensor) -> None:
        if not isinstance(x, torch.Tensor):
            raise InputError(f"x must be a tensor, not {type(x).__name__}")
        n = self.options.event_ndim
        if x.ndim < n:
            raise InputError(
                f"x has {x.ndim} axes, a sample {n}",
                hint=f"x is [*batch, *event] with the last {n} axes one sample (event_ndim={n})",
            )
        if not x.dtype.is_floating_point:
            raise InputError(
                f"x is {x.dtype}; second derivatives need real floating-point numbers",
                hint="x.float() or x.double(); complex inputs as their real and imaginary parts",
            )
        if x.layout != torch.strided:
            raise InputError(f"x has layout {x.layout}; only dense tensors are supported",
                             hint="x.to_dense()")  # fmt: skip
        if x.device.type == "meta":
            raise InputError("x is on the meta device: it has no values")

    def _check_tensors(self, tensors: Mapping[str, torch.Tensor], x: torch.Tensor) -> None:
        for name, tensor in tensors.items():
            if tensor.device.type == "meta":
                raise InputError(f"'{name}' is on the meta device: it has no values")
            if tensor.device != x.device and tensor.ndim:
                raise InputError(
                    f"x is on {x.device}, '{name}' on {tensor.device}", hint="move one of them"
                )

    def _check_types(self, tensors: Mapping[str, torch.Tensor], x: torch.Tensor) -> None:
        """All weights of another type than x, and no conversion in the model: an oversight."""
        weights = {n: t for n, t in tensors.items() if t.dtype.is_floating_point and t.ndim}
        if weights and all(t.dtype != x.dtype for t in weights.values()):
            name, tensor = next(iter(weights.items()))
            raise InputError(
                f"x is {x.dtype}, '{name}' {tensor.dtype}",
                hint=f"x.to({tensor.dtype}) or model.to({x.dtype})",
            )

    # --- looking at it --------------------------------------------------------------------------

    def graph_module(self, x: torch.Tensor) -> fx.GraphModule:
        """The generated code for inputs like x, as a ``torch.fx.GraphModule`` whose inputs are x
        and the model's tensors in the order of :meth:`tensors`."""
        self.specialize(x)
        binding = self._find(x)
        assert binding is not None
        return binding.program.graph_module

    def tensors(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """The model's tensors that the generated code takes besides x, by name, in order."""
        self.specialize(x)
        binding = self._find(x)
        assert binding is not None
        return {
            ".".join(source.path) or f"constant {i}": source.read(self.model)
            for i, source in enumerate(binding.sources)
        }

    def explain(self, x: torch.Tensor) -> Explanation:
        """What the compiler did for inputs like x: print it.  Calls the module a few times, for
        about 0.3 s, to show the measured time beside the predicted one."""
        self.specialize(x)
        binding = self._find(x)
        assert binding is not None
        return Explanation.of(binding.program, x, self.options, self)

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
        state["_bindings"] = {}  # found again in the cache, or made anew, at the next call
        del state["_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._lock = threading.RLock()

    def extra_repr(self) -> str:
        return f"outputs={self.outputs!r}, event_ndim={self.options.event_ndim}"


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors share memory (by the ranges of addresses they span)."""
    if a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr() or not (
        a.numel() and b.numel()
    ):
        return False
    spans = []
    for t in (a, b):
        last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
        start = t.storage_offset() * t.element_size()
        spans.append((start, start + (last + 1) * t.element_size()))
    return spans[0][0] < spans[1][1] and spans[1][0] < spans[0][1]


def _self_overlapping(t: torch.Tensor) -> bool:
    """Whether two entries may share memory: each axis has to step over all finer ones."""
    reach = 0
    for step, n in sorted((s, n) for n, s in zip(t.shape, t.stride(), strict=True) if n > 1):
        if step <= reach:
            return True
        reach += step * (n - 1)
    return False


__all__ = ["OUTPUTS", "CaptureError", "HessianModule", "result_type"]
