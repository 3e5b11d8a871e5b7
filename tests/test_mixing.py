"""What works along the batch axis is refused by name; what keeps samples apart beside it is not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fxhess
from fxhess.errors import CaptureError, SampleMixingError

INDEX = torch.tensor([1, 0])

MIXING = {
    "slice": lambda x: x[1:],
    "slice with steps": lambda x: x[::2],
    "select": lambda x: x[0] * x,
    "split": lambda x: x.split(2)[0],
    "unbind": lambda x: x.unbind(0)[1],
    "cat": lambda x: torch.cat([x, x]),
    "flip": lambda x: x * x.flip(0),
    "flip of all": lambda x: x * x.flip((0, 1)),
    "roll": lambda x: x * x.roll(1, 0),
    "roll of all": lambda x: x * x.roll(1),
    "rot90": lambda x: x[:, :, None] * torch.rot90(x)[None, :, :1],
    "unfold": lambda x: x.unfold(0, 2, 1),
    "diagonal": lambda x: x.diagonal(),
    "triangle": lambda x: x.tril(),
    "diag_embed, batch last": lambda x: torch.diag_embed(x.t()),
    "pad": lambda x: F.pad(x, (0, 0, 1, 0)),
    "crop": lambda x: F.pad(x, (0, 0, -1, 0)),
    "replication pad": lambda x: F.pad(x.t(), (1, 0), mode="replicate"),
    "index_select": lambda x: x.index_select(0, INDEX),
    "index": lambda x: x[INDEX],
    "index of both axes": lambda x: x[INDEX, INDEX],
    "gather": lambda x: x.gather(0, x.argsort(1)),
    "merged gather": lambda x: x.reshape(-1).gather(0, INDEX),
    "sort": lambda x: x.sort(0)[0],
    "topk": lambda x: x.topk(2, 0)[0],
    "max": lambda x: x.max(0)[0] * x,
    "median": lambda x: x.median(0)[0] * x,
    "median of all": lambda x: x.median() * x,
    "cummax": lambda x: x.cummax(0)[0],
    "index_add": lambda x: x.index_add(0, INDEX, torch.zeros(2, 4)),
    "index_fill": lambda x: x.index_fill(0, INDEX, 0.0),
    "scatter": lambda x: x.scatter(0, x.argsort(1), x),
    "scatter_add": lambda x: x.scatter_add(0, x.argsort(1), x),
    "slice_scatter": lambda x: x.slice_scatter(x[:1], 0, 0, 1),
    "select_scatter": lambda x: x.select_scatter(x[1], 0, 0),
    "index_put": lambda x: x.index_put((INDEX,), torch.zeros(2, 4)),
    "diagonal_scatter": lambda x: x.diagonal_scatter(torch.zeros(4)),
    "gram of samples": lambda x: x @ x.t(),
    "outer of samples": lambda x: x[:, None] * x,
    "square of a sum": lambda x: torch.mv(x.t(), x[:, 0]).sum() ** 2,
    "distances of samples": lambda x: torch.cdist(x, x),
    "pairs of samples": F.pdist,
}

SEPARATE = {
    "slice of everything": lambda x: x[:][: len(x)],
    "roll beside": lambda x: x.t().roll(1, 0).t(),
    "sort beside": lambda x: x.t().sort(0)[0].t(),
    "pad beside": lambda x: F.pad(x.t(), (0, 0, 1, 1)).t(),
    "triangle beside": lambda x: (x[:, :, None] * x[:, None]).tril(),
    "arange": lambda x: x[torch.arange(x.shape[0])],
    "arange from 0 in steps of 1": lambda x: x[torch.arange(0, x.shape[0], 1), x.argmax(1)],
}


@pytest.mark.parametrize("name", MIXING)
def test_along_the_batch_is_refused(name):
    x = torch.randn(5, 4)
    with pytest.raises(SampleMixingError, match="samples of the batch see each other"):
        fxhess.transform(lambda x: torch.sin(MIXING[name](x)).sum())(x)


@pytest.mark.parametrize("name", SEPARATE)
def test_beside_the_batch_is_not(name):
    def model(x):
        return torch.sin(SEPARATE[name](x) * 1.5).reshape(len(x), -1).sum(1)

    x = torch.randn(5, 4, dtype=torch.float64)
    expected = torch.func.vmap(torch.func.hessian(lambda s: model(s[None])[0]))(x)
    torch.testing.assert_close(fxhess.transform(model)(x), expected)


def test_an_operation_that_takes_no_other_batch_is_refused_by_name():
    """Also one without a rule, of which nothing can be tried with fewer samples."""
    x = torch.randn(7, 4, dtype=torch.float64)
    with pytest.raises(SampleMixingError, match="no batch of another size"):
        fxhess.transform(lambda x: torch.linalg.householder_product(x, x.new_ones(4)).sum())(x)


def test_a_mean_of_what_is_no_nan_over_samples():
    """A plain sum over how many they are; what one NaN makes of it depends on all samples."""

    def model(x):
        return torch.nanmean(x.exp().prod(1))

    x = torch.randn(5, 4, dtype=torch.float64)
    got = fxhess.transform(model, ("value", "hessian"))(x)
    whole = torch.autograd.functional.hessian(model, x)
    torch.testing.assert_close(got.hessian, torch.stack([whole[i, :, i] for i in range(5)]))
    torch.testing.assert_close(got.value, model(x))
    x[1, 2] = torch.nan
    with pytest.raises(SampleMixingError):
        fxhess.transform(model)(x)
    for mixed in (lambda x: x * x.nanmean(0), lambda x: torch.nanmean(x).tanh()):
        with pytest.raises(SampleMixingError):
            fxhess.transform(mixed)(torch.randn(5, 4))


def test_an_index_that_does_not_count_the_samples_is_refused():
    x = torch.randn(5, 4)
    with pytest.raises(SampleMixingError):
        fxhess.transform(lambda x: x[torch.arange(len(x)).flip(0), x.argmax(1)].sin())(x)
    with pytest.raises(SampleMixingError):
        fxhess.transform(lambda x: x[torch.arange(1, len(x) + 1) - 1, x.argmax(1)].sin())(x)


def test_positions_along_the_batch_are_refused():
    with pytest.raises((CaptureError, SampleMixingError)):
        fxhess.transform(lambda x: torch.where(x[:, 0] > 0)[0].float().sum() * x.sum())(
            torch.randn(5, 4)
        )


def test_a_mask_that_sets_a_number():
    def sets(x):
        y = x * x
        y[x > 0] = 3.0
        return y.sum(1)

    x = torch.randn(5, 4)
    assert torch.equal(fxhess.transform(sets)(x), torch.diag_embed(2.0 * (x <= 0)))


WEIGHT = torch.linspace(-1.0, 1.0, 16, dtype=torch.float64).reshape(4, 4)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.linear(x.view(-1, 2, 2), WEIGHT[:, :2], WEIGHT[0]),
        lambda x: torch.einsum("bi,ij,bj->b", x, WEIGHT, x),
        lambda x: torch.linalg.multi_dot([x, WEIGHT, WEIGHT]),
        lambda x: torch.kron(x, WEIGHT[:1]),
        lambda x: torch.take_along_dim(x, x.argsort(1), 1),
        lambda x: F.pad(x, (1, 1)),
    ],
    ids=["linear", "einsum", "multi_dot", "kron", "take_along_dim", "pad"],
)
@pytest.mark.parametrize("batch", [1, 2, 6])
def test_the_batch_may_have_any_size(function, batch):
    """Also where PyTorch's own implementation reads sizes as numbers."""

    def model(x):
        return torch.sin(function(x)).unsqueeze(-1).flatten(1).sum(1)

    hessian = fxhess.transform(model)
    hessian(torch.randn(3, 4, dtype=torch.float64))
    x = torch.randn(batch, 4, dtype=torch.float64)
    expected = torch.func.vmap(torch.func.hessian(lambda s: model(s[None])[0]))(x)
    torch.testing.assert_close(hessian(x), expected)
