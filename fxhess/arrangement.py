"""How the axes of a captured tensor are made of batch and event axes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Sizes = Sequence[Any]  # of the batch axes: numbers, or symbols while tracing


@dataclass(frozen=True)
class Arrangement:
    """``groups``: for each captured axis the axes that it merges, in order: ``(k, 0)`` batch axis
    k, ``(None, n)`` an event axis of size n.  The canonical form of the tensor is
    ``[*lead, *batch, *event]``, with the event axes in the order of the groups."""

    batch_ndim: int
    groups: tuple[tuple[tuple[int | None, int], ...], ...]

    @property
    def batches(self) -> list[int]:
        """The batch axes that the tensor has."""
        return sorted(k for group in self.groups for k, _ in group if k is not None)

    @property
    def event(self) -> list[int]:
        """Sizes of the event axes."""
        return [n for group in self.groups for k, n in group if k is None]

    def lead(self, t: Any) -> int:
        """How many axes a canonical tensor has before the batch axes."""
        return int(t.ndim) - self.batch_ndim - len(self.event)

    def captured(self, t: Any, sizes: Sizes, lead: int = 0) -> Any:
        """A canonical tensor in the captured arrangement, behind ``lead`` further axes."""
        present = self.batches
        for k in reversed(range(self.batch_ndim)):
            if k not in present:
                t = t.select(lead + k, 0)
        if any(_is_one(t.shape[lead + i]) for i in range(len(present))):
            t = t.expand([*t.shape[:lead], *(sizes[k] for k in present), *self.event])
        order = list(range(lead))
        at = lead + len(present)
        for b in (b for group in self.groups for b, _ in group):
            order.append(at if b is None else lead + present.index(b))
            at += b is None
        if order != sorted(order):
            t = t.permute(order)
        if any(len(group) != 1 for group in self.groups):
            merged = [_product(sizes[k] if k is not None else n for k, n in g) for g in self.groups]
            t = t.reshape([*t.shape[:lead], *merged])
        return t

    def canonical(self, y: Any, sizes: Sizes, lead: int = 0) -> Any:
        """The way back; batch axes that the tensor lacks have size 1."""
        atoms = [atom for group in self.groups for atom in group]
        if any(len(group) != 1 for group in self.groups):
            whole = [sizes[k] if k is not None else n for k, n in atoms]
            y = y.reshape([*y.shape[:lead], *whole])
        present = self.batches
        names = [k for k, _ in atoms]
        order = list(range(lead))
        order += [lead + names.index(k) for k in present]
        order += [lead + i for i, k in enumerate(names) if k is None]
        if order != sorted(order):
            y = y.permute(order)
        for k in range(self.batch_ndim):
            if k not in present:
                y = y.unsqueeze(lead + k)
        return y


def _is_one(size: Any) -> bool:
    """Whether a size is the number 1, not a symbol."""
    return isinstance(size, int) and size == 1


def _product(factors: Iterable[Any]) -> Any:
    total: Any = 1
    for factor in factors:
        total = factor if isinstance(total, int) and total == 1 else total * factor
    return total
