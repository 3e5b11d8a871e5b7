"""A physics-informed network: Poisson's equation on the unit square, trained on its Laplacian.

    python -m examples.poisson_pinn --plot pinn.png

    -(u_xx + u_yy) = f inside,  u = g on the boundary;      here with a solution that is known:
    u* = sin(pi x) sin(pi y) + sin(3 pi x) sin(2 pi y) / 3

``fxhess.transform(u, ("value", "laplacian"))`` gives both numbers of a point in one pass, and one
backward through them gives the gradient of the loss.  (Raissi, Perdikaris and Karniadakis, Journal
of Computational Physics 378 (2019) 686.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, vmap
from tqdm import trange

import fxhess
from examples import pictures, timing

MODES = ((1, 1, 1.0), (3, 2, 1 / 3))  # of the solution: waves along x and y, height
EVERY = 20  # steps of training, the history has an entry


def solution(x: Tensor) -> Tensor:
    """u* at ``x: [*batch, 2]``."""
    waves = ((x * x.new_tensor([a, b]) * math.pi).sin().prod(-1) * c for a, b, c in MODES)
    return sum(waves, x.new_zeros(()))


def source(x: Tensor) -> Tensor:
    """f = -(u*_xx + u*_yy)."""
    terms = (
        (x * x.new_tensor([a, b]) * math.pi).sin().prod(-1) * (c * (a * a + b * b) * math.pi**2)
        for a, b, c in MODES
    )
    return sum(terms, x.new_zeros(()))


def network(width: int = 64, depth: int = 4) -> nn.Sequential:
    """A tanh network of a point."""
    sizes = [2, *[width] * depth]
    layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(width, 1))


def misfit(laplacian: Tensor, value: Tensor, inside: Tensor, edge: Tensor) -> Tensor:
    """Mean squares of the equation's error inside and of the value's on the edge, weighted."""
    equation = laplacian + source(inside)
    boundary = value - solution(edge)
    return equation.square().mean() / 100 + 10 * boundary.square().mean()


class Residual(nn.Module):
    """The loss of a network, which it trains."""

    def __init__(self, u: nn.Module, compiled: bool = False) -> None:
        super().__init__()
        self.net = u
        self.u = fxhess.transform(u, ("value", "laplacian"), compile=compiled)

    def forward(self, inside: Tensor, edge: Tensor) -> Tensor:
        u = self.u(torch.cat([inside, edge]))  # both kinds of points in one pass
        return misfit(u.laplacian[: len(inside)], u.value[len(inside) :], inside, edge)


def by_loops(net: nn.Module, inside: Tensor, edge: Tensor) -> Tensor:
    """The same loss by autograd: one more backward for each coordinate."""
    x = torch.cat([inside, edge]).requires_grad_()
    value = net(x)[:, 0]
    (g,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    laplacian = sum(
        torch.autograd.grad(g[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2)
    )
    return misfit(laplacian[: len(inside)], value[len(inside) :], inside, edge)


def by_func(net: nn.Module, inside: Tensor, edge: Tensor) -> Tensor:
    """The same loss by ``torch.func``."""
    weights = dict(net.named_parameters())
    H = vmap(hessian(lambda s: functional_call(net, weights, (s,))[0]))(inside)
    return misfit(H.diagonal(dim1=-2, dim2=-1).sum(-1), net(edge)[:, 0], inside, edge)


def points(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random points ``[count, 2]`` inside, and a quarter as many on the boundary."""
    inside = torch.rand(count, 2, generator=generator)
    edge = torch.rand(count // 4, 2, generator=generator)
    side = torch.randint(4, (len(edge),), generator=generator)
    edge[torch.arange(len(edge)), side // 2] = (side % 2).to(edge.dtype)
    return inside, edge


def on_grid(u: Callable[[Tensor], Tensor], side: int = 101) -> Tensor:
    """Values of u on a grid over the square: ``[side, side]``, rows along y."""
    line = torch.linspace(0, 1, side)
    mesh = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)
    with torch.no_grad():
        return u(mesh).reshape(side, side)


def relative(found: Tensor, known: Tensor) -> float:
    """|found - known| / |known|."""
    return ((found - known).norm() / known.norm()).item()


def train(
    loss: Residual, count: int, steps: int, generator: torch.Generator
) -> dict[str, list[float]]:
    """Adam on fresh points at every step; the loss and the relative error of u on the way."""
    optimizer = torch.optim.Adam(loss.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=max(steps, 4))
    history: dict[str, list[float]] = {"loss": [], "error": []}
    known = on_grid(solution)
    progress = trange(steps, desc="training", unit="step", disable=steps < 100)
    for step in progress:
        optimizer.zero_grad()
        value = loss(*points(count, generator))
        value.backward()
        optimizer.step()
        schedule.step()
        if step % EVERY == 0:
            history["loss"].append(value.item())
            history["error"].append(relative(on_grid(loss.net), known))
            progress.set_postfix(loss=f"{history['loss'][-1]:.1e}")
    return history


def main(
    steps: int = 3000, count: int = 2048, rounds: int = 20, plot: str | None = None,
    compiled: bool = False,
) -> tuple[float, dict[str, float]]:  # fmt: skip
    """Train for ``steps`` steps on ``count`` points each; returns the relative error of u and the
    seconds a step takes in each way."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    net = network()
    loss = Residual(net, compiled)
    batch = points(count, generator)
    seconds = timing.compare(
        {
            "fxhess": lambda: loss(*batch),
            "vmap(hessian)": lambda: by_func(net, *batch),
            "backward twice": lambda: by_loops(net, *batch),
        },
        list(net.parameters()), rounds, 1e-4,
    )  # fmt: skip
    timing.show(seconds)
    history = train(loss, count, steps, generator)
    found, known = on_grid(net), on_grid(solution)
    error = relative(found, known)
    print(f"relative error of u after {steps} steps: {error:.1e}")
    if plot:
        draw(found, known, history, seconds, plot)
    return error, seconds


def draw(
    found: Tensor, known: Tensor, history: dict[str, list[float]], seconds: dict[str, float],
    path: str,
) -> None:  # fmt: skip
    """The solution, its error, how training went, and the times."""
    with pictures.sheet(path, (9, 7.4), [["u", "error"], ["loss", "times"]]) as (figure, axes):
        extent = (0, 1, 0, 1)
        shown = {"origin": "lower", "extent": extent, "interpolation": "bilinear"}
        image = axes["u"].imshow(found, cmap="RdBu_r", vmin=-1.3, vmax=1.3, **shown)
        axes["u"].contour(known, levels=9, extent=extent, colors="0.15", linewidths=0.6)
        axes["u"].set_title("u of the network; lines: exact u*")
        figure.colorbar(image, ax=axes["u"], shrink=0.9)
        off = 1e3 * (found - known)
        most = off.abs().max().item()
        image = axes["error"].imshow(off, cmap="PuOr", vmin=-most, vmax=most, **shown)
        axes["error"].set_title("error, 1000 (u - u*)")
        figure.colorbar(image, ax=axes["error"], shrink=0.9)
        for name in ("u", "error"):
            axes[name].set(xlabel="x", ylabel="y", xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
        every = EVERY * torch.arange(len(history["loss"]))
        axes["loss"].semilogy(every, history["loss"], color=pictures.VERMILION, label="loss")
        axes["loss"].semilogy(
            every, history["error"], color=pictures.BLUE, ls="--", label="relative error of u"
        )
        axes["loss"].set(xlabel="training step")
        axes["loss"].set_title("training")
        axes["loss"].grid(alpha=0.3)
        axes["loss"].legend()
        pictures.bars(axes["times"], seconds)


if __name__ == "__main__":
    parser = pictures.parser("poisson_pinn", __doc__)
    parser.add_argument("--steps", type=int, default=3000, help="of training (3000)")
    parser.add_argument("--compile", action="store_true", help="through torch.compile")
    given = parser.parse_args()
    main(given.steps, plot=given.plot, compiled=given.compile)
