"""Batch normalization: evaluated it is per sample, in training it mixes the samples."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxhess


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).tanh().sum(1)  # the user's line


@pytest.mark.parametrize("stats", [True, False])
def test_batch_norm_in_training_is_refused_by_name_and_line(stats: bool) -> None:
    model = _Block()
    model.inner[1] = nn.BatchNorm1d(3, track_running_stats=stats)
    with pytest.raises(fxhess.SampleMixingError) as raised:
        fxhess.transform(model)(torch.randn(5, 4))
    text = str(raised.value)
    assert "'inner.1'" in text
    assert "return self.inner(x).tanh().sum(1)  # the user's line" in text
    assert "eval()" in text


def test_batch_norm_in_training_leaves_its_statistics_alone() -> None:
    model = _Block()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(fxhess.SampleMixingError):
        fxhess.transform(model)(torch.randn(5, 4))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_batch_norm_evaluated_reads_live_statistics() -> None:
    model = _Block().double().eval()
    hess = fxhess.transform(model)
    x = torch.randn(5, 4, dtype=torch.float64)
    first = hess(x)
    assert model.inner[1].running_var is not None
    model.inner[1].running_var.mul_(4)
    second = hess(x)
    assert not torch.allclose(first, second)
    torch.testing.assert_close(second, fxhess.transform(model)(x))


def test_instance_norm_in_training_is_per_sample() -> None:
    model = nn.Sequential(nn.InstanceNorm1d(2, affine=True), nn.Tanh(), nn.Flatten())
    x = torch.randn(3, 2, 4)
    hessian = fxhess.transform(model, event_ndim=2)(x)
    assert hessian.shape == (3, 8, 2, 4, 2, 4)
