"""A density learned from samples alone, by exact score matching on the diagonal of a Hessian.

    python -m examples.score_matching --plot score.png

A network gives log p up to a constant.  Its score ``s = grad log p`` is fitted to the data's
without ever knowing that, by the identity of A. Hyvarinen (Journal of Machine Learning Research 6
(2005) 695):

    E |s - s_data|^2 / 2  =  E [ |s|^2 / 2  +  sum_i d2 log p / dx_i^2 ]  +  a constant

Both terms come from one pass of ``fxhess.transform(log_p, ("gradient", "diagonal"))``: no random
projections, no estimate.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, vmap
from tqdm import trange

import fxhess
from examples import pictures, timing


class LogDensity(nn.Module):
    """log p of ``x: [*batch, 2]``, up to a constant: a network in a wide bowl."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)[..., 0] - x.square().sum(-1) / 8


def spirals(count: int, generator: torch.Generator) -> Tensor:
    """Samples ``[count, 2]`` of two arms that wind around each other."""
    turn = torch.rand(count, generator=generator).sqrt() * 2.4 * math.pi + 0.6
    arm = torch.randint(2, (count,), generator=generator) * math.pi
    x = torch.stack([torch.cos(turn + arm), torch.sin(turn + arm)], -1) * turn[:, None] * 0.33
    return x + 0.16 * torch.randn(count, 2, generator=generator)


class Score(nn.Module):
    """The loss of a model of log p."""

    def __init__(self, log_p: nn.Module, compiled: bool = False) -> None:
        super().__init__()
        self.of = fxhess.transform(log_p, ("gradient", "diagonal"), compile=compiled)

    def forward(self, x: Tensor) -> Tensor:
        p = self.of(x)
        return (0.5 * p.gradient.square() + p.diagonal).sum(-1).mean()


def by_loops(log_p: nn.Module, x: Tensor) -> Tensor:
    """The same by autograd: one more backward for each coordinate."""
    x = x.detach().requires_grad_()
    (s,) = torch.autograd.grad(log_p(x).sum(), x, create_graph=True)
    rows = [torch.autograd.grad(s[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2)]
    return (0.5 * s.square().sum(-1) + sum(rows)).mean()


def by_func(log_p: nn.Module, x: Tensor) -> Tensor:
    """The same by ``torch.func``."""
    weights = dict(log_p.named_parameters())

    def function(s: Tensor) -> Tensor:
        return functional_call(log_p, weights, (s,))

    trace = vmap(hessian(function))(x).diagonal(dim1=-2, dim2=-1).sum(-1)
    return (0.5 * vmap(grad(function))(x).square().sum(-1) + trace).mean()


def langevin(
    score: nn.Module, count: int, steps: int, generator: torch.Generator, step: float = 0.01
) -> Tensor:
    """Samples of the model: random walks that follow the score."""
    x = 2 * torch.randn(count, 2, generator=generator)
    with torch.no_grad():
        for k in range(steps):
            noise = torch.randn(x.shape, generator=generator) if k < steps - 1 else 0.0
            x = x + step * score(x) + math.sqrt(2 * step) * noise
    return x


def main(
    steps: int = 4000, count: int = 1024, rounds: int = 20, plot: str | None = None,
    compiled: bool = False,
) -> tuple[list[float], dict[str, float]]:  # fmt: skip
    """Train for ``steps`` steps on ``count`` samples each; returns the losses and the seconds a
    step takes in each way."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    log_p = LogDensity()
    loss = Score(log_p, compiled)
    x = spirals(count, generator)
    seconds = timing.compare(
        {
            "fxhess": lambda: loss(x),
            "vmap(hessian)": lambda: by_func(log_p, x),
            "backward twice": lambda: by_loops(log_p, x),
        },
        list(log_p.parameters()), rounds, 1e-4,
    )  # fmt: skip
    timing.show(seconds)
    optimizer = torch.optim.Adam(log_p.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=max(steps, 4))
    losses = []
    progress = trange(steps, desc="training", unit="step", disable=steps < 100)
    for step in progress:
        optimizer.zero_grad()
        value = loss(spirals(count, generator))
        value.backward()
        optimizer.step()
        schedule.step()
        losses.append(value.item())
        if step % 50 == 0:
            progress.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.2f}")
    if plot:
        draw(log_p, seconds, plot, generator)
    return losses, seconds


def draw(
    log_p: nn.Module, seconds: dict[str, float], path: str, generator: torch.Generator
) -> None:  # fmt: skip
    """Data, the learned density with its score, samples of it, and the times."""
    side = torch.linspace(-3, 3, 161)
    mesh = torch.stack(torch.meshgrid(side, side, indexing="xy"), -1)
    score = fxhess.transform(log_p, "gradient")
    coarse = mesh[4::8, 4::8]
    with torch.no_grad():
        density = (log_p(mesh) - log_p(mesh).max()).exp()
        arrows = score(coarse)
    arrows = arrows / (1 + arrows.norm(dim=-1, keepdim=True))
    walked = langevin(score, 1500, 2000, generator)
    with pictures.sheet(path, (9, 7.6), [["data", "density"], ["times", "drawn"]]) as (_, axes):
        dots = {"s": 5, "alpha": 0.7, "lw": 0}
        axes["data"].scatter(*spirals(1500, generator).T, color=pictures.BLUE, **dots)
        axes["data"].set_title("samples given (1500 shown)")
        axes["density"].imshow(
            density, origin="lower", extent=(-3, 3, -3, 3), cmap="magma", vmax=0.9
        )
        axes["density"].quiver(
            *coarse.movedim(-1, 0), *arrows.movedim(-1, 0), color="w", alpha=0.65, scale=28,
            width=0.004,
        )  # fmt: skip
        axes["density"].set_title("density learned; arrows: its score")
        axes["drawn"].scatter(*walked.T, color=pictures.VERMILION, **dots)
        axes["drawn"].set_title("samples drawn from the model")
        for name in ("data", "density", "drawn"):
            axes[name].set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal", xlabel="x\u2081")
            axes[name].set(ylabel="x\u2082", xticks=range(-3, 4), yticks=range(-3, 4))
        pictures.bars(axes["times"], seconds)


if __name__ == "__main__":
    parser = pictures.parser("score_matching", __doc__)
    parser.add_argument("--steps", type=int, default=4000, help="of training (4000)")
    parser.add_argument("--compile", action="store_true", help="through torch.compile")
    given = parser.parse_args()
    main(given.steps, plot=given.plot, compiled=given.compile)
