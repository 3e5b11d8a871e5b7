"""Convolutional networks: every pooling and normalization, skips, upsampling."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from zoo import Case

SIZE = 6


def _evaluated(net: nn.Module) -> nn.Module:
    """With the statistics of some other data."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 1.5)
    return net.eval()


def _pooled(pool: nn.Module) -> Callable[[], nn.Module]:
    return lambda: _evaluated(
        nn.Sequential(
            nn.Conv2d(1, 2, 3, padding=1),
            nn.BatchNorm2d(2),
            nn.Tanh(),
            pool,
            nn.Conv2d(2, 2, 2),
            nn.SiLU(),
            nn.Flatten(),
            nn.LazyLinear(1),
        )
    )


def _initialized(build: Callable[[], nn.Module], *shape: int) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        net = build()
        net(torch.zeros(1, *shape))
        return net

    return made


POOLS = {
    "max": nn.MaxPool2d(2),
    "max, overlapping, dilated": nn.MaxPool2d(3, 1, dilation=2, padding=1),
    "average": nn.AvgPool2d(2),
    "average, padded": nn.AvgPool2d(3, 2, 1, count_include_pad=False, ceil_mode=True),
    "Lp": nn.LPPool2d(2, 2),
    "adaptive average": nn.AdaptiveAvgPool2d((2, 3)),
    "adaptive max": nn.AdaptiveMaxPool2d(2),
}

NORMS = {
    "batch": lambda: nn.BatchNorm2d(4),
    "group": lambda: nn.GroupNorm(2, 4),
    "instance": lambda: nn.InstanceNorm2d(4, affine=True),
    "local response": lambda: nn.LocalResponseNorm(2),
    "layer": lambda: nn.LayerNorm([4, 4, 4]),
}


class Residual(nn.Module):
    """A basic block: its shortcut is a strided convolution; squeeze and excitation."""

    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.one = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.two = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.norms = nn.ModuleList([norm(), norm()])
        self.short = nn.Conv2d(1, 4, 1)
        self.squeeze, self.excite = nn.Linear(4, 2), nn.Linear(2, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.gelu(self.norms[0](self.one(x)))
        y = self.norms[1](self.two(y))
        gate = torch.sigmoid(self.excite(F.silu(self.squeeze(y.mean((2, 3))))))
        y = F.softplus(y * gate[:, :, None, None] + self.short(x))
        return self.head(F.adaptive_avg_pool2d(y, 1).flatten(1)).log_softmax(1)


class UNet(nn.Module):
    """Down twice, up twice: by transposed convolution, then by interpolation; skips by
    concatenation."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode
        self.enter = nn.Conv2d(1, 2, 3, padding=1)
        self.down = nn.Conv2d(2, 3, 3, stride=2, padding=1)
        self.bottom = nn.Conv2d(3, 3, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(3, 3, 3, stride=2, padding=1)
        self.join = nn.Conv2d(6, 2, 1)
        self.leave = nn.Conv2d(4, 1, 3, padding=1, padding_mode="circular")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one = torch.tanh(self.enter(x))
        two = torch.tanh(self.down(one))
        three = F.silu(self.bottom(two))
        up = self.up(three, output_size=two.shape[-2:])
        two = torch.tanh(self.join(torch.cat([up, two], 1)))
        corners = None if self.mode in ("nearest", "area") else False
        one_up = F.interpolate(two, size=one.shape[-2:], mode=self.mode, align_corners=corners)
        return torch.sigmoid(self.leave(torch.cat([one_up, one], 1))).square().sum((1, 2, 3))


class Mobile(nn.Module):
    """Depthwise-separable, expanded and shuffled, on a hard-swish."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.Hardswish(),
            nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.BatchNorm2d(4), nn.ELU(),
            nn.ChannelShuffle(2), nn.Conv2d(4, 4, 1), nn.PixelShuffle(2), nn.ReflectionPad2d(1),
            nn.Conv2d(1, 1, 3, dilation=2), nn.Dropout2d(0.4),
        )  # fmt: skip
        _evaluated(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.features(x).square().sum((1, 2, 3))


class Wave(nn.Module):
    """Dilated causal convolutions with gates, as WaveNet's."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv1d(2, 3, 1)
        self.layers = nn.ModuleList(nn.Conv1d(3, 6, 2, dilation=2**i) for i in range(3))
        self.mixes = nn.ModuleList(nn.Conv1d(3, 3, 1) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.enter(x)
        skips: list[torch.Tensor] = []
        for i, (layer, mix) in enumerate(zip(self.layers, self.mixes, strict=True)):
            gate, value = layer(F.pad(h, (2**i, 0))).chunk(2, 1)
            y = mix(torch.sigmoid(gate) * torch.tanh(value))
            skips.append(y)
            h = h + y
        return sum(skips, torch.zeros_like(h)).square().sum((1, 2))


def _warped(x: torch.Tensor) -> torch.Tensor:
    """A spatial transformer: the image decides how it is sampled."""
    angle = 0.3 * torch.tanh(x.mean((1, 2, 3)))
    rows = [torch.stack([angle.cos(), -angle.sin(), angle], 1),
            torch.stack([angle.sin(), angle.cos(), 0 * angle], 1)]  # fmt: skip
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False).tanh().sum((1, 2, 3))


def _unpooled(x: torch.Tensor) -> torch.Tensor:
    y, where = F.max_pool2d(x.sin(), 2, return_indices=True)
    return (F.max_unpool2d(y.exp(), where, 2) * x).square().sum((1, 2, 3))


def _unfolded(x: torch.Tensor) -> torch.Tensor:
    patches = F.unfold(x, 3, padding=1, stride=2).transpose(1, 2)
    mixed = torch.softmax(patches @ patches.transpose(1, 2), -1) @ patches
    return F.fold(mixed.transpose(1, 2), (4, 4), 3, padding=1, stride=2).square().sum((1, 2, 3))


def _volume() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(1, 2, 2), nn.Softplus(), nn.AvgPool3d(2, 1), nn.ConvTranspose3d(2, 1, 2),
        nn.Flatten(), nn.Tanh(), nn.LazyLinear(2),
    )  # fmt: skip


IMAGE = (1, 4, 4)

CASES = [
    *(
        Case(f"pooled by {name}", _initialized(_pooled(pool), 1, SIZE, SIZE), (1, SIZE, SIZE))
        for name, pool in POOLS.items()
    ),
    *(
        Case(f"residual, {name} norm", lambda norm=norm: _evaluated(Residual(norm)), IMAGE)
        for name, norm in NORMS.items()
    ),
    *(
        Case(f"U-net, {mode}", lambda mode=mode: UNet(mode), IMAGE)
        for mode in ("nearest", "bilinear", "bicubic", "area")
    ),
    Case("mobile", Mobile, IMAGE),
    Case("wave", Wave, (2, 8)),
    Case("volume", _initialized(_volume, 1, 3, 3, 3), (1, 3, 3, 3)),
    Case("spatial transformer", lambda: _warped, IMAGE),
    Case("max unpooling", lambda: _unpooled, IMAGE),
    Case("patches, folded back", lambda: _unfolded, IMAGE),
]
