"""Uses of small determinants, regular and singular."""

from __future__ import annotations

import torch

from fxhess.testing import Sample

ROW = torch.linspace(-1, 1, 4, dtype=torch.float64)

SAMPLES = [
    *(Sample(f"det, {n} by {n}", torch.linalg.det, (n, n)) for n in (1, 2, 3, 4)),
    Sample("det of a singular matrix", lambda x: torch.linalg.det(x[..., None] * ROW[:3]), (3,)),
]
