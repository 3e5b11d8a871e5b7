"""Verification on the user's own model and data: the result against the referee."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from fxhess import oracle
from fxhess.errors import FxhessError

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


def verify(hess: HessianModule, x: torch.Tensor, samples: int) -> Verification:
    """See :meth:`fxhess.module.HessianModule.verify`."""
    from fxhess.module import HessianModule

    event_ndim = hess.options.event_ndim
    nb = x.ndim - event_ndim
    event = x.shape[nb:]
    x = x.detach()
    if nb:
        x = x.reshape(-1, *event)[:samples]
        x = x[(slice(None), *(None,) * (nb - 1))]
    whole = HessianModule(hess.model, "hessian", event_ndim, hess.options.strategy)
    seed = torch.randint(2**31, ()).item()
    with torch.random.fork_rng():
        torch.manual_seed(int(seed))
        got = whole(x)
    reference = _reference(hess.model, x, event_ndim)
    got64 = got.detach().double()
    summed = _is_summed(whole, x)
    if summed:
        reference = _summed_reference(hess.model, x, event_ndim)
    scale = max(reference.abs().max().item(), 1e-30) if reference.numel() else 1.0
    error = (got64 - reference).abs().max().item() / scale if got.numel() else 0.0
    n = event.numel()
    square = got.reshape(-1, n, n)
    symmetric = bool(torch.equal(square, square.mT)) or not bool(torch.isfinite(square).all())
    allowed = 1e-9 if x.dtype == torch.float64 else 100 * torch.finfo(x.dtype).eps * 10
    result = Verification(error, allowed, x.reshape(-1, *event).shape[0] if nb else 1, symmetric)
    if not (error <= allowed and symmetric):
        raise VerificationError(
            f"the Hessian is off: {result}",
            hint="please report it with the model; a random model (dropout) cannot be verified",
        )
    return result


def _is_summed(whole: HessianModule, x: torch.Tensor) -> bool:
    binding = whole._find(x)
    return binding is not None and binding.summed


def _reference(model: nn.Module, x: torch.Tensor, event_ndim: int) -> torch.Tensor:
    return oracle.hessian(oracle.double(model), x.double(), event_ndim)


def _summed_reference(model: nn.Module, x: torch.Tensor, event_ndim: int) -> torch.Tensor:
    """Diagonal blocks of the Hessian of the sum over the batch, by double backward."""
    nb = x.ndim - event_ndim
    event = x.shape[nb:]
    point = x.double().requires_grad_(True)
    with torch.enable_grad():
        total = oracle.double(model)(point).sum()  # type: ignore[operator]
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
    return stacked.reshape(*x.shape[:nb], *event, *event).detach()
