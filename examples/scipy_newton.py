"""SciPy's Newton methods, fed with exact Hessians and products: a cluster of thirteen atoms.

    python -m examples.scipy_newton --plot cluster.png

Atoms that attract each other as argon does (Lennard-Jones) gather in an icosahedron; its energy,
-44.326801 in units of one pair's, is tabulated in the Cambridge Cluster Database (Wales and Doye,
Journal of Physical Chemistry A 101 (1997) 5111).  ``scipy.optimize.minimize`` takes

    fun, jac   value and gradient,
    hess       all second derivatives, for "trust-exact",
    hessp      products of them with vectors, for "Newton-CG", "trust-ncg" and "trust-krylov",

each of which is an output of ``fxhess.transform``.  SciPy comes with the extra ``examples``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.optimize import OptimizeResult, minimize
from torch import Tensor

import fxhess
from examples import pictures

TABULATED = -44.326801
METHODS = ("BFGS", "Newton-CG", "trust-ncg", "trust-exact")


def energy(p: Tensor) -> Tensor:
    """Lennard-Jones energy of atoms at ``p: [*batch, n, 3]``: ``[*batch]``."""
    n = p.shape[-2]
    i, j = torch.triu_indices(n, n, 1)
    squares = (p[..., i, :] - p[..., j, :]).square().sum(-1)
    sixth = squares.pow(-3)
    return 4 * (sixth * sixth - sixth).sum(-1)


class Problem:
    """A function of ``[n, 3]`` and its derivatives, as SciPy calls them: of flat arrays."""

    def __init__(self, function: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> None:
        self.shape = shape
        options = {"event_ndim": len(shape)}
        self._first = fxhess.transform(function, ("value", "gradient"), **options)
        self._second = fxhess.transform(function, **options)
        self._product = fxhess.transform(function, "hvp", **options)
        self.calls = {"fun": 0, "hess": 0, "hessp": 0}

    def _point(self, flat: Any) -> Tensor:
        return torch.as_tensor(np.asarray(flat, dtype=np.float64)).reshape(self.shape)

    def fun(self, flat: Any) -> tuple[float, Any]:
        """Value and gradient (``jac=True``)."""
        self.calls["fun"] += 1
        first = self._first(self._point(flat))
        return first.value.item(), first.gradient.numpy().ravel()

    def hess(self, flat: Any) -> Any:
        self.calls["hess"] += 1
        return self._second(self._point(flat)).reshape(len(flat), -1).numpy()

    def hessp(self, flat: Any, vector: Any) -> Any:
        self.calls["hessp"] += 1
        return self._product(self._point(flat), vector=self._point(vector)).numpy().ravel()

    def minimize(self, start: Tensor, method: str) -> tuple[OptimizeResult, list[float]]:
        """SciPy's result, given what the method takes, and the gradient's norm at each step."""
        given: dict[str, Any] = {"options": {"gtol": 1e-6}}
        if method == "Newton-CG":
            given = {"options": {"xtol": 1e-10}}
        if method in ("Newton-CG", "trust-ncg", "trust-krylov"):
            given["hessp"] = self.hessp
        elif method == "trust-exact":
            given["hess"] = self.hess
        norms: list[float] = []

        def record(flat: Any) -> None:
            norms.append(self._first(self._point(flat)).gradient.norm().item())

        x0 = start.numpy().ravel()
        record(x0)
        found = minimize(self.fun, x0, jac=True, method=method, callback=record, **given)
        return found, norms


def icosahedron() -> Tensor:
    """Twelve corners at distance 1.08 and the centre: ``[13, 3]``."""
    golden = (1 + math.sqrt(5)) / 2
    corners = [(0.0, a, b * golden) for a in (-1, 1) for b in (-1, 1)]
    turned = [(c[k], c[k - 2], c[k - 1]) for c in corners for k in range(3)]
    points = torch.tensor([(0.0, 0.0, 0.0), *turned], dtype=torch.float64)
    return points * (1.08 / math.sqrt(1 + golden**2))


def main(
    shake: float = 0.07, methods: tuple[str, ...] = METHODS, plot: str | None = None
) -> dict[str, OptimizeResult]:
    """Let the shaken icosahedron relax by each method; returns what SciPy found."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(13, 3, generator=generator, dtype=torch.float64)
    start = icosahedron() + shake * noise
    print(f"energy at the start {energy(start).item():.3f}, tabulated minimum {TABULATED}")
    found, paths = {}, {}
    for method in methods:
        problem = Problem(energy, (13, 3))
        found[method], paths[method] = problem.minimize(start, method)
        calls = ", ".join(f"{n} {kind}" for kind, n in problem.calls.items() if n)
        result = found[method]
        print(f"  {method:<12} E = {result.fun:.6f}  {result.nit:3} steps ({calls})")
    if plot:
        draw(start, torch.as_tensor(found[methods[-1]].x).reshape(13, 3), paths, plot)
    return found


def draw(start: Tensor, end: Tensor, paths: dict[str, list[float]], path: str) -> None:
    """The cluster before and after, and how fast each method gets there."""
    solid = {"projection": "3d"}
    with pictures.sheet(
        path, (9, 7.2), [["shaken", "relaxed"], ["gradients", "gradients"]],
        per_subplot_kw={("shaken", "relaxed"): solid}, height_ratios=(1.1, 1),
    ) as (_, axes):  # fmt: skip
        for name, p in (("shaken", start), ("relaxed", end)):
            axis = axes[name]
            distance = (p[:, None] - p).norm(dim=-1)
            for i, j in (distance < 1.35).nonzero().tolist():
                if i < j:
                    axis.plot(*p[[i, j]].T, color="0.6", lw=1.5)
            axis.scatter(
                *p.T, s=230, c=p[:, 1], cmap="cividis", edgecolors="0.2", depthshade=False, alpha=1
            )
            axis.set(xlim=(-0.8, 0.8), ylim=(-0.8, 0.8), zlim=(-0.8, 0.8))
            axis.set_title(f"{name}: E = {energy(p).item():.4f}", y=0.97)
            axis.view_init(20, 35)
            axis.set_axis_off()
        looks = zip((":", "-", "--", "-."), "osD^", strict=True)
        colours = (pictures.ORANGE, pictures.BLUE, pictures.VERMILION, pictures.GREEN)
        for (method, norms), (dash, mark), colour in zip(
            paths.items(), looks, colours, strict=False
        ):
            axes["gradients"].semilogy(
                norms, label=method, marker=mark, ms=4, lw=1.4, ls=dash, color=colour
            )
        axes["gradients"].set(xlabel="step", ylabel="norm of the gradient")
        axes["gradients"].legend()
        axes["gradients"].grid(alpha=0.3)


if __name__ == "__main__":
    main(plot=pictures.parser("scipy_newton", __doc__).parse_args().plot)
