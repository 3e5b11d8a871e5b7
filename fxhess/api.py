"""The public entry: :func:`transform`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fxhess.arguments import REDUCTIONS
from fxhess.errors import InputError
from fxhess.execute import Running
from fxhess.module import HessianModule
from fxhess.passes.plan import STRATEGIES


def transform(
    model: nn.Module | Callable[..., Any],
    outputs: Any = "hessian",
    *,
    wrt: Any = 0,
    in_dims: Any = None,
    event_ndim: int = 1,
    reduce: str | None = None,
    example: Any = None,
    strategy: str = "auto",
    fallback: str = "allow",
    compile: bool = False,
    max_memory: int | None = None,
) -> HessianModule:
    """A module that returns per-sample derivatives of ``model``, exact and batched.

    For ``x: [*batch, *event]``, where the last ``event_ndim`` axes are one sample and all others
    batch axes (possibly none), ``model(x)`` has to be a scalar for each sample (``[*batch]`` or
    ``[*batch, 1]``), a vector (``[*batch, m]``), or a scalar that is a plain sum over the batch.
    The Hessian is ``[*batch, *event, *event]``, or ``[*batch, m, *event, *event]``.

    Args:
        model: a module or function that PyTorch can trace and whose samples are independent.
            Its parameters and buffers stay its own: changes act at the next call.
        outputs: one, or several: a named tuple, in one pass.  ``"value"``, ``"gradient"`` (or
            ``"jacobian"``), ``"hessian"``, ``"diagonal"`` and ``"laplacian"`` of the Hessian (the
            trace of ``metric @ H`` where the call gives a metric), ``"hvp"`` (H v) and
            ``"quadratic"`` (v H v) along the ``vector`` of the call, ``("entries", [(i, j), ..])``,
            ``("blocks", axis)``: the diagonal blocks along an event axis.  The table below has
            shapes and costs.
        wrt: what is differentiated: an argument of the model by position or name (``"x"``, or
            ``"batch.pos"`` for a part of one), :func:`fxhess.parameters`, or a tuple, list or
            dictionary of these.  An argument may hold several tensors (a tuple, dictionary or
            dataclass).  Of several inputs, derivatives have the structure of ``wrt``, Hessians
            blocks ``H[a][b]``: ``[*batch, *event_a, *event_b]``.
        in_dims: which of the model's other arguments have batch axes, as for ``torch.vmap``: an
            axis or None for each, in a tuple by position or a dictionary by name.  Where nothing is
            said, tensors that begin with the batch sizes do.
        event_ndim: how many trailing axes of x (the first of several inputs) make one sample.
        reduce: with ``wrt=fxhess.parameters(..)``: ``"sum"`` or ``"mean"`` over the batch (the
            first axis of the model's result), for one Hessian instead of one for each sample.
        example: specialize now for inputs like this one (any batch size), not at the first call;
            several arguments as a tuple.
        strategy: how the terms of the Hessian end: ``"auto"`` (by cost), ``"close"`` (all
            contracted at x), ``"pull"`` (all carried back to x) or ``"rebase"`` (piece by piece at
            every narrow place).
        fallback: what to do where the derivatives of an operation without a rule cannot be written
            as plain operations: ``"allow"`` takes them by autograd at every call, exact but slower
            (``explain`` says where), ``"error"`` refuses.
        compile: run the generated code through ``torch.compile``, once for all batch sizes (and
            once more for a batch of one): a first call of seconds, faster ones after.
        max_memory: bytes that a call may allocate, its result included (a given ``out`` is not):
            the batch runs in tiles that fit.  None: tiles that suit the device's cache.

    Outputs (of a model that returns ``[*batch, m]``, m follows the batch in each shape), and their
    cost in gradients, over the nine models of ``python -m benchmarks.outputs``:

    ==================  ================================  ==========
    output              shape                             gradients
    ==================  ================================  ==========
    value               [*batch]
    gradient, jacobian  [*batch, *event]                  1
    hessian             [*batch, *event, *event]          1.5 to 140
    diagonal            [*batch, *event]                  1.4 to 36
    laplacian           [*batch]                          1 to 46
    entries             [*batch, n]                       as many tangents as coordinates named
    blocks              [*batch, *event, *other axes]     between diagonal and hessian
    hvp                 [*batch, *event] or [k, *batch,   0.8 to 1.8
                        *event], as ``vector``
    quadratic           [*batch] or [k, *batch]           0.6 to 1.4
    ==================  ================================  ==========

    Raises:
        InputError: an unknown output or strategy, or an x that does not fit.
        CaptureError: (at specialization) PyTorch cannot trace the model, or its result is no
            scalar or vector per sample.
        SampleMixingError: samples of the batch see each other.
        UnsupportedOpError: an operation on the path from x has no second derivative in PyTorch,
            or, with ``fallback="error"``, none that can be written as plain operations.

    Examples:
        >>> f = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 1))
        >>> x, v, A = torch.randn(32, 10), torch.randn(5, 32, 10), torch.eye(10)
        >>> fxhess.transform(f)(x).shape
        torch.Size([32, 10, 10])
        >>> fxhess.transform(f, "diagonal")(x).shape
        torch.Size([32, 10])
        >>> fxhess.transform(f, "laplacian")(x, metric=A).shape
        torch.Size([32])
        >>> fxhess.transform(f, ("entries", [(0, 1), (2, 2)]))(x).shape
        torch.Size([32, 2])
        >>> fxhess.transform(f, "hvp")(x, vector=v).shape
        torch.Size([5, 32, 10])
        >>> fxhess.transform(f, "quadratic")(x, vector=v[0]).shape
        torch.Size([32])
        >>> several = fxhess.transform(f, ("value", "gradient", "hessian"))(x)
        >>> several.value.shape, several.gradient.shape
        (torch.Size([32]), torch.Size([32, 10]))
        >>> jacobian = fxhess.transform(nn.Linear(10, 3), "jacobian")(x)  # of a vector
        >>> jacobian.shape
        torch.Size([32, 3, 10])
        >>> pair = lambda p: (p[:, :, None] - p[:, None]).square().sum((1, 2, 3)).sin()
        >>> fxhess.transform(pair, ("blocks", 0), event_ndim=2)(torch.randn(6, 5, 3)).shape
        torch.Size([6, 5, 3, 3])

    Source: edge-pushing (Gower & Mello 2012), in tensor form (Laue, Mitterreiter & Giesen 2020).
    """
    if strategy not in STRATEGIES:
        raise InputError(
            f"unknown strategy {strategy!r}", hint=f"valid are {', '.join(map(repr, STRATEGIES))}"
        )
    if fallback not in ("allow", "error"):
        raise InputError(f"unknown fallback {fallback!r}", hint="valid are 'allow' and 'error'")
    if reduce is not None and reduce not in REDUCTIONS:
        raise InputError(f"unknown reduce {reduce!r}", hint="valid are 'sum' and 'mean'")
    if not callable(model):
        raise InputError(f"a model is a module or a function, not {type(model).__name__}")
    if isinstance(model, type):
        raise InputError(
            f"a model is a module or a function, {model.__name__} is a class",
            hint=f"an instance: fxhess.transform({model.__name__}(...))",
        )
    if not isinstance(compile, bool):
        raise InputError(f"compile is True or False, not {compile!r}")
    if not isinstance(event_ndim, int) or isinstance(event_ndim, bool):
        raise InputError(f"event_ndim counts axes; {event_ndim!r} is no number of them")
    if event_ndim < 0:
        raise InputError(f"event_ndim counts axes; {event_ndim} is negative")
    if max_memory is not None and not (isinstance(max_memory, int) and max_memory > 0):
        raise InputError(
            f"max_memory counts bytes; {max_memory!r} is none", hint="8 << 20 are 8 MiB"
        )
    hess = HessianModule(
        model,
        outputs,
        event_ndim,
        strategy,
        fallback,
        Running(compile, max_memory),
        wrt,
        in_dims,
        reduce,
    )
    if example is not None:
        hess.specialize(*(example if isinstance(example, tuple) else (example,)))
    return hess
