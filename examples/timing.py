"""The step time of several ways to the same numbers, measured side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

Step = Callable[[], Tensor]  # gives the loss


def gradients(loss: Step, parameters: Sequence[nn.Parameter]) -> Tensor:
    """The loss and its gradient, in one vector."""
    value = loss()
    found = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([value.detach().reshape(1), *(g.flatten() for g in found)])


def compare(
    ways: Mapping[str, Step], parameters: Sequence[nn.Parameter], rounds: int, tolerance: float
) -> dict[str, float]:
    """Median seconds of a step (loss and gradient) in each of the ways, in turn, ``rounds`` times
    after one to warm up; all have to agree with the last one.

    Raises:
        ArithmeticError: they do not.
    """
    results = {name: gradients(way, parameters) for name, way in ways.items()}
    reference = list(results.values())[-1]
    for name, result in results.items():
        error = ((result - reference).abs().max() / reference.abs().max()).item()
        if error > tolerance:
            raise ArithmeticError(f"{name} is off by {error:.1e} of the largest entry")
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            gradients(way, parameters)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def show(seconds: Mapping[str, float]) -> None:
    """Print the times, and how many times that of the first one they are."""
    first = next(iter(seconds.values()))
    for name, time_ in seconds.items():
        print(f"  {name:<24}{time_ * 1e3:8.2f} ms a step{time_ / first:7.2f}x")
