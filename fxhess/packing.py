"""Several differentiated tensors as one: x, of which a program takes derivatives, and its parts.

Parts stand beside each other along the last axis of x.  Axes that all parts begin with stay axes of
x (positions ``[n, 3]`` and charges ``[n]`` become ``[n, 4]``), so that per-particle structure stays
visible; the others are flattened.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Packing:
    """How parts of these event shapes make up one x.  A single part is x as it is."""

    shapes: tuple[tuple[int, ...], ...]
    shared: tuple[int, ...] = ()  # the axes that all parts begin with, of which some have more
    widths: tuple[int, ...] = ()  # how much of the last axis each part takes

    @classmethod
    def of(cls, shapes: Sequence[tuple[int, ...]]) -> Packing:
        """The packing of parts of these event shapes."""
        longest = max(map(len, shapes))
        shared: list[int] = []
        for sizes in zip(*shapes, strict=False):
            if len(set(sizes)) > 1 or len(shared) + 1 >= longest:
                break
            shared.append(sizes[0])
        widths = [math.prod(shape[len(shared) :]) for shape in shapes]
        return cls(tuple(shapes), tuple(shared), tuple(widths))

    @property
    def single(self) -> bool:
        return len(self.shapes) == 1

    @property
    def event(self) -> tuple[int, ...]:
        """The event shape of x."""
        return self.shapes[0] if self.single else (*self.shared, sum(self.widths))

    @property
    def event_ndim(self) -> int:
        return len(self.event)

    def pack(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """``[*batch, *event]`` of parts ``[*batch, *shape]``."""
        if self.single:
            return parts[0]
        rows = [
            p.reshape(*p.shape[: p.ndim - len(shape)], *self.shared, width)
            for p, shape, width in zip(parts, self.shapes, self.widths, strict=True)
        ]
        return torch.cat(rows, -1)

    def split(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The parts of x, ``[*batch, *shape]`` each."""
        return [self.part(x, k) for k in range(len(self.shapes))]

    def part(self, tensor: torch.Tensor, k: int) -> torch.Tensor:
        """Of ``[*any, *event]``, what belongs to part k: ``[*any, *shape]``, a view."""
        if self.single:
            return tensor
        rest = self.shapes[k][len(self.shared) :]
        own = tensor.narrow(-1, sum(self.widths[:k]), self.widths[k])
        return own.unflatten(-1, rest) if rest else own.squeeze(-1)

    def block(self, matrix: torch.Tensor, a: int, b: int) -> torch.Tensor:
        """Of ``[*any, *event, *event]``, the block of parts a and b, a view."""
        if self.single:
            return matrix
        columns = self.part(matrix, b)
        n, m = self.event_ndim, len(self.shapes[b])
        # The axes of the rows to the end, and back where they were.
        k = columns.ndim - n - m
        turned = columns.permute(
            (
                *range(k),
                *range(k + n, k + n + m),
                *range(k, k + n),
            )
        )
        rows = self.part(turned, a)
        n = len(self.shapes[a])
        return rows.permute(
            (
                *range(k),
                *range(k + m, k + m + n),
                *range(k, k + m),
            )
        )

    def pack_matrix(self, block: Callable[[int, int], torch.Tensor]) -> torch.Tensor:
        """``[*batch, *event, *event]`` of blocks ``[*batch, *shape_a, *shape_b]``."""
        if self.single:
            return block(0, 0)
        n = len(self.shapes)
        rows = []
        for a in range(n):
            row = self.pack([block(a, b) for b in range(n)])  # [*batch, *shape_a, *event]
            k, m = row.ndim - self.event_ndim - len(self.shapes[a]), len(self.shapes[a])
            end = range(k + m, k + m + self.event_ndim)
            rows.append(
                row.permute(
                    (*range(k), *end, *range(k, k + m)),
                )
            )
        whole = self.pack(rows)  # [*batch, *event of columns, *event of rows]
        k, n = whole.ndim - 2 * self.event_ndim, self.event_ndim
        return whole.permute(
            (
                *range(k),
                *range(k + n, k + 2 * n),
                *range(k, k + n),
            )
        )


__all__: list[Any] = ["Packing"]
