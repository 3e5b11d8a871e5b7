"""The workloads: what is differentiated, at which size. A new one is a line in ``WORKLOADS``."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from benchmarks import models

__all__ = ["WORKLOADS", "Workload"]


@dataclass(frozen=True)
class Workload:
    """A model, and the shape and type of its batch ``x: [B, *event]``, entries standard normal."""

    name: str
    summary: str
    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    outputs: int = 1  # m of a model that gives [B, m]
    batches_only: bool = False  # the model cannot take one sample without a batch axis
    quick: bool = False  # short enough to be part of --quick
    dtype: torch.dtype = torch.float32

    @property
    def event_ndim(self) -> int:
        """How many trailing axes of x make one sample."""
        return len(self.shape) - 1

    @property
    def event_size(self) -> int:
        """d, the number of inputs of one sample."""
        return torch.Size(self.shape[1:]).numel()

    def make_model(self, device: str) -> nn.Module:
        """The model with its own reproducible weights, in evaluation mode.

        Its weights are frozen: a Hessian is wanted, no gradient through it, of every rival.
        """
        torch.manual_seed(0)
        return self.model().to(device, self.dtype).eval().requires_grad_(False)

    def make_x(self, seed: int, device: str) -> Tensor:
        """Fresh data, the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.shape, generator=generator, dtype=self.dtype).to(device)

    def in_double(self) -> "Workload":
        """The same in float64."""
        return replace(self, name=f"{self.name}-f64", dtype=torch.float64, quick=False)


HEADLINE = Workload(
    "headline",
    "tanh net 200-200-200-1",
    lambda: models.tanh_net(200, 200, 200, 1),
    (500, 200),
    quick=True,
)
PINN = Workload(
    "pinn",
    "PINN, tanh net 3-64-64-64-64-1",
    lambda: models.tanh_net(3, 64, 64, 64, 64, 1),
    (10_000, 3),
)
PINN_2 = Workload(
    "pinn-2",
    "PINN, tanh net 2-64-64-64-64-1",
    lambda: models.tanh_net(2, 64, 64, 64, 64, 1),
    (10_000, 2),
)
VECTOR = Workload(
    "vector",
    "tanh net 2-64-64-3, three outputs",
    lambda: models.tanh_net(2, 64, 64, 3),
    (2000, 2),
    outputs=3,
)
LAPLACIAN_MLP = Workload(
    "laplacian-mlp",
    "tanh net 50-768-768-512-512-1",
    lambda: models.tanh_net(50, 768, 768, 512, 512, 1),
    (16, 50),
)

WORKLOADS = [
    HEADLINE,
    Workload("small", "tanh net 10-32-1", lambda: models.tanh_net(10, 32, 1), (32, 10), quick=True),
    Workload(
        "columns",
        "tanh net 20-64-64-1 on columns",
        lambda: nn.Sequential(nn.Flatten(-2), *models.tanh_net(20, 64, 64, 1)),
        (320, 20, 1),
        quick=True,
    ),
    Workload(
        "quadratic",
        "0.5*tensordot(x, x @ Q)",
        lambda: models.Quadratic(16),
        (64, 16),
        batches_only=True,
        quick=True,
    ),
    PINN,
    PINN.in_double(),
    PINN_2,
    PINN_2.in_double(),
    VECTOR,
    replace(VECTOR, name="vector-large", shape=(20_000, 2)),
    LAPLACIAN_MLP,
    LAPLACIAN_MLP.in_double(),
    Workload("wide", "tanh net 784-128-64-1", lambda: models.tanh_net(784, 128, 64, 1), (32, 784)),
    Workload(
        "bottleneck",
        "tanh net 300-32-32-1",
        lambda: models.tanh_net(300, 32, 32, 1),
        (100, 300),
    ),
    Workload("deep-set", "deep set, 32 of 4, width 64", lambda: models.DeepSet(4, 64), (64, 32, 4)),
    Workload(
        "pairwise",
        "pair energy of 10 particles, net 1-32-32-1",
        lambda: models.PairwiseEnergy(10, 32),
        (128, 10, 3),
    ),
    Workload("glm", "400 softplus terms, 100 dims", lambda: models.Glm(100, 400), (256, 100)),
    Workload(
        "attention",
        "attention block, 8 tokens of 16",
        lambda: models.AttentionBlock(16),
        (16, 8, 16),
    ),
    Workload(
        "encoder",
        "nn.TransformerEncoderLayer, gelu, 8 tokens of 16",
        lambda: models.EncoderLayer(16, 2, 32),
        (16, 8, 16),
    ),
    Workload("cnn", "CNN of two convolutions, 28×28", models.small_cnn, (4, 1, 28, 28)),
    Workload(
        "single",
        "tanh net 10-32-32-1, one sample",
        lambda: models.tanh_net(10, 32, 32, 1),
        (1, 10),
        quick=True,
    ),
]
