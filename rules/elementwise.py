"""Pointwise functions: ``elementwise(op, f', f'')`` in terms of the result y and the operand x."""

from __future__ import annotations

import torch

from fxhess.registry import aten, elementwise

elementwise(aten.neg.default, -1)
elementwise(aten.tanh.default, lambda y, x: 1 - y * y, lambda y, x: -2 * y * (1 - y * y))
elementwise(aten.sigmoid.default, lambda y, x: y * (1 - y), lambda y, x: y * (1 - y) * (1 - 2 * y))
elementwise(aten.sin.default, lambda y, x: torch.cos(x), lambda y, x: -y)
elementwise(aten.cos.default, lambda y, x: -torch.sin(x), lambda y, x: -y)
elementwise(aten.exp.default, lambda y, x: y, lambda y, x: y)
elementwise(aten.log.default, lambda y, x: 1 / x, lambda y, x: -1 / (x * x))
elementwise(
    aten.add.Tensor, (1, lambda y, a, b, alpha=1: alpha)
)
elementwise(
    aten.sub.Tensor, (1, lambda y, a, b, alpha=1: -alpha)
)
elementwise(
    aten.div.Tensor,
    (lambda y, a, b: 1 / b, lambda y, a, b: -y / b),
    {(0, 1): lambda y, a, b: -1 / (b * b), (1, 1): lambda y, a, b: 2 * y / (b * b)},
)
elementwise(
    aten.pow.Tensor_Scalar,
    lambda y, x, p: p * torch.pow(x, p - 1),
    lambda y, x, p: p * (p - 1) * torch.pow(x, p - 2),
)
