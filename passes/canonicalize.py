"""Batch-dimension propagation: from captured ATen to a canonical per-sample program.

*Needs* a captured functional graph.  *Gives* a graph of the same meaning in which every value
that depends on x has the shape ``[*batch, *event]`` and carries a :class:`~fxhess.facts.Fact`::

    view: [s, 3, 16] -> [3s, 16]                    x: [B, 3, 16]
    mm:   [3s, 16] x [16, 8]               ==>      evaluate('b n k, k h -> b n h'): [B, 3, 8]
    view: [3s, 8] -> [s, 3, 8]

An operation through which samples see each other is refused here, by its axes signature; which
operation it is never matters.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxhess import _torch, kinds
from fxhess._traced import ancestors
from fxhess.capture import Captured, depends_on_values
from fxhess.emit import ORIGIN, VAL, Emitter, Var, nominal_batch
from fxhess.errors import CaptureError, FxhessError, UnsupportedOpError
from fxhess.facts import FACT, Canonical, Fact
from fxhess.functions import called
from fxhess.outputs import Given
from fxhess.passes import signatures
from fxhess.passes.bound import Bound, Raw
from fxhess.passes.layout import Atom, Laid, Layouts
from fxhess.passes.opaque import Opaque
from fxhess.passes.region import units
from fxhess.passes.reshape import reshape
from fxhess.registry import Rule, find

HANDLERS = {
    kinds.Pointwise: signatures.pointwise,
    kinds.Along: signatures.mixed,
    kinds.Trailing: signatures.mixed,
    kinds.Einsum: signatures.einsum,
    kinds.Reshape: reshape,
}


def canonicalize(captured: Captured, x: torch.Tensor, fallback: str = "allow") -> Canonical:
    """Rewrite to canonical form; see the module's docstring.

    ``x`` gives dtype, device and event shape.

    Raises:
        SampleMixingError: an operation lets samples see each other.
        UnsupportedOpError: an operation on the path from x cannot be differentiated twice.
        CaptureError: the model does not return numbers of each sample.
    """
    return _Walk.of(captured, x, fallback).run(x)


def canonical_values(captured: Captured, x: torch.Tensor) -> list[Var]:
    """The ``targets`` of a graph of one sample whose batch axes are implied, each as
    ``[*batch, *shape]`` with its captured shape."""
    walk = _Walk.of(captured, x)
    walk.walk(x, captured.targets)
    with walk.emitter.at(None):
        return [walk.leading(walk.values[node]) for node in captured.targets]


class _Walk:
    """One walk over the captured nodes, in order."""

    def __init__(
        self, captured: Captured, emitter: Emitter, layouts: Layouts, opaque: Opaque
    ) -> None:
        self.captured = captured
        self.emitter = emitter
        self.layouts = layouts
        self.opaque = opaque
        self.values: dict[fx.Node, Any] = {}

    @classmethod
    def of(cls, captured: Captured, x: torch.Tensor, fallback: str = "allow") -> _Walk:
        emitter = Emitter()
        layouts = Layouts(emitter, captured.sizes, captured.implied)
        return cls(captured, emitter, layouts, Opaque(captured, layouts, x, fallback))

    def run(self, x: torch.Tensor) -> Canonical:
        self.walk(x, [self.captured.output])
        return self._leave(self.values[self.captured.output], x.device)

    def walk(self, x: torch.Tensor, targets: Sequence[fx.Node]) -> None:
        """Rewrite all that the targets need."""
        nodes = list(self.captured.graph_module.graph.nodes)
        placeholders = [n for n in nodes if n.op == "placeholder"]
        constants = self.captured.constants
        after = 1 + len(constants)
        self._enter_x(placeholders[0], x)
        taken: set[str] = set()
        for node, constant in zip(placeholders[1:after], constants, strict=True):
            name = _identifier("c", constant.name, taken)
            self.values[node] = self._enter_constant(name, constant, x)
        for i, (node, source) in enumerate(
            zip(placeholders[after:], self.captured.sources, strict=True)
        ):
            val = node.meta["val"]
            stand_in = torch.empty_strided(val.shape, val.stride(), dtype=val.dtype, device="meta")
            name = _identifier("p", "_".join(source.path) or f"constant_{i}", taken)
            var = self.emitter.placeholder(name, stand_in)
            self.values[node] = Raw(var, tuple(val.shape))
        needed = ancestors(*targets)
        steps = [n for n in nodes if n in needed and n.op == "call_function"]
        for unit in units(self.captured, steps):
            if len(unit) > 1:
                self._refuse_implied(unit[0])
                self.values.update(self.opaque.rewrite(unit, self.values))
            elif unit[0] not in self.values:
                self.values[unit[0]] = self._step(unit[0])

    def leading(self, value: Any) -> Var:
        """A value as ``[*batch, *shape]`` with its captured shape."""
        if isinstance(value, Raw):
            return value.var[(None,) * self.layouts.nb]  # type: ignore[no-any-return]
        for axis, group in enumerate(value.groups):
            if not group:
                raise UnsupportedOpError("an axis of no atoms", where=self.layouts.origin)
            value = self.layouts.merge(value, axis)
        return value.var  # type: ignore[no-any-return]

    def _refuse_implied(self, node: fx.Node, failure: Exception | None = None) -> None:
        """The axes of an operation without a rule are found by its sizes, which tell nothing of
        batch axes that it does not have."""
        if self.captured.implied:
            raise UnsupportedOpError(
                f"{node.target} has no rule to run it for several samples at once",
                where=node.meta.get(ORIGIN),
            ) from failure

    def _enter_x(self, node: fx.Node, x: torch.Tensor) -> None:
        sizes = [*self._batch_sizes(), *x.shape[self.captured.batch_ndim :]]
        var = self.emitter.placeholder("x", torch.empty(sizes, dtype=x.dtype, device="meta"))
        self.layouts.x = var
        self.values[node] = self._per_sample(var, active=True)

    def _enter_constant(self, name: str, constant: Given, x: torch.Tensor) -> Laid | Raw:
        """A constant of the call: like x where it is given for each sample, but not active."""
        stand_in = constant.stand_in(self._batch_sizes(), x.dtype)
        var = self.emitter.placeholder(name, stand_in, varies=True)
        return self._per_sample(var) if constant.batched else Raw(var, constant.event)

    def _batch_sizes(self) -> list[int]:
        return [
            int(known) if known.is_number else nominal  # a number that the model was traced for
            for known, nominal in zip(
                self.captured.sizes, nominal_batch(self.captured.batch_ndim), strict=True
            )
        ]

    def _per_sample(self, var: Var, active: bool = False) -> Laid:
        nb = self.captured.batch_ndim
        event = [Atom(int(s)) for s in var.val.shape[nb:]]
        batch = [Atom(0, i) for i in range(nb)]
        var.node.meta[FACT] = Fact(kinds.Zero(), (), (), active=active)
        axes = event if self.captured.implied else [*batch, *event]
        return Laid(var, tuple((a,) for a in axes))

    def _step(self, node: fx.Node) -> Any:
        origin = node.meta.get(ORIGIN)
        self.layouts.origin = origin
        args: Any = fx.node.map_arg(node.args, lambda n: self.values[n])
        kwargs: Any = fx.node.map_arg(node.kwargs, lambda n: self.values[n])
        with self.emitter.at(origin):
            if node.target is operator.getitem:
                return args[0][args[1]]
            if node.target is torch.ops.aten.sym_size.int and isinstance(args[0], Laid):
                return self.layouts.size_of(args[0].groups[args[1]])
            if node.target is torch.ops.aten.sym_numel.default and isinstance(args[0], Laid):
                return self.layouts.size_of(tuple(a for group in args[0].groups for a in group))
            if torch.Tag.data_dependent_output in getattr(node.target, "tags", ()):
                raise depends_on_values(origin)
            if not _holds_laid((args, kwargs)):
                return self._copy(node, args, kwargs)
            return self._by_rule(node, args, kwargs)

    def _by_rule(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """An operation on the samples: by its rule, or where there is none for this call, by
        PyTorch's own derivatives of it."""
        rule = find(node.target)
        failure: Exception | None = None
        if rule is not None and rule.alone and _others_used(node, rule.output):
            rule = None
        if rule is not None and not isinstance(rule.kind, kinds.Composite):
            bound = Bound(rule, _arguments(rule, args, kwargs), node.meta["val"], self.layouts)
            try:
                return HANDLERS[type(rule.axes)](bound)
            except UnsupportedOpError as error:
                failure = error
            except FxhessError:
                raise
            except Exception as error:
                failure = error
        self._refuse_implied(node, failure)
        try:
            results = self.opaque.rewrite([node], self.values)
        except FxhessError as error:
            raise error from failure
        self.values.update(results)
        return results.get(node, ())

    def _copy(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """A value that does not depend on x is computed as the model computes it."""
        plain = fx.node.map_aggregate((args, kwargs), lambda v: v.var if isinstance(v, Raw) else v)
        call = called(node)
        if call is not None:
            var = self.emitter.call(call, *plain[0][0])  # type: ignore[index, misc]
        else:
            var = self.emitter.call(node.target, *plain[0], **plain[1])  # type: ignore[arg-type]
        val = node.meta.get("val")
        if isinstance(val, torch.Tensor):
            return Raw(var, _shape(val))
        if isinstance(val, (tuple, list)):
            return tuple(
                Raw(var[i], _shape(v)) if isinstance(v, torch.Tensor) else None
                for i, v in enumerate(val)
            )
        return var

    def _leave(self, result: Any, device: torch.device) -> Canonical:
        """The model's output as ``[*batch]`` or ``[*batch, m]``: several axes as one."""
        nb = self.captured.batch_ndim
        shape = tuple(self.captured.output.meta["val"].shape)
        if isinstance(result, Raw):
            result = self._constant(result)
        allowed = "[*batch], [*batch, 1], [*batch, m, ..], or a scalar summed over the batch"
        wrong = CaptureError(
            f"the model's output of shape {_pretty(shape)} is not one of each sample",
            where=self.captured.output.meta.get(ORIGIN),
            hint=f"return {allowed}; with event_ndim={len(self.layouts.x.val.shape) - nb}, "  # type: ignore[union-attr]
            f"the first {nb} axes of x are batch axes",
        )
        if not result.var.dtype.is_floating_point:
            raise CaptureError(
                f"the model returns {result.var.dtype}, not a real floating-point tensor",
                where=self.captured.output.meta.get(ORIGIN),
            )
        groups = result.groups
        implied = self.captured.implied
        batched = [i for i in range(nb) if i not in result.summed and not implied]
        head, rest = groups[: len(batched)], groups[len(batched) :]
        if [tuple(a.batch for a in g) for g in head] != [(i,) for i in batched]:
            raise wrong
        if any(a.batch is not None for g in rest for a in g):
            raise wrong
        outputs = tuple(math.prod(a.size for a in g) for g in rest) if len(rest) > 1 else ()
        if outputs:
            one = tuple(a for g in rest for a in g)
            result = Laid(result.var, (*head, one), result.summed)
        if result.summed and batched:
            raise wrong
        if rest:
            result = self.layouts.merge(result, len(batched))
        vector = bool(result.event) and result.event[0].size != 1
        if result.summed and (vector or outputs):
            raise wrong
        node = result.var.node
        if node.meta.get(FACT) is None:
            node.meta[FACT] = Fact(kinds.Zero())
        x_var = self.layouts.x
        assert x_var is not None
        return Canonical(
            self.emitter.graph, x_var.node, node, nb, bool(result.summed), vector, device, outputs
        )

    def _constant(self, raw: Raw) -> Laid:
        """An output that does not depend on x at all, given the axes it must have."""
        nb = self.captured.batch_ndim
        sizes = [_torch.size_expression(s) for s in raw.shape]
        if self.captured.implied:
            return Laid(raw.var[(None,) * nb], tuple((Atom(int(s)),) for s in sizes))
        if len(sizes) == 0 and nb:
            var = raw.var[(None,) * nb]
            return Laid(var, (), frozenset(range(nb)))
        groups = []
        for i, size in enumerate(sizes):
            if i < nb and size == self.captured.sizes[i]:
                groups.append((Atom(0, i),))
            else:
                groups.append((Atom(int(size) if size.is_number else -1),))
        return Laid(raw.var, tuple(groups))


def _arguments(rule: Rule, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments by name, with defaults filled in."""
    schema = rule.op._schema.arguments
    bound: dict[str, Any] = {}
    for i, argument in enumerate(schema):
        if i < len(args) and not argument.kwarg_only:
            bound[argument.name] = args[i]
        elif argument.name in kwargs:
            bound[argument.name] = kwargs[argument.name]
        else:
            bound[argument.name] = argument.default_value if argument.has_default_value() else None
    return bound


def _others_used(node: fx.Node, output: int | None) -> bool:
    """Whether a result other than this one is used."""
    return any(
        user.target is not operator.getitem or (user.args[1] != output and len(user.users) > 0)
        for user in node.users
    )


def _holds_laid(value: Any) -> bool:
    if isinstance(value, Laid):
        return True
    if isinstance(value, Mapping):
        return any(_holds_laid(v) for v in value.values())
    return isinstance(value, (list, tuple)) and any(_holds_laid(v) for v in value)


def _shape(val: torch.Tensor) -> tuple[Any, ...]:
    expressions = [_torch.size_expression(s) for s in val.shape]
    return tuple(int(e) if e.is_number else e for e in expressions)


def _identifier(kind: str, name: str, taken: set[str]) -> str:
    """A name for generated code that says where the tensor is read; added to ``taken``."""
    clean = f"{kind}_" + "".join(
        c if c.isascii() and (c.isalnum() or c == "_") else "_" for c in name
    )
    clean = clean.lower()
    while clean in taken:
        clean += "_"
    taken.add(clean)
    return clean


def _pretty(shape: Sequence[Any]) -> str:
    return "[" + ", ".join(str(s) for s in shape) + "]"


__all__ = ["HANDLERS", "VAL", "Var", "canonicalize"]
