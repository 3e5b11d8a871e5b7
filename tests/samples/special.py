"""Uses of special functions, near their difficult points and far out."""

from __future__ import annotations

import torch
from torch import special

from fxhess.testing import Sample, uniform

W = torch.tensor([0.7, 1.3, 2.1, 0.4], dtype=torch.float64)
POSITIVE = uniform(0.2, 5)
UNIT = uniform(-0.9, 0.9)

EVERYWHERE = {
    "erf": torch.erf,
    "erfc": torch.erfc,
    "erfcx": special.erfcx,
    "ndtr": special.ndtr,
    "log_ndtr": special.log_ndtr,
    "i0": special.i0,
    "i0e": special.i0e,
    "i1": special.i1,
    "i1e": special.i1e,
    "sinc": torch.sinc,
}
HALF_LINE = {
    "lgamma": torch.lgamma,
    "digamma": torch.digamma,
    "polygamma 1": lambda x: torch.polygamma(1, x),
    "polygamma 2": lambda x: torch.polygamma(2, x),
    "mvlgamma": lambda x: torch.mvlgamma(x + 1, 3),
    "gammainc": lambda x: special.gammainc(W, x),
    "gammaincc": lambda x: special.gammaincc(W, x),
    "zeta": lambda x: special.zeta(W + 1, x),
    "zeta number": lambda x: special.zeta(2.5, x),
}

SAMPLES = [
    *(Sample(name, f) for name, f in EVERYWHERE.items()),
    *(
        Sample(f"{name} far", f, make=uniform(-9, 9), twice=False, tolerance=1e-8)
        for name, f in EVERYWHERE.items()
    ),
    *(Sample(name, f, make=POSITIVE, twice=False) for name, f in HALF_LINE.items()),
    Sample("erfinv", torch.erfinv, make=UNIT, twice=False),
    Sample("ndtri", lambda x: special.ndtri(0.5 + x / 2), make=UNIT, twice=False),
]
