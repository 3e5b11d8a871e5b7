"""Verification on the user's own model and data: the result against the referee."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from fxhess import oracle
from fxhess.errors import FxhessError
from fxhess.form import PLAIN, Call, Form
from fxhess.intake import one_tensor

if TYPE_CHECKING:
    from fxhess.module import HessianModule


class VerificationError(FxhessError):
    """The derivatives differ from double backward by more than rounding allows."""


@dataclass(frozen=True)
class Verification:
    """``error``: the largest difference of an entry, relative to the largest entry of the
    reference; ``allowed``: the bound it was held against; ``samples``: how many were compared;
    ``symmetric``: whether H equals its transpose bit for bit."""

    error: float
    allowed: float
    samples: int
    symmetric: bool

    def __str__(self) -> str:
        return (
            f"verified on {self.samples} samples: relative error {self.error:.2e} (allowed"
            f" {self.allowed:.0e}) against float64 double backward; symmetric: {self.symmetric}"
        )


def verify(hess: HessianModule, call: Call, samples: int) -> Verification:
    """See :meth:`fxhess.module.HessianModule.verify`."""
    whole = hess.sibling("hessian")
    form = call.form
    event_ndim = hess.options.event_ndim if form is PLAIN else form.packing.event_ndim
    nb = call.x.ndim - event_ndim
    x = _some(call.x, nb, samples)
    constants = [
        _some(c, nb, samples) if given.batched else c.detach()
        for c, given in zip(call.constants, call.described, strict=False)
    ]
    call = Call(form, x, constants, tuple(g for g in call.described if g.constant))
    seed = torch.randint(2**31, ()).item()
    with torch.random.fork_rng():
        torch.manual_seed(int(seed))
        (got,) = whole.results(call)
    model = _Double(hess.model)
    if whole.is_summed(call):
        reference = _summed_reference(model, call, nb)
    else:
        reference = _reference(model, call, nb).reshape(got.shape)
    got64 = got.detach().double()
    scale = max(reference.abs().max().item(), 1e-30) if reference.numel() else 1.0
    error = (got64 - reference).abs().max().item() / scale if got.numel() else 0.0
    n = x.shape[nb:].numel()
    square = got.reshape(-1, n, n)
    symmetric = bool(torch.equal(square, square.mT)) or not bool(torch.isfinite(square).all())
    allowed = 1e-9 if x.dtype == torch.float64 else 100 * torch.finfo(x.dtype).eps * 10
    result = Verification(error, allowed, x.shape[0] if nb else 1, symmetric)
    if not (error <= allowed and symmetric):
        raise VerificationError(
            f"the Hessian is off: {result}",
            hint="please report it with the model; a random model (dropout) cannot be verified",
        )
    return result


def _some(tensor: torch.Tensor, nb: int, samples: int) -> torch.Tensor:
    """The first samples, along the first of ``nb`` batch axes."""
    tensor = tensor.detach()
    if not nb:
        return tensor
    return tensor.reshape(-1, *tensor.shape[nb:])[:samples][(slice(None), *(None,) * (nb - 1))]


def _double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


class _Double:
    """A model in float64, the modules that it closes over included; it stays as it is."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        named = (model.named_parameters, model.named_buffers)
        self.tensors = {
            name: _double(tensor.detach().clone())
            for names in named
            for name, tensor in names(remove_duplicate=False)
        }

    def __call__(
        self, form: Form, x: torch.Tensor, constants: Sequence[torch.Tensor], alone: int
    ) -> torch.Tensor:
        args, kwargs, own = form.arguments(x, constants, alone)
        tensors = {**self.tensors, **own}
        result = torch.func.functional_call(self.model, tensors, args, kwargs, tie_weights=False)
        return form.reduced(one_tensor(result))


def _reference(model: _Double, call: Call, nb: int) -> torch.Tensor:
    """Of one sample at a time, one after the other."""
    found = []
    for i in range(call.x.shape[0] if nb else 1):
        place = (i, *(0,) * (nb - 1)) if nb else ()
        constants = [
            _double(c[place] if given.batched else c)
            for c, given in zip(call.constants, call.described, strict=True)
        ]
        sample = call.x[place].double()
        found.append(
            oracle.hessian(
                lambda s, constants=constants: model(call.form, s, constants, nb),
                sample,
                sample.ndim,
            )
        )
    return torch.stack(found)


def _summed_reference(model: _Double, call: Call, nb: int) -> torch.Tensor:
    """Diagonal blocks of the Hessian of the sum over the batch, by double backward."""
    batch, event = call.x.shape[:nb], call.x.shape[nb:]
    point = call.x.double().requires_grad_(True)
    constants = [_double(c) for c in call.constants]
    with torch.enable_grad():
        total = model(call.form, point, constants, 0).sum()
        (gradient,) = torch.autograd.grad(total, point, create_graph=True)
        flat = gradient.reshape(-1, event.numel())
        rows = []
        for i in range(event.numel()):
            if not flat.requires_grad:
                rows.append(torch.zeros_like(point))
                continue
            (row,) = torch.autograd.grad(
                flat[:, i].sum(), point, retain_graph=True, allow_unused=True
            )
            rows.append(torch.zeros_like(point) if row is None else row)
    stacked = torch.stack(rows, nb)
    return stacked.reshape(*batch, *event, *event).detach()
