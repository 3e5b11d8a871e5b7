"""The compiler, aloud: canonicalize, mark activity, plan, differentiate, simplify, order, lower.

The only module that imports both rules and passes.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import sympy
import torch
from torch import fx

import fxhess.rules  # noqa: F401  (fills the registry)
from fxhess import _kept, _lanes, cost
from fxhess._direct import Direct
from fxhess._running import Fastest, Way, compiled, fastest
from fxhess.capture import Captured
from fxhess.emit import VAL
from fxhess.errors import InputError, Origin
from fxhess.execute import Execution
from fxhess.facts import Canonical
from fxhess.guards import Guard
from fxhess.interrupts import passed
from fxhess.outputs import Given, Output, leading_axes
from fxhess.passes.activity import mark_activity
from fxhess.passes.canonicalize import canonical_values, canonicalize
from fxhess.passes.check import check_canonical, check_graph
from fxhess.passes.describe import describe
from fxhess.passes.differentiate import differentiate, planned
from fxhess.passes.draft import Draft, Term
from fxhess.passes.fuse import fuse, fusible
from fxhess.passes.lower import lower
from fxhess.passes.order import order
from fxhess.passes.plan import plan as make_plan
from fxhess.passes.rejoin import rejoin
from fxhess.passes.simplify import simplify
from fxhess.rates import rates_for
from fxhess.registry import version
from fxhess.splice import slow_nodes
from fxhess.steps import Step


@dataclass(frozen=True)
class Options:
    """What a plan is made for, besides the graph itself."""

    outputs: tuple[Output, ...]
    event_ndim: int
    strategy: str = "auto"
    fallback: str = "allow"
    given: tuple[Given, ...] = ()  # what is given at a call besides x, the constants first
    compiled: bool = False  # whether the program is compiled, and planned as such

    @property
    def names(self) -> tuple[str, ...]:
        """The outputs' names, in order."""
        return tuple(output.name for output in self.outputs)


@dataclass
class Program:
    """A finished plan: the generated module and what ``explain`` tells about it.

    ``graph_module`` takes x, what is ``given`` besides and the tensors of the sources, in order,
    and returns the outputs (a tuple if there are several).
    """

    graph_module: fx.GraphModule
    terms: list[tuple[Origin | None, str, str, str]]
    summed: bool
    vector: bool
    bases: list[str]
    estimate: float
    batch_ndim: int
    given: tuple[Given, ...] = ()
    leads: tuple[tuple[int, ...], ...] = ((),)
    notes: tuple[str, ...] = ()
    steps: tuple[Step, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    one_size: bool = False  # whether it is for one size of the batch, which cannot be cut then
    chosen_at_once: bool | None = None  # whether large compiled calls go at once; None: not tried

    @cached_property
    def fused(self) -> fx.GraphModule:
        """The program as it is best compiled."""
        if not fusible(self.graph_module.graph):
            return self.graph_module
        return _kept.module_of(fuse(self.graph_module.graph), "FusedDerivative")

    @cached_property
    def execution(self) -> Execution | None:
        """The program split for running without autograd, or None where it cannot be."""
        whole = self.summed or self.one_size
        return Execution.of(self.graph_module, self.batch_ndim, whole, self.given, self.leads)

    def check_memory(self, x: torch.Tensor, wanted: bool, limit: int) -> None:
        """Refuse to run where the whole program has to (gradients are ``wanted``, or it cannot
        be cut by samples) and that takes more than ``limit`` bytes.

        Raises:
            InputError: it does.
        """
        if self.execution is not None and not wanted:
            return
        calls = [n for n in self.graph_module.graph.nodes if n.op.startswith("call")]
        nominal = next(iter(self.graph_module.graph.nodes)).meta[VAL].shape[: self.batch_ndim]
        taken = sum(map(cost.own_bytes, calls)) if wanted else cost.held_bytes(calls)
        taken = taken * x.shape[: self.batch_ndim].numel() // max(1, nominal.numel())
        if taken > limit:
            raise InputError(
                f"max_memory={limit} bytes do not suffice: about {taken} are needed"
                + (" to keep what gradients through the result need" if wanted else ""),
                hint="torch.no_grad(), or weights that do not require grad" if wanted else "",
            )

    @property
    def in_lanes(self) -> bool:
        """Whether compiled calls have run as one function, one sample a lane."""
        execution = self.__dict__.get("execution")
        ways = (self.__dict__.get("direct"), execution and execution.__dict__.get("compiled"))
        return any(getattr(way, "name", None) == "lanes" for way in ways)

    @cached_property
    def at_once(self) -> Direct:
        """The whole program, weights' work included, one sample a lane."""
        graph, nb = self.graph_module.graph, self.batch_ndim
        return Direct(
            self.graph_module, nb, self.graph_module.forward, 0,
            lambda inputs: _lanes.compiled(graph, inputs, nb, 0),
        )  # fmt: skip

    def goes_at_once(
        self, x: torch.Tensor, tensors: Sequence[torch.Tensor], apart: Callable[[], Any]
    ) -> bool:
        """Whether :attr:`at_once` is faster than ``apart``, which does weights' work apart and
        keeps some of it: tried at the first call after which what is left has run one sample a
        lane."""
        if self.chosen_at_once is None and self.execution is not None:
            if self.execution.compiled.last is None:
                apart()
            if self.execution.compiled.name != "lanes":
                return False
            self.chosen_at_once = self.at_once.has(x, *tensors) and (
                fastest(lambda: self.at_once(x, *tensors)) < fastest(apart)
            )
        return self.chosen_at_once is True

    @cached_property
    def compiled(self) -> Callable[..., Any]:
        """The whole program, compiled at its first call."""
        return compiled(self.fused, self.batch_ndim, self.given)

    @cached_property
    def direct(self) -> Callable[..., Any]:
        """The same for calls without autograd, at less cost a call where that is possible."""
        if self.given:
            return self.compiled
        usual = Direct(self.fused, self.batch_ndim, lambda *args: self.compiled(*args))
        return Fastest(
            Way("plain", self.graph_module.forward),
            Way("lanes", self.at_once, self.at_once.has),
            Way("compiled", usual),
        )


def key_of(captured: Captured, x: torch.Tensor, options: Options) -> str:
    """What two captured models must have in common to share a program: the structure of the
    graph, shapes, types, device kind, options, the device's rates and the table of rules."""
    digest = hashlib.sha256()
    index: dict[fx.Node, int] = {}

    def write(value: Any) -> str:
        if isinstance(value, fx.Node):
            return f"%{index[value]}"
        if isinstance(value, (list, tuple)):
            return "[" + ",".join(map(write, value)) + "]"
        if isinstance(value, dict):
            return "{" + ",".join(f"{k}:{write(v)}" for k, v in value.items()) + "}"
        return f"{type(value).__name__}:{value!r}"

    for i, node in enumerate(captured.graph_module.graph.nodes):
        index[node] = i
        text = f"{node.op}|"
        if node.op == "placeholder":
            val = node.meta["val"]
            text += f"{tuple(val.shape)}|{val.dtype}|{val.device.type}"
        else:
            text += f"{node.target}|{write(node.args)}|{write(node.kwargs)}"
        digest.update(text.encode())
    nb = captured.batch_ndim
    facts = (
        index[captured.output], captured.implied, captured.symbols, captured.guards, nb,
        tuple(x.shape[nb:]), x.dtype, str(x.device), options, version(), torch.__version__,
        rates_for(x.device, x.dtype),
    )  # fmt: skip
    digest.update(repr(facts).encode())
    return digest.hexdigest()


def batched(captured: Captured) -> Captured:
    """A model captured for one sample, without batch axes, as one of a batch of samples."""
    symbol = sympy.Symbol("samples", integer=True, positive=True)
    return replace(captured, batch_ndim=1, symbols=(symbol,), sizes=(symbol,), implied=True)


def compile_guard(captured: Captured, guard: Guard, x: torch.Tensor) -> fx.GraphModule:
    """The guard of one sample as a program for a batch of them: from ``x: [n, *event]``, the
    constants of the call and the tensors of its sources, each operand as ``[n, *shape]``, or
    ``[1, *shape]``."""
    graph = guard.module.graph
    (operands,) = next(n for n in graph.nodes if n.op == "output").args
    own = replace(
        batched(captured), graph_module=guard.module, sources=guard.sources,
        targets=tuple(operands),  # type: ignore[arg-type]
    )  # fmt: skip
    values = canonical_values(own, x)
    canonical = Canonical(
        values[0].node.graph, next(iter(values[0].node.graph.nodes)), values[-1].node,
        1, False, False, x.device,
    )  # fmt: skip
    draft = Draft(canonical)
    results = {f"operand_{i}": draft.values[v.node] for i, v in enumerate(values)}
    module = lower(draft.emitter.graph, results)
    module.graph.eliminate_dead_code()
    check_graph(module.graph, "compile_guard")
    return _kept.recompiled(module)


def compile_captured(captured: Captured, x: torch.Tensor, options: Options) -> Program:
    """Run all passes; the graph is checked after each."""
    clock = _Clock()
    canonical = canonicalize(captured, x, options.fallback)
    clock.mark("canonicalize")
    check_canonical(canonical, "canonicalize")
    canonical = mark_activity(canonical)
    check_canonical(canonical, "mark_activity")
    canonical = rejoin(canonical)
    check_canonical(canonical, "rejoin")
    clock.mark("activity")
    batch = canonical.x.meta[VAL].shape[: captured.batch_ndim]
    given = {g.name: g.stand_in(batch, x.dtype) for g in options.given if not g.constant}
    plans = {
        output.name: make_plan(canonical, options.strategy, output, given, options.compiled)
        for output in planned(options.outputs)
    }
    clock.mark("plan")
    derivative = differentiate(
        canonical, {name: p.pieces for name, p in plans.items()}, options.outputs, given
    )
    check_graph(derivative.graph, "differentiate")
    clock.mark("differentiate")
    results = derivative.results
    marks = derivative.graph.output(tuple(v.node for v in results.values()))
    graph = simplify(derivative.graph)
    (kept,) = marks.args
    assert isinstance(kept, tuple)
    for var, node in zip(results.values(), kept, strict=True):
        assert isinstance(node, fx.Node)
        var.node = node
    graph.erase_node(marks)
    check_graph(graph, "simplify")
    clock.mark("simplify")
    order(graph, [v.node for v in results.values()])
    check_graph(graph, "order")
    clock.mark("order")
    module = lower(graph, results)
    check_graph(module.graph, "lower")
    clock.mark("lower")
    program = Program(
        module,
        _describe(derivative.terms),
        canonical.summed,
        canonical.vector,
        list(dict.fromkeys(p.base.name for plan in plans.values() for p in plan.pieces)),
        sum(plan.estimate for plan in plans.values()),
        captured.batch_ndim,
        options.given,
        tuple(leading_axes(options.outputs, options.given)),
        (*slow_nodes(module.graph), *_lost(derivative.losses)),
        describe(canonical, derivative, module.graph),
        clock.marks,
        any(isinstance(guard, sympy.Eq) for guard in captured.guards),
    )
    _ = program.fused  # made now: a compiler that traces a call must find it ready
    return program


def _lost(losses: Sequence[tuple[Origin | None, int]]) -> list[str]:
    """Where block-diagonal tangents became dense, one line an operation."""
    found: dict[str, int] = {}
    for origin, size in losses:
        where = str(origin) if origin else "the result"
        found[where] = max(found.get(where, 0), size)
    return [
        f"structure lost: an axis of {size} of the tangents became dense at {where}"
        for where, size in found.items()
    ]


def _describe(terms: Sequence[Term]) -> list[tuple[Origin | None, str, str, str]]:
    rows = []
    for term in terms:
        distinct = len(set(term.pattern))
        structure = "diagonal" if distinct < len(term.pattern) else "dense"
        structure = structure if term.pattern else "-"
        rows.append((term.node.meta.get("origin"), term.ending, term.base.name, structure))
    return rows


class _Clock:
    def __init__(self) -> None:
        self.marks: dict[str, float] = {}
        self._last = time.perf_counter()

    def mark(self, name: str) -> None:
        passed()
        now = time.perf_counter()
        self.marks[name] = now - self._last
        self._last = now
