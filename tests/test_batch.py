"""Batch-dimension propagation: where the samples are in every value, and what is refused."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from reference import ALL, assert_close, assert_symmetric, block_diagonal, check, mlp, randn
from torch import nn
from torch.nn import functional as F

import fxhess
from fxhess import SampleMixingError

W, V = randn(4, 6, seed=1), randn(4, 4, seed=2)
B6 = randn(6, seed=3)
FLAT = randn(12, 2, seed=6)


def _merged(x):
    return torch.tanh(x.reshape(-1, 4) @ W).reshape(*x.shape[:-1], 6).sum(-1).sum(-1)


def _merged_thrice(x):  # [B, 3, 2, 4]
    h = torch.tanh(x.reshape(-1, 4) @ V)
    h = torch.sin(h.view(-1, 2, 4).transpose(1, 2).reshape(-1, 2))
    return h.view(x.shape[0], 3, 8).square().sum((1, 2))


def _split_event(x):  # [B, 4] -> [B, 2, 2]
    return torch.exp(x.view(-1, 2, 2) @ V[:2, :2]).sum((1, 2))


def _sequence_first(x):  # [S, B, k] inside
    h = torch.tanh(x.transpose(0, 1) @ W)
    return (h * h[:1]).sum(0).sum(-1)


def _batch_last(x):
    return torch.tanh(W.T @ x.mT + B6[:, None]).square().sum(0)


def _per_sample_norm(x):
    return (x / x.norm(dim=-1, keepdim=True)).pow(3).sum(-1)


def _unsqueezed(x):
    return torch.sin(x[:, None] * x[:, :, None]).sum((1, 2))


def _expanded_constant(x):
    return (x * V[0].expand(x.shape[0], 4)).exp().sum(-1)


def _chunks(x):
    a, b = x.chunk(2, -1)
    return (a.exp() * b).sum(-1)


def _batch_size_as_number(x):
    size = x.shape[0]
    return (x * size / (size + 0.0)).exp().sum(-1) + size - size * 1.0


MODELS = {  # name: model, event shape
    "batch and event axes merged": (_merged, (3, 4)),
    "merged again and again": (_merged_thrice, (3, 2, 4)),
    "an event axis split": (_split_event, (4,)),
    "sequence first": (_sequence_first, (3, 4)),
    "batch last": (_batch_last, (4,)),
    "normalized samples": (_per_sample_norm, (4,)),
    "outer products": (_unsqueezed, (4,)),
    "a constant for each sample": (_expanded_constant, (4,)),
    "chunks": (_chunks, (4,)),
    "sizes as numbers": (_batch_size_as_number, (4,)),
    "flatten": (lambda x: torch.tanh(x.flatten(1) @ FLAT).sum(-1), (3, 4)),
    "unfold": (lambda x: x.unfold(-1, 2, 1).prod(-1).sum(-1), (4,)),
    "einsum": (lambda x: torch.einsum("bi,ij,bj->b", x.sin(), V, x.cos()), (4,)),
    "einsum, batch last": (lambda x: torch.einsum("bi,ij->jb", x, W).tanh().sum(0), (4,)),
    "vmap inside": (lambda x: torch.vmap(lambda s: s.sin() @ V @ s)(x), (4,)),
}


@pytest.mark.parametrize("size", [0, 1, 2, 5])
@pytest.mark.parametrize("name", MODELS)
def test_model(name, size):
    model, event = MODELS[name]
    check(model, randn(size, *event, seed=size), len(event))


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (2, 1, 3), (1, 2, 1, 1, 2, 1)])
def test_any_number_of_batch_axes(batch):
    check(mlp(3, 5, 1), randn(*batch, 3))
    check(lambda x: torch.softmax(x @ V, -1)[..., 0], randn(*batch, 4))


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_vector_outputs_over_any_batch(batch):
    check(mlp(3, 5, 2), randn(*batch, 3))


def test_batch_axes_in_another_order_inside():
    def model(x):  # [A, B, k]
        h = torch.tanh(x.permute(1, 0, 2).reshape(-1, 4) @ W)
        return h.reshape(x.shape[1], x.shape[0], 6).transpose(0, 1).sum(-1)

    check(model, randn(2, 3, 4))


@pytest.mark.parametrize("event_ndim", [0, 1, 2, 3])
def test_event_ndim_says_what_one_sample_is(event_ndim):
    def model(x):
        y = torch.sin(x) * x
        return y.sum(tuple(range(-event_ndim, 0))) if event_ndim else y

    x = randn(2, 3, 4)
    check(model, x, event_ndim)
    nb = 3 - event_ndim
    got = fxhess.transform(model, event_ndim=event_ndim)(x)
    assert got.shape == (*x.shape[:nb], *x.shape[nb:] * 2)


def test_a_batch_axis_named_as_event_axis():
    """Samples that see each other are one sample."""
    model = lambda x: (torch.tanh(x - x.mean(0)) @ V).square().sum()  # noqa: E731
    check(model, randn(3, 4), event_ndim=2)


def test_a_batch_size_read_by_len_is_traced_for_that_size():
    hess = fxhess.transform(lambda x: (x * torch.ones(len(x), 4)).exp().sum(-1))
    for size in (2, 5, 3, 5):
        x = randn(size, 4)
        assert_close(hess(x), torch.diag_embed(x.exp()))
    with pytest.raises(fxhess.CaptureError, match=r"x\.shape\[0\]"):
        hess(randn(1, 4))


# --- plain sums over the batch --------------------------------------------------------------------

Q = randn(4, 4, seed=4)
SUMS = {
    "sum": lambda x: (x @ W).tanh().sum(),
    "mean": lambda x: torch.exp(x @ W).mean(),
    "mean then sum": lambda x: torch.exp(x @ W).mean(0).sum(),
    "weighted": lambda x: (torch.sin(x).sum(-1) * 3).sum() / 7 - 1,
    "tensordot": lambda x: 0.5 * torch.tensordot(x, x @ Q, dims=2),
    "einsum": lambda x: torch.einsum("bi,bj,ij->", x.sin(), x.cos(), Q),
    "mse": lambda x: F.mse_loss(torch.tanh(x @ W).sum(-1), x.new_zeros(x.shape[0])),
    "a sum of sums": lambda x: x.exp().sum() + x.sin().sum(0).sum(),
    "dot": lambda x: torch.dot(x.reshape(-1), x.exp().reshape(-1)),
    "linear after it": lambda x: -(2 * x.pow(3).sum(0) + 1) @ V[0],
    "matmul over the batch": lambda x: (x.sin().T @ x.cos() * Q).sum(),
    "divided by its size": lambda x: x.exp().sum() / x.shape[0],
    "empty shape kept": lambda x: x.exp().sum().reshape(1),
}


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("size", [1, 3])
def test_plain_sum(name, size):
    model = SUMS[name]
    x = randn(size, 4, seed=5)
    got = fxhess.transform(model, ALL)(x)
    want = block_diagonal(model, x)
    assert_close(got.hessian, want)
    assert_symmetric(got.hessian)
    (gradient,) = torch.autograd.grad(model(p := x.clone().requires_grad_()).sum(), p)
    assert_close(got.gradient, gradient)
    assert_close(got.value, model(x).reshape(()))


@pytest.mark.parametrize("name", SUMS)
def test_plain_sum_of_an_empty_batch(name):
    assert fxhess.transform(SUMS[name])(randn(0, 4)).shape == (0, 4, 4)


def test_sum_over_several_batch_axes():
    x = randn(2, 3, 4)
    model = lambda x: torch.tanh(x @ W).sum()  # noqa: E731
    assert_close(fxhess.transform(model)(x), block_diagonal(model, x))


def test_samples_of_a_sum_do_not_change_each_other():
    hess = fxhess.transform(SUMS["sum"])
    x = randn(5, 4)
    assert_close(hess(x)[:2], hess(x[:2]), 1e-13)


# --- refusals -------------------------------------------------------------------------------------


class Mixing(nn.Module):
    """A network whose submodule 'inner' is given by a test."""

    def __init__(self, inner):
        super().__init__()
        self.first = nn.Linear(4, 4).double()
        self.inner = inner

    def forward(self, x):
        return self.inner(self.first(x)).flatten(1).sum(-1)


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


REFUSED = {  # name: (function of [B, 4], part of an operator's name)
    "minus mean": (lambda x: x - x.mean(0).exp(), "exp"),
    "centred": (lambda x: torch.tanh(x - x.mean(0)), ""),
    "gram matrix": (lambda x: x @ x.T, "mm"),
    "gram matrix in einsum": (lambda x: torch.einsum("ai,bi->ab", x, x), "mm"),
    "cumsum": (lambda x: x.cumsum(0), "cumsum"),
    "cumsum from behind": (lambda x: x.cumsum(-2), "cumsum"),
    "roll": (lambda x: x.roll(1, 0), "roll"),
    "roll of all": (lambda x: x.roll(1), ""),
    "sort": (lambda x: x.sort(0).values, "sort"),
    "flip": (lambda x: x.flip(0), "flip"),
    "first sample": (lambda x: x - x[0], ""),
    "index": (lambda x: x[torch.tensor([0, 0])].sum(0) + x, "index"),
    "gather": (lambda x: x.gather(0, torch.zeros(1, 4, dtype=torch.long)) + x, "gather"),
    "slice": (lambda x: torch.cat([x[1:], x[:1]]), ""),
    "softmax": (lambda x: x.softmax(0), "softmax"),
    "log-softmax": (lambda x: x.log_softmax(0), "softmax"),
    "max": (lambda x: x - x.amax(0), "amax"),
    "max over all": (lambda x: x / x.abs().max(), "max"),
    "norm over all": (lambda x: x / x.norm(), ""),
    "variance": (lambda x: x / x.var(0), ""),
    "product": (lambda x: x * x.prod(0), ""),
    "logsumexp": (lambda x: x - x.logsumexp(0), ""),
    "reshaped away": (lambda x: x.reshape(2, -1).T.reshape(-1, 4), ""),
    "outer difference": (lambda x: (x[:, None] - x[None]).exp().sum(1), ""),
    "concatenated": (lambda x: torch.cat([x, x]).reshape(-1, 2, 4), ""),
    "sum times itself": (lambda x: x * x.sum(0), "mul"),
    "sum squared": (lambda x: x + x.sum(0).square(), ""),
    "covariance": (lambda x: x @ (x.T @ x), "mm"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_op_module_and_line(name):
    function, op = REFUSED[name]
    model = Mixing(Apply(function))
    with pytest.raises(SampleMixingError) as caught:
        fxhess.transform(model)(randn(4, 4))
    message = str(caught.value)
    assert "op aten." in message and op in message.split("where: ")[1].split(",")[0]
    lines, start = inspect.getsourcelines(function)
    assert f"{Path(__file__).name}:{start}: " in message
    assert lines[0].strip() in message
    assert "next:" in message


def test_refusal_names_the_module():
    with pytest.raises(SampleMixingError, match="in module 'inner'"):
        fxhess.transform(Mixing(Apply(lambda x: x.cumsum(0))))(randn(4, 4))


def test_batch_norm_in_training_is_refused_and_in_evaluation_not():
    norm = nn.BatchNorm1d(4).double()
    model = Mixing(nn.Sequential(norm, nn.Tanh()))
    model.train()
    hess = fxhess.transform(model)
    with pytest.raises(SampleMixingError) as caught:
        hess(randn(4, 4))
    message = str(caught.value)
    assert "batch_norm" in message and "inner.0" in message and "eval()" in message
    assert norm.num_batches_tracked == 0
    assert torch.equal(norm.running_mean, torch.zeros(4, dtype=torch.float64))
    check(model.eval(), randn(4, 4))


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(4, track_running_stats=False)])
def test_batch_statistics_without_running_ones_are_refused(layer):
    with pytest.raises(SampleMixingError, match="batch_norm"):
        fxhess.transform(Mixing(layer.double()).eval())(randn(4, 4))


def test_mixing_refused_without_a_module():
    def model(x):
        return (x - x.flip(0)).exp().sum(-1)

    with pytest.raises(SampleMixingError, match=r"op aten\.flip\.default, at .*test_batch\.py"):
        fxhess.transform(model)(randn(3, 4))


def test_mixing_refused_on_the_second_batch_axis():
    with pytest.raises(SampleMixingError, match="cumsum"):
        fxhess.transform(lambda x: x.cumsum(1).exp().sum(-1))(randn(2, 3, 4))


def test_mixing_of_what_does_not_depend_on_x_is_no_mixing():
    check(lambda x: (x * V.cumsum(0).softmax(0)[0]).exp().sum(-1), randn(3, 4))
