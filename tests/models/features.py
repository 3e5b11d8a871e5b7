"""What PyTorch models are made with: parametrizations, tied and lazy weights, checkpoints, writes
and views, loops and branches on shapes, distributions, transforms of Fourier, splines."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import distributions as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from zoo import Apply, Case, uniform


class Spline(nn.Module):
    """A monotone rational-quadratic spline, as of neural spline flows: the log-density of x."""

    def __init__(self, bins: int = 5) -> None:
        super().__init__()
        self.widths = nn.Parameter(torch.randn(4, bins))
        self.heights = nn.Parameter(torch.randn(4, bins))
        self.slopes = nn.Parameter(torch.randn(4, bins + 1))
        self.scale = nn.Linear(4, 4)

    def edges(self, parameter: torch.Tensor) -> torch.Tensor:
        widths = 0.05 + 0.75 * torch.softmax(parameter, -1)
        return F.pad(torch.cumsum(widths / widths.sum(-1, keepdim=True), -1), (1, 0)) * 6 - 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        xs, ys = self.edges(self.widths), self.edges(self.heights)
        d = F.softplus(self.slopes) + 0.1
        z = torch.tanh(self.scale(x)) * 3.5
        inside = (z > -3) & (z < 3)
        clamped = torch.where(inside, z, torch.zeros_like(z))
        k = torch.searchsorted(xs[:, 1:-1].contiguous(), clamped.detach().T.contiguous()).T

        def at(t: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return torch.gather(t.expand(x.shape[0], -1, -1), 2, k.unsqueeze(-1)).squeeze(-1)

        x0, x1, y0, y1 = at(xs, k), at(xs, k + 1), at(ys, k), at(ys, k + 1)
        d0, d1 = at(d, k), at(d, k + 1)
        t, s = (clamped - x0) / (x1 - x0), (y1 - y0) / (x1 - x0)
        below = s + (d0 + d1 - 2 * s) * t * (1 - t)
        y = y0 + (y1 - y0) * (s * t**2 + d0 * t * (1 - t)) / below
        slope = s**2 * (d1 * t**2 + 2 * s * t * (1 - t) + d0 * (1 - t) ** 2) / below**2
        y = torch.where(inside, y, z)
        logs = torch.where(inside, torch.log(slope), torch.zeros_like(slope))
        return (logs - 0.5 * y.square()).sum(1)


class Mixture(nn.Module):
    """A Gaussian mixture whose weights, means and scales are given by x, at x."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 9))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits, means, scales = self.net(x).chunk(3, -1)
        mixture = dist.MixtureSameFamily(
            dist.Categorical(logits=logits, validate_args=False),
            dist.Normal(means, F.softplus(scales), validate_args=False),
            validate_args=False,
        )
        return mixture.log_prob(x.sum(1))


class Density(nn.Module):
    """A mixture of full-covariance normal distributions, and others at each coordinate."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(3))
        self.means = nn.Parameter(torch.randn(3, 2))
        self.register_buffer("factors", torch.eye(2) + 0.3 * torch.randn(3, 2, 2).tril())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixture = dist.MixtureSameFamily(
            dist.Categorical(logits=self.weights),
            dist.MultivariateNormal(self.means, scale_tril=self.factors),
        )
        return mixture.log_prob(x)


def _likelihoods(x: torch.Tensor) -> torch.Tensor:
    """Log-likelihoods with parameters that depend on x; checks of arguments are off."""
    off = {"validate_args": False}
    a, b, c, d = x.unbind(1)
    terms = [
        dist.Gamma(a.exp(), b.exp(), **off).log_prob(torch.full_like(a, 1.3)),
        dist.Beta(a.exp(), c.exp() + 1, **off).log_prob(torch.sigmoid(d)),
        dist.StudentT(b.exp() + 1, c, d.exp(), **off).log_prob(a),
        dist.Laplace(a, b.exp(), **off).log_prob(d + 3),
        dist.Poisson(c.exp(), **off).log_prob(torch.full_like(c, 2.0)),
        dist.kl_divergence(dist.Normal(a, b.exp(), **off), dist.Normal(c, d.exp(), **off)),
        dist.Dirichlet(x.exp(), **off).log_prob(torch.softmax(x.flip(1), 1)),
        dist.VonMises(a, b.exp(), **off).log_prob(c),
    ]
    return torch.stack(terms, 1).sum(1)


class Flow(nn.Module):
    """Through torch's transforms: affine coupling, tanh, sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shift, scale = self.net(x[:, :2]).chunk(2, 1)
        y = torch.cat([x[:, :2], (x[:, 2:] - shift) * scale.tanh().exp()], 1)
        base = dist.Normal(torch.zeros_like(y), torch.ones_like(y), validate_args=False)
        chain = [dist.SigmoidTransform(), dist.AffineTransform(-1.0, 2.0)]
        density = dist.TransformedDistribution(base, chain, validate_args=False)
        return density.log_prob(torch.tanh(y) * 0.9).sum(1) + scale.tanh().sum(1)


class Fourier(nn.Module):
    """Fourier-neural-operator layers: complex weights on the lowest modes."""

    def __init__(self) -> None:
        super().__init__()
        self.lift = nn.Linear(1, 2)
        self.modes = nn.Parameter(torch.randn(2, 2, 3, 2))
        self.local = nn.Conv1d(2, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.lift(x.unsqueeze(-1)).transpose(1, 2)
        modes = torch.fft.rfft(h)
        mixed = torch.zeros_like(modes)
        weights = torch.view_as_complex(self.modes)
        mixed[:, :, :3] = torch.einsum("bim,iom->bom", modes[:, :, :3], weights)
        h = F.gelu(torch.fft.irfft(mixed, n=x.shape[-1]) + self.local(h))
        return h.square().sum((1, 2))


def _spectrum(x: torch.Tensor) -> torch.Tensor:
    window = torch.hann_window(x.shape[-1], dtype=x.dtype)
    return torch.log1p(torch.fft.rfft(x * window + 0.1 * x).abs()).sum(1)


def _phases(x: torch.Tensor) -> torch.Tensor:
    z = torch.fft.fftshift(torch.fft.fft2(x.unflatten(1, (2, 3)).exp()), dim=(-2, -1))
    return (z * z.conj().roll(1, -1)).real.sum((1, 2)) + torch.polar(x, x.sin()).sum(1).abs()


class Tied(nn.Module):
    """An autoencoder whose decoder is the encoder's transpose; the loss of its own input."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 3)
        self.again = self.encoder
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        code = torch.tanh(self.encoder(x))
        back = F.linear(code, self.encoder.weight.t(), self.bias)
        return F.mse_loss(self.again(back), code, reduction="none").mean(1)


class Skew(nn.Module):
    def forward(self, w: torch.Tensor) -> torch.Tensor:
        upper = w.triu(1)
        return torch.linalg.matrix_exp(upper - upper.mT)


def _parametrized(change: Callable[[nn.Linear], nn.Module], training: bool = False) -> Any:
    def build() -> nn.Module:
        return nn.Sequential(
            change(nn.Linear(4, 4)), nn.Tanh(), change(nn.Linear(4, 4)), nn.SiLU(), nn.Linear(4, 1)
        ).train(training)

    return build


def _rotated(layer: nn.Linear) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Skew())
    return layer


class Functions(nn.Sequential):
    """A sequence of plain functions."""

    def __init__(self, *functions: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.functions = functions

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for function in self.functions:
            x = function(x)
        return x


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)))
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = checkpoint(self.blocks[0], x, use_reentrant=False)
        x = checkpoint_sequential(self.blocks[1:], 2, x, use_reentrant=False)
        return checkpoint(lambda t, scale: self.head(t * scale), x, 0.7, use_reentrant=False)


def _written(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty(x.shape[0], 3, 4, dtype=x.dtype)
    for i in range(3):
        out[:, i] = x.roll(i, 1).sin() * (i + 1)
    out[:, 1, ::2] *= x[:, :2]
    view = out.transpose(1, 2)[:, 1:]
    view.add_(x[:, None, :3].cos()).mul_(0.5)
    out[..., -1].clamp_(min=-0.2)
    flat = out.view(x.shape[0], -1)
    flat[:, [0, 5]] = flat[:, [5, 0]].exp()
    return out.diagonal(dim1=1, dim2=2).prod(1) + out.square().sum((1, 2))


def _looped(x: torch.Tensor) -> torch.Tensor:
    """A polynomial by Horner, in as many terms as x has entries; branches on shapes and types."""
    terms = [x[:, i] * (i + 1) for i in range(x.size(-1))]
    total = torch.zeros_like(terms[0])
    for n, term in enumerate(reversed(terms)):
        total = total * terms[0] + (term.tanh() if n % 2 else term)
    if x.ndim == 2 and x.shape[1] > 3 and x.is_floating_point():
        total = total + x.square().mean(1)
    while total.ndim < 2:
        total = total.unsqueeze(-1)
    return total


def _fixed_point(x: torch.Tensor) -> torch.Tensor:
    """Unrolled Newton steps for y + y^3 = x."""
    y = x
    for _ in range(4):
        y = y - (y + y**3 - x) / (1 + 3 * y**2)
    return y.prod(1)


class Batch(dict):
    """A mapping of inputs and outputs, as large code bases pass them."""


class Mapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Linear(3, 2)})

    def forward(self, batch: Batch, *, scale: float = 1.0) -> Batch:
        hidden = torch.tanh(self.net["a"](batch["x"])) * scale
        return Batch(hidden=hidden, energy=self.net["b"](hidden))


class Experts(nn.Module):
    """A soft mixture of experts, stacked and run at once by torch.func."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 3), nn.Tanh()) for _ in range(3))
        self.gate = nn.Linear(4, 3)
        self.bilinear = nn.Bilinear(3, 4, 2)
        self.activation = nn.PReLU(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs = torch.stack([expert(x) for expert in self.experts], 1)
        mixed = torch.einsum("be,bef->bf", torch.softmax(self.gate(x), 1), outputs)
        return self.bilinear(self.activation(mixed), x)


def _vectorized(x: torch.Tensor) -> torch.Tensor:
    """A model that is itself written for one sample and mapped, and takes a Jacobian inside."""

    def one(s: torch.Tensor) -> torch.Tensor:
        return torch.func.jacrev(lambda t: torch.tanh(t) * t.sum())(s).square().sum()

    return torch.func.vmap(one)(x)


CASES = [
    Case("neural spline", Spline, batch=3),
    Case("mixture density", Mixture, (2,), 3),
    Case("mixture of normal distributions", Density, (2,), 3),
    Case("likelihoods", lambda: _likelihoods),
    Case("flow", Flow),
    Case("Fourier operator", Fourier, (6,)),
    Case("spectrum", lambda: _spectrum, (6,), 3),
    Case("phases", lambda: _phases, (6,), 2, uniform(0.2, 1)),
    Case("tied autoencoder", Tied),
    Case("weight norm", _parametrized(parametrizations.weight_norm)),
    Case("old weight norm", _parametrized(nn.utils.weight_norm)),
    Case("spectral norm", _parametrized(parametrizations.spectral_norm)),
    Case("old spectral norm", _parametrized(nn.utils.spectral_norm)),
    Case("orthogonal", _parametrized(parametrizations.orthogonal)),
    Case("orthogonal, Cayley", _parametrized(
        lambda m: parametrizations.orthogonal(m, orthogonal_map="cayley"))),
    Case("own parametrization", _parametrized(_rotated)),
    Case("functions in sequence", lambda: Functions(
        torch.sin, lambda t: t @ t.new_ones(4, 3), F.softplus, lambda t: math.tau * t.prod(1))),
    Case("checkpointed", Checkpointed),
    Case("written in place", lambda: _written),
    Case("looped", lambda: _looped),
    Case("fixed point", lambda: _fixed_point),
    Case("mapping in, mapping out", lambda: Apply(
        Mapped(), lambda net, x: net(Batch(x=x), scale=0.5)["energy"])),
    Case("experts", Experts),
    Case("mapped by torch.func", lambda: _vectorized),
]  # fmt: skip
