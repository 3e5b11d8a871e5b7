"""What stands above the rows of docs/conventions.md, what a row is, and how numbers are written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

D = torch.float64
Z4 = (0.0,) * 4
Z9 = (0.0,) * 9
SMOOTH = "the function is smooth there; this is its derivative"

INTRODUCTION = """# Conventions

What fxhess returns where a derivative is a matter of convention, and where PyTorch's double
backward returns something else. At a kink: the derivatives of the branch that PyTorch takes
there. Of ties: what PyTorch's first derivative takes. Where a norm or root has no derivative: 0. An
entry that is not chosen (`where`, `masked_fill`, indices, slices, maxima, clamps) does not count,
whatever its value; nor do entries that are constants (written by `where`, `masked_fill` or at an
index, turned off by `relu` or `clamp`, multiplied by a 0), but for a sum of entries that are all
turned off, or multiplied by 0. No NaN where the function is twice differentiable, but for
functions of eigenvectors where eigenvalues repeat, below.
Every row is a test, from one list (`tests/edges.py`); the table is written by
`python -m tests.edges --write docs/conventions.md`{version}.

A norm, a standard deviation or a square root to an even power is smooth where it is 0, and has the
derivatives of what is under the root, also where it was reshaped or multiplied by a factor before.
Other even functions of a norm (its cosine) take the norm's own derivatives at 0.

Functions of eigenvalues or singular values that are smooth where these repeat (a sum of squares, a
log-determinant: all that treat equal ones alike) have their derivatives there: the quotients
(g_i - g_j) / (l_i - l_j) of the gradient g by the values have limits, which the second derivative
of what follows tells. Where there is no limit (the largest of two equal) the pair counts as 0, like
a norm at 0. A gradient through such a Hessian, and what depends on eigenvectors or singular
vectors, is PyTorch's: NaN, or noise where rounding has split equal values. There the first
derivative is 0 / 0 already, and what follows would have to be differentiated three times to tell
the second's limit.

Value, gradient and Hessian have the type of the model's own result: float32 for a float32 model,
bfloat16 inside `torch.autocast("cpu", torch.bfloat16)`, float64 where float64 weights meet a
float32 x. x itself is real and of 64, 32 or 16 bits; what happens inside may be complex, the result
not.
"""


@dataclass(frozen=True)
class Row:
    """A function ``[B, n] -> [B]`` at a point ``x: [n]``, and its gradient and Hessian (rows in one
    list) by the convention; ``why``, where PyTorch's double backward gives something else."""

    place: str
    function: Callable[[torch.Tensor], torch.Tensor]
    x: tuple[float, ...]
    gradient: tuple[float, ...]
    hessian: tuple[float, ...]
    why: str = ""


def total(f: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: f(x).reshape(x.shape[0], -1).sum(1)


def one(
    place: str,
    f: Callable[[torch.Tensor], torch.Tensor],
    x: float,
    first: float,
    second: float,
    why: str = "",
) -> Row:
    """A function of one variable."""
    return Row(place, total(f), (x,), (first,), (second,), why)


def show(numbers: object) -> str:
    assert isinstance(numbers, (list, tuple))
    if len(numbers) > 4 and len(set(map(_number, numbers))) == 1:
        return f"all {_number(numbers[0])}"
    return ", ".join(map(_number, numbers))


def _number(value: float) -> str:
    return f"{0.0 if abs(value) < 1e-12 else value:.4g}"
