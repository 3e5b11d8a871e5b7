"""Error bars for a network: Laplace's approximation of the posterior, with the exact Hessian.

    python -m examples.laplace --plot laplace.png

With independent Gaussian noise and a Gaussian prior on the weights, the posterior at its mode w* is
approximately normal (MacKay, Neural Computation 4 (1992) 448):

    w ~ N(w*, A^-1),      A = sum over data of d2 (-log p(y | x, w)) / dw dw  +  prior precision

``fxhess.transform(loss, wrt=fxhess.parameters(), reduce="sum")`` is that sum, of all weights
at once, and ``fxhess.transform(net, "gradient", wrt=fxhess.parameters())`` the Jacobian that
carries it over to predictions: var f(x) = J A^-1 J^T.  The determinant of A gives the evidence,
the probability of the data under the prior, by which the prior's strength is chosen:

    log p(y)  =  log p(y | w*) + log p(w*) + (log det 2 pi - log det A) / 2
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import fxhess
from examples import pictures
from examples.newton import restricted

NOISE = 0.12  # standard deviation of the data
PRIOR = 1.0  # precision of every weight, where nothing else is said


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
    """-log p(y | x, w) of each point, without its constant, log(2 pi NOISE^2) / 2."""

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

    def __init__(
        self, net: nn.Module, x: Tensor, y: Tensor, steps: int = 800, prior: float = PRIOR
    ) -> None:
        self.net, self.prior = net, prior
        misfit = Misfit(net)
        self.names = [f"net.{name}" for name, _ in net.named_parameters()]
        self.derivatives = fxhess.transform(
            misfit, ("value", "gradient", "hessian"), wrt=fxhess.parameters(), reduce="sum"
        )
        self.decrease = self._climb(x, y, steps)  # the norm of the gradient left
        value, _, self.precision = self._now(x, y)
        self.factor = torch.linalg.cholesky(self.precision)  # fails unless this is a minimum
        self.evidence = self._evidence(value, len(x))
        self.jacobian = fxhess.transform(net, "gradient", wrt=fxhess.parameters())

    def _now(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Minus the logarithm of the posterior without its constants, its gradient, its Hessian."""
        with torch.no_grad():
            now = self.derivatives(x, y)
            w = parameters_to_vector(self.net.parameters())
            gradient = torch.cat([now.gradient[name].flatten() for name in self.names])
            H = matrix(now.hessian, self.names)
        value = now.value + 0.5 * self.prior * w.square().sum()
        return value, gradient + self.prior * w, H + self.prior * torch.eye(len(w), dtype=w.dtype)

    def _evidence(self, value: Tensor, count: int) -> float:
        """log p(y): the constants of likelihood, prior and posterior, those in 2 pi cancelled."""
        weights = len(self.factor)
        constants = -0.5 * count * math.log(2 * math.pi * NOISE**2) + 0.5 * weights * math.log(
            self.prior
        )
        return (constants - value - self.factor.diagonal().log().sum()).item()

    def _climb(self, x: Tensor, y: Tensor, steps: int) -> float:
        """Newton's method in a trust region, until the gradient is nothing; its norm.

        Raises:
            ArithmeticError: the steps did not suffice.
        """
        w = parameters_to_vector(self.net.parameters()).detach()
        radius = torch.ones_like(w[:1])
        value, g, H = self._now(x, y)
        for _ in range(steps):
            if g.norm() < 1e-9:
                break
            step = restricted(g[None], H[None], radius)[0]
            noise = 1e-13 * value.abs()  # of the difference that follows
            predicted = noise - (g @ step + 0.5 * step @ H @ step)
            vector_to_parameters(w + step, self.net.parameters())
            new = self._now(x, y)
            gained = noise + value - new[0]
            if gained < 0.25 * predicted:
                radius = step.norm()[None] / 4
            elif gained > 0.75 * predicted and step.norm() > 0.9 * radius:
                radius = 2 * radius
            if gained > 0:
                w, (value, g, H) = w + step, new
        vector_to_parameters(w, self.net.parameters())
        if g.norm() > 1e-6:
            raise ArithmeticError(f"no mode in {steps} steps: a gradient of {g.norm():.0e} is left")
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


def fitted(prior: float = PRIOR, steps: int = 800) -> Posterior:
    """The posterior of a fresh network, always the same one, on the data."""
    torch.manual_seed(0)
    return Posterior(network(), *data(), steps, prior)


def main(priors: int = 15, plot: str | None = None) -> tuple[Posterior, Tensor, Tensor]:
    """Fit, print how sure it is where; returns the posterior, and precisions of the prior with
    their evidences, each ``[priors]``."""
    posterior = fitted()
    eigenvalues = torch.linalg.eigvalsh(posterior.precision)
    print(f"gradient at the mode {posterior.decrease:.0e}, {len(eigenvalues)} weights,")
    print(f"precision from {eigenvalues[0]:.2g} to {eigenvalues[-1]:.2g}")
    for place in (-2.0, 0.0, 2.0, 4.5):
        mean, deviation = posterior.predict(torch.tensor([[place]], dtype=torch.float64))
        print(f"  f({place:4}) = {mean.item():6.3f} +- {deviation.item():.3f}")
    strengths = torch.logspace(-0.7, 0.7, priors, dtype=torch.float64)
    evidences = torch.tensor([fitted(prior).evidence for prior in strengths.tolist()])
    best = strengths[evidences.argmax()]
    print(f"greatest evidence among {priors} priors: that of precision {best:.2g}")
    if plot:
        draw(posterior, strengths, evidences, plot)
    return posterior, strengths, evidences


def draw(posterior: Posterior, strengths: Tensor, evidences: Tensor, path: str) -> None:
    """Data, mean, two standard deviations, and some functions drawn from the posterior; the
    Hessian; the evidence."""
    grid = torch.linspace(-5, 5, 400, dtype=torch.float64)[:, None]
    mean, deviation = posterior.predict(grid)
    some = posterior.draws(grid, 12, torch.Generator().manual_seed(1))
    from matplotlib import colors

    g = grid[:, 0]
    total = (deviation**2 + NOISE**2).sqrt()
    mosaic = [["f", "f"], ["H", "evidence"]]
    with pictures.sheet(path, (9, 7.8), mosaic, height_ratios=(1, 1.05)) as (figure, axes):
        axis = axes["f"]
        band = {"color": pictures.BLUE, "lw": 0}
        axis.fill_between(g, mean - 2 * total, mean + 2 * total, alpha=0.12, **band)
        axis.fill_between(g, mean - 2 * deviation, mean + 2 * deviation, alpha=0.2, **band)
        axis.plot(g, some.T, color=pictures.BLUE, lw=0.6, alpha=0.5)
        axis.plot(g, mean, color="#003f66", lw=2.2, label="network")
        axis.plot(g, truth(grid)[:, 0], color="k", lw=1.2, ls="--", label="truth")
        axis.scatter(*data(), s=18, color=pictures.VERMILION, zorder=3, label="data")
        axis.set(ylim=(-2.6, 2.6), xlim=(-5, 5), xlabel="x", ylabel="y")
        axis.set_title("two standard deviations of f (dark), of data (light); twelve draws")
        axis.legend(loc="upper left")
        A = posterior.precision
        reach = A.abs().max().item()
        image = axes["H"].imshow(
            A, cmap="RdBu_r", norm=colors.SymLogNorm(1, vmin=-reach, vmax=reach)
        )
        sizes = [p.numel() for p in posterior.net.parameters()]
        ends = torch.tensor([0, *sizes]).cumsum(0) - 0.5
        for end in ends[1:-1].tolist():
            axes["H"].axhline(end, color="k", lw=0.6)
            axes["H"].axvline(end, color="k", lw=0.6)
        names = [f"{name} " for name, p in posterior.net.named_parameters() if p.numel() > 1]
        middles = (0.5 * (ends[1:] + ends[:-1])).tolist()[: len(names)]
        axes["H"].set(xticks=(), yticks=middles, yticklabels=names)
        axes["H"].tick_params(axis="y", length=0)
        axes["H"].set_title("A, of all weights")
        figure.colorbar(image, ax=axes["H"], shrink=0.85)
        best = evidences.argmax()
        axes["evidence"].semilogx(strengths, evidences, color=pictures.BLUE, marker=".")
        axes["evidence"].plot(strengths[best], evidences[best], "o", color=pictures.VERMILION)
        axes["evidence"].set(xlabel="precision of the prior", ylabel="log p(y)")
        ticks = (0.2, 0.5, 1, 2, 5)
        axes["evidence"].set_xticks(ticks, [f"{t:g}" for t in ticks])
        axes["evidence"].set_xticks((), minor=True)
        axes["evidence"].set_title("evidence")


if __name__ == "__main__":
    main(plot=pictures.parser("laplace", __doc__).parse_args().plot)
