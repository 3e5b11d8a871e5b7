"""Models of the sciences: particles, wavefunctions, differential equations, Gaussian processes."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F
from zoo import Case, uniform

ATOMS = 4


def _edges() -> tuple[torch.Tensor, torch.Tensor]:
    pairs = [(i, j) for i in range(ATOMS) for j in range(ATOMS) if i != j and (i + j) % 4]
    i, j = torch.tensor(pairs).T
    return i, j


class DeepSet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.phi = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 3), nn.Tanh())
        self.rho = nn.Sequential(nn.Linear(6, 4), nn.Softplus(), nn.Linear(4, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.phi(x)
        return self.rho(torch.cat([h.sum(-2), torch.logsumexp(h, -2)], -1))


class SchNet(nn.Module):
    """Continuous-filter convolutions over given edges: radial basis, cosine cutoff, shifted
    softplus, embedded atom types."""

    def __init__(self) -> None:
        super().__init__()
        i, j = _edges()
        self.register_buffer("i", i)
        self.register_buffer("j", j)
        self.register_buffer("types", torch.tensor([0, 1, 1, 2]))
        self.register_buffer("centres", torch.linspace(0.0, 4.0, 5))
        self.embed = nn.Embedding(3, 4)
        self.filters = nn.ModuleList(
            nn.Sequential(nn.Linear(5, 4), nn.Softplus(), nn.Linear(4, 4)) for _ in range(2)
        )
        self.mixes = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.head = nn.Sequential(nn.Linear(4, 3), nn.Softplus(), nn.Linear(3, 1))

    def forward(self, p: torch.Tensor) -> torch.Tensor:
        d = (p[:, self.i] - p[:, self.j]).norm(dim=-1)
        basis = torch.exp(-2.0 * (d.unsqueeze(-1) - self.centres) ** 2)
        cutoff = 0.5 * (torch.cos(d * math.pi / 8.0) + 1.0) * (d < 8.0)
        h = self.embed(self.types).expand(p.shape[0], -1, -1)
        for filters, mix in zip(self.filters, self.mixes, strict=True):
            messages = h[:, self.j] * filters(basis) * cutoff.unsqueeze(-1)
            gathered = torch.zeros_like(h).index_add(1, self.i, messages)
            h = h + F.softplus(mix(gathered)) - math.log(2.0)
        return self.head(h).sum((1, 2))


class MessagePassing(nn.Module):
    """Attention over edges: gathered, normalized and summed by scatter_reduce."""

    def __init__(self, reduce: str) -> None:
        super().__init__()
        self.reduce = reduce
        i, j = _edges()
        self.register_buffer("i", i)
        self.register_buffer("j", j)
        self.message = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        where = self.i.view(1, -1, 1).expand(x.shape[0], -1, 3)
        source = torch.gather(x, 1, self.j.view(1, -1, 1).expand(x.shape[0], -1, 3))
        target = x.index_select(1, self.i)
        m = self.message(torch.cat([source, target], -1))
        pooled = torch.zeros_like(x).scatter_reduce(1, where, m, self.reduce, include_self=False)
        weights = m.exp() / torch.zeros_like(x).scatter_add(1, where, m.exp()).gather(1, where)
        y = torch.zeros_like(x).scatter_add(1, where, weights * source)
        return (pooled.sin() * y).sum((1, 2))


def _lennard_jones(p: torch.Tensor) -> torch.Tensor:
    i, j = torch.triu_indices(ATOMS, ATOMS, 1)
    r2 = (p[:, i] - p[:, j]).square().sum(-1) + 0.5
    return 4 * (r2**-6 - r2**-3).sum(1)


class Wavefunction(nn.Module):
    """log|psi| of a Slater-Jastrow-backflow state: determinants of both spins."""

    def __init__(self) -> None:
        super().__init__()
        self.orbitals = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
        self.decay = nn.Parameter(torch.rand(2) + 0.5)

    def forward(self, p: torch.Tensor) -> torch.Tensor:
        r = torch.linalg.vector_norm(p, dim=-1, keepdim=True)
        h = torch.cat([p, r, p.mean(1, keepdim=True).expand_as(p)[..., :2]], -1)
        matrices = self.orbitals(h).unflatten(-1, (2, 2)) * torch.exp(-self.decay * r).unsqueeze(2)
        up, down = matrices[:, :2, 0], matrices[:, 2:, 1]
        signs, logs = torch.linalg.slogdet(torch.stack([up, down], 1))
        i, j = torch.triu_indices(ATOMS, ATOMS, 1)
        apart = torch.linalg.vector_norm(p[:, i] - p[:, j], dim=-1)
        return logs.sum(1) - (0.5 / (1 + apart)).sum(1) + 0.0 * signs.sum(1)


class Slater(nn.Module):
    """A sum of determinants of larger matrices, in logarithms with signs."""

    def __init__(self) -> None:
        super().__init__()
        self.orbitals = nn.Linear(3, 2 * ATOMS)

    def forward(self, p: torch.Tensor) -> torch.Tensor:
        m = torch.tanh(self.orbitals(p)).unflatten(-1, (2, ATOMS)).transpose(1, 2)
        sign, log = torch.slogdet(m + torch.eye(ATOMS, dtype=p.dtype))
        top = log.max(1, keepdim=True).values.detach()
        return (sign * torch.exp(log - top)).sum(1).abs().log() + top.squeeze(1)


def _tight_binding(p: torch.Tensor) -> torch.Tensor:
    """Energy of the lowest two states of a hopping matrix."""
    d2 = (p[:, :, None] - p[:, None]).square().sum(-1)
    h = torch.exp(-d2) + torch.diag(torch.arange(p.shape[1], dtype=p.dtype))
    return torch.linalg.eigvalsh(h)[:, :2].sum(1)


def _density(p: torch.Tensor) -> torch.Tensor:
    """A functional of the occupied eigenvectors, which any basis of them gives."""
    d2 = (p[:, :, None] - p[:, None]).square().sum(-1)
    h = torch.exp(-d2) + torch.diag(torch.arange(p.shape[1], dtype=p.dtype))
    energies, states = torch.linalg.eigh(h)
    density = states[..., :2].square().sum(-1)
    return energies[:, :2].sum(1) + density.pow(4 / 3).sum(1)


class GaussianProcess(nn.Module):
    """Posterior mean and variance at x, of given data: Cholesky and triangular solves."""

    def __init__(self, outputs: str) -> None:
        super().__init__()
        self.outputs = outputs
        self.register_buffer("points", torch.randn(6, 3))
        self.register_buffer("values", torch.randn(6))
        self.log_scale = nn.Parameter(torch.zeros(3))

    def kernel(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        scale = self.log_scale.exp()
        return torch.exp(-0.5 * ((a / scale).unsqueeze(-2) - b / scale).square().sum(-1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        k = self.kernel(self.points, self.points) + 0.1 * torch.eye(6, dtype=x.dtype)
        factor = torch.linalg.cholesky(k)
        weights = torch.cholesky_solve(self.values.unsqueeze(-1), factor).squeeze(-1)
        cross = self.kernel(x, self.points)
        mean = cross @ weights
        half = torch.linalg.solve_triangular(factor, cross.T, upper=False)
        variance = 1.1 - half.square().sum(0)
        return torch.stack([mean, variance.sqrt()], -1) if self.outputs == "both" else mean


def _marginal_likelihood(x: torch.Tensor) -> torch.Tensor:
    """Of a process observed at a sample's own points."""
    k = torch.exp(-(x.unsqueeze(-1) - x.unsqueeze(-2)).square()) + torch.eye(4, dtype=x.dtype)
    factor = torch.linalg.cholesky(k)
    half = torch.linalg.solve_triangular(factor, x.sin().unsqueeze(-1), upper=False)
    return half.square().sum((1, 2)) / 2 + factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


class Flow(nn.Module):
    """A neural ordinary differential equation by fixed steps of Runge and Kutta."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.field = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))

    def velocity(self, t: float, y: torch.Tensor) -> torch.Tensor:
        return self.field(torch.cat([y, torch.full_like(y[:, :1], t)], 1))

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        h = 1.0 / self.steps
        for n in range(self.steps):
            t = n * h
            k1 = self.velocity(t, y)
            k2 = self.velocity(t + h / 2, y + h / 2 * k1)
            k3 = self.velocity(t + h / 2, y + h / 2 * k2)
            k4 = self.velocity(t + h, y + h * k3)
            y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return y.square().sum(1)


class Pinn(nn.Module):
    """A solution with hard boundary conditions, on Fourier features; periodic in its last axis."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(2, 4))
        self.net = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(),
                                 nn.Linear(8, 1))  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        u, t = x[:, 0:1], x[:, 1:2]
        z = 2 * math.pi * x[:, :2] @ self.frequencies
        turn = 2 * math.pi * x[:, 2:3]
        z = torch.cat([torch.sin(z), torch.cos(z), torch.sin(turn), torch.cos(turn)], 1)
        return u * (1 - u) * t * self.net(z) + torch.sin(math.pi * u)


class Siren(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 6), nn.Linear(6, 6), nn.Linear(6, 3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:-1]:
            x = torch.sin(3.0 * layer(x))
        return self.layers[-1](x)


class Force(nn.Module):
    """A model that differentiates inside itself: the squared norm of a force."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x if x.requires_grad else x.detach().requires_grad_()
        with torch.enable_grad():
            energy = self.energy(x).sum()
            (force,) = torch.autograd.grad(energy, x, create_graph=True)
        return force.square().sum(1)


class Icnn(nn.Module):
    """An input-convex network: weights made positive in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.skips = nn.ModuleList(nn.Linear(3, 5) for _ in range(3))
        self.inner = nn.ParameterList(torch.randn(5, 5) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = F.softplus(self.skips[0](x))
        for skip, weight in zip(self.skips[1:], self.inner, strict=True):
            z = F.softplus(F.linear(z, F.softplus(weight)) + skip(x))
        return z.sum(1) + 0.1 * x.square().sum(1)


SCENE = (ATOMS, 3)

CASES = [
    Case("deep set", DeepSet, (4, 2)),
    Case("SchNet", SchNet, SCENE),
    *(
        Case(f"messages, {r}", lambda r=r: MessagePassing(r), SCENE)
        for r in ("sum", "mean", "amax", "prod")
    ),
    Case("Lennard-Jones", lambda: _lennard_jones, SCENE),
    Case("wavefunction", Wavefunction, SCENE),
    Case("sum of determinants", Slater, SCENE),
    Case("tight binding", lambda: _tight_binding, (3, 2)),
    Case("density functional", lambda: _density, (3, 1)),
    Case("posterior mean", lambda: GaussianProcess("mean"), (3,), 3),
    Case("posterior mean and deviation", lambda: GaussianProcess("both"), (3,), 3),
    Case("marginal likelihood", lambda: _marginal_likelihood),
    Case("Runge-Kutta", lambda: Flow(3), (3,), 3),
    Case("PINN", Pinn, (3,), 3, uniform(0, 1)),
    Case("SIREN", Siren, (2,), 3),
    Case("force", Force, (3,), 3),
    Case("input-convex", Icnn, (3,), 3),
]
