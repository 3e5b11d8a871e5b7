"""Numbers that are harmless: what guarded and sheltered operations are given.

*Needs* canonical facts.  *Gives* weights that do not cancel, arguments far from where matrices and
vectors are singular, and masks of results as masks of operands.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from fxhess.contraction import contract
from fxhess.emit import VAL, Emitter, Var
from fxhess.facts import Canonical, fact, known_fact
from fxhess.kinds import Elementwise, Label, Multilinear
from fxhess.passes.choice import moved
from fxhess.passes.forms import Forms

_GOLDEN = (math.sqrt(5) - 1) / 2  # its multiples modulo 1 are all different


class Harmless:
    """Writes them."""

    def __init__(self, canonical: Canonical, emitter: Emitter) -> None:
        self.canonical = canonical
        self.emitter = emitter
        self.nb = canonical.batch_ndim

    def weights(self, node: fx.Node) -> Var:
        """Positive numbers that do not cancel in whatever is added up of them."""
        event = self.canonical.event(node)
        ramp: Any = self.emitter.call(
            torch.arange, math.prod(event), dtype=torch.float64, device=self.canonical.device
        )
        weights = (1 + torch.remainder(ramp * _GOLDEN, 1)).to(node.meta[VAL].dtype)
        return weights.reshape([1] * self.nb + list(event))  # type: ignore[return-value]

    def regular(self, operand: fx.Node) -> Var:
        """An entry far from where functions of matrices and of vectors are singular: a matrix has
        the eigenvalues 1, 2, .. n."""
        event = self.canonical.event(operand)
        if len(event) < 2 or event[-1] != event[-2]:
            return self.weights(operand)
        ramp: Any = self.emitter.call(
            torch.arange, 1, event[-1] + 1, dtype=operand.meta[VAL].dtype,
            device=self.canonical.device,
        )  # fmt: skip
        return torch.diag(ramp)  # type: ignore[return-value]

    def spread(self, forms: Forms, node: fx.Node, i: int, mask: Var) -> Var | None:
        """A mask of the node's entries as one of operand i's: true where any of its uses is; None
        where that is everywhere."""
        known = known_fact(node)
        output: list[Label]
        if isinstance(known.kind, (Elementwise, Multilinear)):
            inputs, output, _ = forms.labelled(node)
            target = inputs[i]
        else:
            output = [("e", k) for k in range(len(self.canonical.event(node)))]
            target = moved(known.axes[i])
        if len(set(target)) != len(target):
            return None
        target = [*(forms.batch() if fact(known.operands[i]) else ()), *target]
        labels = [*forms.batch(), *output]
        labels = labels[len(labels) - mask.ndim :]
        if labels == target:
            return mask
        weights = mask.to(forms.algebra.like.dtype)
        count = contract(self.emitter, [(weights, labels)], target, None, forms.batch_size)
        return count > 0  # type: ignore[return-value, operator]
