"""Error bars for a network: Laplace's approximation of the posterior, with the exact Hessian.

    python -m examples.laplace --plot laplace.png

With independent Gaussian noise and a Gaussian prior on the weights, the posterior at its mode w* is
approximately normal (MacKay, Neural Computation 4 (1992) 448):

    w ~ N(w*, A^-1),      A = sum over data of d2 (-log p(y | x, w)) / dw dw  +  prior precision

``fxhess.transform(loss, wrt=fxhess.parameters(), reduce="sum")`` is that sum, of all weights
at once, and ``fxhess.transform(net, "gradient", wrt=fxhess.parameters())`` the Jacobian that
carries it over to predictions: var f(x) = J A^-1 J^T.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import fxhess

NOISE = 0.12  # standard deviation of the data
PRIOR = 0.3  # precision of every weight


def data(count: int = 60) -> tuple[Tensor, Tensor]:
    """Noisy values ``[count, 1]`` of a function, with a gap in the middle."""
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(count, 1, generator=generator, dtype=torch.float64) * 2.6 - 3.2
    x[count // 2 :] += 3.8
    noise = torch.randn(count, 1, generator=generator, dtype=torch.float64)
    return x, truth(x) + NOISE * noise


def truth(x: Tensor) -> Tensor:
    """The function that the data are made of."""
    return torch.sin(1.7 * x) * 0.8 + 0.25 * x


def network(width: int = 16) -> nn.Sequential:
    return nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 1)).double()


class Misfit(nn.Module):
    """-log p(y | x, w) of each point, up to a constant."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.net(x) - y).square().sum(-1) / (2 * NOISE**2)


def matrix(blocks: Mapping[str, Mapping[str, Tensor]], names: list[str]) -> Tensor:
    """Blocks ``H[a][b]: [*shape a, *shape b]`` as one matrix ``[p, p]``."""
    sizes = {a: round(blocks[a][a].numel() ** 0.5) for a in names}
    return torch.cat(
        [torch.cat([blocks[a][b].reshape(sizes[a], sizes[b]) for b in names], 1) for a in names]
    )


class Posterior:
    """The posterior of a network's weights around its mode, which they are moved to."""

    def __init__(self, net: nn.Module, x: Tensor, y: Tensor, steps: int = 300) -> None:
        self.net = net
        misfit = Misfit(net)
        self.names = [f"net.{name}" for name, _ in net.named_parameters()]
        self.derivatives = fxhess.transform(
            misfit, ("value", "gradient", "hessian"), wrt=fxhess.parameters(), reduce="sum"
        )
        self.decrease = self._climb(x, y, steps)
        self.precision = self._now(x, y)[2]
        self.factor = torch.linalg.cholesky(self.precision)  # fails unless this is a minimum
        self.jacobian = fxhess.transform(net, "gradient", wrt=fxhess.parameters())

    def _now(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-log posterior, its gradient and its Hessian by all weights."""
        with torch.no_grad():
            now = self.derivatives(x, y)
            w = parameters_to_vector(self.net.parameters())
            gradient = torch.cat([now.gradient[name].flatten() for name in self.names])
            H = matrix(now.hessian, self.names)
        value = now.value + 0.5 * PRIOR * w.square().sum()
        return value, gradient + PRIOR * w, H + PRIOR * torch.eye(len(w), dtype=w.dtype)

    def _climb(self, x: Tensor, y: Tensor, steps: int) -> float:
        """Newton's method, damped while the Hessian is indefinite; the last gradient's norm."""
        damping = 10.0
        value, g, H = self._now(x, y)
        for _ in range(steps):
            w = parameters_to_vector(self.net.parameters()).detach()
            values, vectors = torch.linalg.eigh(H)
            step = vectors @ ((vectors.T @ g) / (values.abs() + damping))
            vector_to_parameters(w - step, self.net.parameters())
            new = self._now(x, y)
            if new[0] <= value:
                value, g, H = new
                damping = damping / 3 if damping > 1e-9 else 0.0
            else:
                vector_to_parameters(w, self.net.parameters())
                damping = max(4 * damping, 1e-6)
            if g.norm() < 1e-9:
                break
        return g.norm().item()

    def predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of f at ``x: [n, 1]``, each ``[n]``."""
        with torch.no_grad():
            rows = self.jacobian(x)
            names = [name.removeprefix("net.") for name in self.names]
            J = torch.cat([rows[name].flatten(1) for name in names], 1)
            half = torch.linalg.solve_triangular(self.factor, J.T, upper=False)
            return self.net(x)[:, 0], half.square().sum(0).sqrt()

    def draws(self, x: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """f of weights drawn from the posterior, to first order around the mode: [count, n]."""
        mean, _ = self.predict(x)
        noise = torch.randn(len(self.factor), count, generator=generator, dtype=x.dtype)
        moved = torch.linalg.solve_triangular(self.factor.T, noise, upper=True)
        with torch.no_grad():
            rows = self.jacobian(x)
        J = torch.cat([rows[name.removeprefix("net.")].flatten(1) for name in self.names], 1)
        return mean + (J @ moved).T


def main(steps: int = 300, plot: str | None = None) -> Posterior:
    """Fit, print how sure it is where, and return the posterior."""
    torch.manual_seed(0)
    x, y = data()
    posterior = Posterior(network(), x, y, steps)
    eigenvalues = torch.linalg.eigvalsh(posterior.precision)
    print(f"gradient at the mode {posterior.decrease:.0e}, {len(eigenvalues)} weights,")
    print(f"precision from {eigenvalues[0]:.2g} to {eigenvalues[-1]:.2g}")
    for place in (-2.0, 0.0, 2.0, 4.5):
        mean, deviation = posterior.predict(torch.tensor([[place]], dtype=x.dtype))
        print(f"  f({place:4}) = {mean.item():6.3f} +- {deviation.item():.3f}")
    if plot:
        draw(posterior, x, y, plot)
    return posterior


def draw(posterior: Posterior, x: Tensor, y: Tensor, path: str) -> None:
    """Data, mean, two standard deviations, and some functions drawn from the posterior."""
    import matplotlib.pyplot as plt

    grid = torch.linspace(-5, 5, 400, dtype=torch.float64)[:, None]
    mean, deviation = posterior.predict(grid)
    generator = torch.Generator().manual_seed(1)
    some = posterior.draws(grid, 12, generator)
    figure, axes = plt.subplots(
        1, 2, figsize=(11, 3.6), width_ratios=(2.3, 1), layout="constrained"
    )
    g = grid[:, 0]
    total = (deviation**2 + NOISE**2).sqrt()
    axes[0].fill_between(g, mean - 2 * total, mean + 2 * total, color="#2457a8", alpha=0.12, lw=0)
    axes[0].fill_between(
        g, mean - 2 * deviation, mean + 2 * deviation, color="#2457a8", alpha=0.2, lw=0
    )
    axes[0].plot(g, some.T, color="#2457a8", lw=0.6, alpha=0.5)
    axes[0].plot(g, mean, color="#16366b", lw=2, label="network")
    axes[0].plot(g, truth(grid)[:, 0], color="k", lw=1, ls="--", label="truth")
    axes[0].scatter(x, y, s=16, color="#c4552d", zorder=3, label="data")
    axes[0].set(ylim=(-3.2, 3.2), xlim=(-5, 5), xlabel="x")
    axes[0].set_title("two standard deviations, of f and of data", fontsize=10)
    axes[0].legend(frameon=False, loc="upper left", fontsize=9)
    A = posterior.precision
    scale = A.abs().max()
    shown = A.sign() * (A.abs() / scale).clamp(min=1e-6).log10().add(6) / 6
    axes[1].imshow(shown, cmap="RdBu_r", vmin=-1, vmax=1)
    ends = torch.tensor([p.numel() for p in posterior.net.parameters()]).cumsum(0)
    for end in ends[:-1]:
        axes[1].axhline(end - 0.5, color="0.4", lw=0.5)
        axes[1].axvline(end - 0.5, color="0.4", lw=0.5)
    axes[1].set(xticks=(), yticks=())
    axes[1].set_title("Hessian of all weights (signed log)", fontsize=10)
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", help="write a picture here")
    main(plot=parser.parse_args().plot)
