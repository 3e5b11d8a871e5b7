"""Float32 errors beside ``vmap(hessian)``'s: ``python -m tests.precision``.

A model and data are rounded to float32; the truth is double backward, one sample at a time, of
the same rounded numbers in float64.  The error of a sample is the largest difference of an entry
of its Hessian, relative to the largest entry.  Of each case many samples are drawn; medians and
largest errors of fxhess and of ``torch.func.vmap(hessian)`` are set side by side.

Both are sums in different orders, so neither can be smaller on every draw.  fxhess counts as
*worse* where its median is above ``MEDIAN`` times the rival's or its largest above ``LARGEST``
times, and that is more than ``FLOOR`` (two units in the last place of the largest entry).
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxhess
from fxhess import oracle

if __name__ == "__main__":  # the zoo's files import each other as the tests do
    sys.path.insert(0, str(Path(__file__).parent))

MEDIAN, LARGEST = 1.25, 2.0
FLOOR = 2 * torch.finfo(torch.float32).eps
SAMPLES = 64  # of each case: medians of a few differ by more than MEDIAN from draw to draw
FEW = 8  # of those that the rival does not do


@dataclass(frozen=True)
class Case:
    """``model``: in float64; ``draw(seed)``: float64 data ``[B, *event]``."""

    name: str
    model: Callable[[], Any]
    draw: Callable[[int], torch.Tensor]
    event_ndim: int = 1


@dataclass(frozen=True)
class Errors:
    """Medians and maxima over all samples; of the rival None where it fails."""

    name: str
    ours: tuple[float, float]
    theirs: tuple[float, float] | None

    @property
    def worse(self) -> bool:
        if self.theirs is None:
            return False
        bounds = (MEDIAN * self.theirs[0], LARGEST * self.theirs[1])
        return any(e > max(b, FLOOR) for e, b in zip(self.ours, bounds, strict=True))

    def row(self) -> str:
        ours = " | ".join(f"{e:.1e}" for e in self.ours)
        if self.theirs is None:
            return f"| {self.name} | {ours} | fails | | |"
        theirs = " | ".join(f"{e:.1e}" for e in self.theirs)
        ratio = self.ours[0] / max(self.theirs[0], 1e-30)
        return f"| {self.name} | {ours} | {theirs} | {ratio:.2f}{' **worse**' * self.worse} |"


# --- measuring ------------------------------------------------------------------------------------


def rival(model: Any, x: torch.Tensor) -> torch.Tensor:
    """``torch.func.vmap(hessian)``, of models ``[1, *event]`` to one or several numbers."""

    def function(sample: torch.Tensor) -> torch.Tensor:
        y = model(sample[None])
        return y.reshape(()) if y.numel() == 1 else y.reshape(-1)

    return torch.func.vmap(torch.func.hessian(function))(x)


def measure(case: Case, samples: int = SAMPLES) -> Errors:
    """The errors of both on as many draws of data as give so many samples."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        single = _typed(case.model(), torch.float32)
    double = _typed(copy.deepcopy(single), torch.float64)
    ours: list[float] = []
    theirs: list[float] | None = []
    hess = fxhess.transform(single, event_ndim=case.event_ndim)
    for seed in itertools.count():
        if len(ours) >= (samples if theirs is not None else min(samples, FEW)):
            break
        x = case.draw(seed).float()
        truth = oracle.hessian(double, x.double(), case.event_ndim)
        with torch.no_grad():
            ours += _errors(hess(x), truth)
        try:
            if theirs is not None:
                theirs += _errors(rival(single, x).reshape(truth.shape), truth)
        except Exception:
            theirs = None
    return Errors(case.name, _summary(ours), _summary(theirs) if theirs is not None else None)


def _typed(model: Any, dtype: torch.dtype) -> Any:
    return model.to(dtype) if isinstance(model, nn.Module) else model


def _errors(got: torch.Tensor, truth: torch.Tensor) -> list[float]:
    off = (got.double() - truth).abs().flatten(1).amax(1)
    size = truth.abs().flatten(1).amax(1)
    return (off / size.clamp_min(torch.finfo(torch.float32).tiny)).tolist()


def _summary(errors: list[float]) -> tuple[float, float]:
    values = torch.tensor(errors)
    return values.median().item(), values.max().item()


# --- cases ----------------------------------------------------------------------------------------


def normal(*shape: int, scale: float = 1.0) -> Callable[[int], torch.Tensor]:
    def draw(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return scale * torch.randn(shape, generator=generator, dtype=torch.float64)

    return draw


def net(activation: nn.Module, *widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n, m in pairwise(widths):
        layers += [nn.Linear(n, m), copy.deepcopy(activation)]
    return nn.Sequential(*layers[:-1]).double()


ACTIVATIONS: dict[str, nn.Module] = {
    "tanh": nn.Tanh(),
    "sigmoid": nn.Sigmoid(),
    "softplus": nn.Softplus(),
    "softplus, beta 5": nn.Softplus(5.0),
    "log-sigmoid": nn.LogSigmoid(),
    "GELU": nn.GELU(),
    "GELU, tanh": nn.GELU("tanh"),
    "SiLU": nn.SiLU(),
    "Mish": nn.Mish(),
    "ELU": nn.ELU(),
    "CELU": nn.CELU(0.7),
    "SELU": nn.SELU(),
    "softsign": nn.Softsign(),
    "tanhshrink": nn.Tanhshrink(),
    "hardswish": nn.Hardswish(),
    "softmin": nn.Softmin(-1),
    "softmax": nn.Softmax(-1),
    "log-softmax": nn.LogSoftmax(-1),
}


class _Function(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


POINTWISE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sin": torch.sin,
    "exp": lambda x: torch.exp(0.5 * x),
    "square": torch.square,
    "erf": torch.erf,
    "erfc": torch.erfc,
    "atan": torch.atan,
    "asinh": torch.asinh,
    "logaddexp": lambda x: torch.logaddexp(x, -x),
    "sinc": torch.sinc,
    "log1p of a square": lambda x: torch.log1p(x * x),
    "rsqrt": lambda x: torch.rsqrt(1 + x * x),
    "cube root": lambda x: (1 + x * x) ** (1 / 3),
    "tan": lambda x: torch.tan(0.3 * x),
    "sinh": lambda x: torch.sinh(0.5 * x),
    "x exp(-x²)": lambda x: x * torch.exp(-x * x),
    "log-ndtr": torch.special.log_ndtr,
    "i0e": torch.special.i0e,
    "xlogy": lambda x: torch.xlogy(1 + x * x, 2 + x * x),
    "hypot": lambda x: torch.hypot(x, torch.ones_like(x)),
    "atan2": lambda x: torch.atan2(x, 1.5 + torch.sin(x)),
}


def _normalizations() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    def between(norm: nn.Module) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 16), norm, nn.Tanh(), nn.Linear(16, 1))

    def batch_norm() -> nn.Module:
        layer = nn.BatchNorm1d(16)
        layer(2 * torch.randn(64, 16) + 1)
        return layer.eval()

    yield "layer norm", lambda: between(nn.LayerNorm(16))
    yield "layer norm, twice", lambda: between(nn.Sequential(nn.LayerNorm(16), nn.LayerNorm(16)))
    yield "RMS norm", lambda: between(nn.RMSNorm(16))
    yield "group norm", lambda: between(nn.GroupNorm(4, 16))
    yield "batch norm, evaluated", lambda: between(batch_norm())
    yield (
        "local response norm",
        lambda: between(
            _Function(lambda h: nn.functional.local_response_norm(h[..., None], 3, 0.1).squeeze(-1))
        ),
    )
    yield (
        "cosine similarity",
        lambda: nn.Sequential(
            nn.Linear(4, 16), _Function(lambda h: torch.cosine_similarity(h[:, :8], h[:, 8:], -1))
        ),
    )
    yield "normalize", lambda: between(_Function(lambda h: nn.functional.normalize(h, dim=-1)))
    yield (
        "logsumexp",
        lambda: nn.Sequential(nn.Linear(4, 16), _Function(lambda h: torch.logsumexp(h, -1))),
    )
    yield "norm", lambda: nn.Sequential(nn.Linear(4, 16), _Function(lambda h: h.norm(dim=-1)))
    yield "std", lambda: nn.Sequential(nn.Linear(4, 16), _Function(lambda h: h.std(-1)))
    yield (
        "prod",
        lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), _Function(lambda h: (1.5 + h).prod(-1))),
    )


def _structured() -> Iterator[Case]:
    """The shapes of the benchmarks, at sizes that the referee can do."""
    from benchmarks import models

    tanh = nn.Tanh()
    yield Case("tanh net 50-100-100-1", lambda: net(tanh, 50, 100, 100, 1), normal(8, 50))
    yield Case("tanh net 10-32-1", lambda: net(tanh, 10, 32, 1), normal(32, 10))
    yield Case("tanh net 3-64-64-64-64-1", lambda: net(tanh, 3, 64, 64, 64, 64, 1), normal(32, 3))
    yield Case("tanh net 20-64-8-64-1", lambda: net(tanh, 20, 64, 8, 64, 1), normal(16, 20))
    yield Case("8 tanh layers of 32", lambda: net(tanh, 8, *[32] * 8, 1), normal(16, 8))
    yield Case("deep set", lambda: models.DeepSet(4, 16).double(), normal(8, 6, 4), 2)
    yield Case("pair energy", lambda: models.PairwiseEnergy(5, 16).double(), normal(8, 5, 3), 2)
    yield Case("generalized linear model", lambda: models.Glm(20, 60).double(), normal(16, 20))
    yield Case("attention block", lambda: models.AttentionBlock(8).double(), normal(4, 4, 8), 2)
    yield Case(
        "convolutions",
        lambda: nn.Sequential(
            nn.Conv1d(2, 6, 3, padding=1), nn.SiLU(), nn.Conv1d(6, 6, 3, padding=1), nn.Tanh(),
            nn.AvgPool1d(2), nn.Flatten(), nn.Linear(24, 1),
        ).double(),
        normal(8, 2, 8), 2,
    )  # fmt: skip
    yield Case(
        "slogdet",
        lambda: lambda x: torch.linalg.slogdet(x + 4 * torch.eye(4, dtype=x.dtype))[1],
        normal(8, 4, 4),
        2,
    )
    yield Case(
        "solve",
        lambda: (
            lambda x: torch.linalg.solve(x + 4 * torch.eye(4, dtype=x.dtype), x.sum(-1)).sum(-1)
        ),
        normal(8, 4, 4),
        2,
    )
    yield Case(
        "FFT", lambda: lambda x: torch.fft.rfft(torch.sin(x)).abs().square().sum(-1), normal(16, 8)
    )
    yield Case(
        "softmax, nearly one-hot",
        lambda: lambda x: (torch.softmax(4 * x, -1) * x).square().sum(-1),
        normal(32, 6, scale=3.0),
    )
    yield Case("log-softmax, nearly one-hot", lambda: _log_likelihoods, normal(32, 6, scale=3.0))
    yield Case("tanh net at 20 sigma", lambda: net(tanh, 4, 16, 1), normal(32, 4, scale=20.0))
    yield Case(
        "softplus net at 20 sigma", lambda: net(nn.Softplus(), 4, 16, 1), normal(32, 4, scale=20.0)
    )


def _log_likelihoods(x: torch.Tensor) -> torch.Tensor:
    return (torch.log_softmax(4 * x, -1) * x.sigmoid()).sum(-1)


def cases() -> list[Case]:
    """All cases but the zoo's."""
    found = [
        Case(f"{name} net", lambda a=a: net(a, 4, 16, 16, 1), normal(32, 4))  # type: ignore[misc]
        for name, a in ACTIVATIONS.items()
    ]
    found += [
        Case(f"{name} net", lambda f=f: net(_Function(f), 4, 16, 16, 1), normal(32, 4))  # type: ignore[misc]
        for name, f in POINTWISE.items()
    ]
    found += [Case(name, lambda m=m: m().double(), normal(32, 4)) for name, m in _normalizations()]  # type: ignore[misc]
    return [*found, *_structured()]


def zoo() -> Iterator[Case]:
    """The zoo's models, on data near the zoo's own."""
    from zoo import table

    for family, case in table():

        def draw(seed: int, case: Any = case) -> torch.Tensor:
            x = case.draw()
            generator = torch.Generator().manual_seed(seed)
            return x * (1 + 0.1 * torch.randn(x.shape, generator=generator, dtype=x.dtype))

        yield Case(f"{family}: {case.name}", case.model, draw, len(case.event))


# --- the command ----------------------------------------------------------------------------------


def report(rows: list[Errors], samples: int = SAMPLES) -> str:
    known = [r for r in rows if r.theirs is not None]
    smaller = sum(r.ours[0] <= r.theirs[0] for r in known if r.theirs is not None)
    lines = [
        "# Float32 errors",
        "",
        f"Written by `python -m tests.precision --write docs/precision.md`, PyTorch"
        f" {torch.__version__.split('+')[0]}, CPU. Errors of Hessians in float32 against double"
        " backward in float64, relative to the largest entry: median and largest, of at least"
        f" {samples} samples where `vmap(hessian)` has them, {FEW} elsewhere. Of {len(rows)} cases"
        f" it does {len(known)}; the median of fxhess is the smaller one in {smaller} of them;"
        " it is worse by the bounds of `tests/precision.py`"
        f" (a median above {MEDIAN} times, or a largest error above {LARGEST:g} times the rival's)"
        f" in {sum(r.worse for r in known)}.",
        "",
        "| case | fxhess, median | largest | vmap(hessian), median | largest | ratio of medians |",
        "| --- | --- | --- | --- | --- | --- |",
        *[r.row() for r in rows],
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--write", type=Path, help="keep the table as Markdown")
    parser.add_argument("--no-zoo", action="store_true", help="leave the zoo's models out")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="of each case, at least")
    parser.add_argument("-k", nargs="*", default=[""], help="only cases with one in their name")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    for case in [*cases(), *(() if options.no_zoo else zoo())]:
        if any(k in case.name for k in options.k):
            try:
                rows.append(measure(case, options.samples))
            except Exception as error:
                print(f"| {case.name} | {type(error).__name__}: {str(error)[:100]}", flush=True)
                continue
            print(rows[-1].row(), flush=True)
    text = report(rows, options.samples)
    print(text.split("\n\n")[1])
    if options.write:
        options.write.parent.mkdir(exist_ok=True)
        options.write.write_text(text)
    return int(any(r.worse for r in rows))


if __name__ == "__main__":
    sys.exit(main())
