"""Uses of small determinants (double backward of singular ones is not finite), least squares and
eigenvalues."""

from __future__ import annotations

import torch

from fxhess.testing import Sample

RIGHT = torch.linspace(-1, 2, 3, dtype=torch.float64).reshape(3, 1)


def _least_squares(x):
    found = torch.linalg.lstsq(x, RIGHT, driver="gels")
    return torch.cat([found.solution, found.residuals[None]])


def _normal(x):
    """The same by normal equations: PyTorch does not differentiate residuals."""
    solution = torch.linalg.solve(x.mT @ x, x.mT @ RIGHT)
    return torch.cat([solution, (x @ solution - RIGHT).square().sum(0, keepdim=True)])


SLOPES = torch.sin(torch.arange(9, dtype=torch.float64)).reshape(3, 3) / 3


def _newton(x):
    """A step towards ``z = tanh(W z + x)``: a matrix and a vector, both of x."""
    z = torch.tanh(x)
    slope = (1 - torch.tanh(z @ SLOPES + x).square())[..., None] * SLOPES.mT
    return z - torch.linalg.solve(
        torch.eye(3, dtype=x.dtype) - slope, z - torch.tanh(z @ SLOPES + x)
    )


SAMPLES = [
    Sample("solve, a matrix and a vector", _newton, (3,)),
    Sample("lstsq", _least_squares, (3, 1), batch=None, reference=_normal, tolerance=1e-8),
    Sample("eigvalsh", torch.linalg.eigvalsh, (3, 3)),
    *(Sample(f"det, {n} by {n}", torch.linalg.det, (n, n)) for n in (1, 2, 3, 4)),
]
