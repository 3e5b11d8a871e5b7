"""Modules of derivatives in files: exported, with their weights, for processes that do not know the
model's source.

:func:`save` lets ``torch.export`` trace the module for all batch sizes and writes its graph as the
cache does, as plain data of a closed set, with the weights' bytes beside it: ``torch.export``'s own
files hold pickles and expressions that are evaluated.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from fxhess import _aoti, _kept, container, serial
from fxhess.errors import FileError, FxhessError, InputError
from fxhess.form import PLAIN
from fxhess.module import HessianModule, result_type
from fxhess.outputs import NAMES

_CHECKED = "_assert_tensor_metadata"  # of the export's own; inputs are checked by us
# What it writes behind tensors that a model makes itself: the same tensor.
_SAME = frozenset({torch.ops.aten.detach_.default, torch.ops.aten.lift_fresh_copy.default})


def save(
    hess: HessianModule,
    path: str | os.PathLike[str],
    *args: Any,
    vector: Any = None,
    metric: Any = None,
    **kwargs: Any,
) -> None:
    """Write a module of derivatives, for calls like this one of any batch size (with ``reduce``:
    of this one), to a file that :func:`load` reads without the model's source: its program, and its
    weights as they are now.

    Args:
        hess: what :func:`fxhess.transform` returned.
        path: the file; one that is there is replaced.
        args, kwargs, vector, metric: an example of a call, as for ``hess`` itself.  Arguments are
            tensors and plain values, alone or in tuples, lists and dictionaries.

    Raises:
        FileError: the program holds what no file holds (autograd at run time, custom operators).
        InputError: the arguments do not fit.
        OSError: the file cannot be written.
    """
    if vector is not None:
        kwargs["vector"] = vector
    if metric is not None:
        kwargs["metric"] = metric
    flat = _Flat(hess, args, kwargs)
    graph, weights, names = _plain(_exported(flat))
    fields = {
        "arguments": flat.arguments,
        "result": flat.result,
        "inputs": [
            [str(t.dtype), _marked(t, axes)]
            for t, axes in zip(flat.tensors, flat.batch, strict=True)
        ],
        "names": names,
        "torch": torch.__version__,
    }
    try:
        document = serial.graph_to_data(graph, fields)
    except serial.NotPlainError as error:
        raise FileError(
            f"the program cannot be saved: it holds {error}",
            hint="hess.explain(x) says where derivatives are taken at run time",
        ) from error
    container.write(path, document, weights)


def load(path: str | os.PathLike[str]) -> SavedModule:
    """The module that :func:`save` wrote.  Nothing in the file is executed or unpickled.

    Raises:
        FileError: the file holds none: it is another kind of file, truncated, changed or newer.
        OSError: it cannot be read.
    """
    document, weights = container.read(path)
    try:
        graph, fields = serial.graph_from_data(document)
        return SavedModule(graph, weights, fields)
    except (serial.NotPlainError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise FileError(f"{path} holds no saved module: {error}") from error


def package(
    hess: HessianModule,
    path: str | os.PathLike[str],
    *args: Any,
    vector: Any = None,
    metric: Any = None,
    **kwargs: Any,
) -> str:
    """Compile a module of derivatives ahead of time (AOTInductor), for calls like this one, to a
    package that runs without Python too.  It holds machine code: load none that you do not trust.

    Args:
        hess, args, kwargs, vector, metric: see :func:`save`; tensors in them become the package's
            inputs, in order, and results come as a flat list.
        path: the package, ``.pt2``.

    Returns:
        The path.  ``torch._inductor.aoti_load_package(path)`` loads it in Python,
        ``torch::inductor::AOTIModelPackageLoader`` in C++.

    Raises:
        InputError: the arguments do not fit, or the path does not end in ``.pt2``.
    """
    if not os.fspath(path).endswith(".pt2"):
        raise InputError(f"a package is a file .pt2, not {os.fspath(path)}")
    if vector is not None:
        kwargs["vector"] = vector
    if metric is not None:
        kwargs["metric"] = metric
    with torch.no_grad():
        return _aoti.compile_package(_exported(_Flat(hess, args, kwargs)), path)


class SavedModule(nn.Module):
    """A module of derivatives from a file; made by :func:`fxhess.load`.  It is called like the one
    that was saved, on any batch size, can be trained through, compiled and exported again.
    ``weights`` names its tensors as the model did."""

    def __init__(
        self, graph: fx.Graph, weights: Sequence[torch.Tensor], fields: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self._arguments, self._result = fields["arguments"], fields["result"]
        self._inputs = [(dtype, list(shape)) for dtype, shape in fields["inputs"]]
        self.weights: dict[str, str] = {}
        for i, (name, tensor) in enumerate(zip(fields["names"], weights, strict=True)):
            self.register_buffer(f"weight_{i}", tensor)
            self.weights[str(name)] = f"weight_{i}"
        places = [n for n in graph.nodes if n.op == "placeholder"]
        if len(places) != len(weights) + len(self._inputs):
            raise ValueError("weights and inputs are not those of the graph")
        self._program = _kept.module_of(graph, "SavedDerivative")
        self._count = len(weights)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See :meth:`fxhess.HessianModule.forward`.

        Raises:
            InputError: the arguments are not like those that it was saved for.
        """
        tensors: list[torch.Tensor] = []
        given = {k: v for k, v in kwargs.items() if v is not None}
        if describe((args, given), tensors) != self._arguments:
            raise InputError(
                f"this module was saved for arguments {_shown(self._arguments)}",
                hint="call it as in fxhess.save, by the same names and plain values",
            )
        self._check(tensors)
        weights = [getattr(self, f"weight_{i}") for i in range(self._count)]
        results = self._program(*weights, *tensors)
        return build(self._result, iter(results))

    def _check(self, tensors: Sequence[torch.Tensor]) -> None:
        batch: dict[int, int] = {}
        for i, (tensor, (dtype, shape)) in enumerate(zip(tensors, self._inputs, strict=True)):
            fits = tensor.ndim == len(shape) and all(
                batch.setdefault(want, n) == n if want < 0 else n == want
                for n, want in zip(tensor.shape, shape, strict=True)
            )
            if not fits or str(tensor.dtype) != dtype:
                listed = ", ".join("batch" if n < 0 else str(n) for n in shape)
                raise InputError(
                    f"argument {i} is {tensor.dtype} {list(tensor.shape)}; this module was saved"
                    f" for {dtype} [{listed}], with the same batch for all"
                )


def _marked(tensor: torch.Tensor, batch: range) -> list[int]:
    """The sizes of a tensor, those of the batch as -1, -2, .."""
    return [-1 - batch.index(i) if i in batch else n for i, n in enumerate(tensor.shape)]


# --- nested arguments and results as plain data ---------------------------------------------------


def describe(value: Any, tensors: list[torch.Tensor]) -> Any:
    """The structure of a nested value; its tensors are appended to a list.

    Raises:
        InputError: something in it is neither a tensor, a plain value nor a container of them.
    """
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return ("tensor",)
    if value is None or type(value) in (bool, int, float, str):
        return ("plain", type(value).__name__, value)
    if isinstance(value, tuple) and isinstance(value, result_type(getattr(value, "_fields", ()))):
        return ("outputs", list(value._fields), [describe(v, tensors) for v in value])  # type: ignore[attr-defined]
    if type(value) in (tuple, list):
        return (type(value).__name__, [describe(v, tensors) for v in value])
    if type(value) is dict and all(isinstance(k, str) for k in value):
        return ("dict", list(value), [describe(v, tensors) for v in value.values()])
    raise InputError(
        f"a saved module has no arguments of the type {type(value).__name__}",
        hint="tensors and plain values, alone or in tuples, lists and dictionaries",
    )


def build(described: Any, tensors: Iterator[torch.Tensor]) -> Any:
    """The value of a structure."""
    kind, *rest = described
    if kind == "tensor":
        return next(tensors)
    if kind == "plain":
        return rest[1]
    parts = [build(d, tensors) for d in rest[-1]]
    if kind == "dict":
        return dict(zip(rest[0], parts, strict=True))
    if kind == "outputs":
        if not set(rest[0]) <= set(NAMES):
            raise ValueError("unknown outputs")
        return result_type(tuple(rest[0]))(*parts)
    return tuple(parts) if kind == "tuple" else parts


def _shown(described: Any) -> str:
    kind, *rest = described
    if kind in ("tensor", "plain"):
        return "tensor" if kind == "tensor" else repr(rest[1])
    parts = [_shown(d) for d in rest[-1]]
    if kind == "dict":
        parts = [f"{key}={part}" for key, part in zip(rest[0], parts, strict=True)]
    return f"({', '.join(parts)})"


# --- exporting ------------------------------------------------------------------------------------


class _Flat(nn.Module):
    """A module of derivatives whose arguments and results are flat: tensors alone.  ``batch``: for
    each argument the axes that are the batch's."""

    def __init__(self, hess: HessianModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not isinstance(hess, HessianModule):
            raise InputError(
                f"what is written is a module that fxhess.transform returned, not"
                f" {type(hess).__name__}",
                hint="fxhess.transform(model) first",
            )
        super().__init__()
        self.hess = hess
        self.tensors: list[torch.Tensor] = []
        self.arguments = describe((args, kwargs), self.tensors)
        results: list[torch.Tensor] = []
        with torch.no_grad():
            self.result = describe(hess(*args, **kwargs), results)
        self.batch = _batch_axes(hess, args, kwargs, self.tensors)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        args, kwargs = build(self.arguments, iter(tensors))
        results: list[torch.Tensor] = []
        describe(self.hess(*args, **kwargs), results)
        return tuple(results)


def _batch_axes(
    hess: HessianModule, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: Sequence[Any]
) -> list[range]:
    """Which axes of each tensor of a call are the batch's."""
    given = {name: kwargs[name] for name in ("vector", "metric") if kwargs.get(name) is not None}
    own_kwargs = {name: value for name, value in kwargs.items() if name not in given}
    call = hess.prepared(args, own_kwargs, **given)
    nb, form = call.x.ndim - hess.programs.options(call).event_ndim, call.form
    if form is PLAIN:
        found = [range(nb)]
        events = [tensors[0].ndim - nb]
    else:
        axes = [form.parts[k] if k >= 0 else form.constants[-1 - k] for k in form.leaves]
        found = [range(0) if a is None else range(a, a + nb) for a in axes]
        events = [len(shape) for shape in form.packing.shapes]
    pairs = [a + b for a in events for b in events]
    for name, value in given.items():
        own: list[torch.Tensor] = []
        describe(value, own)
        for tensor, event in zip(own, events if name == "vector" else pairs, strict=True):
            lead = tensor.ndim - event - nb
            found.append(range(lead, lead + nb) if lead >= 0 else range(0))
    assert len(found) == len(tensors)
    return found


def _exported(flat: _Flat) -> torch.export.ExportedProgram:
    """The module as ``torch.export`` traces it, for all batch sizes."""
    auto = torch.export.Dim.AUTO
    axes = tuple(dict.fromkeys(axes, auto) for axes in flat.batch)
    examples = tuple(_enlarged(t, a) for t, a in zip(flat.tensors, flat.batch, strict=True))
    try:
        program = torch.export.export(
            flat, examples, dynamic_shapes={"tensors": axes}, strict=False
        )
    except FxhessError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise FileError(
            f"torch.export cannot trace the module: {reason}",
            hint="hess.explain(x) says what is decided or differentiated at run time",
        ) from error
    places = [n for n in program.graph.nodes if n.op == "placeholder"][-len(axes) :]
    for place, own in zip(places, flat.batch, strict=True):
        for axis in own:
            if isinstance(place.meta["val"].shape[axis], int):
                raise FileError(
                    f"the program holds for one batch size only: axis {axis} of {place.name}",
                    hint="hess.explain(x) tells what it depends on",
                )
    return program


def _enlarged(tensor: torch.Tensor, axes: range) -> torch.Tensor:
    """An example of at least two samples: PyTorch takes sizes 0 and 1 for constants."""
    tensor = tensor.detach()
    for axis in axes:
        if tensor.shape[axis] < 2:
            sizes = [*tensor.shape]
            sizes[axis] = 2
            tensor = (
                tensor.expand(sizes).contiguous() if tensor.numel() else tensor.new_zeros(sizes)
            )
    return tensor


def _plain(
    program: torch.export.ExportedProgram,
) -> tuple[fx.Graph, list[torch.Tensor], list[str]]:
    """The graph without what only exporting needs, and the weights that are its first inputs, with
    their names."""
    held = {**program.state_dict, **program.constants}
    weights, names = [], []
    for spec in program.graph_signature.input_specs:
        if spec.target is None:
            continue
        value = held[spec.target]
        if not isinstance(value, torch.Tensor):
            raise FileError(f"the program holds a {type(value).__name__}")
        weights.append(value)
        names.append(spec.target.removeprefix("hess.model."))
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        if _CHECKED in str(node.target):
            continue
        if node.target in _SAME:
            copies[node] = copies[node.args[0]]
            continue
        copies[node] = copy = graph.node_copy(node, copies.__getitem__)
        copy.meta.clear()
    return graph, weights, names
