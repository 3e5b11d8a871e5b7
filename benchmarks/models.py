"""The workloads' models in PyTorch. Each takes ``x: [*batch, *event]``, batch axes or none."""

import itertools

import torch
from torch import Tensor, nn

__all__ = [
    "AttentionBlock",
    "DeepSet",
    "EncoderLayer",
    "Glm",
    "PairwiseEnergy",
    "Quadratic",
    "small_cnn",
    "tanh_net",
]


def tanh_net(*widths: int) -> nn.Sequential:
    """A fully connected net, ``[*batch, widths[0]]`` to ``[*batch, widths[-1]]``, tanh between."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def small_cnn() -> nn.Sequential:
    """``[*batch, 1, 28, 28]`` to ``[*batch, 1]`` by two strided convolutions and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2),  # [8, 13, 13]
        nn.Tanh(),
        nn.Conv2d(8, 16, 3, stride=2),  # [16, 6, 6]
        nn.Tanh(),
        nn.Flatten(-3),
        nn.Linear(576, 1),
    )


class Quadratic(nn.Module):
    """``0.5 * sum_b x_b^T Q x_b``: ``[B, d]`` to a scalar of the whole batch."""

    Q: Tensor

    def __init__(self, d: int) -> None:
        super().__init__()
        self.register_buffer("Q", torch.randn(d, d))

    def forward(self, x: Tensor) -> Tensor:
        """``x: [B, d]`` to ``[]``."""
        return 0.5 * torch.tensordot(x, x @ self.Q)


class Glm(nn.Module):
    """``sum_k softplus(w_k . x + b_k)``: ``[*batch, d]`` to ``[*batch]``."""

    def __init__(self, d: int, terms: int) -> None:
        super().__init__()
        self.linear = nn.Linear(d, terms)

    def forward(self, x: Tensor) -> Tensor:
        """``x: [*batch, d]`` to ``[*batch]``."""
        return nn.functional.softplus(self.linear(x)).sum(-1)


class DeepSet(nn.Module):
    """``rho(sum_n phi(x_n))``: ``[*batch, n, k]`` to ``[*batch, 1]``."""

    def __init__(self, k: int, width: int) -> None:
        super().__init__()
        self.phi = tanh_net(k, width, width)
        self.rho = tanh_net(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``x: [*batch, n, k]`` to ``[*batch, 1]``."""
        return self.rho(self.phi(x).sum(-2))


class PairwiseEnergy(nn.Module):
    """``sum_{i<j} net(|p_i - p_j|)``: positions ``[*batch, n, 3]`` to energies ``[*batch]``."""

    first: Tensor
    second: Tensor

    def __init__(self, particles: int, width: int) -> None:
        super().__init__()
        first, second = torch.triu_indices(particles, particles, offset=1)
        self.register_buffer("first", first)
        self.register_buffer("second", second)
        self.net = tanh_net(1, width, width, 1)

    def forward(self, p: Tensor) -> Tensor:
        """``p: [*batch, n, 3]`` to ``[*batch]``."""
        difference = p[..., self.first, :] - p[..., self.second, :]
        distance = difference.square().sum(-1, keepdim=True).sqrt()
        return self.net(distance).sum((-2, -1))


class AttentionBlock(nn.Module):
    """Pre-norm transformer block, mean over tokens, linear: ``[*batch, n, k]`` to ``[*batch, 1]``.

    Attention is written out, since PyTorch's fused kernels refuse the rivals' second derivatives.
    """

    def __init__(self, k: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(k)
        self.qkv = nn.Linear(k, 3 * k)
        self.proj = nn.Linear(k, k)
        self.norm2 = nn.LayerNorm(k)
        self.mlp = tanh_net(k, 2 * k, k)
        self.head = nn.Linear(k, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``x: [*batch, n, k]`` to ``[*batch, 1]``."""
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        scores = (q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5
        x = x + self.proj(scores.softmax(-1) @ v)
        x = x + self.mlp(self.norm2(x))
        return self.head(x.mean(-2))


class EncoderLayer(nn.Module):
    """PyTorch's own encoder layer, mean over tokens, linear: ``[(B,) n, k]`` to ``[(B,) 1]``."""

    def __init__(self, k: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            k, heads, hidden, dropout=0.0, activation="gelu", batch_first=True
        )
        self.head = nn.Linear(k, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``x: [(B,) n, k]`` to ``[(B,) 1]``."""
        return self.head(self.layer(x).mean(-2))
