"""Capture: from a module or function to a functional ATen graph whose inputs are x and the
model's own live tensors.

Parameters, buffers and tensors found in closures become inputs of the graph; a :class:`Source`
says where each is read at every call, so weights that change, are replaced or swapped by
``torch.func.functional_call`` act at once.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch._ops import HigherOrderOperator  # the type only; it has no public name
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from fxhess import _outside, _settings, _torch, _traced, registry
from fxhess.closures import tensor_paths
from fxhess.emit import ORIGIN
from fxhess.errors import CaptureError, FxhessError, Origin
from fxhess.form import PLAIN, Form
from fxhess.functions import CALL, hold, whole_functions
from fxhess.guards import Structure
from fxhess.intake import check_model, one_tensor
from fxhess.interrupts import passed
from fxhess.lines import INTERNAL, calling_line, user_line
from fxhess.outputs import Given
from fxhess.reads import Questions
from fxhess.sources import Source, exclusive

# Notes on traced nodes, from which Origin is made.
_OP, _CALL, _LINE, _PATH = "operator", "call", "line", "module path"


@dataclass
class Captured:
    """A functional ATen graph: placeholders are x, the constants of the call, then one for each
    source.  ``constants`` describes them, ``examples`` are theirs at capture.  ``symbols``,
    ``sizes`` and ``guards`` of the batch axes are those of :class:`fxhess._torch.Traced`;
    ``structure``: what was seen of values, where the program holds for these only.

    ``implied``: the graph is that of one sample, and the batch axes are none of its own; all its
    values have them in front.  ``targets``: what is wanted, where that is not the result.
    """

    graph_module: fx.GraphModule
    sources: list[Source]
    batch_ndim: int
    symbols: tuple[Any, ...]
    sizes: tuple[Any, ...]
    guards: tuple[Any, ...]
    tensors: list[torch.Tensor]
    structure: Structure | None = None
    constants: tuple[Given, ...] = ()
    examples: tuple[torch.Tensor, ...] = ()
    implied: bool = False
    targets: tuple[fx.Node, ...] = ()
    output: fx.Node = field(init=False)

    def __post_init__(self) -> None:
        if self.targets:
            self.output = self.targets[-1]
            return
        (result,) = next(n for n in self.graph_module.graph.nodes if n.op == "output").args
        if not isinstance(result, fx.Node) or not isinstance(result.meta.get("val"), torch.Tensor):
            raise CaptureError("the model returns a tensor that does not depend on x")
        self.output = result

    @property
    def converts(self) -> bool:
        """Whether the model converts between types itself."""
        return any(
            node.target is torch.ops.aten._to_copy.default for node in self.graph_module.graph.nodes
        )


class _Watch(TorchFunctionMode):
    """What autograd would not record of the model is a constant of the derivative; and every node
    is marked with the line of the user's that wrote it."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any | None = None
    ) -> Any:
        if not _torch.tracing():  # a program is made, or a value asked for: not the model's own
            return func(*args, **(kwargs or {}))
        passed()
        before = _torch.newest_node()
        again = self if isinstance(func, HigherOrderOperator) else nullcontext()
        with again:  # what a control flow operator calls is the model's own
            result = registry.substituted(func)(*args, **(kwargs or {}))
        if _torch.newest_node() is not before:
            _mark(before, _LINE, calling_line())
        graph = func is not torch.autograd.grad or (kwargs or {}).get("create_graph")
        if (graph and torch.is_grad_enabled()) or any(result is a for a in args):
            return result
        with torch._C.DisableTorchFunctionSubclass():
            return tree_map_only(
                torch.Tensor, lambda t: t.detach() if t.is_floating_point() else t, result
            )


def _mark(before: fx.Node | None, key: str, text: str) -> None:
    """Note ``text`` on all nodes that were traced after ``before`` and have no such note yet."""
    for node in _torch.nodes_since(before):
        node.meta.setdefault(key, text)


def capture(
    model: nn.Module,
    x: torch.Tensor,
    batch_ndim: int,
    alone: int = 0,
    form: Form = PLAIN,
    constants: Sequence[torch.Tensor] = (),
    described: Sequence[Given] = (),
) -> Captured:
    """Trace the model as a function of x, of which the first ``batch_ndim`` axes are symbolic.
    ``form`` says how its arguments are made of x and the ``constants``, which are ``described``.

    With ``alone``, x and what is given for each sample are those of one (``batch_ndim`` 0), and the
    model is given a batch of that sample alone, with this many batch axes.

    Raises:
        CaptureError: PyTorch cannot trace the model, or it does not return one tensor.
        SampleStructureError: the structure of the program depends on values of x, which may differ
            between the samples of a batch.
        InputError: a lazily initialized module has not seen an input.
    """
    check_model(model)
    named = _own_tensors(model)
    names = list(named)

    open_modules: list[tuple[str, fx.Node | None]] = []

    count = len(constants)
    samples = [0, *(i for i, given in enumerate(described, 1) if given.batched)]

    def function(x: torch.Tensor, *rest: torch.Tensor) -> Any:
        questions.start()
        _traced.mark_samples(samples)
        with _Watch(), _marked_modules(model, open_modules):
            args, kwargs, own = form.arguments(x, rest[:count], alone)
            given = {**dict(zip(names, rest[count:], strict=True)), **own}
            result = torch.func.functional_call(model, given, args, kwargs, tie_weights=False)
            return _without(alone, form.reduced(one_tensor(result)))

    inputs = [x, *constants, *named.values()]
    known = [t if _outside.has_values(t) else None for t in inputs]
    x, *others = map(_outside.plain, inputs)
    tensors = [t.detach() for t in others[count:]]
    examples = tuple(c.detach() for c in others[:count])
    given = [(c, d.batched) for c, d in zip(examples, described, strict=True)]
    questions = Questions(known, lambda op: _here(op, open_modules), apart=batch_ndim > 0)
    rewrites = questions.answers(registry.decompositions())
    rewrites = {op: _located(op, rewrite, open_modules) for op, rewrite in rewrites.items()}
    with (
        exclusive(),
        _settings.plain_attention(),
        _settings.exporting(),
        _traced.unrolled(),
        torch.compiler.set_stance("force_eager"),  # what the user compiled is traced as it was
        _settings.plain_layers(),
        torch.enable_grad(),
        whole_functions(),
        questions.asked(),
    ):
        traced, failure, run = None, None, function
        asked = questions.operands
        for example in _examples(x, batch_ndim):
            try:
                try:
                    found = _torch.trace(run, example, batch_ndim, given, tensors, rewrites, asked)
                except RuntimeError as error:
                    if run is not function or not _WANTS_AUTOGRAD.search(str(error)):
                        raise
                    run = _torch.with_autograd(function)
                    found = _torch.trace(run, example, batch_ndim, given, tensors, rewrites, asked)
            except FxhessError:
                raise
            except Exception as error:
                failure = error
                continue
            if found.holds(x.shape):
                traced = found
                break
        if traced is None:
            raise _capture_error(failure, x, open_modules) from failure
        graph_module = traced.graph_module
        graph = graph_module.graph
        placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        sources = [Source(tuple(name.split("."))) for name in names]
        assert len(placeholders) == 1 + count + len(sources)
        _record_origins(graph)
        hold(graph)
        _lift_constants(graph_module, model, placeholders[-1], sources)
        if _torch.writes_in_place(graph):
            graph_module = _torch.functional(graph_module, rewrites, (ORIGIN, CALL))
        structure = Structure.of(graph_module, described, sources, model, questions.complete)
    values = [source.read(model) for source in sources]
    symbols, sizes, guards = traced.symbols, traced.sizes, traced.guards
    return Captured(
        graph_module, sources, batch_ndim, symbols, sizes, guards, values, structure,
        tuple(described), examples,
    )  # fmt: skip


def _without(axes: int, result: Any) -> Any:
    """The result for one sample of a model that was given a batch of that sample alone."""
    if axes and isinstance(result, torch.Tensor) and result.shape[:axes].numel() == 1:
        return result.reshape(result.shape[axes:])
    return result


def _own_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters, then buffers, by name; of a module that is used under several names, once: it
    holds one value at a time."""
    named: dict[str, torch.Tensor] = {}
    for kind in (nn.Module.named_parameters, nn.Module.named_buffers):
        for path, module in model.named_modules():
            prefix = f"{path}." if path else ""
            for name, tensor in kind(module, recurse=False, remove_duplicate=False):
                named[prefix + name] = tensor
    return named


# Batch sizes to trace with: they coincide with no other size of a model, so that no condition on
# the batch size is recorded by accident.
_UNLIKELY = (1009, 1013, 1019, 1021)
# What PyTorch says where a model differentiates inside itself and autograd records nothing.
_WANTS_AUTOGRAD = re.compile("does not require grad|requires_grad_")


def _examples(x: torch.Tensor, batch_ndim: int) -> Iterator[torch.Tensor]:
    """Stand-ins for x to trace with: of unlikely batch sizes, and, for models that were written
    for one batch size, of x's own."""
    event = x.shape[batch_ndim:]
    if batch_ndim:
        # Of very many axes, small ones: their product has to be a size that a tensor can have.
        sizes = _UNLIKELY[:batch_ndim] if batch_ndim <= len(_UNLIKELY) else (3,) * batch_ndim
        yield _torch.stand_in(x, (*sizes, *event))
    yield _torch.stand_in(x, (*(max(2, n) for n in x.shape[:batch_ndim]), *event))


@contextmanager
def _marked_modules(
    model: nn.Module, open_modules: list[tuple[str, fx.Node | None]]
) -> Iterator[None]:
    """Mark every node with the path of the innermost submodule that wrote it; ``open_modules``
    holds the paths of those that run now."""
    open_modules.clear()
    hooks: list[tuple[nn.Module, Any, Any]] = []
    for path, module in model.named_modules():
        if not path or isinstance(module, (torch.jit.ScriptModule, nn.Identity)):
            continue

        def enter(*_: Any, path: str = path) -> None:
            open_modules.append((path, _torch.newest_node()))

        def leave(*_: Any) -> None:
            if open_modules:
                path, before = open_modules.pop()
                _mark(before, _PATH, path)

        hooks.append((module, enter, leave))
    handles = []
    try:
        for module, enter, leave in hooks:
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _located(
    op: Any, rewrite: Callable[..., Any], open_modules: list[tuple[str, fx.Node | None]]
) -> Callable[..., Any]:
    """The rewrite; its nodes go by the name of the (outermost) operator that was rewritten, and a
    refusal says where."""

    def run(*args: Any, **kwargs: Any) -> Any:
        before = _torch.newest_node()
        try:
            result = rewrite(*args, **kwargs)
        except FxhessError as error:
            if error.where is not None:
                raise
            where = _here(str(op), open_modules)
            raise type(error)(error.what, where=where, hint=error.hint) from error
        if result is not NotImplemented:
            call = object()
            for node in _torch.nodes_since(before):
                node.meta[_OP], node.meta[_CALL] = str(op), call
        return result

    return run


def _here(op: str, open_modules: list[tuple[str, fx.Node | None]]) -> Origin:
    """Where the model is by now."""
    return Origin(op, open_modules[-1][0] if open_modules else "", calling_line())


def _record_origins(graph: fx.Graph) -> None:
    steps: dict[object, int] = {}
    for i, node in enumerate(graph.nodes):
        line = node.meta.get(_LINE) or user_line(node.meta.get("stack_trace") or "")
        name = node.meta.get(_OP, str(node.target))
        step = steps.setdefault(node.meta.get(_CALL, node), i)
        node.meta[ORIGIN] = Origin(name, node.meta.get(_PATH, ""), line, step)


def _lift_constants(
    graph_module: fx.GraphModule, model: nn.Module, last: fx.Node, sources: list[Source]
) -> None:
    """Turn every tensor that the trace holds as an attribute into an input of the graph."""
    graph = graph_module.graph
    lifted: dict[str, fx.Node] = {}
    paths: dict[int, tuple[str, ...]] | None = None
    for node in list(graph.nodes):
        if node.op != "get_attr":
            continue
        name = str(node.target)
        tensor = getattr(graph_module, name)
        if not isinstance(tensor, torch.Tensor):
            raise CaptureError(
                "the model calls a higher-order operation, which fxhess cannot look into",
                where=node.meta.get(ORIGIN),
            )
        if tensor.layout != torch.strided:
            raise CaptureError(
                f"the model uses a tensor of its own in the layout {tensor.layout}; programs of"
                " derivatives hold strided tensors only",
                where=next(iter(node.users)).meta.get(ORIGIN),
                hint="read its indices and values outside of the model, and write the product with"
                " index_select and index_add; or use tensor.to_dense()",
            )
        if name not in lifted:
            if paths is None:
                paths = tensor_paths(model)
            path = paths.get(id(tensor))
            with graph.inserting_after(last):
                lifted[name] = last = graph.placeholder(name)
            last.meta["val"] = node.meta.get("val", tensor)
            kept = tensor if tensor.is_leaf else tensor.detach()
            sources.append(Source(path) if path else Source(constant=kept))
        node.replace_all_uses_with(lifted[name])
        graph.erase_node(node)


def _capture_error(
    error: Exception | None, x: torch.Tensor, open_modules: list[tuple[str, fx.Node | None]]
) -> CaptureError:
    if error is None:
        return CaptureError(
            f"the model behaves differently for a batch like that of x, {list(x.shape)}, than for"
            " every larger one, so it cannot be traced for it",
            hint="read the batch size as x.shape[0], not as len(x) or int(x.shape[0])",
        )
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith(INTERNAL)]
    places = [f"module '{open_modules[-1][0]}'"] if open_modules else []
    places += [f"{own[-1].filename}:{own[-1].lineno}: {own[-1].line}"] if own else []
    where = ", at ".join(places)
    name = type(error).__name__
    if "DataDependent" in name or "data-dependent" in str(error).lower():
        return depends_on_values(where)
    return CaptureError(
        f"PyTorch could not run the model on x of shape {list(x.shape)} while tracing it:"
        f" {name}: {_first_lines(error)}",
        where=where,
        hint="check that model(x) itself runs on such an x, and with what else it is called with",
    )


def depends_on_values(where: Origin | str | None) -> CaptureError:
    """The refusal of a program that is not the same for every x."""
    return CaptureError(
        "the model branches on the value of a tensor (`if tensor`, `.item()`, a boolean mask),"
        " so one program cannot serve every sample",
        where=where,
        hint="choose with torch.where, or move the decision out of the model",
    )


def _first_lines(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3])
