"""Uses of small determinants (double backward of singular ones is not finite)."""

from __future__ import annotations

import torch

from fxhess.testing import Sample

SAMPLES = [
    *(Sample(f"det, {n} by {n}", torch.linalg.det, (n, n)) for n in (1, 2, 3, 4)),
]
