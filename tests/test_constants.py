"""Which constants are one for each sample, and which are shared: told by shapes, and by trying."""

from __future__ import annotations

import pytest
import torch
from reference import assert_close, randn, referee
from torch import nn

import fxhess
from fxhess import InputError

W, V = randn(5, 8, seed=1), randn(8, seed=2)


def mixed(x, c, s, kind):
    """One constant of all samples, two that each has its own."""
    h = torch.tanh(x @ W[:3])
    h = h * V[kind][:, None] + h * c.cos().sum(-1, keepdim=True)
    return torch.sin(h).sum(-1) * s


@pytest.mark.parametrize("n", [3, 4])
@pytest.mark.parametrize("verified", [False, True])
def test_one_shared_constant_among_batched_ones(n, verified):
    """Also where it has as many entries as there are samples, and before the first call."""
    x, c, s = randn(n, 3, seed=1), randn(3, seed=2), randn(n, seed=3)
    kind = torch.randint(0, 8, (n,), generator=torch.Generator().manual_seed(0))

    want = torch.stack([
        referee(lambda a, i=i: mixed(a[None], c, s[i : i + 1], kind[i : i + 1])[0], x[i])[0][0]
        for i in range(n)
    ])  # fmt: skip
    hess = fxhess.transform(mixed)
    if verified:
        hess.verify(x, c, s, kind)
    assert_close(hess(x, c, s, kind), want)
    told = "given for each sample: s, kind; for all of them: c"
    assert any(told in note for note in hess.explain(x, c, s, kind).notes)
    assert_close(hess(x[:2], c, s[:2], kind[:2]), want[:2])


@pytest.mark.parametrize("n", [3, 4])
def test_one_shared_constant_beside_parameters(n):
    """There samples are captured one by one, and do not show which constants are shared."""
    x, c, s = randn(n, 3, seed=1), randn(3, seed=2), randn(n, seed=3)
    layer = nn.Linear(3, 8).double()

    def model(x, c, s):
        return torch.tanh(layer(x) * c.cos().sum(-1, keepdim=True)).sum(-1) * s

    hess = fxhess.transform(model, wrt=(fxhess.parameters(), "x"))
    got = hess(x, c, s)
    weight = next(name for name in got[0] if name.endswith("weight"))
    found = [
        referee(
            lambda w, a, i=i: (
                torch.tanh((a @ w.T + layer.bias) * c.cos().sum(-1)).sum(-1) * s[i]
            ),
            layer.weight, x[i],
        )
        for i in range(n)
    ]  # fmt: skip
    assert_close(got[0][weight][1].detach(), torch.stack([f[0][1] for f in found]))
    assert_close(got[1][1].detach(), torch.stack([f[1][1] for f in found]))
    hess.verify(x, c, s)
    with pytest.raises(fxhess.SampleMixingError, match="given for each sample: c, s"):
        fxhess.transform(
            lambda x, c, s: model(x, c, s) * c.norm() * s.norm(), wrt=(fxhess.parameters(), "x")
        )(randn(3, 3), c, randn(3))


@pytest.mark.parametrize("given", ["held by the model", "as an argument for all"])
def test_an_entry_for_each_sample_that_is_not_batched(given):
    """Then the program is for one batch size, and the batch is not cut."""
    x, s, M = randn(3000, 20, seed=1), randn(3000, seed=2), randn(20, 64, seed=3)
    if given == "held by the model":
        hess, more = fxhess.transform(lambda x: torch.tanh(x @ M).sum(-1) * s), ()
    else:
        model = lambda x, s: torch.tanh(x @ M).sum(-1) * s  # noqa: E731
        hess, more = fxhess.transform(model, in_dims=(0, None)), (s,)
    want = fxhess.transform(lambda x: torch.tanh(x @ M).sum(-1))(x) * s[:, None, None]
    small = fxhess.transform(hess.model, max_memory=22 << 20, in_dims=hess.arguments.in_dims)
    assert_close(hess(x, *more), want)
    assert any("this size of the batch" in note for note in hess.explain(x, *more).notes)
    with pytest.raises(InputError, match="do not suffice"):
        small(x, *more)
    ample = fxhess.transform(hess.model, max_memory=64 << 20, in_dims=hess.arguments.in_dims)
    assert_close(ample(x, *more), want)
