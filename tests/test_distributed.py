"""Training modules that hold a transformed one, in two processes: gradients as in one."""

from __future__ import annotations

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from reference import mlp, randn
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import fxhess
from fxhess.errors import CaptureError

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="PyTorch without gloo"
)

CPU = torch.device("cpu")
X = randn(8, 3, seed=1)


class Residual(nn.Module):
    """The loss of a PINN: what is wrapped and called."""

    def __init__(self, net):
        super().__init__()
        self.u = fxhess.transform(net, ("value", "laplacian"))

    def forward(self, x):
        u = self.u(x)
        return (u.laplacian + u.value.sin()).square().mean()


def _net():
    return mlp(3, 8, 8, 1, seed=4)


def _step(module, x):
    """One step of gradient descent with rate 1."""
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    module(x).backward()
    optimizer.step()


def _ddp(residual, x):
    _step(DistributedDataParallel(residual), x)
    return residual.parameters()


def _fsdp(residual, x, **options):
    wrapped = FullyShardedDataParallel(residual, device_id=CPU, **options)
    _step(wrapped, x)
    with FullyShardedDataParallel.summon_full_params(wrapped):
        return [p.detach().clone() for p in wrapped.parameters()]


def _fsdp_with_original_parameters(residual, x):
    return _fsdp(residual, x, use_orig_params=True)


def _fully_shard(residual, x):
    fully_shard(residual)
    _step(residual, x)
    return [p.full_tensor() for p in residual.parameters()]


def _fully_shard_the_transform(residual, x):
    fully_shard(residual.u)
    _step(residual, x)
    return [p.full_tensor() for p in residual.parameters()]


def _fully_shard_inside(residual, x):
    """Not possible, and said: layers that gather their weights when they are called."""
    fully_shard(residual.u.model[0])
    with pytest.raises(CaptureError, match=r"when it is called.*\n.*fully_shard\(hess"):
        residual(x)
    return


def _ddp_inside(residual, x):
    """Likewise: the wrapper sums gradients only if it is called itself."""
    hess = fxhess.transform(DistributedDataParallel(_net()))
    with pytest.raises(CaptureError, match=r"DistributedDataParallel.*\n.*DDP\(hess\)"):
        hess(x)
    return


WAYS = (
    _ddp, _fsdp, _fsdp_with_original_parameters, _fully_shard, _fully_shard_the_transform,
    _fully_shard_inside, _ddp_inside,
)  # fmt: skip


def _flat(parameters):
    return torch.cat([p.detach().flatten() for p in parameters])


def _work(rank, store):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    try:
        alone = Residual(_net())
        _step(alone, X)
        want = _flat(alone.parameters())
        mine = X[4 * rank : 4 * rank + 4]
        for way in WAYS:
            got = way(Residual(_net()), mine)
            if got is not None:
                error = (_flat(got) - want).abs().max().item()
                assert error < 1e-13, f"{way.__name__}: off by {error}"
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(os.name != "posix", reason="processes share a file store")
def test_gradients_of_two_processes_are_those_of_one(tmp_path):
    mp.spawn(_work, (str(tmp_path / "store"),), nprocs=2)
