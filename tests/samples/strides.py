"""Uses of memory order."""

from __future__ import annotations

import torch

from fxhess.testing import Sample

BOX = (3, 4)


def _windows(x):
    """Overlapping windows of each sample."""
    return x.as_strided((x.shape[0], 3, 2), (x.shape[1], 1, 2), 0)


SAMPLES = [
    Sample("windows", _windows, (6,)),
    Sample("windows of a part", lambda x: x.sin().as_strided((x.shape[0], 2), (6, 2), 0), (6,)),
    Sample("columns", lambda x: torch.as_strided(x, (4, 2), (1, 4), 2), BOX, batch=None),
    Sample("one entry many times", lambda x: x.as_strided((2, 3), (0, 1)), (5,), batch=None),
    Sample("a number", lambda x: x.as_strided((), (), 3) * x, (5,), batch=None),
    Sample("of a row", lambda x: x[1:].as_strided((2,), (3,), 5), BOX, batch=None),
]
