"""Models of other packages as they are; each only where its package is installed (extra
`models`)."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import nn
from zoo import Case, uniform

ATOMS = 4


def has(package: str) -> bool:
    """Whether it is installed; it is imported when a model is built, not before."""
    return importlib.util.find_spec(package) is not None


class Whole(nn.Module):
    def forward(self, h: torch.Tensor, _: torch.Tensor, dim: int) -> torch.Tensor:
        return h.sum(dim, keepdim=True)


class Molecule(nn.Module):
    """PyTorch Geometric's SchNet over given edges, one molecule at a time, mapped over the batch.

    Its own readout counts the molecules by the value of a tensor; here there is one."""

    def __init__(self) -> None:
        super().__init__()
        from torch_geometric.nn.models import SchNet

        pairs = [(i, j) for i in range(ATOMS) for j in range(ATOMS) if i != j and (i + j) % 4]
        self.register_buffer("edges", torch.tensor(pairs).T.contiguous())
        self.register_buffer("numbers", torch.tensor([1, 6, 6, 8]))
        self.net = SchNet(
            hidden_channels=6,
            num_filters=4,
            num_interactions=2,
            num_gaussians=5,
            cutoff=6.0,
            interaction_graph=self.graph,
        )
        self.net.readout = Whole()

    def graph(self, p: torch.Tensor, _: Any) -> tuple[torch.Tensor, torch.Tensor]:
        i, j = self.edges
        return self.edges, (p[i] - p[j]).norm(dim=-1)

    def forward(self, p: torch.Tensor) -> torch.Tensor:
        return torch.func.vmap(lambda one: self.net(self.numbers, one).squeeze())(p)


def _fnn() -> nn.Module:
    """DeepXDE's network with Fourier features and a hard boundary condition."""
    os.environ.setdefault("DDE_BACKEND", "pytorch")
    import deepxde

    net = deepxde.nn.FNN([4, 8, 8, 1], "tanh", "Glorot normal")
    net.apply_feature_transform(
        lambda x: torch.cat([torch.sin(3 * x[:, :1]), torch.cos(3 * x[:, :1]), x], 1)
    )
    net.apply_output_transform(lambda x, y: x[:, :1] * (1 - x[:, :1]) * x[:, 1:] * y + x[:, 1:])
    return net


CASES = [
    *(
        [Case("SchNet of PyTorch Geometric", Molecule, (ATOMS, 3))]
        if has("torch_geometric")
        else []
    ),
    *([Case("FNN of DeepXDE", _fnn, (2,), 3, uniform(0, 1))] if has("deepxde") else []),
]
