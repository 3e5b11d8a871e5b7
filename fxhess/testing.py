"""Checking rules, for this package's tests and for anyone who writes a rule.

A :class:`Sample` is a small function that uses an operator.  :func:`check_sample` builds models
around it so that first form, second form and both structured and dense tangents are exercised,
and compares with double backward of one sample at a time in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from fxhess import oracle
from fxhess.errors import RuleError


@dataclass(frozen=True)
class Sample:
    """A use of an operator: ``function`` maps ``x: [B, *event]`` to ``[B, ...]`` of any shape; with
    ``batch`` None, for operators that know no batch axis, one sample ``[*event]`` to any shape.

    ``make`` draws x (default: standard normal) given a torch.Generator and a shape.
    ``twice``: whether to also compose the operator with itself-independent nonlinear functions
    before it (false for functions of a bounded domain; ``make`` then has to draw inside it).
    ``reference``: another form of the same function, for the referee, where PyTorch cannot
    differentiate ``function`` itself twice.
    """

    name: str
    function: Callable[[torch.Tensor], torch.Tensor]
    event: tuple[int, ...] = (4,)
    batch: int | None = 3
    make: Callable[..., torch.Tensor] | None = None
    twice: bool = True
    tolerance: float = 1e-9
    reference: Callable[[torch.Tensor], torch.Tensor] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.event if self.batch is None else (self.batch, *self.event)

    def draw(self, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        if self.make is not None:
            return self.make(self.shape, generator)
        return torch.randn(self.shape, generator=generator, dtype=torch.float64)


def uniform(low: float, high: float) -> Callable[..., torch.Tensor]:
    """Draw from [low, high), for functions of a bounded domain."""

    def make(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)

    return make


def models(sample: Sample, seed: int) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Scalar models around the sample: plain, followed by a nonlinear function, and between this
    and one that makes the tangents dense.  The second uses all of a rule, the third all but its
    axes, which dense tangents do not ask for."""
    generator = torch.Generator().manual_seed(seed + 1)
    y = sample.function(sample.draw(seed))
    nb = 0 if sample.batch is None else 1
    weight = torch.randn(y.shape[nb:], generator=generator, dtype=torch.float64)
    n = math.prod(sample.event)
    mix = torch.randn(n, n, generator=generator, dtype=torch.float64) / n**0.5

    def total(y: torch.Tensor) -> torch.Tensor:
        weighted = y * weight
        return weighted.sum(tuple(range(nb, y.ndim))) if y.ndim > nb else weighted

    def dense(x: torch.Tensor) -> torch.Tensor:
        return (torch.tanh(x.flatten(nb)) @ mix).reshape(x.shape)

    yield "plain", lambda x: total(sample.function(x))
    yield "then sin", lambda x: total(torch.sin(sample.function(x)))
    if sample.twice:
        yield (
            "between a dense layer and sin",
            lambda x: total(torch.sin(sample.function(dense(x)))),
        )


def check_sample(sample: Sample, seed: int = 0, turn: int | None = None) -> None:
    """Compare fxhess with the oracle on the models around ``sample``; with ``turn``, on a single
    one: the second where that is even, the last where it is odd.

    Raises:
        RuleError: a Hessian or gradient differs by more than ``sample.tolerance`` (relative to
            the largest entry), is not finite where the oracle is, or is not exactly symmetric.
    """
    from fxhess.api import transform

    x = sample.draw(seed)
    event_ndim = len(sample.event)
    plain = replace(sample, function=sample.reference or sample.function)
    pairs = list(zip(models(sample, seed), models(plain, seed), strict=True))
    if turn is not None:
        pairs = [pairs[1 + turn % (len(pairs) - 1)]]
    for (name, model), (_, referee) in pairs:
        got = transform(model, ("value", "gradient", "hessian"), event_ndim=event_ndim)(x)
        label = f"{sample.name} ({name})"
        _compare(f"{label}: value", got.value, referee(x), sample.tolerance)
        _compare(
            f"{label}: gradient",
            got.gradient,
            oracle.gradient(referee, x, event_ndim),
            sample.tolerance,
        )
        expected = oracle.hessian(referee, x, event_ndim)
        _compare(f"{label}: hessian", got.hessian, expected, sample.tolerance)
        n = math.prod(sample.event)
        square = got.hessian.reshape(-1, n, n)
        if not torch.equal(square, square.mT):
            raise RuleError(f"{label}: the Hessian is not exactly symmetric")


def check_rule(
    function: Callable[[torch.Tensor], torch.Tensor],
    event: tuple[int, ...] = (4,),
    *,
    batch: int = 3,
    make: Callable[..., torch.Tensor] | None = None,
    tolerance: float = 1e-9,
    seeds: int = 3,
) -> None:
    """Check the rule of whatever operators ``function`` uses, on fresh random data.

    ``function`` maps ``[batch, *event]`` to ``[batch, ...]``, sample by sample.

    Example:
        >>> fxhess.testing.check_rule(torch.tanh)

    Raises:
        RuleError: the result differs from double backward in float64.
    """
    name = getattr(function, "__name__", "function")
    sample = Sample(name, function, event, batch, make, tolerance=tolerance)
    for seed in range(seeds):
        check_sample(sample, seed)


def _compare(what: str, got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    if got.shape != want.shape:
        raise RuleError(f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}")
    error = (got - want).abs().max().item() if got.numel() else 0.0
    scale = max(1.0, want.abs().max().item() if want.numel() else 0.0)
    if not error <= tolerance * scale:
        raise RuleError(f"{what}: off by {error:.3g} where entries reach {scale:.3g}")
