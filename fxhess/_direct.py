"""Adapter: a program through PyTorch's own compiler, called without what ``torch.compile`` does at
every call.

``torch._dynamo`` proves at each call that what it compiled still holds: 15 to 25 microseconds, as
much as a small Hessian takes.  Here the program is functional and its inputs are known, so
``torch._inductor`` compiles it as it is, and one check in C++ of the inputs' types, sizes and
strides replaces that proof.  Where PyTorch's internals have moved, or anything else stands in the
way, :func:`direct` says so with None, and its caller takes the public ``torch.compile``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

_MANY = 8  # combinations of sizes and strides, after which the public way is taken
_log = logging.getLogger(__name__)


def same_inputs(
    tensors: Sequence[torch.Tensor], free: Sequence[int], strides: bool = True
) -> Callable[..., bool] | None:
    """A check, in C++, whether other tensors have the same Python type, dtype, device, dispatch
    keys (so the same modes are on), sizes and ``strides``, and no gradient is wanted of them.  Of
    the first one the sizes of the axes ``free`` and all strides are left open.  None where PyTorch
    has no such check, or it would not hold for these tensors."""
    sizes: list[Any] = [list(t.shape) for t in tensors]
    steps: list[Any] = [list(t.stride()) if strides else [None] * t.ndim for t in tensors]
    for axis in free:
        sizes[0][axis] = None
    steps[0] = [None] * len(steps[0])
    like = [
        torch.nn.Parameter(t.detach(), requires_grad=False)
        if type(t) is torch.nn.Parameter
        else t.detach()
        for t in tensors
    ]
    try:
        guards = torch._C._dynamo.guards.TensorGuards(
            *like, dynamic_dims_sizes=sizes, dynamic_dims_strides=steps
        )
        check: Callable[..., bool] = guards.check
        return check if check(*tensors) is True else None
    except (AttributeError, TypeError, RuntimeError):  # pragma: no cover - another PyTorch
        return None


class Direct:
    """A functional program of x and the model's tensors, compiled once for all batch sizes but 1.

    ``public`` does the same, for what cannot be compiled here.
    """

    def __init__(self, module: fx.GraphModule, batch_ndim: int, public: Callable[..., Any]) -> None:
        self._module = module
        self._batch_ndim = batch_ndim
        self._public = public
        self._last: tuple[Callable[..., bool], int, Callable[..., Any]] | None = None
        self._codes: dict[Any, Callable[..., Any] | None] = {}

    def __call__(self, x: torch.Tensor, *tensors: torch.Tensor) -> Any:
        last = self._last
        if (
            last is not None
            and last[0](x, *tensors)
            and x.is_contiguous()
            and last[1] == torch.get_num_threads()
        ):
            return last[2]([x, *tensors])
        return self._find(x, tensors)

    def _find(self, x: torch.Tensor, tensors: Sequence[torch.Tensor]) -> Any:
        batch = x.shape[: self._batch_ndim]
        plain = all(type(t) in (torch.Tensor, torch.nn.Parameter) for t in (x, *tensors))
        if torch._C._len_torch_dispatch_stack() > 0:  # somebody wants to see the operators
            return self._module.forward(x, *tensors)
        if 0 in batch or not plain or x.device.type != "cpu":
            return self._public(x, *tensors)
        x = x.contiguous()
        known = tuple([(t.shape, t.stride(), t.dtype) for t in tensors])
        free = [axis for axis, n in enumerate(batch) if n != 1]
        threads = torch.get_num_threads()
        key = (tuple(free), x.shape[self._batch_ndim :], x.dtype, known, threads)
        if key not in self._codes and len(self._codes) < _MANY:
            self._codes[key] = _compile(self._module, x, tensors, free)
        code = self._codes.get(key)
        if code is None:
            return self._public(x, *tensors)
        check = same_inputs([x, *tensors], free)
        if check is not None:
            self._last = (check, threads, code)
        return code([x, *tensors])


def _compile(
    module: fx.GraphModule, x: torch.Tensor, tensors: Sequence[torch.Tensor], free: Sequence[int]
) -> Callable[..., Any] | None:
    """Compiled code that takes a list of tensors like these; None where there is none."""
    try:
        return _compiled(module, [x, *tensors], free)
    except Exception as error:
        # Whatever it is, torch.compile says it better if it is the program's own fault.
        _log.info("taking torch.compile instead: %s: %s", type(error).__name__, error)
        return None


def _compiled(
    module: fx.GraphModule, inputs: Sequence[torch.Tensor], free: Sequence[int]
) -> Callable[..., Any] | None:
    from torch._guards import TracingContext, tracing
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import (
        DimDynamic,
        ShapeEnv,
        StatelessSymbolicContext,
    )

    (values,) = next(n for n in module.graph.nodes if n.op == "output").args
    single = isinstance(values, fx.Node)

    def several(*args: Any) -> tuple[Any, ...]:
        result = module.forward(*args)
        return (result,) if single else tuple(result)

    shapes = ShapeEnv(duck_shape=False)  # two batch axes of one size are two axes
    fake = FakeTensorMode(shape_env=shapes)
    stand_ins = []
    for i, tensor in enumerate(inputs):
        sizes = [
            DimDynamic.DYNAMIC if i == 0 and axis in free else DimDynamic.STATIC
            for axis in range(tensor.ndim)
        ]
        context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
        stand_ins.append(fake.from_tensor(tensor.detach(), symbolic_context=context))
    options = {"cpp_wrapper": True, "size_asserts": False, "alignment_asserts": False}
    known = {name: value for name, value in options.items() if hasattr(config, name)}
    with torch.no_grad(), config.patch(known):
        traced = make_fx(several, decomposition_table=select_decomp_table())(*stand_ins)
        if not _is_plain(traced.graph):
            return None
        out = next(n for n in traced.graph.nodes if n.op == "output")
        made = [n.meta["val"] for n in out.args[0]]
        out.meta["user_visible_output_idxs"] = list(range(len(made)))
        out.meta["original_output_strides"] = [tuple(v.stride()) for v in made]
        with tracing(TracingContext(fake)):
            code: Any = compile_fx_inner(traced, stand_ins, cpp_wrapper=True)
    if shapes.guards:  # holds for some sizes only
        return None
    call = code.current_callable
    copies = [t.clone(memory_format=torch.preserve_format) for t in inputs]
    with torch.no_grad():
        got, want = call(list(copies)), several(*copies)
    if any(g.shape != w.shape or g.stride() != w.stride() or g.dtype != w.dtype
           for g, w in zip(got, want, strict=True)):  # fmt: skip
        return None
    return (lambda args: call(args)[0]) if single else (lambda args: tuple(call(args)))


def _is_plain(graph: fx.Graph) -> bool:
    """Whether there are only PyTorch's own operators, which write nothing and draw no numbers."""
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if not isinstance(node.target, torch._ops.OpOverload):
            if getattr(node.target, "__module__", "") not in ("_operator", "math"):
                return False
            continue
        random = torch.Tag.nondeterministic_seeded in node.target.tags
        if node.target.namespace not in ("aten", "prims") or random:
            return False
        if node.target._schema.is_mutable:
            return False
    return all(n.op in ("placeholder", "call_function", "output") for n in graph.nodes)
