"""Newton's method and a trust region, many problems at once: batches of Hessians and of solves.

    python -m examples.newton --plot newton.png

Two problems with known answers.

*Which penalty?* Multinomial logistic regression of Fisher's irises (Annals of Eugenics 7 (1936)
179), for many strengths of the penalty, and to choose among them by cross-validation each also with
one flower left out, for every flower: thousands of classifiers, all by the same Newton steps.  The
Hessians are ``[penalties, flowers, 15, 15]``, the solves one call of ``torch.linalg``.

*A hard fit from many starts*: the data of Kowalik and Osborne, NIST's StRD problem MGH09, whose
parameters are certified to eleven digits.  Far from them the Hessian is indefinite: a trust region
(Nocedal and Wright, *Numerical Optimization*, 2006, algorithm 4.1 with the exact subproblem of
section 4.3) shifts its eigenvalues, for all starts at once.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxhess
from examples import pictures
from fxhess.demo import iris

SPECIES = ("setosa", "versicolor", "virginica")

# --- a path of classifiers ------------------------------------------------------------------------


class Regression(nn.Module):
    """What multinomial logistic regression of the irises minimizes, of weights ``[*batch, 15]``:
    four features' and a constant, for each species.  Minus the mean log-likelihood of the flowers
    that count (``counted: [*batch, 150]``, ones and zeros) + ``penalty: [*batch]`` |w|^2 / 2."""

    def __init__(self) -> None:
        super().__init__()
        x, species = iris()
        x = (x - x.mean(0)) / x.std(0)
        self.register_buffer("x", F.pad(x, (0, 1), value=1.0).double())
        self.register_buffer("chosen", F.one_hot(species, 3).double())

    def log_likelihood(self, w: Tensor) -> Tensor:
        """Of every flower: ``[*batch, 150]``."""
        scores = self.x @ w.unflatten(-1, (3, 5)).mT  # [*batch, 150, 3]
        return (torch.log_softmax(scores, -1) * self.chosen).sum(-1)

    def forward(self, w: Tensor, penalty: Tensor, counted: Tensor) -> Tensor:
        mean = (self.log_likelihood(w) * counted).sum(-1) / counted.sum(-1)
        return 0.5 * penalty * w.square().sum(-1) - mean


def newton(
    regression: Regression, penalty: Tensor, counted: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """Weights ``[*batch, 15]`` after Newton steps from zero, and the norms of the gradients before
    each step and after the last, ``[steps + 1, *batch]``."""
    derivatives = fxhess.transform(regression, ("gradient", "hessian"))
    w = penalty.new_zeros(*penalty.shape, 15)
    norms = []
    for k in range(steps + 1):
        with torch.no_grad():
            g, H = derivatives(w, penalty, counted)
        norms.append(g.norm(dim=-1))
        if k < steps:
            w = w - torch.cholesky_solve(g[..., None], torch.linalg.cholesky(H))[..., 0]
    return w, torch.stack(norms)


def path(penalties: Tensor, steps: int = 14) -> tuple[Tensor, Tensor]:
    """Weights ``[n, 15]`` of the classifiers of all flowers by penalty, and `newton`'s norms."""
    regression = Regression()
    return newton(regression, penalties, penalties.new_ones(len(penalties), 150), steps)


def leave_one_out(penalties: Tensor, steps: int = 14) -> tuple[Tensor, Tensor]:
    """What classifiers of 149 flowers tell of the one left out, for each one and every penalty:
    its log-likelihood, and whether they take it for what it is; both ``[n, 150]``.

    Raises:
        ArithmeticError: the steps did not suffice.
    """
    regression = Regression()
    counted = 1 - torch.eye(150, dtype=torch.float64)
    each = (len(penalties), 150)  # a problem for every penalty and flower
    w, norms = newton(
        regression, penalties[:, None].expand(each), counted.expand(*each, 150), steps
    )
    if norms[-1].max() > 1e-8:
        raise ArithmeticError(f"{steps} steps are too few: a gradient of {norms[-1].max():.0e}")
    with torch.no_grad():
        told = regression.log_likelihood(w).diagonal(dim1=-2, dim2=-1)
        scores = torch.einsum("fi,pfsi->pfs", regression.x, w.unflatten(-1, (3, 5)))
    return told, scores.argmax(-1) == regression.chosen.argmax(-1)


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
    penalties: int = 41, starts: int = 500, steps: int = 40, plot: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Solve both; returns the gradients' norms of the path ``[15, penalties]``, the parameters
    ``[starts, 4]`` and their misfits ``[steps + 1, starts]``."""
    strengths = torch.logspace(0.5, -5, penalties, dtype=torch.float64)
    weights, norms = path(strengths)
    print(f"irises, {penalties} penalties, largest gradient after each of Newton's steps:")
    print("  " + ", ".join(f"{n:.0e}" for n in norms.amax(-1)))
    start = time.perf_counter()
    told, right = leave_one_out(strengths)
    surprise, wrong = -told.mean(-1), (~right).sum(-1)
    best = int(surprise.argmin())
    print(f"{150 * penalties} classifiers of 149 flowers: {time.perf_counter() - start:.1f} s")
    print(
        f"  best penalty {strengths[best]:.1e}: {wrong[best]} of 150 flowers left out are told "
        f"wrongly, {surprise[best]:.3f} nats each"
    )
    generator = torch.Generator().manual_seed(0)
    first = torch.rand(starts, 4, generator=generator, dtype=torch.float64)
    b, history = trust_region(first, steps)
    reached = history[-1] < CERTIFIED_SUM * (1 + 1e-9)
    print(f"MGH09: {reached.sum()} of {starts} starts reach the certified minimum")
    nearest = b[history[-1].argmin()]
    for name, value, known in zip(("b1", "b2", "b3", "b4"), nearest, CERTIFIED, strict=True):
        print(f"  {name} = {value:.11f}   certified {known:.11f}")
    if plot:
        draw(strengths, weights, norms, surprise, wrong, history, plot)
    return norms, b, history


def draw(
    strengths: Tensor, weights: Tensor, norms: Tensor, surprise: Tensor, wrong: Tensor,
    history: Tensor, target: str,
) -> None:  # fmt: skip
    """The weights by penalty, the gradients by step, cross-validation, the misfits by step."""
    mosaic = [["weights", "gradients"], ["left out", "misfits"]]
    best = strengths[surprise.argmin()].item()
    with pictures.sheet(target, (9, 7.4), mosaic) as (figure, axes):
        axis = axes["weights"]
        colours = (pictures.BLUE, pictures.VERMILION, pictures.GREEN)
        for k, (species, colour, dash) in enumerate(
            zip(SPECIES, colours, ("-", "--", "-."), strict=True)
        ):
            rows = weights.unflatten(-1, (3, 5))[:, k, :4]
            axis.semilogx(strengths, rows, color=colour, ls=dash)[0].set_label(species)
        axis.axvline(best, color="0.5", lw=1, ls=":")
        axis.set(xlabel="penalty", ylabel="weight of a feature")
        axis.set_title(f"irises: {len(strengths)} classifiers")
        axis.legend(loc="upper left")
        axis = axes["gradients"]
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import LogNorm

        scale = ScalarMappable(LogNorm(strengths.min(), strengths.max()), "cividis")
        for row, strength in zip(norms.T, strengths, strict=True):
            axis.semilogy(row, color=scale.to_rgba(strength), lw=1)
        axis.set(xlabel="Newton steps", ylabel="norm of the gradient", xticks=range(0, 15, 2))
        axis.set_title("quadratic convergence")
        figure.colorbar(scale, ax=axis, label="penalty")
        axis = axes["left out"]
        axis.semilogx(strengths, surprise, color=pictures.BLUE)
        axis.plot(best, surprise.min(), "o", color=pictures.BLUE)
        axis.axvline(best, color="0.5", lw=1, ls=":")
        axis.set(xlabel="penalty", ylim=(0, None))
        axis.set_ylabel("nats a flower", color=pictures.BLUE)
        axis.set_title("a flower left out: surprise, errors")
        other = axis.twinx()
        other.step(strengths, wrong, where="mid", color=pictures.VERMILION, ls="--")
        other.set_ylabel("told wrongly, of 150", color=pictures.VERMILION)
        other.set_ylim(0, None)
        other.spines["right"].set_visible(True)
        for name in ("weights", "left out"):
            axes[name].invert_xaxis()
        axis = axes["misfits"]
        excess = (history / CERTIFIED_SUM - 1).clamp(min=1e-13)
        axis.semilogy(excess[:, :200], color=pictures.BLUE, alpha=0.15, lw=0.8)
        axis.set(xlabel="steps of the trust region", ylabel="misfit / certified misfit - 1")
        axis.set(xlim=(0, 25))
        axis.set_title("MGH09 from 200 random starts")


if __name__ == "__main__":
    main(plot=pictures.parser("newton", __doc__).parse_args().plot)
