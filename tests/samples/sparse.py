"""Uses of sparse copies of what depends on x."""

from __future__ import annotations

import torch

from fxhess.testing import Sample

BOX = (3, 3)

SAMPLES = [
    Sample("to_sparse", lambda x: x.sin().to_sparse().to_dense(), BOX),
    Sample("to_sparse_csr", lambda x: x.to_sparse_csr().to_dense() * x, BOX, batch=None),
    Sample("product", lambda x: x.to_sparse() @ x.mT, BOX, batch=None),
    Sample("sparse.mm", lambda x: torch.sparse.mm(x.to_sparse(), x.mT.sin()), BOX, batch=None),
]
