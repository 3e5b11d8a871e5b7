"""Convolutions and sliding windows: linear in the image; the adjoint of each is its transpose.

A kernel that depends on x is refused: its operand is taken as a constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fxhess.kinds import Call, Trailing, Window
from fxhess.registry import aten, composite, linear

Maybe = torch.Tensor | None
Ints = Sequence[int]


def _full(values: Ints, rank: int) -> list[int]:
    """One number for each axis of the image; a single number stands for all."""
    return list(values) * rank if len(values) == 1 else list(values)


def _bias_apart(input: torch.Tensor, weight: torch.Tensor, bias: Maybe, *rest: Any) -> Any:
    """The bias is added after, so that the operator is linear."""
    if bias is None:
        return NotImplemented
    y = aten.convolution.default(input, weight, None, *rest)
    return y + bias.reshape(-1, *[1] * (input.ndim - 2))


def _pull(g: Any, call: Call) -> Any:
    """The transposed convolution.  A stride loses the remainder of a division, which
    ``output_padding`` gives back."""
    _, weight, _, stride, padding, dilation, transposed, _, groups = call.args
    rank = weight.ndim - 2
    stride, padding, dilation = (_full(v, rank) for v in (stride, padding, dilation))
    sizes = [call.operands[0].size(d) for d in range(-rank, 0)]
    if transposed:
        image = torch.convolution(
            g, weight, None, stride, padding, dilation, False, [0] * rank, groups
        )
        for d, n in zip(range(-rank, 0), sizes, strict=True):
            if image.size(d) > n:  # an output_padding of a whole stride
                image = torch.narrow(image, d, 0, n)
        return image
    least = [
        (call.y.size(d) - 1) * stride[d] - 2 * padding[d] + dilation[d] * (weight.size(d) - 1) + 1
        for d in range(-rank, 0)
    ]
    extra = [n - m for n, m in zip(sizes, least, strict=True)]
    return torch.convolution(g, weight, None, stride, padding, dilation, True, extra, groups)


def _windows(call: Call) -> list[Window | None]:
    """Channels are mixed; a position reads what the kernel covers there."""
    _, weight, _, *numbers, transposed, _, _ = call.args
    rank = weight.ndim - 2
    found: list[Window | None] = [None]
    axes = zip(*(_full(v, rank) for v in numbers), strict=True)
    for d, (stride, padding, dilation) in enumerate(axes):
        reach = Window.of(stride, -padding, dilation * (weight.size(2 + d) - 1) - padding)
        # The positions that a transposed convolution reads are those that the plain one gives to.
        found.append(reach.reversed() if transposed else reach)
    return found


linear(
    aten.convolution.default,
    Trailing(lambda a: a["weight"].ndim - 1),
    pull=_pull,
    fold=True,
    windows=_windows,
    rewrite=_bias_apart,
)


@composite(aten.convolution_overrideable.default)
def convolution_overrideable(*args: Any) -> torch.Tensor:
    return torch.convolution(*args)


@composite(aten._convolution.default)
def convolution_with_flags(*args: Any) -> torch.Tensor:
    return torch.convolution(*args[:9])


@composite(aten.mkldnn_convolution.default)
def mkldnn_convolution(
    self: torch.Tensor,
    weight: torch.Tensor,
    bias: Maybe,
    padding: Ints,
    stride: Ints,
    dilation: Ints,
    groups: int,
) -> torch.Tensor:
    none = [0] * (self.ndim - 2)
    return torch.convolution(self, weight, bias, stride, padding, dilation, False, none, groups)


@composite(aten.cudnn_convolution.default)
def cudnn_convolution(
    self: torch.Tensor,
    weight: torch.Tensor,
    padding: Ints,
    stride: Ints,
    dilation: Ints,
    groups: int,
    *flags: bool,
) -> torch.Tensor:
    return mkldnn_convolution(self, weight, None, padding, stride, dilation, groups)


# --- sliding windows ----------------------------------------------------------------------------


def _summed(
    columns: Any, sizes: Ints, kernel: Ints, dilation: Ints, padding: Ints, stride: Ints
) -> Any:
    """``col2im`` of the padded image, then cut: with symbolic sizes, PyTorch itself cannot cut."""
    pads = _full(padding, 2)
    whole = [n + 2 * p for n, p in zip(sizes, pads, strict=True)]
    image = aten.col2im.default(columns, whole, kernel, dilation, [0, 0], stride)
    for d, n, p in zip((-2, -1), sizes, pads, strict=True):
        image = torch.narrow(image, d, p, n) if p else image
    return image


def _unpadded(self: torch.Tensor, *options: Any) -> Any:
    return _summed(self, *options) if any(options[3]) else NotImplemented


linear(
    aten.im2col.default,
    Trailing(3),
    pull=lambda g, c: _summed(g, [c.operands[0].size(d) for d in (-2, -1)], *c.args[1:]),
    fold=True,
)
linear(
    aten.col2im.default,
    Trailing(2),
    pull=lambda g, c: aten.im2col.default(g, *c.args[2:]),
    fold=True,
    rewrite=_unpadded,
)
