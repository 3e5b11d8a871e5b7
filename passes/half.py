"""A half Hessian, A with ``H = A + A^T``: see :mod:`fxhess.passes.halves`, which writes them."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from fxhess.emit import Var
from fxhess.windows import Band

Pattern = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """Which part of a second form is wanted.  ``tied``: basis axes whose two indices are the same
    (all of them: the diagonal); ``traced``: summed over them; ``doubled``: whether the transpose is
    still to be added (it is not where both orders of two different sides were contracted)."""

    tied: frozenset[int] = frozenset()
    traced: bool = False
    doubled: bool = True


FULL = Part()


@dataclass
class Half:
    """A core's axes are the batch axes, then one for each distinct name of its pattern, in order.
    ``symmetric``: whether the sum of all cores is as it is, but for rounding."""

    basis: tuple[int, ...]
    outputs: tuple[int, ...]
    cores: dict[Pattern, Var | float] = field(default_factory=dict)
    # By their band (none: all of the triangle): [*batch, *outputs, entries].
    packed: dict[Band | None, Var] = field(default_factory=dict)
    part: Part = FULL
    symmetric: bool = False

    @property
    def untied(self) -> list[int]:
        """Basis axes with two indices."""
        return [k for k in range(len(self.basis)) if k not in self.part.tied]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the axes (outputs.., basis.., basis again, without the tied ones)."""
        if self.part.traced:
            return self.outputs
        return (*self.outputs, *self.basis, *(self.basis[k] for k in self.untied))

    def add_packed(self, part: Var, band: Band | None = None) -> None:
        known = self.packed.get(band)
        self.packed[band] = part if known is None else known + part  # type: ignore[assignment]

    def add(self, pattern: Pattern, core: Var | float) -> None:
        known = self.cores.get(pattern)
        self.cores[pattern] = core if known is None else known + core  # type: ignore[operator]

    def join(self, part: Half) -> None:
        """Add a part along the same basis."""
        for pattern, core in part.cores.items():
            self.add(pattern, core)
        for band, packed in part.packed.items():
            self.add_packed(packed, band)

    def values(self) -> list[fx.Node]:
        """What holds the half."""
        held = [*self.cores.values(), *self.packed.values()]
        return [v.node for v in held if isinstance(v, Var)]
