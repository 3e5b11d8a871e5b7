"""A physics-informed network: Poisson's equation on the unit square, trained on its Laplacian.

    python -m examples.poisson_pinn --plot pinn.png

    -(u_xx + u_yy) = f inside,  u = g on the boundary;      here with a solution that is known:
    u* = sin(pi x) sin(pi y) + sin(3 pi x) sin(2 pi y) / 3

``fxhess.transform(u, ("value", "laplacian"))`` gives both numbers of a point in one pass, and one
backward through them gives the gradient of the loss.  (Raissi, Perdikaris and Karniadakis, Journal
of Computational Physics 378 (2019) 686.)
"""

from __future__ import annotations

import argparse
import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, vmap
from tqdm import trange

import fxhess
from examples import timing

MODES = ((1, 1, 1.0), (3, 2, 1 / 3))  # of the solution: waves along x and y, height


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


class Residual(nn.Module):
    """The loss of a network: mean squares of the equation's and of the boundary's error."""

    def __init__(self, u: nn.Module, compiled: bool = False) -> None:
        super().__init__()
        self.u = fxhess.transform(u, ("value", "laplacian"), compile=compiled)

    def forward(self, inside: Tensor, edge: Tensor) -> Tensor:
        u = self.u(torch.cat([inside, edge]))  # both kinds of points in one pass
        equation = u.laplacian[: len(inside)] + source(inside)
        boundary = u.value[len(inside) :] - solution(edge)
        return equation.square().mean() / 100 + 10 * boundary.square().mean()


def by_loops(net: nn.Module, inside: Tensor, edge: Tensor) -> Tensor:
    """The same loss by autograd: one more backward for each coordinate."""
    x = torch.cat([inside, edge]).requires_grad_()
    value = net(x)[:, 0]
    (g,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    laplacian = sum(
        torch.autograd.grad(g[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2)
    )
    equation = laplacian[: len(inside)] + source(inside)
    boundary = value[len(inside) :] - solution(edge)
    return equation.square().mean() / 100 + 10 * boundary.square().mean()


def by_func(net: nn.Module, inside: Tensor, edge: Tensor) -> Tensor:
    """The same loss by ``torch.func``."""
    weights = dict(net.named_parameters())
    H = vmap(hessian(lambda s: functional_call(net, weights, (s,))[0]))(inside)
    equation = H.diagonal(dim1=-2, dim2=-1).sum(-1) + source(inside)
    boundary = net(edge)[:, 0] - solution(edge)
    return equation.square().mean() / 100 + 10 * boundary.square().mean()


def points(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random points ``[count, 2]`` inside, and a quarter as many on the boundary."""
    inside = torch.rand(count, 2, generator=generator)
    edge = torch.rand(count // 4, 2, generator=generator)
    side = torch.randint(4, (len(edge),), generator=generator)
    edge[torch.arange(len(edge)), side // 2] = (side % 2).to(edge.dtype)
    return inside, edge


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
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=max(steps, 4))
    losses = []
    progress = trange(steps, desc="training", unit="step", disable=steps < 100)
    for step in progress:
        optimizer.zero_grad()
        value = loss(*points(count, generator))
        value.backward()
        optimizer.step()
        schedule.step()
        losses.append(value.item())
        if step % 50 == 0:
            progress.set_postfix(loss=f"{losses[-1]:.1e}")
    grid = torch.linspace(0, 1, 101)
    mesh = torch.stack(torch.meshgrid(grid, grid, indexing="xy"), -1)
    with torch.no_grad():
        found, known = net(mesh)[..., 0], solution(mesh)
    error = ((found - known).norm() / known.norm()).item()
    print(f"relative error of u after {steps} steps: {error:.1e}")
    if plot:
        draw(found, known, losses, seconds, plot)
    return error, seconds


def draw(
    found: Tensor, known: Tensor, losses: list[float], seconds: dict[str, float], path: str
) -> None:
    """The solution, its error, the loss, and the times."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, 4, figsize=(13, 3.1), width_ratios=(1, 1, 1.1, 0.9), layout="constrained"
    )
    extent = (0, 1, 0, 1)
    image = axes[0].imshow(found, origin="lower", extent=extent, cmap="RdBu_r", vmin=-1.3, vmax=1.3)
    axes[0].contour(known, levels=9, extent=extent, colors="0.2", linewidths=0.5)
    axes[0].set_title("network, and contours of u*", fontsize=10)
    figure.colorbar(image, ax=axes[0], shrink=0.85)
    image = axes[1].imshow(found - known, origin="lower", extent=extent, cmap="PuOr")
    axes[1].set_title("error", fontsize=10)
    bar = figure.colorbar(image, ax=axes[1], shrink=0.85)
    bar.formatter.set_powerlimits((0, 0))
    smooth = torch.tensor(losses).unfold(0, min(25, len(losses)), 5).median(-1).values
    axes[2].semilogy(torch.arange(len(smooth)) * 5, smooth, color="#2457a8")
    axes[2].set_title("loss", fontsize=10)
    axes[2].set_xlabel("step")
    axes[2].grid(alpha=0.3)
    names = list(seconds)[::-1]
    times = [seconds[n] * 1e3 for n in names]
    axes[3].barh(names, times, color=["0.7"] * (len(names) - 1) + ["#2457a8"])
    for k, t in enumerate(times):
        axes[3].text(t, k, f" {t:.1f}", va="center", fontsize=9)
    axes[3].set_title("ms a training step", fontsize=10)
    axes[3].set_xlim(0, max(times) * 1.2)
    axes[3].spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--plot", help="write a picture here")
    parser.add_argument("--compile", action="store_true", help="through torch.compile")
    given = parser.parse_args()
    main(given.steps, plot=given.plot, compiled=given.compile)
