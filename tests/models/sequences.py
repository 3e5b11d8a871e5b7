"""State spaces, filters and recursions over a sequence; splines and messages of newer networks."""

from __future__ import annotations

import math

import torch
import torch.distributions as dist
import torch.nn.functional as F
from torch import nn
from zoo import Case


class Selective(nn.Module):
    """A block of a selective state space model (Gu and Dao 2023), scanned step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(4)
        self.inner = nn.Linear(4, 12)
        self.conv = nn.Conv1d(6, 6, 3, padding=2, groups=6)
        self.choose = nn.Linear(6, 7)
        self.step = nn.Linear(1, 6)
        self.rates = nn.Parameter(torch.arange(1, 4.0).log().repeat(6, 1))
        self.skip = nn.Parameter(torch.ones(6))
        self.outer = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        u, gate = self.inner(self.norm(x)).chunk(2, -1)
        u = F.silu(self.conv(u.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        step, into, out = self.choose(u).split([1, 3, 3], -1)
        step = F.softplus(self.step(step))
        h = u.new_zeros(len(u), 6, 3)
        results = []
        for t in range(x.shape[1]):
            d = step[:, t, :, None]
            h = torch.exp(-d * self.rates.exp()) * h + d * into[:, t, None] * u[:, t, :, None]
            results.append((h * out[:, t, None]).sum(-1))
        y = (torch.stack(results, 1) + self.skip * u) * F.silu(gate)
        return (x + self.outer(y)).logsumexp(-1).sum(-1)


class HiddenMarkov(nn.Module):
    """The likelihood of observations, by the forward algorithm."""

    def __init__(self) -> None:
        super().__init__()
        self.moves = nn.Parameter(torch.randn(3, 3))
        self.means = nn.Parameter(torch.randn(3))
        self.widths = nn.Parameter(0.1 * torch.randn(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        moves = self.moves.log_softmax(-1)
        seen = dist.Normal(self.means, self.widths.exp()).log_prob(x[..., None])
        a = seen[:, 0] - math.log(3)
        for t in range(1, x.shape[1]):
            a = torch.logsumexp(a[:, :, None] + moves, 1) + seen[:, t]
        return a.logsumexp(-1)


class Tagger(nn.Module):
    """A conditional random field: the score of fixed tags, less the partition function."""

    def __init__(self) -> None:
        super().__init__()
        self.moves = nn.Parameter(torch.randn(3, 3))
        self.scores = nn.Linear(1, 3)
        self.register_buffer("tags", torch.tensor([0, 1, 2, 1, 0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = 2 * self.scores(x[..., None]).tanh()
        a = scores[:, 0]
        for t in range(1, x.shape[1]):
            a = (a[..., None] + self.moves + scores[:, t, None]).logsumexp(1)
        own = scores.gather(2, self.tags.expand(len(x), -1)[..., None]).sum((1, 2))
        return own + self.moves[self.tags[:-1], self.tags[1:]].sum() - a.logsumexp(1)


class Kalman(nn.Module):
    """The likelihood of a filter whose noise depends on its state."""

    def __init__(self) -> None:
        super().__init__()
        self.move = nn.Parameter(torch.tensor([[0.9, 0.1], [0.0, 0.8]]))
        self.noise = nn.Parameter(torch.zeros(2))
        self.look = nn.Parameter(torch.tensor([[1.0, 0.5]]))

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        A, C = self.move, self.look
        m = y.new_zeros(len(y), 2)
        P = torch.eye(2, dtype=y.dtype).expand(len(y), 2, 2)
        total = y.new_zeros(len(y))
        for t in range(y.shape[1]):
            m = m @ A.T
            P = A @ P @ A.T + torch.diag_embed(F.softplus(self.noise) * (1 + m * m))
            L = torch.linalg.cholesky(C @ P @ C.T + 0.1)
            missed = (y[:, t, None] - m @ C.T)[..., None]
            white = torch.linalg.solve_triangular(L, missed, upper=False)
            total = total + 0.5 * white.square().sum((1, 2))
            total = total + L.diagonal(dim1=1, dim2=2).log().sum(1)
            gain = torch.cholesky_solve(C @ P, L).mT
            m, P = m + (gain @ missed)[..., 0], P - gain @ C @ P
        return total


class Splines(nn.Module):
    """A layer of B-splines on the edges (Kolmogorov-Arnold networks), by Cox and de Boor."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(4, 3, 7))
        self.base = nn.Parameter(torch.randn(4, 3))
        self.register_buffer("knots", torch.linspace(-4, 4, 11))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        k, at = self.knots, x[..., None]
        B = ((at >= k[:-1]) & (at < k[1:])).to(x.dtype)
        for d in range(1, 4):
            left = (at - k[: -d - 1]) / (k[d:-1] - k[: -d - 1]) * B[..., :-1]
            B = left + (k[d + 1 :] - at) / (k[d + 1 :] - k[1:-d]) * B[..., 1:]
        y = torch.einsum("bin,ion->bo", B, self.weights) + F.silu(x) @ self.base
        return y.tanh().prod(-1)


class Tensors(nn.Module):
    """Messages of vectors and traceless matrices between atoms, within a smooth cutoff."""

    def __init__(self) -> None:
        super().__init__()
        self.radial = nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 3))
        self.readout = nn.Linear(3, 1)
        pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
        self.register_buffer("pairs", torch.tensor(pairs).T.contiguous())

    def forward(self, p: torch.Tensor) -> torch.Tensor:
        i, j = self.pairs
        r = (p[:, i] - p[:, j]).norm(dim=-1, keepdim=True)
        e, u = (p[:, i] - p[:, j]) / r, r / 5
        waves = torch.sin(torch.arange(1, 7, dtype=p.dtype) * math.pi * u) / r
        w = self.radial(waves * torch.where(u < 1, 1 - 28 * u**6 + 48 * u**7 - 21 * u**8, 0.0))
        zero = p.new_zeros(len(p), 4)
        vectors = zero[..., None].expand(-1, -1, 3).index_add(1, i, w[..., 1:2] * e)
        outer = e[..., None] * e[..., None, :] - torch.eye(3, dtype=p.dtype) / 3
        matrices = (
            zero[..., None, None].expand(-1, -1, 3, 3).index_add(1, i, w[..., 2:, None] * outer)
        )
        found = [
            zero.index_add(1, i, w[..., 0]), vectors.square().sum(-1),
            torch.einsum("bnij,bnji->bn", matrices, matrices),
        ]  # fmt: skip
        return self.readout(torch.stack(found, -1).tanh()).sum((1, 2))


class Implicit(nn.Module):
    """A fixed point ``z = tanh(W z + x)``, by Newton's method."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.15 * torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z, one = torch.zeros_like(x), torch.eye(4, dtype=x.dtype)
        for _ in range(3):
            y = torch.tanh(z @ self.weight.T + x)
            z = z - torch.linalg.solve(one - (1 - y * y)[..., None] * self.weight, z - y)
        return z.prod(-1)


class Sparse(nn.Module):
    """A mixture of experts of which each sample takes two, with a term that balances them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 3)
        self.experts = nn.Parameter(torch.randn(3, 4, 5))
        self.readout = nn.Linear(5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.gate(x)
        best, which = logits.topk(2, -1)
        hidden = F.gelu(torch.einsum("bd,bkdh->bkh", x, self.experts[which]))
        mixed = torch.einsum("bk,bkh->bh", best.softmax(-1), hidden)
        balance = (logits.softmax(-1) * F.one_hot(which[:, 0], 3)).sum(-1)
        return self.readout(mixed)[:, 0] + 0.1 * balance


CASES = [
    Case("selective state space", Selective, (4, 4)),
    Case("hidden Markov model", HiddenMarkov, (5,)),
    Case("conditional random field", Tagger, (5,)),
    Case("Kalman filter", Kalman, (4,)),
    Case("spline layer", Splines),
    Case("tensor messages", Tensors, (4, 3)),
    Case("implicit layer, Newton", Implicit),
    Case("two experts of three", Sparse),
]
