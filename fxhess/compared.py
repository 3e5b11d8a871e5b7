"""``fxhess bench``: a model's Hessians beside PyTorch's own, values checked, times interleaved."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxhess.api import transform
from fxhess.clock import seconds_of
from fxhess.errors import FxhessError

_LEAST = 0.005  # seconds of one measurement; shorter calls are repeated within it
_ROUNDS = (3, 101)  # fewest and most

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Way:
    """One way to the Hessians.  ``seconds``: the median; ``fastest`` and ``slowest`` of the
    rounds; ``error``: the largest difference from ours, relative to the largest entry; ``failed``:
    why there are no times."""

    name: str
    seconds: float | None = None
    fastest: float | None = None
    slowest: float | None = None
    error: float | None = None
    failed: str = ""


@dataclass(frozen=True)
class Comparison:
    """``ways``: ours first; ``verified``: the error of ours beside double backward in float64, and
    what was allowed; ``first``: seconds of the first call, which traces and plans; ``speedup``: how
    many times ours is faster than the fastest right other; None where none ran."""

    ways: tuple[Way, ...]
    verified: float
    allowed: float
    first: float
    speedup: float | None


def compare(
    model: nn.Module | Callable[..., Any],
    x: Tensor,
    event_ndim: int,
    seconds: float,
    **options: Any,
) -> Comparison:
    """Measure for about ``seconds``; ``options`` are those of ``transform``.

    Raises:
        VerificationError: ours is wrong.
    """
    hess = transform(model, event_ndim=event_ndim, **options)
    with torch.no_grad():
        start = time.perf_counter()
        H = hess(x)
        first = time.perf_counter() - start
    checked = hess.verify(x)
    result = torch.empty_like(H)

    def alone() -> Tensor:
        with torch.no_grad():
            return hess(x)  # type: ignore[no-any-return]

    def into() -> Tensor:
        with torch.no_grad():
            return hess(x, out=result)  # type: ignore[no-any-return]

    ways: dict[str, Call] = {"fxhess": alone, "fxhess out=": into, **_others(model, x, event_ndim)}
    found: dict[str, Way] = {}
    repeats: dict[str, int] = {}
    for name, call in ways.items():
        try:
            got = call().reshape(H.shape)
            error = _error(got, H)
            taken = seconds_of(call, x.device)
        except (RuntimeError, NotImplementedError, TypeError, FxhessError) as failure:
            found[name] = Way(name, failed=f"{type(failure).__name__}: {_brief(failure)}")
            continue
        repeats[name] = 1 + int(_LEAST / max(taken, 1e-9))
        found[name] = Way(name, error=error)
    times: dict[str, list[float]] = {name: [] for name in repeats}
    order = list(repeats)
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < _ROUNDS[0] or (rounds < _ROUNDS[1] and time.perf_counter() < end):
        for name in order:
            times[name].append(seconds_of(ways[name], x.device, repeats[name]))
        order = [*order[1:], order[0]]  # nobody always follows the same one
        rounds += 1
    for name, own in times.items():
        found[name] = Way(
            name, statistics.median(own), min(own), max(own), found[name].error, found[name].failed
        )
    tolerance = 10 * checked.allowed
    right = [
        way.seconds
        for way in found.values()
        if not way.name.startswith("fxhess") and way.seconds and (way.error or 0.0) <= tolerance
    ]
    ours = found["fxhess"].seconds
    speedup = min(right) / ours if right and ours else None
    return Comparison(tuple(found.values()), checked.error, checked.allowed, first, speedup)


def _others(model: Callable[..., Any], x: Tensor, event_ndim: int) -> dict[str, Call]:
    """PyTorch's own ways, for samples in one batch axis."""

    def sample(s: Tensor) -> Tensor:
        y = model(s.reshape((1,) * (x.ndim - event_ndim) + tuple(s.shape)))
        return y.reshape(()) if y.numel() == 1 else y.reshape(y.shape[-1:])

    event = x.shape[x.ndim - event_ndim :]
    samples = x.reshape(-1, *event)
    forward_over_reverse = torch.func.vmap(torch.func.hessian(sample))
    reverse_twice = torch.func.vmap(torch.func.jacrev(torch.func.jacrev(sample)))
    return {
        "vmap(hessian)": lambda: forward_over_reverse(samples),
        "vmap(jacrev²)": lambda: reverse_twice(samples),
    }


def _error(got: Tensor, want: Tensor) -> float:
    if not want.numel():
        return 0.0
    scale = max(want.abs().max().item(), 1e-30)
    return (got.detach().double() - want.double()).abs().max().item() / scale


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:120]


__all__ = ["Comparison", "Way", "compare"]
