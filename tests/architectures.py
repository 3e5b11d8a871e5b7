"""Random models: a recipe of named steps, drawn by hypothesis and small enough to read."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

SMOOTH = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "silu": F.silu,
    "gelu": F.gelu,
    "sin": torch.sin,
    "cube": lambda h: h**3 / 4,
    "gaussian": lambda h: torch.exp(-h * h),
}
KINKED = {"relu": F.relu, "abs": torch.abs, "leaky": lambda h: F.leaky_relu(h, 0.3)}
ACTIVATIONS = {**SMOOTH, **KINKED}


@dataclass(frozen=True)
class Recipe:
    """A model of ``x: [*batch, *event]``: steps, each with a width or a name, then a head that
    gives ``[*batch]`` ("sum"), ``[*batch, 1]`` ("one") or ``[*batch, m]`` ("vector")."""

    event: tuple[int, ...]
    batch_ndim: int
    steps: tuple[tuple[str, object], ...]
    head: str
    outputs: int = 1


class Network(nn.Module):
    """The model of a recipe.  Weights are drawn at once, in order of the steps."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.weights = nn.ParameterList()
        generator = torch.Generator().manual_seed(len(recipe.steps))
        self._generator = generator
        event = list(recipe.event) or [3]
        if not recipe.event:
            self._new(3)
        for step, argument in recipe.steps:
            event = self._prepare(step, argument, event)
        self._new(recipe.outputs, math.prod(event))
        del self._generator

    def _new(self, *shape: int) -> None:
        w = torch.randn(shape, generator=self._generator, dtype=torch.float64)
        self.weights.append(nn.Parameter(w / shape[-1] ** 0.5))

    def _prepare(self, step: str, argument: object, event: list[int]) -> list[int]:
        """Draw the weights of a step; returns the event shape after it."""
        n = event[-1]
        match step, argument:
            case ("linear", int(width)):
                self._new(width, n)
                self._new(width)
                return [*event[:-1], width]
            case ("merged linear", int(width)):
                self._new(width, n)
                return [*event[:-1], width]
            case ("residual" | "shared", _):
                self._new(n, n)
            case ("gate", _):
                self._new(n, n)
                self._new(n, n)
            case ("affine norm", _):
                self._new(n)
                self._new(n)
            case ("concatenate", _):
                return [*event[:-1], 2 * n]
            case ("transpose", _):
                return [*event[:-2], *event[-2:][::-1]]
            case ("flatten", _):
                return [math.prod(event)]
            case ("sum", _) if len(event) > 1:
                return event[:-1]
            case ("narrow", _):
                return [*event[:-1], (n + 1) // 2]
        return event

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        nb = self.recipe.batch_ndim
        weights = iter(self.weights)
        h = x if self.recipe.event else x.unsqueeze(-1) * next(weights)
        for step, argument in self.recipe.steps:
            h = self._step(h, step, argument, weights, nb)
        h = F.linear(h.flatten(nb), next(weights))
        return h.sum(-1) if self.recipe.head == "sum" else h

    def _step(self, h, step, argument, weights, nb):
        match step:
            case "activation":
                return ACTIVATIONS[argument](h)
            case "linear":
                return F.linear(h, next(weights), next(weights))
            case "merged linear":  # batch and event axes in one
                flat = h.reshape(-1, h.shape[-1]) @ next(weights).T
                return flat.reshape(*h.shape[:-1], -1) if h.numel() else F.linear(
                    h, flat.new_zeros(argument, h.shape[-1])
                )  # fmt: skip
            case "residual":
                return h + torch.tanh(h @ next(weights))
            case "shared":
                w = next(weights)
                return torch.tanh(torch.tanh(h @ w) @ w)
            case "gate":
                return torch.sigmoid(h @ next(weights)) * (h @ next(weights))
            case "affine norm":
                return F.layer_norm(h, h.shape[-1:], next(weights), next(weights), eps=0.1)
            case "softmax":
                return torch.softmax(h, -1)
            case "concatenate":
                return torch.cat([torch.sin(h), h], -1)
            case "transpose":
                return h.transpose(-1, -2) if h.ndim - nb > 1 else h
            case "batch last":  # a layout with the batch behind, and back
                return torch.tanh(h.movedim(0, -1)).movedim(-1, 0) if nb else torch.tanh(h)
            case "flatten":
                return h.flatten(nb)
            case "sum":
                return h.sum(-1) if h.ndim - nb > 1 else h
            case "mean square":
                return h * (h * h).mean(-1, keepdim=True)
            case "narrow":
                return h[..., ::2]
            case "norm":
                return h / (1 + h.square().sum(-1, keepdim=True)).sqrt()
        raise AssertionError(step)


def steps(activations: list[str]) -> st.SearchStrategy[tuple[str, object]]:
    width = st.integers(1, 4)
    plain = [
        "residual", "shared", "gate", "affine norm", "softmax", "concatenate", "transpose",
        "batch last", "flatten", "sum", "mean square", "narrow", "norm",
    ]  # fmt: skip
    return st.one_of(
        st.tuples(st.just("activation"), st.sampled_from(activations)),
        st.tuples(st.sampled_from(["linear", "merged linear"]), width),
        st.tuples(st.sampled_from(plain), st.none()),
    )


@st.composite
def recipes(
    draw: st.DrawFn, activations: tuple[str, ...] = tuple(ACTIVATIONS), max_steps: int = 5
) -> Recipe:
    event = tuple(draw(st.lists(st.integers(1, 3), max_size=3)))
    batch_ndim = draw(st.integers(0, 3))
    chosen = tuple(draw(st.lists(steps(list(activations)), min_size=1, max_size=max_steps)))
    head = draw(st.sampled_from(["sum", "one", "vector"]))
    outputs = draw(st.integers(2, 3)) if head == "vector" else (1 if head == "one" else 2)
    return Recipe(event, batch_ndim, chosen, head, outputs)


@st.composite
def cases(
    draw: st.DrawFn, activations: tuple[str, ...] = tuple(ACTIVATIONS), max_batch: int = 5
) -> tuple[Recipe, tuple[int, ...]]:
    """A recipe and batch sizes: up to ``max_batch`` on the first axis, up to 2 on the others."""
    recipe = draw(recipes(activations))
    sizes = [draw(st.integers(0, max_batch if i == 0 else 2)) for i in range(recipe.batch_ndim)]
    return recipe, tuple(sizes)
