"""Captured operations taken together: as one function, at the values that the model gives them.

A *region* is one operation without a rule, or all those that hang together through complex numbers:
a function of real tensors with real results, whatever is inside.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fxhess import _batched, _torch
from fxhess._traced import ancestors
from fxhess.capture import Captured
from fxhess.emit import ORIGIN
from fxhess.errors import FxhessError, Origin, SampleMixingError, UnsupportedOpError
from fxhess.functions import called, differentiable

_NOISE = (0.05, 1e-3)  # relative: how far the probe's samples are from those of x


@dataclass(frozen=True)
class Region:
    """Captured operations as one function of captured tensors: see :class:`Derivation`."""

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    symbols: tuple[Any, ...]
    origin: Origin

    @classmethod
    def of(cls, nodes: Sequence[fx.Node], captured: Captured) -> Region:
        inside = set(nodes)
        needed = ancestors(captured.output)
        inputs = dict.fromkeys(
            operand
            for node in nodes
            for operand in node.all_input_nodes
            if operand not in inside and isinstance(operand.meta.get("val"), torch.Tensor)
        )
        outputs = [
            node
            for node in nodes
            if isinstance(node.meta.get("val"), torch.Tensor)
            and (
                node is captured.output
                or any(user in needed and user not in inside for user in node.users)
            )
        ]
        first = next((n for n in nodes if n.meta.get(ORIGIN)), nodes[0])
        origin = first.meta.get(ORIGIN) or Origin(str(first.target))
        call = called(first)
        if call is not None:
            origin = replace(origin, op=f"{call.__module__}.{call.__qualname__}")
        return cls(tuple(nodes), tuple(inputs), tuple(outputs), captured.symbols, origin)

    def __call__(
        self, tensors: Sequence[torch.Tensor], sizes: Sequence[Any], differentiate: bool
    ) -> list[torch.Tensor]:
        values: dict[fx.Node, Any] = dict(zip(self.inputs, tensors, strict=True))
        known = dict(zip(self.symbols, sizes, strict=True))

        def value(node: fx.Node) -> Any:
            if node in values:
                return values[node]
            return _batched.evaluate(_torch.size_expression(node.meta["val"]), known)

        for node in self.nodes:
            args = fx.node.map_arg(node.args, value)
            kwargs = fx.node.map_arg(node.kwargs, value)
            target = differentiable(node.target) if differentiate else node.target
            values[node] = target(*args, **kwargs)  # type: ignore[operator]
        return [values[node] for node in self.outputs]

    def structure(self) -> tuple[Any, ...]:
        """What tells this region from others: equal ones are the same function."""
        index: dict[fx.Node, int] = {}

        def told(value: Any) -> Any:
            if isinstance(value, fx.Node) and value in index:
                return ("node", index[value])
            if isinstance(value, fx.Node):
                return ("size", str(_torch.size_expression(value.meta["val"])))
            if isinstance(value, (list, tuple)):
                return tuple(map(told, value))
            if isinstance(value, dict):
                return tuple((k, told(v)) for k, v in value.items())
            return (type(value).__name__, repr(value))

        for node in (*self.inputs, *self.nodes):
            index[node] = len(index)
        inputs = [n.meta["val"] for n in self.inputs]
        return (
            tuple((tuple(map(str, t.shape)), t.dtype) for t in inputs),
            tuple((n.target, told(n.args), told(n.kwargs)) for n in self.nodes),
            tuple(index[n] for n in self.outputs),
        )


class Probe:
    """The model run on a few samples near those of x: where its operations are tried."""

    def __init__(self, captured: Captured, x: torch.Tensor) -> None:
        self.captured = captured
        nb = captured.batch_ndim
        free = _unlike(captured)
        self.sizes = tuple(
            int(s) if getattr(s, "is_number", True) else next(free) for s in captured.sizes
        )
        self._noise = _NOISE if nb else (0.0, *_NOISE)
        self._own = x.detach()
        self._xs = [self._sample(x, noise) for noise in self._noise]
        self._values: list[dict[fx.Node, Any]] = [{} for _ in self._noise]

    def _constants(self) -> list[torch.Tensor]:
        """The constants of the call, for as many samples."""
        pairs = zip(self.captured.examples, self.captured.constants, strict=True)
        return [self._resized(c) if given.batched else c for c, given in pairs]

    def _resized(self, x: torch.Tensor) -> torch.Tensor:
        """As many samples as are tried, those of x over and over."""
        generator = torch.Generator().manual_seed(0)
        for axis, n in enumerate(self.sizes):
            if x.shape[axis] == 0:
                shape = [*x.shape[:axis], n, *x.shape[axis + 1 :]]
                x = torch.randn(shape, generator=generator).to(x)
            x = x.index_select(axis, torch.arange(n, device=x.device) % x.shape[axis])
        return x

    def _sample(self, x: torch.Tensor, noise: float) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        x = self._resized(x.detach())
        scale = float(x.abs().mean()) if x.numel() else 1.0
        scale = scale if 0 < scale < float("inf") else 1.0
        drawn = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        return x + (noise * scale * drawn).to(x)

    def run(self, region: Region) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """An x and the operands of the region there, such that its results are finite if they
        are anywhere."""
        found = None
        failure: Exception | None = None
        for x, values in zip(self._xs, self._values, strict=True):
            try:
                with torch.inference_mode(False), torch.no_grad():
                    tensors = self._operands(region, x.clone(), values)
                    results = region(tensors, self.sizes, False)
            except FxhessError:
                raise
            except Exception as error:
                failure = error
                continue
            found = (x, tensors)
            if all(bool(r.isfinite().all()) for r in results):
                break
        if found is None:
            self._refuse_fixed_size(region, failure)
            raise UnsupportedOpError(
                f"{region.origin.op} has no rule, and trying it on samples near those of x failed: "
                f"{' '.join(str(failure).split())[:200]}",
                where=region.origin,
                hint="specialize on an x on which the model runs: hess.specialize(x)",
            ) from failure
        return found

    def _refuse_fixed_size(self, region: Region, failure: Exception | None) -> None:
        """What fails for another number of samples, but runs on those of x, is no operation of
        single samples."""
        sizes = tuple(self._own.shape[: len(self.sizes)])
        if sizes == self.sizes:
            return
        try:
            with torch.inference_mode(False), torch.no_grad():
                region(self._operands(region, self._own.clone(), {}, False), sizes, False)
        except Exception:
            return
        raise SampleMixingError(
            "samples of the batch see each other: this operation takes no batch of another size"
            f" ({' '.join(str(failure).split())[:200]})",
            where=region.origin,
            hint="compute each sample on its own, for a batch of any size",
        ) from failure

    def _operands(
        self, region: Region, x: torch.Tensor, values: dict[fx.Node, Any], resized: bool = True
    ) -> list[torch.Tensor]:
        if not values:
            places = [n for n in self.captured.graph_module.graph.nodes if n.op == "placeholder"]
            tensors = [t.detach() for t in self.captured.tensors]
            constants = self._constants() if resized else self.captured.examples
            values.update(zip(places, [x, *constants, *tensors], strict=True))
        for node in _ancestors(region.inputs):
            if node not in values:
                args = fx.node.map_arg(node.args, values.__getitem__)
                kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
                values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return [values[node] for node in region.inputs]


def _unlike(captured: Captured) -> Iterator[int]:
    """Small batch sizes that are no other size in the model: operations may read meaning into
    axes of equal size."""
    values = [t for n in captured.graph_module.graph.nodes for t in _tensors(n.meta.get("val"))]
    taken = {size for t in values for size in t.shape if isinstance(size, int)}
    return (n for n in itertools.count(2) if n not in taken)


def with_items(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """Also the single results of operations with several."""
    found = dict.fromkeys(nodes)
    for node in nodes:
        if not isinstance(node.meta.get("val"), torch.Tensor):
            found.update(dict.fromkeys(node.users))
    if len(found) == len(nodes):
        return list(nodes)
    return [n for n in nodes[0].graph.nodes if n in found]


def _ancestors(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """What the nodes need, and they themselves, in order."""
    if not nodes:
        return []
    needed = ancestors(*nodes)
    return [n for n in nodes[0].graph.nodes if n in needed]


def _reach(nodes: Iterable[fx.Node], step: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    queue = list(nodes)
    while queue:
        node = queue.pop()
        if node not in found:
            found.add(node)
            queue += step(node)
    return found


# --- complex numbers ----------------------------------------------------------------------------


def units(captured: Captured, nodes: Sequence[fx.Node]) -> list[tuple[fx.Node, ...]]:
    """``nodes`` in an order to be rewritten in, those of one region together."""
    regions = _complex_regions(captured, nodes)
    if not regions:
        return [(node,) for node in nodes]
    place = {node: i for i, node in enumerate(nodes)}
    home = {node: min(place[n] for n in region) for region in regions for node in region}
    unit = {node: home.get(node, i) for node, i in place.items()}
    members: dict[int, list[fx.Node]] = {}
    for node in nodes:
        members.setdefault(unit[node], []).append(node)
    needs = {
        i: {unit[o] for n in group for o in n.all_input_nodes if o in unit} - {i}
        for i, group in members.items()
    }
    ready = [i for i in members if not needs[i]]
    heapq.heapify(ready)
    order = []
    while ready:
        i = heapq.heappop(ready)
        order.append(tuple(members[i]))
        for user in {unit[u] for n in members[i] for u in n.users if u in unit} - {i}:
            needs[user].discard(i)
            if not needs[user]:
                heapq.heappush(ready, user)
    return order


def _complex_regions(captured: Captured, nodes: Sequence[fx.Node]) -> list[set[fx.Node]]:
    """Operations on complex numbers that depend on x, with those that make them real again; and
    whatever lies on a way from one to another."""
    inside = set(nodes)
    x = next(iter(captured.graph_module.graph.nodes))
    depends = _reach(
        [x], lambda n: [u for u in n.users if u in inside and _tensors(u.meta.get("val"))]
    )
    regions: list[set[fx.Node]] = []
    for node in nodes:
        if node not in depends or not any(t.is_complex() for t in _tensors(node.meta.get("val"))):
            continue
        own = {node, *(user for user in node.users if user in depends)}
        regions = _joined([*regions, own])
    # Also by way of a size that was read off a value inside.
    linked = depends | {n for n in nodes if not _tensors(n.meta.get("val"))}
    while regions:
        closed = []
        for region in regions:
            after = _reach(region, lambda n: [u for u in n.users if u in linked])
            before = _reach(region, lambda n: [o for o in n.all_input_nodes if o in linked])
            closed.append((after & before) | region)
        joined = _joined(closed)
        if joined == regions:
            break
        regions = joined
    return regions


def _joined(regions: Sequence[set[fx.Node]]) -> list[set[fx.Node]]:
    """Regions that share an operation are one."""
    found: list[set[fx.Node]] = []
    for region in regions:
        apart = [other for other in found if not other & region]
        found = [*apart, region.union(*(other for other in found if other & region))]
    return found


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return (
        [v for v in value if isinstance(v, torch.Tensor)]
        if isinstance(value, (tuple, list))
        else []
    )
