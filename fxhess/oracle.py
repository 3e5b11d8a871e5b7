"""The referee: Hessians of one sample at a time, by double backward in float64 and by central
differences.  Independent of every rule, pass and graph of this package."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from fxhess._settings import plain_attention
from fxhess.locks import making

Model = nn.Module | Callable[..., Any]


def double(model: Model) -> Model:
    """A float64 copy of a module; a function is returned as it is."""
    return copy.deepcopy(model).double() if isinstance(model, nn.Module) else model


def sample_function(
    model: Model, x: torch.Tensor, event_ndim: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The model's outputs (flattened) as a function of one sample, in a batch of that sample
    alone; with no batch axes, of x itself."""
    nb = x.ndim - event_ndim

    def function(sample: torch.Tensor) -> torch.Tensor:
        result = model(sample[(None,) * nb] if nb else sample)
        return result.reshape(-1)

    return function


def hessian(model: Model, x: torch.Tensor, event_ndim: int = 1) -> torch.Tensor:
    """Per-sample Hessians by double backward, one sample at a time: ``[*batch, *event, *event]``,
    or ``[*batch, m, *event, *event]`` where the model gives m > 1 outputs for a sample.

    The model must take a batch of one sample, and be of x's dtype.
    """
    nb = x.ndim - event_ndim
    batch, event = x.shape[:nb], x.shape[nb:]
    results = []
    outputs = 1
    for sample in x.detach().reshape(-1, *event):
        function = sample_function(model, x, event_ndim)
        point = sample.clone().requires_grad_(True)
        rows = []
        with making, torch.enable_grad(), plain_attention(), as_written():
            ys = function(point)
            outputs = ys.numel()
            for y in ys:
                rows.append(_hessian_of(y, point))
        results.append(torch.stack(rows))
    if not results:
        return x.new_zeros((*batch, *event, *event))
    stacked = torch.stack(results).reshape(*batch, outputs, *event, *event)
    return stacked if outputs > 1 else stacked.squeeze(nb)


def _hessian_of(y: torch.Tensor, point: torch.Tensor) -> torch.Tensor:
    zeros = point.new_zeros((*point.shape, *point.shape))
    if not y.requires_grad:
        return zeros
    (gradient,) = torch.autograd.grad(y, point, create_graph=True, allow_unused=True)
    if gradient is None or not gradient.requires_grad:
        return zeros
    rows = []
    for entry in gradient.reshape(-1):
        (row,) = torch.autograd.grad(entry, point, retain_graph=True, allow_unused=True)
        rows.append(torch.zeros_like(point) if row is None else row)
    return torch.stack(rows).reshape((*point.shape, *point.shape)).detach()


def as_written() -> AbstractContextManager[None]:
    """Functions that were compiled run as they were written: compiled ones lose their second
    derivative."""
    return torch.compiler.set_stance("force_eager")  # type: ignore[no-any-return]


def differences(
    model: Model, x: torch.Tensor, event_ndim: int = 1, step: float = 1e-4
) -> torch.Tensor:
    """Per-sample Hessians by central differences of the model's values alone, error O(step^2 +
    eps/step^2); shapes as in :func:`hessian`."""
    nb = x.ndim - event_ndim
    batch, event = x.shape[:nb], x.shape[nb:]
    results = []
    outputs = 1
    for sample in x.detach().reshape(-1, *event):
        function = sample_function(model, x, event_ndim)
        n = sample.numel()
        basis = torch.eye(n, dtype=x.dtype).reshape(n, *event) * step
        with torch.no_grad():
            centre = function(sample)
            outputs = centre.numel()
            h = x.new_zeros(outputs, n, n)
            for i in range(n):
                for j in range(i + 1):
                    pp = function(sample + basis[i] + basis[j])
                    pm = function(sample + basis[i] - basis[j])
                    mp = function(sample - basis[i] + basis[j])
                    mm = function(sample - basis[i] - basis[j])
                    h[:, i, j] = h[:, j, i] = (pp - pm - mp + mm) / (4 * step * step)
        results.append(h)
    stacked = torch.stack(results).reshape(*batch, outputs, *event, *event)
    return stacked if outputs > 1 else stacked.squeeze(nb)


def gradient(model: Model, x: torch.Tensor, event_ndim: int = 1) -> torch.Tensor:
    """Per-sample gradients by one backward a sample and output: ``[*batch, *event]`` or
    ``[*batch, m, *event]``."""
    nb = x.ndim - event_ndim
    batch, event = x.shape[:nb], x.shape[nb:]
    results, outputs = [], 1
    for sample in x.detach().reshape(-1, *event):
        function = sample_function(model, x, event_ndim)
        point = sample.clone().requires_grad_(True)
        with making, torch.enable_grad(), plain_attention(), as_written():
            ys = function(point)
            outputs = ys.numel()
            rows = []
            for y in ys:
                grad = None
                if y.requires_grad:
                    (grad,) = torch.autograd.grad(y, point, retain_graph=True, allow_unused=True)
                rows.append(torch.zeros_like(point) if grad is None else grad.detach())
        results.append(torch.stack(rows))
    stacked = torch.stack(results).reshape(*batch, outputs, *event)
    return stacked if outputs > 1 else stacked.squeeze(nb)
