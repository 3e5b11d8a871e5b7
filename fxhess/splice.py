"""Derivatives of a :class:`~fxhess.derive.Derivation` as nodes of a graph under construction.

A derivative is traced for symbolic batch sizes into plain operations, which are checked against the
untraced one on the values seen and then copied into the graph.  Where that cannot be done, one
node takes the derivative by autograd each time the program runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxhess import _batched
from fxhess.derive import Derivation, Way
from fxhess.emit import ORIGIN, Emitter, Var
from fxhess.errors import FxhessError, Origin, UnsupportedOpError
from fxhess.graft import UntraceableError, splice, tidy

_UNROLLED = 32  # derivatives along more directions than this are not written one by one


@dataclass
class Splicer:
    """Writes the forms of one derivation.

    ``shapes``: for inputs that are passed as they are, their captured sizes (numbers and
    expressions in ``symbols``, the batch sizes).  ``point``: an x and inputs to check traces at.
    ``strict``: a derivative that cannot be traced is an error.  ``traces``: what was traced of
    equal derivations, and why with numbers (see :func:`fxhess._batched.trace_batched`).
    """

    derivation: Derivation
    shapes: tuple[tuple[Any, ...] | None, ...]
    symbols: tuple[Any, ...]
    point: tuple[torch.Tensor, list[torch.Tensor]]
    origin: Origin | None
    strict: bool
    traces: dict[Any, Any] = field(default_factory=dict)

    def values(self, x: Var, tensors: Sequence[Var]) -> list[Var]:
        """All outputs."""
        return self._write("values", (), x, tensors, [])  # type: ignore[no-any-return]

    def pull(self, k: int, x: Var, tensors: Sequence[Var], g: Var) -> list[Var]:
        return self._write("pull", (k,), x, tensors, [g])  # type: ignore[no-any-return]

    def push(self, k: int, x: Var, tensors: Sequence[Var], ts: Sequence[Var]) -> Var:
        return self._write("push", (k,), x, tensors, ts)  # type: ignore[no-any-return]

    def curve(self, k: int, i: int, j: int, x: Var, tensors: Sequence[Var], g: Var, t: Var) -> Var:
        return self._write("curve", (k, i, j), x, tensors, [g, t])  # type: ignore[no-any-return]

    def _write(
        self, form: str, at: tuple[int, ...], x: Var, tensors: Sequence[Var], extra: Sequence[Var]
    ) -> Any:
        inputs = [x, *tensors, *extra]
        program = Program(self.derivation, form, at, len(tensors), str(self._op()))
        dims = [self._dims(form, at, n, v) for n, v in enumerate(inputs)]
        key = (form, at, tuple(map(tuple, dims)))
        if key not in self.traces:
            self.traces[key] = self._trace(program, dims, [v.dtype for v in inputs])
        traced = self.traces[key]
        emitter = x.tracer
        assert isinstance(emitter, Emitter)
        if traced is not None:
            try:
                return splice(emitter, traced, inputs)
            except FxhessError:
                self.traces[key] = None
        if self.strict:
            raise UnsupportedOpError(
                f"the derivatives of {self._op()} cannot be written as plain operations",
                where=self.origin,
                hint='register a rule for it, or allow the slower exact way: fallback="allow"',
            )
        out = emitter.call(program, *inputs)
        if program.many:
            return [out[n] for n in range(len(out.val))]
        return out

    def _op(self) -> str:
        return self.origin.op if self.origin is not None else "an operation"

    def _dims(self, form: str, at: tuple[int, ...], n: int, v: Var) -> list[Any]:
        """The sizes of an input: batch axes as symbols."""
        derivation = self.derivation
        nb = derivation.batch_ndim
        shape: list[Any] = [int(s) for s in v.val.shape]
        n -= 1
        if n < 0:
            return [*self.symbols, *shape[nb:]]
        if n < len(derivation.inputs):
            own = self.shapes[n]
            if own is not None:
                return list(own)
            arrangement = derivation.inputs[n]
        else:
            n -= len(derivation.inputs)
            if form == "push":
                arrangement = derivation.operand(n)
            elif n == 0:
                arrangement = derivation.outputs[at[0]]
            else:
                arrangement = derivation.operand(at[2])
        assert arrangement is not None
        lead = arrangement.lead(v)
        for axis, symbol in enumerate(self.symbols):
            if shape[lead + axis] != 1:
                shape[lead + axis] = symbol
        return shape

    def _trace(
        self, program: Program, dims: list[list[Any]], dtypes: list[torch.dtype]
    ) -> fx.GraphModule | None:
        x, tensors = self.point
        generator = torch.Generator().manual_seed(0)
        sizes = dict(zip(self.symbols, x.shape, strict=False))
        inputs = [x, *tensors]
        for shape, dtype in zip(dims[len(inputs) :], dtypes[len(inputs) :], strict=True):
            drawn = torch.randn(
                [int(sizes.get(s, s)) for s in shape], generator=generator, dtype=torch.float64
            )
            inputs.append(drawn.to(x.device, dtype))
        longest = max(
            (s for d in dims[1 + len(tensors) :] for s in d[:1] if isinstance(s, int)), default=1
        )
        ways = [Way(True, True)] + ([Way(False, True)] if longest <= _UNROLLED else [])
        for way in ways:
            try:
                traced = _batched.trace_batched(
                    program.on(way), self.symbols, dims, dtypes, x.device,
                    self.traces.setdefault("numbers", set()),
                )  # fmt: skip
                self._check(tidy(traced), program, inputs, dims)
            except Exception:  # whatever the reason, the exact way at run time is left
                continue
            return traced
        return None

    def _check(
        self,
        traced: fx.GraphModule,
        program: Program,
        inputs: list[torch.Tensor],
        dims: list[list[Any]],
    ) -> None:
        """The trace agrees with the untraced derivative, for the first and last direction; and so
        do their gradients, for what follows from the Hessian."""
        given = list(inputs)
        first = 1 + len(self.derivation.inputs)
        lead = 0
        for n in range(first, len(inputs)):
            count = len(dims[n]) - self._rank(program, n - first)
            lead = max(lead, count)
            given[n] = _ends(given[n], range(count))
        places = range(1, first) if program.form != "values" else ()
        with torch.inference_mode(False):
            got, slopes = _with_gradients(traced, inputs, places, lead)
            want, right = _with_gradients(program.on(Way(keep=True)), given, places, lead)
        for a, b in zip(got, want, strict=True):
            if not agree(a, b):
                raise UntraceableError
        if right is not None:
            if slopes is None:
                raise UntraceableError
            for a, b in zip(slopes, right, strict=True):
                if not agree(a, b):
                    raise UntraceableError

    def _rank(self, program: Program, n: int) -> int:
        derivation = self.derivation
        if program.form == "push":
            arrangement = derivation.operand(n)
        elif n == 0:
            arrangement = derivation.outputs[program.at[0]]
        else:
            arrangement = derivation.operand(program.at[2])
        return derivation.batch_ndim + len(arrangement.event)


class Program:
    """A form as a function of tensors alone: x, the inputs, then adjoints and tangents.  Called,
    it differentiates by autograd: the exact slower way."""

    def __init__(
        self, derivation: Derivation, form: str, at: tuple[int, ...], count: int, op: str
    ) -> None:
        self.derivation, self.form, self.at, self.count, self.op = derivation, form, at, count, op
        self.many = form in ("values", "pull")
        self.__name__ = f"{form}_by_autograd"
        self.__qualname__ = self.__name__
        self.__module__ = __name__

    def on(self, way: Way) -> Any:
        """The function itself."""

        def run(x: torch.Tensor, *rest: torch.Tensor) -> Any:
            tensors, extra = rest[: self.count], rest[self.count :]
            d: Any = self.derivation
            with torch.inference_mode(False), torch.enable_grad():
                if self.form == "values":
                    return d.values(x, tensors)
                if self.form == "pull":
                    return d.pull(way, *self.at, x, tensors, *extra)
                if self.form == "push":
                    return d.push(way, *self.at, x, tensors, extra)
                return d.curve(way, *self.at, x, tensors, *extra)

        return run

    def __call__(self, *inputs: torch.Tensor) -> Any:
        if inputs[0].device.type == "meta":
            return self._stand_in(*inputs)
        keep = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
        with torch.inference_mode(False):
            given = [t.clone() if t.is_inference() else t for t in inputs]
            out = self.on(Way(keep=keep))(*given)
            if keep:
                return out
            return [t.detach() for t in out] if self.many else out.detach()

    def _stand_in(self, x: torch.Tensor, *rest: torch.Tensor) -> Any:
        """The shape of the result, for the graph under construction."""
        d = self.derivation
        nb = d.batch_ndim
        tensors, extra = rest[: self.count], rest[self.count :]

        def like(arrangement: Any, lead: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
            batch = [n if k in arrangement.batches else 1 for k, n in enumerate(x.shape[:nb])]
            return torch.empty([*lead, *batch, *arrangement.event], dtype=dtype, device="meta")

        def dtype_of(i: int) -> torch.dtype:
            return tensors[d.operands[i]].dtype

        if self.form == "values":
            return [like(a, (), t) for a, t in zip(d.outputs, d.types, strict=True)]
        if self.form == "push":
            leads = [t.shape[: d.operand(i).lead(t)] for i, t in enumerate(extra)]
            k = self.at[0]
            return like(d.outputs[k], torch.broadcast_shapes(*leads), d.types[k])
        g = extra[0]
        lead = g.shape[: d.outputs[self.at[0]].lead(g)]
        if self.form == "pull":
            return [like(d.operand(i), lead, dtype_of(i)) for i in range(len(d.operands))]
        t = extra[1]
        lead = torch.broadcast_shapes(lead, t.shape[: d.operand(self.at[2]).lead(t)])
        return like(d.operand(self.at[1]), lead, dtype_of(self.at[1]))


def agree(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two results are the same up to rounding; what is not finite must coincide."""
    if a.shape != b.shape:
        return False
    if not (a.is_floating_point() or a.is_complex()):
        return bool(torch.equal(a, b))
    eps = torch.finfo(a.dtype).eps
    tolerance = eps**0.5 if eps > 1e-10 else 1e-9
    finite = b[b.isfinite()].abs()
    scale = max(1.0, float(finite.max())) if finite.numel() else 1.0
    return bool(torch.allclose(a, b, rtol=tolerance, atol=tolerance * scale, equal_nan=True))


def slow_nodes(graph: fx.Graph) -> tuple[str, ...]:
    """A sentence for each operation whose derivatives are taken by autograd at run time."""
    found = dict.fromkeys(
        str(node.meta.get(ORIGIN) or node.target.op)
        for node in graph.nodes
        if isinstance(node.target, Program)
    )
    return tuple(
        f"slower, at run time by autograd (it cannot be traced): {where}" for where in found
    )


def _ends(t: torch.Tensor, axes: Iterable[int]) -> torch.Tensor:
    """The first and last entry along each axis."""
    for axis in axes:
        if t.shape[axis] > 2:
            ends = torch.tensor([0, t.shape[axis] - 1], device=t.device)
            t = t.index_select(axis, ends)
    return t


def _with_gradients(
    function: Any, inputs: Sequence[torch.Tensor], places: Iterable[int], lead: int
) -> tuple[list[torch.Tensor], list[torch.Tensor] | None]:
    """The results (at the ends of their leading axes), and the gradients of a weighted sum of
    them with respect to the inputs at ``places``; None where PyTorch has none."""
    given = [t.clone() for t in inputs]
    points = [given[n].requires_grad_() for n in places if given[n].is_floating_point()]
    with torch.enable_grad():
        out = function(*given)
        results = [
            _ends(t, range(lead)) for t in (out if isinstance(out, (list, tuple)) else [out])
        ]
        total = sum(
            (t * torch.arange(1, t.numel() + 1, device=t.device).reshape(t.shape)).sum()
            for t in results
            if t.is_floating_point()
        )
        slopes = None
        if isinstance(total, torch.Tensor) and total.requires_grad and points:
            try:
                found = torch.autograd.grad(total, points, allow_unused=True)
                slopes = [
                    torch.zeros_like(p) if s is None else s
                    for p, s in zip(points, found, strict=True)
                ]
            except RuntimeError:
                slopes = None
        elif points:
            slopes = [torch.zeros_like(p) for p in points]
    return [t.detach() for t in results], slopes
