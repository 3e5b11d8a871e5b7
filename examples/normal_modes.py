"""Normal modes of water, and of its isotopes, from an energy: frequencies out of one Hessian.

    python -m examples.normal_modes --plot water.png

The energy is the harmonic force field of A. R. Hoy, I. M. Mills and G. Strey (Molecular Physics 24
(1972) 1265) at the equilibrium geometry of W. S. Benedict, N. Gailar and E. K. Plyler (Journal of
Chemical Physics 24 (1956) 1139), whose harmonic frequencies it reproduces.  In Cartesian
coordinates of mass ``m_a``, with ``H = d2E / dp dp``,

    omega^2 = eigenvalues of H_ab / sqrt(m_a m_b)

Six of the nine are zero: three translations and three rotations.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import fxhess
from examples import pictures

BOND, ANGLE = 0.9572, math.radians(104.52)  # in Angstrom, at equilibrium
MASSES = {"H": 1.00782503, "D": 2.01410178, "O": 15.99491462}  # atomic mass units
ISOTOPES = {"H2O": ("O", "H", "H"), "HDO": ("O", "H", "D"), "D2O": ("O", "D", "D")}
# Harmonic wave numbers in 1/cm of Benedict, Gailar and Plyler: bend, two stretches.
PUBLISHED = {"H2O": (1648.47, 3832.17, 3942.53), "D2O": (1206.39, 2763.80, 2888.78)}
# sqrt(attojoule / Angstrom^2 / atomic mass unit) as a wave number in 1/cm.
WAVE_NUMBER = math.sqrt(100 / 1.66053907e-27) / (2 * math.pi * 2.99792458e10)


class Water(nn.Module):
    """Energy in attojoule of atoms O, H, H at ``[*batch, 3, 3]``, in Angstrom: ``[*batch]``."""

    def __init__(self) -> None:
        super().__init__()
        self.stretch = nn.Parameter(torch.tensor(8.454))  # attojoule / Angstrom^2
        self.stretches = nn.Parameter(torch.tensor(-0.101))  # between the two bonds
        self.coupling = nn.Parameter(torch.tensor(0.219))  # attojoule / Angstrom
        self.bend = nn.Parameter(torch.tensor(0.697))  # attojoule

    def forward(self, p: Tensor) -> Tensor:
        bonds = p[..., 1:, :] - p[..., :1, :]
        length = torch.linalg.vector_norm(bonds, dim=-1)
        cosine = (bonds[..., 0, :] * bonds[..., 1, :]).sum(-1) / length.prod(-1)
        r, a = length - BOND, torch.acos(cosine) - ANGLE
        return (
            0.5 * self.stretch * r.square().sum(-1)
            + self.stretches * r.prod(-1)
            + self.coupling * r.sum(-1) * a
            + 0.5 * self.bend * a.square()
        )


def equilibrium() -> Tensor:
    """Positions ``[3, 3]`` of O, H, H with the lowest energy."""
    x, y = BOND * math.sin(ANGLE / 2), BOND * math.cos(ANGLE / 2)
    positions = [[0.0, 0.0, 0.0], [x, y, 0.0], [-x, y, 0.0]]
    return torch.tensor(positions, dtype=torch.float64)


def modes(H: Tensor, masses: Tensor) -> tuple[Tensor, Tensor]:
    """Wave numbers ``[.., 3n]`` in 1/cm (imaginary ones negative), in ascending order, and the
    displacements ``[.., 3n, n, 3]``, from ``H: [n, 3, n, 3]`` and ``masses: [.., n]``."""
    n = masses.shape[-1]
    root = masses.sqrt().repeat_interleave(3, -1)
    weighted = H.reshape(3 * n, 3 * n) / (root[..., :, None] * root[..., None, :])
    squares, vectors = torch.linalg.eigh(weighted)
    moves = (vectors / root[..., :, None]).mT.unflatten(-1, (n, 3))
    return squares.sign() * squares.abs().sqrt() * WAVE_NUMBER, moves


def main(plot: str | None = None) -> dict[str, list[float]]:
    """Print the wave numbers of three isotopes, return them; ``plot``: where to draw the modes."""
    hess = fxhess.transform(Water().double(), event_ndim=2)
    p = equilibrium()
    with torch.no_grad():
        H = hess(p)  # [3, 3, 3, 3]: one molecule, no batch axes
    masses = torch.tensor([[MASSES[a] for a in m] for m in ISOTOPES.values()], dtype=p.dtype)
    numbers, moves = modes(H, masses)  # all isotopes at once: they share the energy
    for name, row in zip(ISOTOPES, numbers, strict=True):
        own = ", ".join(f"{n:.1f}" for n in row[6:])
        known = ", ".join(f"{n:.1f}" for n in PUBLISHED.get(name, ()))
        print(f"{name}: {own} per cm" + (f" (published: {known})" if known else ""))
        print(f"     translations and rotations: largest {row[:6].abs().max():.1e} per cm")
    if plot:
        draw(p, moves[0, 6:], numbers, plot)
    return {name: row.tolist() for name, row in zip(ISOTOPES, numbers, strict=True)}


def draw(p: Tensor, moves: Tensor, numbers: Tensor, path: str) -> None:
    """The three vibrations of H2O, and all spectra as lines."""
    vibrations = ("bend", "symmetric stretch", "antisymmetric stretch")
    mosaic = [vibrations, ["spectra"] * 3]
    with pictures.sheet(path, (9, 5.7), mosaic, height_ratios=(1, 1.35)) as (_, axes):
        for name, move, number in zip(vibrations, moves, numbers[0, 6:], strict=True):
            axis = axes[name]
            move = move * (0.45 / move.abs().max())
            for k in (1, 2):
                axis.plot(*p[[0, k], :2].T, color="0.5", lw=6, zorder=1)
            atoms = {"c": [pictures.VERMILION, "0.93", "0.93"], "edgecolors": "0.2", "zorder": 2}
            axis.scatter(*p[:, :2].T, s=[1300, 620, 620], **atoms)
            for place, letter in zip(p[:, :2].tolist(), "OHH", strict=True):
                axis.text(*place, letter, ha="center", va="center", fontsize=12, zorder=5)
            # From the rims of the hydrogens; the oxygen, sixteen times as heavy, hardly moves.
            for place, step in zip(p[1:, :2], move[1:, :2], strict=True):
                for sign, alpha in ((-1, 0.4), (1, 1.0)):
                    start = place + sign * 0.125 * step / step.norm()
                    axis.quiver(
                        *start, *(sign * step), angles="xy", scale_units="xy", scale=1,
                        color=pictures.BLUE, width=0.015, alpha=alpha, zorder=3,
                    )  # fmt: skip
            axis.set(xlim=(-1.3, 1.3), ylim=(-0.32, 1.15), aspect="equal")
            axis.set_title(f"{name}\n{number:.0f} cm$^{{-1}}$")
            axis.axis("off")
        axis = axes["spectra"]
        colours = (pictures.BLUE, pictures.PURPLE, pictures.GREEN)
        for k, (name, row) in enumerate(zip(ISOTOPES, numbers[:, 6:].tolist(), strict=True)):
            axis.vlines(row, 2 - k, 2.6 - k, color=colours[k], lw=3.5)
            sides = ("center", "right", "left") if row[2] - row[1] < 300 else ("center",) * 3
            for number, side in zip(row, sides, strict=True):
                axis.text(number, 2.64 - k, f"{number:.0f}", ha=side)
            for number in PUBLISHED.get(name, ()):
                label = "published" if (k, number) == (0, PUBLISHED["H2O"][0]) else None
                axis.plot(number, 1.94 - k, "^", color="0.1", ms=7, clip_on=False, label=label)
        axis.set_yticks([2.3, 1.3, 0.3], ["H$_2$O", "HDO", "D$_2$O"])
        axis.set(xlabel="wave number in cm$^{-1}$", ylim=(-0.2, 3), xlim=(1000, 4200))
        axis.spines["left"].set_visible(False)
        axis.tick_params(axis="y", length=0, labelsize=12)
        axis.legend(loc="upper left", bbox_to_anchor=(0.3, 1))


if __name__ == "__main__":
    main(pictures.parser("normal_modes", __doc__).parse_args().plot)
