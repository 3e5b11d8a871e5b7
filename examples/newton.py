"""Newton's method and a trust region, many problems at once: batches of Hessians and of solves.

    python -m examples.newton --plot newton.png

Two problems with known answers.

*A path of classifiers*: multinomial logistic regression of Fisher's irises (Annals of Eugenics 7
(1936) 179) for sixty strengths of the penalty, all by the same Newton steps: the Hessians are
``[60, 15, 15]``, the solves one call of ``torch.linalg``.

*A hard fit from many starts*: the data of Kowalik and Osborne, NIST's StRD problem MGH09, whose
parameters are certified to eleven digits.  Far from them the Hessian is indefinite: a trust region
(Nocedal and Wright, *Numerical Optimization*, 2006, algorithm 4.1 with the exact subproblem of
section 4.3) shifts its eigenvalues, for all starts at once.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxhess
from fxhess.demo import iris

# --- a path of classifiers ------------------------------------------------------------------------


class Likelihood(nn.Module):
    """Minus the mean log-likelihood of weights ``[*batch, 15]`` (5 for each species)."""

    def __init__(self) -> None:
        super().__init__()
        x, species = iris()
        x = (x - x.mean(0)) / x.std(0)
        self.register_buffer("x", F.pad(x, (0, 1), value=1.0).double())
        self.register_buffer("chosen", F.one_hot(species, 3).double())

    def forward(self, weights: Tensor) -> Tensor:
        scores = self.x @ weights.unflatten(-1, (3, 5)).mT  # [*batch, 150, 3]
        return -(torch.log_softmax(scores, -1) * self.chosen).sum(-1).mean(-1)


def newton_path(penalties: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Weights ``[n, 15]`` that minimize likelihood + penalty |w|^2 / 2 for each penalty, and the
    norms of the gradients after each step, ``[steps + 1, n]``."""
    likelihood = fxhess.transform(Likelihood(), ("gradient", "hessian"))
    w = penalties.new_zeros(len(penalties), 15)
    eye = torch.eye(15, dtype=w.dtype)
    norms = []
    for k in range(steps + 1):
        with torch.no_grad():
            now = likelihood(w)
        g = now.gradient + penalties[:, None] * w
        H = now.hessian + penalties[:, None, None] * eye
        norms.append(g.norm(dim=-1))
        if k < steps:
            w = w - torch.cholesky_solve(g[..., None], torch.linalg.cholesky(H))[..., 0]
    return w, torch.stack(norms)


# --- a hard fit from many starts ------------------------------------------------------------------

MGH09 = torch.tensor([
    [4.0, 0.1957], [2.0, 0.1947], [1.0, 0.1735], [0.5, 0.1600], [0.25, 0.0844], [0.167, 0.0627],
    [0.125, 0.0456], [0.1, 0.0342], [0.0833, 0.0323], [0.0714, 0.0235], [0.0625, 0.0246],
], dtype=torch.float64)  # fmt: skip
CERTIFIED = (1.9280693458e-01, 1.9128232873e-01, 1.2305650693e-01, 1.3606233068e-01)
CERTIFIED_SUM = 3.0750560385e-04


def misfit(b: Tensor) -> Tensor:
    """Squared residuals of y = b1 (x^2 + b2 x) / (x^2 + b3 x + b4), summed; ``b: [*batch, 4]``."""
    x, y = MGH09.T
    b1, b2, b3, b4 = (b[..., k, None] for k in range(4))
    return (y - b1 * (x * x + b2 * x) / (x * x + b3 * x + b4)).square().sum(-1)


def restricted(g: Tensor, H: Tensor, radius: Tensor) -> Tensor:
    """Steps p that minimize g p + p H p / 2 with |p| <= radius: (H + s) p = -g with the smallest
    shift s >= 0 that leaves H + s without negative eigenvalues, by bisection on s."""
    values, vectors = torch.linalg.eigh(H)
    c = (vectors.mT @ g[..., None])[..., 0]
    scale = values.abs().amax(-1) + g.norm(dim=-1) / radius
    low = (-values[..., 0]).clamp(min=0) + 1e-12 * scale
    high = low + scale

    def step(shift: Tensor) -> Tensor:
        return -c / (values + shift[..., None])

    for _ in range(60):
        middle = 0.5 * (low + high)
        outside = step(middle).norm(dim=-1) > radius
        low, high = torch.where(outside, middle, low), torch.where(outside, high, middle)
    inside = (values[..., 0] > 0) & (step(torch.zeros_like(high)).norm(dim=-1) <= radius)
    p = step(torch.where(inside, 0.0, high))
    return (vectors @ p[..., None])[..., 0]


def trust_region(b: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Parameters ``[n, 4]`` reached from these, and the misfits after each step."""
    derivatives = fxhess.transform(misfit, ("value", "gradient", "hessian"))
    radius = torch.full((len(b),), 0.1, dtype=b.dtype)
    history = []
    for _ in range(steps):
        now = derivatives(b)
        history.append(now.value)
        p = restricted(now.gradient, now.hessian, radius)
        curvature = (p * (now.hessian @ p[..., None])[..., 0]).sum(-1)
        predicted = -((now.gradient * p).sum(-1) + 0.5 * curvature)
        gained = now.value - misfit(b + p)
        ratio = gained / predicted.clamp(min=1e-300)
        edge = p.norm(dim=-1) > 0.9 * radius
        radius = torch.where(ratio < 0.25, radius / 4, radius)
        radius = torch.where((ratio > 0.75) & edge, (2 * radius).clamp(max=1.0), radius)
        b = torch.where((gained > 0)[:, None], b + p, b)
    history.append(misfit(b))
    return b, torch.stack(history)


def main(
    penalties: int = 60, starts: int = 500, steps: int = 40, plot: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Solve both; returns the gradients' norms of the path ``[steps + 1, penalties]``, the
    parameters ``[starts, 4]`` and their misfits ``[steps + 1, starts]``."""
    strengths = torch.logspace(0.5, -4, penalties, dtype=torch.float64)
    weights, norms = newton_path(strengths, 12)
    print(f"{penalties} classifiers, largest gradient after each of Newton's steps:")
    print("  " + ", ".join(f"{n:.0e}" for n in norms.amax(-1)))
    generator = torch.Generator().manual_seed(0)
    first = torch.rand(starts, 4, generator=generator, dtype=torch.float64)
    b, history = trust_region(first, steps)
    reached = history[-1] < CERTIFIED_SUM * (1 + 1e-9)
    print(f"MGH09: {reached.sum()} of {starts} starts reach the certified minimum")
    best = b[history[-1].argmin()]
    for name, value, known in zip(("b1", "b2", "b3", "b4"), best, CERTIFIED, strict=True):
        print(f"  {name} = {value:.11f}   certified {known:.11f}")
    if plot:
        draw(strengths, weights, norms, history, plot)
    return norms, b, history


def draw(strengths: Tensor, weights: Tensor, norms: Tensor, history: Tensor, path: str) -> None:
    """The weights by penalty, the gradients by step, the misfits by step."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    colours = ("#2457a8", "#c4552d", "#2b8a5b")
    for k, (species, colour) in enumerate(
        zip(("setosa", "versicolor", "virginica"), colours, strict=True)
    ):
        lines = axes[0].semilogx(strengths, weights.unflatten(-1, (3, 5))[:, k, :4], color=colour)
        lines[0].set_label(species)
    axes[0].set(xlabel="penalty")
    axes[0].set_title(f"weights of {len(strengths)} classifiers", fontsize=10)
    axes[0].invert_xaxis()
    axes[0].legend(frameon=False, fontsize=8)
    shades = plt.get_cmap("viridis")(torch.linspace(0, 0.95, norms.shape[1]).numpy())
    for row, shade in zip(norms.T, shades, strict=True):
        axes[1].semilogy(row, color=shade, lw=0.9)
    axes[1].set(xlabel="Newton step")
    axes[1].set_title("their gradients, strong to weak penalty", fontsize=10)
    excess = (history / CERTIFIED_SUM - 1).clamp(min=1e-13)
    axes[2].semilogy(excess[:, :200], color="#2457a8", alpha=0.15, lw=0.8)
    axes[2].set(xlabel="step of the trust region", xlim=(0, 30))
    axes[2].set_title("misfit above the certified one, 200 starts", fontsize=10)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", help="write a picture here")
    main(plot=parser.parse_args().plot)
