"""Operations without a rule: their derivatives are PyTorch's own, their axes found by looking.

*Needs* captured operations (one, or several that hang together through complex numbers).  *Gives*
canonical values of kind smooth, linear or zero, made of plain operations::

    inv: [s, 3, 3]        ==>        linalg_inv_ex of [B, 3, 3], with pull = its vjp,
                                     push = the vjp of that, curve = the vjp's vjp along t

Which axes of the results are the batch is read off their symbolic sizes; that samples stay apart is
tried on the model's own values: the operation of one sample must give that sample of the operation.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import sympy
import torch
from torch import fx

from fxhess import _torch, kinds
from fxhess.arrangement import Arrangement
from fxhess.capture import Captured
from fxhess.derive import Derivation
from fxhess.emit import Var
from fxhess.errors import CaptureError, FxhessError, Origin, UnsupportedOpError
from fxhess.facts import fact
from fxhess.passes.bound import Raw
from fxhess.passes.layout import Atom, Laid, Layouts
from fxhess.passes.region import Probe, Region, with_items
from fxhess.splice import Splicer, agree

_MAX_CANDIDATES = 24


class Opaque:
    """Rewrites captured operations without a rule; made once for a captured graph."""

    def __init__(
        self, captured: Captured, layouts: Layouts, x: torch.Tensor, fallback: str
    ) -> None:
        self.captured = captured
        self.layouts = layouts
        self.strict = fallback == "error"
        self._x = x
        self._traces: dict[Any, dict[Any, Any]] = {}  # of equal regions, as a deep model has many

    @cached_property
    def probe(self) -> Probe:
        """Made for the first operation that needs one: most models have none."""
        return Probe(self.captured, self._x)

    def rewrite(
        self, nodes: Sequence[fx.Node], values: Mapping[fx.Node, Any]
    ) -> dict[fx.Node, Any]:
        """Canonical values of the results of ``nodes``, given those of what they need."""
        nodes = with_items(nodes)
        region = Region.of(nodes, self.captured)
        origin = region.origin
        self.layouts.origin = origin
        given = [values[n] for n in region.inputs]
        for value in given:
            if isinstance(value, Laid) and value.summed:
                raise self.layouts.mixing("is not known to be linear in a sum over the batch")
        self._refuse_random(nodes, origin)
        x, tensors = self.probe.run(region)
        arranged = [self._arrangement(n, v) for n, v in zip(region.inputs, given, strict=True)]
        outputs = self._outputs(region, arranged, tensors)
        operands = tuple(
            i for i, v in enumerate(given) if isinstance(v, Laid) and v.var.dtype.is_floating_point
        )
        derivation = Derivation(
            region,
            tuple(a if isinstance(v, Laid) else None for a, v in zip(arranged, given, strict=True)),
            operands,
            outputs,
            tuple(n.meta["val"].dtype for n in region.outputs),
            self.layouts.nb,
        )
        point = [
            t if a is None else a.canonical(t, self.probe.sizes)
            for t, a in zip(tensors, derivation.inputs, strict=True)
        ]
        return self._write(region, derivation, given, (x, point))

    def _refuse_random(self, nodes: Sequence[fx.Node], origin: Origin) -> None:
        for node in nodes:
            tags = getattr(node.target, "tags", ())
            if torch.Tag.nondeterministic_seeded in tags:
                raise UnsupportedOpError(
                    f"{node.target} draws random numbers and has no rule", where=origin
                )

    def _refuse_unknown_size(self, shape: Sequence[Any]) -> None:
        known = set(self.captured.symbols)
        if any(not set(size.free_symbols) <= known for size in shape):
            raise CaptureError(
                "the size of a result depends on the values of a tensor, so one program cannot"
                " serve every sample",
                where=self.layouts.origin,
                hint="keep all entries and choose among them with torch.where",
            )

    # --- axes -------------------------------------------------------------------------------------

    def _arrangement(self, node: fx.Node, value: Any) -> Arrangement:
        if isinstance(value, Laid):
            groups = tuple(
                tuple((a.batch, 0 if a.batch is not None else a.size) for a in group)
                for group in value.groups
            )
            return Arrangement(self.layouts.nb, groups)
        for arrangement in self._candidates(value.shape, []):
            return arrangement
        raise self.layouts.mixing(f"takes a tensor of shape {list(value.shape)}")

    def _candidates(
        self, shape: Sequence[Any], known: Sequence[Arrangement]
    ) -> Iterator[Arrangement]:
        """Ways to read the sizes of a tensor as batch and event axes, likely ones first."""
        axes = [list(self._readings(size, known)) for size in shape]
        for groups in itertools.islice(itertools.product(*axes), _MAX_CANDIDATES):
            batches = [k for group in groups for k, _ in group if k is not None]
            if len(set(batches)) == len(batches):
                yield Arrangement(self.layouts.nb, tuple(groups))

    def _readings(self, size: Any, known: Sequence[Arrangement]) -> Iterator[Any]:
        """What an axis of this size can be made of."""
        expression = sympy.sympify(size)
        symbols = self.layouts.symbols
        seen = []
        for arrangement in known:
            for group in arrangement.groups:
                batched = any(k is not None for k, _ in group)
                if batched and self._extent(group) == expression and group not in seen:
                    seen.append(group)
                    yield group
        if expression.is_Integer:
            for k, symbol in enumerate(symbols):  # the model was made for this batch size
                if symbol == expression and not seen:
                    yield ((k, 0),)
            yield ((None, int(expression)),)
            return
        number, rest = expression.as_coeff_Mul()
        factors = [k for k, s in enumerate(symbols) if s in rest.free_symbols]
        if rest != sympy.Mul(*(symbols[k] for k in factors)) or not number.is_Integer:
            return  # not a product: no reading
        parts: list[tuple[int | None, int]] = [(k, 0) for k in factors]
        if number != 1:
            parts.append((None, int(number)))
        for order in itertools.permutations(parts):
            if order not in seen:
                yield order

    def _extent(self, group: Sequence[tuple[int | None, int]]) -> Any:
        symbols = self.layouts.symbols
        return sympy.Mul(*(n if k is None else symbols[k] for k, n in group))

    # --- samples apart ----------------------------------------------------------------------------

    def _outputs(
        self,
        region: Region,
        inputs: Sequence[Arrangement],
        tensors: Sequence[torch.Tensor],
    ) -> tuple[Arrangement, ...]:
        """The arrangement of each result under which samples are apart."""
        sizes = self.probe.sizes
        ones = (1,) * self.layouts.nb
        whole = region(tensors, sizes, False)
        present = {k for a in inputs for k in a.batches}
        alone = []
        if present:
            canonical = [a.canonical(t, sizes) for a, t in zip(inputs, tensors, strict=True)]
            for index in itertools.product(*map(range, sizes)):
                sample = [
                    a.captured(_take(t, index), ones)
                    for a, t in zip(inputs, canonical, strict=True)
                ]
                try:
                    alone.append((index, region(sample, ones, False)))
                except Exception as error:
                    raise self.layouts.mixing(
                        f"has no value for a sample alone ({_brief(error)})"
                    ) from error
        found = []
        for i, node in enumerate(region.outputs):
            shape = [_torch.size_expression(s) for s in node.meta["val"].shape]
            self._refuse_unknown_size(shape)
            for arrangement in self._candidates(shape, inputs):
                samples = [(index, results[i]) for index, results in alone]
                own = set(arrangement.batches)
                if own in (present, set()) and self._apart(arrangement, whole[i], samples):
                    found.append(arrangement)
                    break
            else:
                raise self.layouts.mixing("gives a sample other values in a batch than alone")
        return tuple(found)

    def _apart(
        self,
        arrangement: Arrangement,
        whole: torch.Tensor,
        alone: Sequence[tuple[tuple[int, ...], torch.Tensor]],
    ) -> bool:
        ones = (1,) * self.layouts.nb
        canonical = arrangement.canonical(whole, self.probe.sizes)
        return all(
            agree(_take(canonical, index), arrangement.canonical(part, ones))
            for index, part in alone
        )

    # --- writing ----------------------------------------------------------------------------------

    def _write(
        self,
        region: Region,
        derivation: Derivation,
        given: Sequence[Any],
        point: tuple[torch.Tensor, list[torch.Tensor]],
    ) -> dict[fx.Node, Any]:
        layouts = self.layouts
        assert layouts.x is not None
        shapes = tuple(v.shape if isinstance(v, Raw) else None for v in given)
        d = derivation
        equal = (region.structure(), d.inputs, d.operands, d.outputs, d.types, shapes)
        splicer = Splicer(
            derivation, shapes, self.captured.symbols, point, region.origin, self.strict,
            self._traces.setdefault(equal, {}),
        )  # fmt: skip
        vars_ = [v.var for v in given]
        results = splicer.values(layouts.x, vars_)
        found: dict[fx.Node, Any] = {}
        operands = [vars_[i] for i in derivation.operands]
        args = (layouts.x, *vars_)
        for k, (node, var, arrangement) in enumerate(
            zip(region.outputs, results, derivation.outputs, strict=True)
        ):
            if fact(var.node) is not None or any(
                var.node is v.node for v in vars_
            ):  # an operand passed on as it is
                var = layouts.emitter.call(torch.ops.aten.alias.default, var)
            kind = self._kind(splicer, k, region.origin)
            if isinstance(kind, kinds.Zero):
                layouts.annotate(var, kind, [], [])
            else:
                axes = [(None,) * len(derivation.operand(i).event) for i in range(len(operands))]
                layouts.annotate(var, kind, operands, axes, args, derived=True)
            groups = tuple(
                tuple(Atom(n) if b is None else Atom(0, b) for b, n in group)
                for group in arrangement.groups
            )
            found[node] = Laid(var, groups)
        return found

    def _kind(self, splicer: Splicer, k: int, origin: Origin) -> Any:
        """How output k differentiates: tried by double backward at the probe."""
        d = splicer.derivation
        batched = any(a is not None and a.batches for a in d.inputs)
        if batched and not d.outputs[k].batches:
            return kinds.Zero()  # the same for every sample: it does not depend on x
        order = _order(d, k, *splicer.point, origin)
        if order == 0:
            return kinds.Zero()

        def pull(g: Var, c: kinds.Call) -> list[Var]:
            return splicer.pull(k, c.args[0], c.args[1:], g)

        def push(c: kinds.Call, *ts: Var) -> Var:
            return splicer.push(k, c.args[0], c.args[1:], ts)

        def curve(c: kinds.Call, g: Var, i: int, j: int, t: Var) -> Var:
            return splicer.curve(k, i, j, c.args[0], c.args[1:], g, t)

        if order == 1:
            return kinds.Linear(pull, push)
        return kinds.Smooth(push, pull, curve)


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _order(
    derivation: Derivation, k: int, x: torch.Tensor, tensors: list[torch.Tensor], origin: Origin
) -> int:
    """0 if no derivative flows through output k, 1 if it is linear, else 2.

    Raises:
        UnsupportedOpError: PyTorch has no first or second derivative of it.
    """
    dtype = derivation.types[k]
    if not derivation.operands or not dtype.is_floating_point:
        return 0
    with torch.inference_mode(False), torch.enable_grad():
        tensors = [t.clone() for t in tensors]
        _, y, xs = derivation._run(k, x.clone(), tensors)
        if not y.requires_grad:
            return 0
        g = torch.ones_like(y, requires_grad=True)
        times = "first"
        try:
            ps = torch.autograd.grad(y, xs, g, create_graph=True, allow_unused=True)
            known = [p for p in ps if p is not None and p.requires_grad]
            if all(p is None for p in ps) and "NotImplemented" in type(y.grad_fn).__name__:
                raise RuntimeError("it is not implemented")
            times = "second"
            # A derivative is linear in g, so it records a graph unless it is zero.
            if any(p is not None and not p.requires_grad and bool(p.any()) for p in ps):
                raise RuntimeError(
                    "its backward records no graph (it runs under no_grad, or on detached tensors)"
                )
            if not known:
                return 0
            _refuse_missing(known)
            ones = [torch.ones_like(p) for p in known]
            cs = torch.autograd.grad(known, xs, ones, allow_unused=True, retain_graph=True)
            torch.autograd.grad(known, [g], ones, allow_unused=True)
        except FxhessError:
            raise
        except Exception as error:
            message = " ".join(str(error).split())[:200]
            raise UnsupportedOpError(
                f"PyTorch cannot take the {times} derivative of {origin.op}: {message}",
                where=origin,
                hint="write its backward of differentiable operations (no once_differentiable),"
                " or register a rule: fxhess.register_rule",
            ) from error
        return 1 if all(c is None for c in cs) else 2


def _refuse_missing(tensors: Sequence[torch.Tensor]) -> None:
    """Autograd raises for a missing derivative only if the way to its inputs leads through, and
    otherwise leaves it out in silence."""
    seen = set()
    queue = [t.grad_fn for t in tensors]
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name().split("::")[-1] == "Error":
            raise RuntimeError("its backward is marked with @once_differentiable")
        queue += [following for following, _ in node.next_functions]


def _take(t: torch.Tensor, index: Sequence[int]) -> torch.Tensor:
    """One sample of a canonical tensor, its batch axes kept."""
    return t[tuple(slice(i, i + 1) if t.shape[k] > 1 else slice(None) for k, i in enumerate(index))]
