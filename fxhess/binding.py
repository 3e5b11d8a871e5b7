"""A program as one model uses it."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from fxhess import _outside, _settings, _torch
from fxhess.cache import lasting_key, programs
from fxhess.capture import Captured
from fxhess.checks import check_tensors, check_types
from fxhess.errors import CaptureError, StructureWarning
from fxhess.execute import Hoisted, Running, run_whole
from fxhess.guards import Structure
from fxhess.pipeline import Options, Program, compile_captured, key_of
from fxhess.progress import advance
from fxhess.reads import transformed
from fxhess.repeat import Repeat
from fxhess.runner import Runner
from fxhess.sources import Reader, Source, traced

# Programs of one model for inputs of one shape, one for each structure seen.
MAX_STRUCTURES = 64
_MANY = 16  # captures after which a warning is due
_MAX_EXACT = 8  # captures for a number that has to be exactly the one seen


@dataclass(eq=False)
class Binding:
    """A program, where the model's tensors that it takes are read, and what they must be.

    ``guards`` on the batch sizes in ``symbols``, and ``structure`` on values, say what the program
    holds for; ``generation`` is that of the cache;
    ``captures``: the how manieth structure it is.
    """

    program: Program
    sources: list[Source]
    read: Reader
    specs: list[tuple[torch.Size, torch.dtype, torch.device]]
    guards: tuple[Any, ...]
    symbols: tuple[Any, ...]
    generation: int
    structure: Structure | None = None
    captures: int = 1
    hoisted: Hoisted = field(default_factory=Hoisted)
    # The program as one operator, where it can be one; made now: a compiler that traces a call
    # must find it ready.
    runner: Runner | None = None
    unconditional: bool = field(init=False)  # whether it serves all batch sizes and values

    def __post_init__(self) -> None:
        self.unconditional = not self.guards and self.structure is None
        if self.program.execution is not None:
            self.runner = Runner(self.program.execution, self.hoisted)

    @property
    def summed(self) -> bool:
        """Whether the model returns the plain sum over the batch."""
        return self.program.summed

    @cached_property
    def random(self) -> bool:
        """Whether the program draws random numbers."""
        return any(
            torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
            for node in self.program.graph_module.graph.nodes
        )

    def serves(self, x: torch.Tensor, constants: Sequence[torch.Tensor] = ()) -> bool:
        """Whether the program is right for these inputs and the model as it is now.  While PyTorch
        traces the call nothing can be known of values: then :meth:`run` demands it."""
        if self.guards and not _torch.conditions_hold(self.symbols, self.guards, x.shape):
            return False
        if self.structure is None or traced():
            return True
        if self.structure.varying is not None and _outside.transforming():
            raise transformed()
        return self.structure.holds((x, *constants))

    def fits(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether the model's tensors are those that it was traced for, in shape, type and
        device."""
        for tensor, spec in zip(tensors, self.specs, strict=True):
            if (
                tensor is None
                or tensor.shape != spec[0]
                or tensor.dtype != spec[1]
                or tensor.device != spec[2]
            ):
                return False
        return True

    def run(
        self,
        x: torch.Tensor,
        given: Sequence[torch.Tensor],
        tensors: list[torch.Tensor],
        running: Running,
    ) -> list[torch.Tensor]:
        """All results: in tiles where nothing but numbers is wanted and there is enough work for
        it, otherwise by the plain program, which autograd and functional transforms see."""
        if _torch.autocasting(x.device):
            with _torch.as_written(x.device):
                return self.run(x, given, tensors, running)
        program = self.program
        wanted = _wanted([x, *given, *tensors])
        if torch.compiler.is_compiling():
            runner = self.runner
            whole = wanted or runner is None or not runner.execution.worth_a_call
            if whole or _settings.is_exporting():
                return run_whole(program.fused, x, given, tensors)
            return runner.traced(x, given, tensors)  # type: ignore[union-attr]
        if type(x) not in (torch.Tensor, nn.Parameter) or _outside.transforming():
            return run_whole(program.graph_module, x, given, tensors)
        execution = program.execution
        if running.max_memory is not None:
            program.check_memory(x, wanted, running.max_memory)
        if (
            not wanted
            and execution is not None
            and (running.max_memory is not None or execution.worthwhile(x))
        ):

            def apart() -> list[torch.Tensor]:
                return execution(x, tensors, None, self.hoisted, running, given)

            free = running.compile and running.max_memory is None and not given
            samples = x.shape[: program.batch_ndim].numel()
            free = free and 0 < samples <= execution.most_samples_at_once
            if free and program.goes_at_once(x, tensors, apart):
                results = run_whole(program.at_once, x, given, tensors)
                advance(samples)
                return results
            return apart()
        if running.compile:
            return run_whole(program.compiled if wanted else program.direct, x, given, tensors)
        return run_whole(program.graph_module, x, given, tensors)

    def repeat(
        self, model: nn.Module, x: torch.Tensor, tensors: list[torch.Tensor], running: Running
    ) -> Repeat | None:
        """How to run the same again where :meth:`run` takes the plain program as it is; None where
        it does not."""
        plain = type(x) in (torch.Tensor, nn.Parameter) and not _outside.transforming()
        plain = plain and not _torch.autocasting(x.device) and not _wanted([x, *tensors])
        if not plain or not self.unconditional or running.max_memory is not None:
            return None
        program = self.program
        limit = sys.maxsize
        run = program.direct if running.compile else program.graph_module.forward
        if program.execution is not None:
            most = program.execution.most_samples_whole
            if running.compile and program.chosen_at_once and x.shape.numel() > 0:
                run, most = program.at_once, program.execution.most_samples_at_once
            limit = most * x.shape[program.batch_ndim :].numel()
        if x.numel() > limit:
            return None
        return Repeat.of(model, self.read, run, [x, *tensors], program.batch_ndim, limit)


def _wanted(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether gradients are wanted."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def bind(model: nn.Module, captured: Captured, x: torch.Tensor, options: Options) -> Binding:
    """The program of a captured model, compiled or found in the cache."""
    tensors = _checked(model, captured.sources, captured.converts, x)
    key = key_of(captured, x, options)
    program = programs.get(
        key,
        lambda: compile_captured(captured, x, options),
        lambda: lasting_key(captured, key),
    )
    return Binding(
        program,
        captured.sources,
        Reader(captured.sources, model),
        _specs(tensors),
        captured.guards,
        captured.symbols,
        programs.generation,
        captured.structure,
    )


def rebind(
    model: nn.Module, program: Program, sources: list[Source], converts: bool, x: torch.Tensor
) -> Binding:
    """A program that is known to be the model's, for all batch sizes and values; ``converts``: see
    :class:`fxhess.capture.Captured`."""
    tensors = _checked(model, sources, converts, x)
    reader = Reader(sources, model)
    return Binding(program, sources, reader, _specs(tensors), (), (), programs.generation)


def _checked(
    model: nn.Module, sources: Sequence[Source], converts: bool, x: torch.Tensor
) -> list[torch.Tensor]:
    """The tensors of the sources, which have to fit x."""
    tensors = [source.read(model) for source in sources]
    used = {
        ".".join(source.path) or "a tensor made in forward": tensor
        for source, tensor in zip(sources, tensors, strict=True)
    }
    check_tensors(used, x)
    if not converts:
        check_types(used, x, model)
    return tensors


def _specs(tensors: Sequence[torch.Tensor]) -> list[tuple[torch.Size, torch.dtype, torch.device]]:
    return [(t.shape, t.dtype, t.device) for t in tensors]


def keep(known: list[Any], binding: Binding) -> None:
    """Add a program to those for the same shapes, most recent first; at most MAX_STRUCTURES of
    those that differ by values are kept.

    Raises:
        CaptureError: numbers that depend on x are guarded by their exact value, over and over.
    """
    structure = binding.structure
    if structure is None:
        known.insert(0, binding)
        return
    others = [b for b in known if b.structure is not None]
    binding.captures += max((b.captures for b in others), default=0)
    exact = [r for r in structure.reads if r.varying and r.is_exact]
    if exact and binding.captures > _MAX_EXACT:
        raise CaptureError(
            f"a number computed from x is needed as a number of Python: {_MAX_EXACT} programs were"
            " made for as many values of it, each of which holds for one x",
            where=exact[0].origin,
            hint="keep it a tensor (x.max(), not float(x.max()) or math.exp of it), or move it out"
            " of the model",
        )
    known.insert(0, binding)
    if binding.captures == _MANY:
        warnings.warn(
            f"fxhess: the model was captured {_MANY} times since its structure changes with the"
            f" values read:\n  {structure.reads[-1]}\n  next:  read less of them, or keep"
            " all entries and choose with torch.where; hess.explain(x) lists what is read",
            StructureWarning,
            stacklevel=2,
        )
    for dropped in others[MAX_STRUCTURES - 1 :]:
        known.remove(dropped)


def first(known: list[Any], binding: Any) -> None:
    """Move the program that was used last to the front: it is the likeliest to be right again."""
    with contextlib.suppress(ValueError):  # another thread did
        known.remove(binding)
    known.insert(0, binding)
