"""fxhess and ``torch.func.hessian`` compared with double backward in float64, case by case.

Verdicts: "right", "wrong", "refused" (an error of any kind), "no referee" (double backward itself
fails).  Of a batch whose samples see each other: "right" if it is refused as that
(``SampleMixingError``), "wrong" if any number comes.  Where fxhess and double backward differ,
central differences of the function's values decide.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

import fxhess
from fxhess import oracle

from ._pytorch import ForEachEntry, reseed
from .cases import Case, Function, is_symmetric, seeded

DIFFERENCES = 1e-5  # what central differences are good for

_NO_BATCH = "is not one of each sample"  # nor is there a result of each sample

CORRECTED = "double backward is not; central differences agree"

Transform = Callable[[Case], torch.Tensor]


@dataclass(frozen=True)
class Outcome:
    """What came of one case.  ``kind``: "unbatched", "batched" (independent samples) or "mixing";
    ``rival``: the verdict on ``torch.func.hessian``, "" where it was not asked."""

    kind: str
    label: str
    verdict: str
    detail: str = ""
    rival: str = ""
    seconds: float = 0.0


class Referee:
    """What double backward says of a case: ``hessian [*batch, *event, *event]``, ``gradient``,
    ``value``, and whether samples see each other (``mixing``)."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.function = for_each_entry(seeded(case.function))
        x = case.x.clone().requires_grad_()
        count = x.shape[0] if case.batched else 1
        n = x.numel() // count
        with torch.enable_grad(), oracle_attention():
            y = self.function(x)
            self.value = y.detach()
            single = y.ndim == 0
            ys = [y] if single else list(y)
            whole_gradient = torch.stack([_grad(v, x) for v in ys])
            h = x.new_zeros(len(ys), x.numel(), x.numel())
            for k, g in enumerate(whole_gradient):
                if g.requires_grad:
                    entries = g.reshape(-1)
                    own = range(len(entries)) if single else range(k * n, (k + 1) * n)
                    for i in own:
                        h[k, i] = _grad(entries[i], x).detach().reshape(-1)
        gradients = whole_gradient.detach().reshape(len(ys), count, n)
        blocks = h.reshape(len(ys), count, n, count, n)
        if single:
            own_g, own_h = gradients[0], _diagonal(blocks[0])
            off = blocks[0].clone()
            _diagonal(off).zero_()
            self.mixing = count > 1 and (bool(off.nan_to_num().abs().max() > 0) or self._tied())
        else:
            own_g = gradients.diagonal(dim1=0, dim2=1).mT
            own_h = torch.stack([blocks[k, k, :, k] for k in range(count)])
            off_g = gradients.clone()
            off_g.diagonal(dim1=0, dim2=1).zero_()
            off_h = torch.stack(
                [blocks[k, k][:, [j for j in range(count) if j != k]] for k in range(count)]
            )
            self.mixing = _seen(off_g, own_g) or _seen(off_h, own_h) or self._heard()
        event = x.shape[1:] if case.batched else x.shape
        batch = x.shape[:1] if case.batched else ()
        self.gradient = own_g.reshape((*batch, *event))
        # Some conventions at kinks break the symmetry: the symmetric part.
        self.hessian = ((own_h + own_h.mT) / 2).reshape((*batch, *event, *event))

    @cached_property
    def placed(self) -> bool:
        """Whether samples may rightly be refused: they see each other, what happens to one depends
        on its place in the batch, or no derivative flows, so that there is nothing to see."""
        case, x = self.case, self.case.x
        if not case.batched or self.mixing or case.in_place:
            return case.batched
        turned = self.function(x.flip(0))
        if not _alike(turned, self.value.flip(0) if self.value.ndim else self.value):
            return True
        return _error(self.gradient, 0 * self.gradient)[0] < 1e-8

    def _heard(self) -> bool:
        """Whether a sample's value changes when the others do."""
        x = self.case.x
        for others in self._others():
            for k in range(len(x)):
                changed = others.clone()
                changed[k] = x[k]
                if not _alike(self.function(changed)[k], self.value[k]):
                    return True
        return False

    def _tied(self) -> bool:
        """Whether what a sample adds to one number for all depends on the others."""
        x = self.case.x
        for others in self._others():
            for k in range(len(x)):
                near, far = x.clone(), others.clone()
                near[k], far[k] = others[k], x[k]
                change = self.function(near) - self.value
                if not _alike(self.function(others) - self.function(far), change):
                    return True
        return False

    def _others(self) -> list[torch.Tensor]:
        """Other values for all samples: new ones, and in other places."""
        new, x = self.case.others, self.case.x
        if new is None or len(x) < 2:
            return []
        return [new, x.roll(1, 0), new.roll(1, 0), x.flip(0)]

    @cached_property
    def differences(self) -> torch.Tensor:
        """The Hessian by central differences of values."""
        case, x = self.case, self.case.x
        if not case.batched:
            return oracle.differences(self.function, x, x.ndim)
        rows = []
        for k, sample in enumerate(x):

            def one(s: torch.Tensor, k: int = k) -> torch.Tensor:
                value = self.function(torch.cat([x[:k], s[None], x[k + 1 :]]))
                return value[k] if value.ndim else value

            rows.append(oracle.differences(one, sample, sample.ndim))
        return torch.stack(rows)

    def is_slope(self, got: torch.Tensor, scale: float, step: float = 1e-5) -> bool:
        """Whether ``got``, and not what backward says, is the gradient, by central differences."""
        x = self.case.x
        flat, slope = x.reshape(-1), x.new_zeros(x.numel())
        per_sample = x.numel() // (x.shape[0] if self.case.batched else 1)
        with torch.no_grad():
            for i in range(len(flat)):
                e = torch.zeros_like(flat)
                e[i] = step
                up, down = (self.function((flat + s * e).reshape(x.shape)) for s in (1, -1))
                change = (up - down) / (2 * step)
                slope[i] = change[i // per_sample] if change.ndim else change
        slope = slope.reshape(x.shape)
        return _close(got, slope, scale) and not _close(self.gradient, slope, scale)

    def check(self, got: torch.Tensor, symmetric: bool = False) -> tuple[bool, str]:
        """Whether ``got`` is the Hessian, and a remark.  ``symmetric``: along symmetric matrices
        only, where x is one, or where double backward differs from central differences too: what
        reads one triangle (Cholesky factors, eigenvalues) goes by conventions along others."""
        want = self.hessian
        if symmetric:
            rank = self.case.event_ndim
            square = rank >= 2 and self.case.x.shape[-1] == self.case.x.shape[-2]
            if got.shape != want.shape or not square:
                return False, ""
            if not is_symmetric(self.case.x) and _close(want, self.differences, 1.0):
                return False, ""
            got, want = _along_symmetric(got, rank), _along_symmetric(want, rank)
            error, scale = _error(got, want)
            return error <= self.case.tolerance * scale, ""
        if got.shape != want.shape:
            return False, f"shape {list(got.shape)}, not {list(want.shape)}"
        n = math.prod(self.case.x.shape[self.case.batched :])
        square = got.reshape(-1, n, n)
        got = ((square + square.mT) / 2).reshape(got.shape)
        remark = ""
        if not (want.isfinite().all() and self.gradient.isfinite().all()):
            # Not differentiable here, for some directions at least.
            remark = "where all is finite: double backward is not"
            want = torch.where(got.isfinite(), want, torch.nan)
        error, scale = _error(got, want)
        if error <= self.case.tolerance * scale:
            return True, remark
        twice = self.differences
        if _close(got, twice, scale) and not _close(want, twice, scale):
            return True, CORRECTED
        return False, f"off by {error:.2g} where entries reach {scale:.2g}"


def _grad(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    if not y.requires_grad:
        return torch.zeros_like(x)
    (g,) = torch.autograd.grad(y, x, create_graph=True, allow_unused=True)
    return torch.zeros_like(x) if g is None else g


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-8, atol=1e-10, equal_nan=True)


def _close(h: torch.Tensor, differences: torch.Tensor, scale: float) -> bool:
    return torch.allclose(h, differences, rtol=DIFFERENCES, atol=DIFFERENCES * scale)


def _diagonal(blocks: torch.Tensor) -> torch.Tensor:
    """``[count, n, n]``, a view of ``[count, n, count, n]``."""
    return blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0)


def _seen(off: torch.Tensor, own: torch.Tensor) -> bool:
    scale = max(1.0, float(own.nan_to_num(0, 0, 0).abs().max())) if own.numel() else 1.0
    return bool(off.numel() and off.nan_to_num(0, 0, 0).abs().max() > 1e-10 * scale)


def _error(got: torch.Tensor, want: torch.Tensor) -> tuple[float, float]:
    """The largest error where ``want`` is finite, and the size that it is relative to."""
    finite = want.isfinite()
    if not finite.any():
        return 0.0, 1.0
    scale = max(1.0, float(want[finite].abs().max()))
    return float((got - want)[finite].abs().nan_to_num(torch.inf).max()), scale


def _along_symmetric(h: torch.Tensor, rank: int) -> torch.Tensor:
    """The form on symmetric matrices alone: the mean over transposing either argument."""
    h = h + h.transpose(-1, -2)
    return (h + h.transpose(-rank - 1, -rank - 2)) / 4


def for_each_entry(function: Function) -> Function:
    """The function, drawing numbers as :class:`ForEachEntry` does."""

    def run(x: torch.Tensor) -> torch.Tensor:
        with ForEachEntry():
            return function(x)

    return run


def oracle_attention() -> contextlib.AbstractContextManager[object]:
    """Fused attention has no double backward: its mathematical form has."""
    return torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)


# --- the two that are judged ----------------------------------------------------------------------


class _Holder(nn.Module):
    """A function of modules, with these as its parts."""

    def __init__(self, function: Function, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.function = function
        self.parts = nn.ModuleList(modules)
        self.training = any(m.training for m in modules)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def by_fxhess(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Value, gradient and Hessian."""
    model = _Holder(case.function, case.modules) if case.modules else case.function
    hess = fxhess.transform(model, ("value", "gradient", "hessian"), event_ndim=case.event_ndim)
    with torch.no_grad():
        hess.specialize(case.x)
        reseed()
        return hess(case.x)


def by_torch_func(case: Case) -> torch.Tensor:
    """``torch.func.hessian``, under ``vmap`` for a batch."""
    reseed()
    if not case.batched:
        return torch.func.hessian(case.function)(case.x)
    assert case.alone is not None
    return torch.func.vmap(torch.func.hessian(case.alone))(case.x)


def judge(
    case: Case,
    rival: Transform | None = by_torch_func,
    ours: Callable[[Case], tuple[torch.Tensor, ...]] = by_fxhess,
) -> Outcome:
    """Compare ``ours`` (and ``rival``) with double backward on one case."""
    start = time.process_time()
    kind = "batched" if case.batched else "unbatched"
    theirs = ""

    def outcome(verdict: str, detail: str = "") -> Outcome:
        took = time.process_time() - start
        return Outcome(kind, case.label, verdict, detail, theirs, round(took, 2))

    try:
        referee = Referee(case)
    except Exception as error:
        return outcome("no referee", brief(error))
    if referee.mixing:
        kind = "mixing"
    elif rival is not None and (not case.batched or case.alone is not None):
        theirs = _rival(case, referee, rival)
    try:
        value, gradient, hessian = ours(case)
    except fxhess.errors.SampleMixingError as error:
        kind = "mixing" if referee.placed else kind
        return outcome("right" if kind == "mixing" else "refused", brief(error))
    except Exception as error:
        named = isinstance(error, fxhess.FxhessError)
        if referee.placed and named and (_NO_BATCH in str(error) or not referee.mixing):
            kind = "mixing"
            return outcome("right", brief(error))
        return outcome("refused", brief(error))
    if referee.mixing:
        return outcome("wrong", "samples see each other, and it was accepted")
    right, remark = referee.check(hessian)
    if not right:
        return outcome("wrong", remark)
    for name, got, want in (
        ("value", value, referee.value),
        ("gradient", gradient, referee.gradient),
    ):
        if got.shape != want.shape:
            return outcome("wrong", f"{name}: shape {list(got.shape)}, not {list(want.shape)}")
        if remark.startswith("where"):
            want = torch.where(got.isfinite(), want, torch.nan)
        error, scale = _error(got, want)
        if not error <= case.tolerance * scale and not (
            name == "gradient" and referee.is_slope(got, scale)
        ):
            return outcome("wrong", f"{name} off by {error:.2g} where entries reach {scale:.2g}")
    return outcome("right", remark)


def _rival(case: Case, referee: Referee, rival: Transform) -> str:
    try:
        got = rival(case)
    except Exception:
        return "fails"
    got = got.detach()
    right = referee.check(got)[0] or referee.check(got, symmetric=True)[0]
    return "right" if right else "wrong"


def brief(error: Exception) -> str:
    """The error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
