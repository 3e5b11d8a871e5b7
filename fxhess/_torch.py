"""The only place that touches tracing internals of PyTorch, with a public fallback.

``trace`` turns a Python function into a functional ATen graph in which the leading axes of the
first tensor are symbolic and every other size is a number.  It uses ``make_fx`` over fake tensors
(``torch._subclasses``, ``ShapeEnv``), seen to work in torch 2.11 to 2.13; if these cannot be
imported, ``torch.export`` (public, about three times slower) gives the same kind of graph.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot, make_fx

from fxhess import _kept

try:
    from torch._dispatch.python import enable_python_dispatcher
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import (
        DimDynamic,
        StatelessSymbolicContext,
    )

    HAVE_FAKE_TENSORS = True
except ImportError:  # pragma: no cover - a future PyTorch that moved them
    HAVE_FAKE_TENSORS = False


try:
    from torch._functorch.eager_transforms import (
        enable_inplace_requires_grad as _requires_grad_allowed,
    )
except ImportError:  # pragma: no cover - a future PyTorch that moved it
    _requires_grad_allowed = contextlib.nullcontext  # type: ignore[assignment]


Constant = tuple[torch.Tensor, bool]  # and whether it has the batch axes in front


@dataclass
class Traced:
    """A functional graph with placeholders x, the constants, then the tensors, in the order given.

    ``symbols``: the sympy symbol of each batch axis; ``sizes``: the same, or the number that
    tracing had to specialize it to; ``guards``: sympy conditions on the symbols under which the
    graph holds.
    """

    graph_module: fx.GraphModule
    symbols: tuple[Any, ...]
    sizes: tuple[Any, ...]
    guards: tuple[Any, ...]

    @property
    def serves_all_sizes(self) -> bool:
        return all(isinstance(size, sympy.Symbol) for size in self.sizes)

    def holds(self, shape: Sequence[int]) -> bool:
        """Whether the graph holds for an x of this shape."""
        return conditions_hold(self.symbols, self.guards, shape)


def conditions_hold(symbols: Sequence[Any], guards: Sequence[Any], shape: Sequence[int]) -> bool:
    """Whether conditions on batch symbols hold for the leading sizes of ``shape``.

    A batch of one sample, or none, is a batch like any other: PyTorch itself takes shortcuts for
    size 1 (``einsum``, ``expand``), so conditions are held against at least 2.  Not so the
    equations that say which number was written into the graph."""
    exact = dict(zip(symbols, shape, strict=False))
    usual = {symbol: max(2, n) for symbol, n in exact.items()}
    return all(
        bool(guard.subs(exact if isinstance(guard, sympy.Eq) else usual)) for guard in guards
    )


def trace(
    function: Callable[..., Any],
    x: torch.Tensor,
    batch_ndim: int,
    constants: Sequence[Constant],
    tensors: Sequence[torch.Tensor],
    decompositions: Mapping[Any, Callable[..., Any]],
    also: Callable[[], Any] = tuple,
) -> Traced:
    """Trace ``function(x, *constants, *tensors)``; see the module's docstring.  The graph returns a
    pair: the function's result, and the traced tensors that ``also`` gives after it ran."""
    if not HAVE_FAKE_TENSORS:
        return trace_by_export(function, x, batch_ndim, constants, tensors, decompositions)
    first: Traced | None = None
    with contextlib.suppress(RuntimeError):
        first = _trace_fake(function, x, batch_ndim, constants, tensors, decompositions, also)
        if first.serves_all_sizes:
            return first
    # Some shape functions written in C++ miss symbolic sizes, or read them as numbers.  Those
    # written in Python come second, since PyTorch's own decompositions come with them, before the
    # rules' rewrites.
    try:
        with enable_python_dispatcher():
            second = _trace_fake(function, x, batch_ndim, constants, tensors, decompositions, also)
    except RuntimeError:
        if first is None:
            raise
        return first
    return second if first is None or second.serves_all_sizes else first


def _trace_fake(
    function: Callable[..., Any],
    x: torch.Tensor,
    batch_ndim: int,
    constants: Sequence[Constant],
    tensors: Sequence[torch.Tensor],
    decompositions: Mapping[Any, Callable[..., Any]],
    also: Callable[[], Any],
) -> Traced:
    env = _kept.shape_env()
    mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)
    sizes = [DimDynamic.DYNAMIC if i < batch_ndim else DimDynamic.STATIC for i in range(x.ndim)]
    context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
    with mode:
        fake_x = mode.from_tensor(x, symbolic_context=context)
        symbols = tuple(_expression(fake_x.shape[i]) for i in range(batch_ndim))
        batch = fake_x.shape[:batch_ndim]
        given = [_fake_constant(mode, c, batch) for c in constants]
        # One fake for one tensor: tied weights stay tied.
        fakes: dict[int, torch.Tensor] = {}
        for t in tensors:
            if id(t) not in fakes:
                fakes[id(t)] = mode.from_tensor(t, static_shapes=True).detach()
    functional = torch.func.functionalize(function)
    # Leave fake tensors of tied weights distinct inputs: the caller passes distinct names.
    with quiet(), mode:
        run = make_fx(
            lambda *inputs: (functional(*inputs), also()),
            decomposition_table=dict(decompositions),
            tracing_mode="real",
            _allow_non_fake_inputs=True,
        )
        graph_module = _kept.generated(run(fake_x, *given, *(fakes[id(t)] for t in tensors)))
    replaced = tuple(env.replace(s) for s in symbols)
    return Traced(graph_module, symbols, replaced, tuple(g.expr for g in env.guards))


def _fake_constant(mode: Any, constant: Constant, batch: Sequence[Any]) -> torch.Tensor:
    """The stand-in of a constant: of x's own batch sizes, where it has the batch axes."""
    tensor, batched = constant
    if batched and batch:
        shape = (*batch, *tensor.shape[len(batch) :])
        return torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
    return mode.from_tensor(tensor, static_shapes=True).detach()  # type: ignore[no-any-return]


def stand_in(x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """A tensor like x to trace with, of any size: it has no memory where that is possible."""
    if not HAVE_FAKE_TENSORS:
        return x.new_empty(tuple(sizes))
    with FakeTensorMode():
        return torch.empty(tuple(sizes), dtype=x.dtype, device=x.device)


@functools.cache
def standard_decompositions() -> Mapping[Any, Callable[..., Any]]:
    """How PyTorch composes operators of its core ones; empty where it no longer tells."""
    try:
        from torch._decomp import core_aten_decompositions
    except ImportError:  # pragma: no cover - a PyTorch that moved it
        return {}
    return dict(core_aten_decompositions().items())


def writes_in_place(graph: fx.Graph) -> bool:
    """Whether the graph holds in-place operations: the operators that PyTorch itself composes of
    others (recurrent layers, circular padding) are traced below functionalization."""
    return any(
        isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
        for node in graph.nodes
    )


def functional(
    graph_module: fx.GraphModule,
    decompositions: Mapping[Any, Callable[..., Any]],
    keep: Sequence[str],
) -> fx.GraphModule:
    """The same program without in-place operations, traced from ``graph_module``.  Each new node
    keeps the ``meta`` entries named in ``keep`` of the node that it comes from."""

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            before = newest_node()
            result = super().run_node(n)
            for node in nodes_since(before):
                node.meta.update({key: n.meta[key] for key in keep if key in n.meta})
            return result

        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            try:
                return super().call_function(target, args, kwargs)
            except RuntimeError:  # functionalization misses symbolic sizes in some operators
                name = target._schema.name if isinstance(target, torch._ops.OpOverload) else ""
                if not name.endswith("_") or torch.Tag.inplace_view in target.tags:
                    raise
                packet = getattr(torch.ops.aten, name.removeprefix("aten::")[:-1])
                plain = getattr(packet, target._overloadname)
                return args[0].copy_(plain(*args, **kwargs))

    inputs = [n.meta["val"] for n in graph_module.graph.nodes if n.op == "placeholder"]
    mode = next(v.fake_mode for v in inputs if hasattr(v, "fake_mode"))

    def retrace() -> fx.GraphModule:
        with mode:
            run = make_fx(
                torch.func.functionalize(Recorder(graph_module).run),
                decomposition_table=dict(decompositions),
                tracing_mode="real",
                _allow_non_fake_inputs=True,
            )
            return _kept.generated(run(*inputs))

    try:
        return retrace()
    except RuntimeError:  # as in `trace`
        with enable_python_dispatcher():
            return retrace()


def trace_by_export(
    function: Callable[..., Any],
    x: torch.Tensor,
    batch_ndim: int,
    constants: Sequence[Constant],
    tensors: Sequence[torch.Tensor],
    decompositions: Mapping[Any, Callable[..., Any]],
) -> Traced:
    """The public fallback: the same graph through ``torch.export``."""

    class Holder(torch.nn.Module):
        def forward(
            self, x: torch.Tensor, given: list[torch.Tensor], tensors: list[torch.Tensor]
        ) -> Any:
            return function(x, *given, *tensors)

    dims = dict.fromkeys(range(batch_ndim), torch.export.Dim.AUTO)
    exported = torch.export.export(
        Holder(),
        (x, [_of_batch(c, x.shape[:batch_ndim]) for c in constants], list(tensors)),
        dynamic_shapes=(
            dims,
            [dims if batched else None for _, batched in constants],
            [None] * len(tensors),
        ),
        strict=False,
    ).run_decompositions(dict(decompositions))
    graph_module = exported.graph_module
    for node in graph_module.graph.nodes:
        if node.op == "output":
            node.args = ((node.args[0][0], ()),)
    fake_x = next(iter(graph_module.graph.nodes)).meta["val"]
    symbols = tuple(_expression(fake_x.shape[i]) for i in range(batch_ndim))
    return Traced(graph_module, symbols, symbols, ())


def _of_batch(constant: Constant, batch: Sequence[int]) -> torch.Tensor:
    tensor, batched = constant
    return tensor.new_empty((*batch, *tensor.shape[len(batch) :])) if batched else tensor


def _expression(size: Any) -> Any:
    if isinstance(size, sympy.Basic):
        return size
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(int(size))


def size_expression(size: Any) -> Any:
    """A size as a sympy expression in the batch symbols."""
    return _expression(size)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """PyTorch logs what its shape functions cannot do; here it is an answer like any other."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.level
    try:
        logger.setLevel(logging.CRITICAL + 1)
        yield
    finally:
        logger.setLevel(before)


def tracing() -> bool:
    """Whether what is computed now is traced."""
    return get_proxy_mode() is not None


def newest_node() -> fx.Node | None:
    """The last node of the graph being traced by now (None outside of a trace)."""
    mode = get_proxy_mode()
    return next(iter(reversed(mode.tracer.graph.nodes)), None) if mode is not None else None


def nodes_since(before: fx.Node | None) -> Iterator[fx.Node]:
    """The nodes traced after ``before``, last one first."""
    mode = get_proxy_mode()
    for node in reversed(mode.tracer.graph.nodes) if mode is not None else ():
        if node is before:
            return
        yield node


_RENAMING = frozenset({"alias", "clone", "detach", "expand", "unsqueeze", "view", "_unsafe_view"})


def is_counting(tensor: torch.Tensor) -> bool:
    """Whether ``tensor``, in a trace, is ``torch.arange(n)``, possibly with further axes along
    which it is the same."""
    mode = get_proxy_mode()
    slot = None if mode is None else get_proxy_slot(tensor, mode.tracer, None)
    if slot is None:
        return False
    node: Any = slot.proxy.node
    while isinstance(node, fx.Node) and node.op == "call_function":
        name, _, overload = str(node.target).removeprefix("aten.").partition(".")
        if name == "arange":
            start = 0 if overload == "default" else node.args[0]
            step = node.args[2] if overload == "start_step" and len(node.args) > 2 else 1
            return bool(start == 0 and step == 1)
        if name not in _RENAMING:
            return False
        node = node.args[0]
    return False


def with_autograd(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with autograd at work inside, for models that call ``torch.autograd.grad`` or
    ``requires_grad_`` themselves; what they compute with it is traced as well."""

    def run(x: torch.Tensor, *tensors: torch.Tensor) -> Any:
        def inner(x: torch.Tensor) -> Any:
            with _requires_grad_allowed(True):
                return function(x, *tensors)

        return torch.func.vjp(inner, x)[0]

    return run


# Asked once: torch.compile of 2.11 cannot trace the question.
_AUTOCAST = frozenset(
    kind
    for kind in ("cpu", "cuda", "hpu", "mps", "mtia", "xla", "xpu")
    if torch.amp.is_autocast_available(kind)
)


def autocasting(device: torch.device) -> torch.dtype | None:
    """The type that ``torch.autocast`` casts to on a device now, None where it is off."""
    kind = device.type
    if kind not in _AUTOCAST:
        return None
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def as_written(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Inside, ``torch.autocast`` is off: a program holds the casts of its model, and its own
    products are to be of the types that they were written for."""
    if autocasting(device) is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
