"""Adapter: a program through PyTorch's own compiler, called without what ``torch.compile`` does at
every call.

``torch._dynamo`` proves at each call that what it compiled still holds: 15 to 25 microseconds, as
much as a small Hessian takes.  Here the program is functional and its inputs are known, so
``torch._inductor`` compiles it as it is, and one check in C++ of the inputs' types, sizes and
strides replaces that proof.  Where PyTorch's internals have moved, or anything else stands in the
way, there is no code (None), and :class:`Direct` takes the public ``torch.compile``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

_MANY = 8  # combinations of sizes and strides, after which the public way is taken
_AGREES = {torch.float32: 1e-3, torch.float64: 1e-9}  # of the largest entry, with the plain way
_log = logging.getLogger(__name__)


def same_inputs(
    tensors: Sequence[torch.Tensor], batched: Sequence[int], batch_ndim: int, strides: bool = True
) -> Callable[..., bool] | None:
    """A check, in C++, whether other tensors have the same Python type, dtype, device, dispatch
    keys (so the same modes are on), sizes and ``strides``, and no gradient is wanted of them.  Of
    those that are ``batched`` the sizes of the leading ``batch_ndim`` axes and all strides are left
    open.  None where PyTorch has no such check, or it would not hold for these tensors."""
    sizes: list[Any] = [list(t.shape) for t in tensors]
    steps: list[Any] = [list(t.stride()) if strides else [None] * t.ndim for t in tensors]
    for i in batched:
        sizes[i][:batch_ndim] = [None] * batch_ndim
        steps[i] = [None] * len(steps[i])
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

    With ``written``, the program takes as many tensors more, whose leading axes are x's batch axes,
    and writes its results into them with ``copy_``.  ``public`` does the same, for what cannot be
    compiled here.  ``compiles`` gives the code for inputs like those that it takes, None where it
    cannot; without it, that is PyTorch's compiler.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        batch_ndim: int,
        public: Callable[..., Any],
        written: int = 0,
        compiles: Callable[[Sequence[torch.Tensor]], Callable[..., Any] | None] | None = None,
    ) -> None:
        self._compiles = compiles
        self._module = module
        self._batch_ndim = batch_ndim
        self._public = public
        self._written = written
        # A check of the inputs, whether a batch axis may be anything but 1, threads, and the code.
        self._last: tuple[Callable[..., bool], bool, int, Callable[..., Any]] | None = None
        self._codes: dict[Any, Callable[..., Any] | None] = {}

    def __call__(self, x: torch.Tensor, *tensors: torch.Tensor) -> Any:
        if not x.is_contiguous():
            x = x.contiguous()
        last = self._last
        if (
            last is not None
            and last[0](x, *tensors)
            and last[1] is (min(x.shape[: self._batch_ndim], default=2) > 1)
            and last[2] == torch.get_num_threads()
        ):
            for out in tensors[len(tensors) - self._written :]:
                if not out.is_contiguous():
                    return self._public(x, *tensors)
            return last[3]([x, *tensors])
        if torch._C._len_torch_dispatch_stack() > 0:  # somebody wants to see the operators
            return self._module.forward(x, *tensors)
        code = self._code(x, tensors)
        return self._public(x, *tensors) if code is None else code([x, *tensors])

    def has(self, x: torch.Tensor, *tensors: torch.Tensor) -> bool:
        """Whether there is code for such inputs; it is compiled now."""
        return self._code(x.contiguous(), tensors) is not None

    def _code(self, x: torch.Tensor, tensors: Sequence[torch.Tensor]) -> Callable[..., Any] | None:
        """The code for these inputs, the next to be taken; None where there is none."""
        batch = x.shape[: self._batch_ndim]
        plain = all(type(t) in (torch.Tensor, torch.nn.Parameter) for t in (x, *tensors))
        outs = tensors[len(tensors) - self._written :]
        filled = all(t.is_contiguous() and t.shape[: self._batch_ndim] == batch for t in outs)
        if 0 in batch or not plain or not filled or x.device.type != "cpu":
            return None
        known = tensors[: len(tensors) - self._written]
        threads = torch.get_num_threads()
        key = (
            tuple([n == 1 for n in batch]), x.shape[self._batch_ndim :], x.dtype, threads,
            tuple([(t.shape, t.stride(), t.dtype) for t in known]),
            tuple([(t.shape[self._batch_ndim :], t.dtype) for t in outs]),
        )  # fmt: skip
        if key not in self._codes and len(self._codes) < _MANY:
            self._codes[key] = self._compile([x, *tensors])
        code = self._codes.get(key)
        if code is None:
            return None
        several = 1 not in batch
        batched = [0, *range(1 + len(known), 1 + len(tensors))]
        # Where some of the batch axes are 1 and some are not, each call looks for its code.
        if several or all(n == 1 for n in batch):
            check = same_inputs([x, *tensors], batched, self._batch_ndim if several else 0)
            self._last = None if check is None else (check, several, threads, code)
        return code

    def _compile(self, inputs: Sequence[torch.Tensor]) -> Callable[..., Any] | None:
        """Compiled code that takes a list of tensors like these; None where there is none."""
        try:
            if self._compiles is None:
                return _compiled(self._module, inputs, self._batch_ndim, self._written)
            code = self._compiles(inputs)
        except Exception as error:
            # Whatever it is, torch.compile says it better if it is the program's own fault.
            _log.info("not compiled directly: %s: %s", type(error).__name__, error)
            return None
        return code if code is not None and self._agrees(code, inputs) else None

    def _agrees(self, code: Callable[..., Any], inputs: Sequence[torch.Tensor]) -> bool:
        """Whether the results are those of the plain way, but for rounding."""
        several = []
        for way in (lambda args: self._module.forward(*args), code):
            args = _own_results(inputs, self._written)
            with torch.no_grad():
                result = way(args)
            made = result if isinstance(result, (tuple, list)) else (result,)
            several.append(args[len(args) - self._written :] if self._written else made)
        for plain, own in zip(*several, strict=True):
            largest = float(plain.nan_to_num(0, 0, 0).abs().max()) if plain.numel() else 0.0
            limit = _AGREES[plain.dtype] * largest
            if own.shape != plain.shape or not torch.allclose(own, plain, 0, limit, equal_nan=True):
                _log.warning("compiled code that does not agree with the program is not used")
                return False
        return True


def _own_results(inputs: Sequence[torch.Tensor], written: int) -> list[torch.Tensor]:
    """The inputs, with copies of those that are written."""
    known = len(inputs) - written
    return [*inputs[:known], *(t.clone() for t in inputs[known:])]


def _compiled(
    module: fx.GraphModule, inputs: Sequence[torch.Tensor], batch_ndim: int, written: int
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
        return (result,) if single else tuple(result or ())

    shapes = ShapeEnv(duck_shape=False)  # two batch axes of one size are two axes
    fake = FakeTensorMode(shape_env=shapes)
    x, *known = inputs[: len(inputs) - written]
    free = [axis < batch_ndim and n != 1 for axis, n in enumerate(x.shape)]
    context: Any = StatelessSymbolicContext(
        dynamic_sizes=[DimDynamic.DYNAMIC if f else DimDynamic.STATIC for f in free]
    )
    stand_ins: list[torch.Tensor] = [fake.from_tensor(x.detach(), symbolic_context=context)]
    for tensor in known:
        fixed: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.STATIC] * tensor.ndim)
        stand_ins.append(fake.from_tensor(tensor.detach(), symbolic_context=fixed))
    batch = stand_ins[0].shape[:batch_ndim]
    with fake:
        for out in inputs[len(inputs) - written :]:
            stand_ins.append(torch.empty((*batch, *out.shape[batch_ndim:]), dtype=out.dtype))
    with torch.no_grad():
        traced = make_fx(several, decomposition_table=select_decomp_table())(*stand_ins)
    own = _is_own(traced.graph)
    if own is None:
        return None
    output = next(n for n in traced.graph.nodes if n.op == "output")
    made = [n.meta["val"] for n in output.args[0]]  # type: ignore[union-attr]
    output.meta["user_visible_output_idxs"] = list(range(len(made)))
    output.meta["original_output_strides"] = [tuple(v.stride()) for v in made]
    options: dict[str, Any] = {"cpp_wrapper": own, "size_asserts": False}
    with torch.no_grad(), config.patch(options), tracing(TracingContext(fake)):
        code: Any = compile_fx_inner(traced, stand_ins, cpp_wrapper=own)
    if shapes.guards:  # holds for some sizes only
        return None
    call = code.current_callable
    copies = _own_results(inputs, written)
    with torch.no_grad():
        got, want = call(list(copies)), several(*copies)
    if any(g.shape != w.shape or g.stride() != w.stride() or g.dtype != w.dtype
           for g, w in zip(got, want, strict=True)):  # fmt: skip
        return None
    return (lambda args: call(args)[0]) if single else (lambda args: tuple(call(args)))


def _is_own(graph: fx.Graph) -> bool | None:
    """Whether there are only PyTorch's own operators, which may be called from generated C++; None
    where an operator draws numbers or writes into anything but an input."""
    own = True
    for node in graph.nodes:
        if node.op != "call_function":
            if node.op not in ("placeholder", "output"):
                return None
            continue
        target: Any = node.target
        if not isinstance(target, torch._ops.OpOverload):
            if getattr(target, "__module__", "") not in ("_operator", "math"):
                return None
            continue
        if torch.Tag.nondeterministic_seeded in target.tags:
            return None
        fills = target is torch.ops.aten.copy_.default and node.args[0].op == "placeholder"
        if target._schema.is_mutable and not fills:
            return None
        own = own and target.namespace in ("aten", "prims")
    return own
