"""Sparse tensors of the model's own: refused by name, and the way that the message names works."""

from __future__ import annotations

import pytest
import torch
from reference import check, randn

import fxhess

DENSE = randn(4, 4) * (randn(4, 4, seed=1) > 0)
SPARSE = DENSE.to_sparse().coalesce()
ROWS, COLUMNS = SPARSE.indices().clone()
VALUES = SPARSE.values().clone()[:, None]


@pytest.mark.parametrize(
    "product",
    [
        lambda x: SPARSE @ x,
        lambda x: torch.sparse.mm(SPARSE, x),
        lambda x: SPARSE.to_sparse_csr() @ x,
    ],
)
def test_sparse_constants_are_refused_by_name(product):
    with pytest.raises(fxhess.errors.CaptureError, match="strided tensors only"):
        fxhess.transform(lambda x: product(x).sin().sum(), event_ndim=2)(randn(4, 3))


def test_the_product_written_with_indices():
    def product(x):
        read = x.index_select(-2, COLUMNS) * VALUES
        return torch.zeros_like(x).index_add(-2, ROWS, read)

    x = randn(2, 4, 3)
    torch.testing.assert_close(product(x), DENSE @ x)
    check(lambda x: product(x).sin().sum((-1, -2)), x, 2)
