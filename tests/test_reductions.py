"""Reductions of a whole sample, and derivatives where a norm or deviation is not smooth."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import fxhess
from fxhess import oracle

WHOLE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sum": lambda x: x.sin().sum(),
    "mean": lambda x: x.sin().mean(),
    "nansum": lambda x: torch.nansum(x.sin()),
    "var": torch.var,
    "std": lambda x: torch.std(x, correction=0),
    "norm": lambda x: x.norm(),
    "norm 3": lambda x: torch.linalg.vector_norm(x, 3),
    "dist": lambda x: torch.dist(x[0], x[1] * 2, 3),
    "max": lambda x: x.sin().max() * x.exp().min(),
    "amax": lambda x: x.sin().amax(),
    "aminmax": lambda x: torch.mul(*torch.aminmax(x.exp())),
    "prod": torch.prod,
    "logsumexp": lambda x: torch.logsumexp(x, (0, 1)),
    "tests": lambda x: torch.where((x > 0).any(), x.sin(), x.cos()).sum() * torch.all(x > -9),
    "count": lambda x: torch.count_nonzero(x) * x.sin().sum(),
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_sample(name: str) -> None:
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = fxhess.transform(WHOLE[name], event_ndim=2)(x)
    torch.testing.assert_close(got, oracle.hessian(WHOLE[name], x, 2))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.linalg.vector_norm(x, dim=1),
        lambda x: torch.linalg.vector_norm(x, 3, dim=1),
        lambda x: torch.linalg.vector_norm(x, 1.5, dim=1),
        lambda x: torch.linalg.vector_norm(x, 0.5, dim=1),
        lambda x: torch.std(x, 1),
    ],
)
def test_no_nan_where_a_root_is_taken_of_zero(
    function: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """The function's own derivatives are 0 there, and those of what is added to it remain."""
    x = torch.zeros(2, 3, dtype=torch.float64)
    hessian = fxhess.transform(lambda x: function(x) + (x * x).sum(1))(x)
    torch.testing.assert_close(hessian, 2 * torch.eye(3, dtype=torch.float64).expand(2, 3, 3))


@pytest.mark.parametrize("function", [torch.prod, torch.cumprod])
def test_products_at_zeros(function: Callable[..., torch.Tensor]) -> None:
    x = torch.tensor([[0.0, 2.0, 0.0, 3.0], [1.0, 0.0, 2.0, 3.0]], dtype=torch.float64)

    def model(x: torch.Tensor) -> torch.Tensor:
        return function(x, 1).reshape(len(x), -1).sum(1)

    def plain(x: torch.Tensor) -> torch.Tensor:
        a, b, c, d = x.unbind(1)
        if function is torch.prod:
            return a * b * c * d
        return a + a * b + a * b * c + a * b * c * d

    torch.testing.assert_close(fxhess.transform(model)(x), oracle.hessian(plain, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_of_exponentials_far_out(dtype: torch.dtype) -> None:
    """Two terms of three are negligible or equal; nothing overflows or turns into NaN."""
    x = torch.tensor([[2000.0, -2000.0, 0.0], [700.0, 700.0, -700.0]], dtype=dtype)
    hessian = fxhess.transform(lambda x: torch.logsumexp(x, 1))(x)
    want = torch.zeros(2, 3, 3, dtype=dtype)
    want[1, :2, :2] = torch.tensor([[0.25, -0.25], [-0.25, 0.25]])
    torch.testing.assert_close(hessian, want)


def test_masked_rows_of_attention() -> None:
    """A row that attends to nothing gives zeros, and no NaN."""
    allowed = torch.tensor([[True, False], [False, False]])

    def model(x: torch.Tensor) -> torch.Tensor:
        attended = torch.nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=allowed)
        return attended.sin().sum((1, 2)) + x.cos().sum((1, 2))

    x = torch.randn(2, 2, 3, dtype=torch.float64)
    got = fxhess.transform(model, event_ndim=2)(x)

    def plain(x: torch.Tensor) -> torch.Tensor:
        return x[:, 0].sin().sum(1) + x.cos().sum((1, 2))

    torch.testing.assert_close(got, oracle.hessian(plain, x, 2))
