"""Products: the einsum equation is the whole rule."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from fxhess.emit import Var
from fxhess.kinds import Equation, broadcast_equation
from fxhess.registry import aten, composite, multilinear, substitute
from fxhess.rules.roots import squared_root
from fxhess.rules.shape import event_size


def _product(a: Mapping[str, Any]) -> Equation:
    """A product of broadcasting tensors, or of a tensor and a number."""
    left, right = a["self"], a["other"]
    if not hasattr(right, "ndim") or isinstance(right, Var):
        axes = tuple(range(left.ndim))
        return Equation((axes,), axes, scale=right)
    return broadcast_equation([left.ndim, right.ndim], [left.shape, right.shape])


def _equation(text: str) -> Any:
    """``"ik,kj->ij"`` as an equation, whatever the arguments."""
    inputs, output = text.split("->")
    equation = Equation(tuple(map(tuple, inputs.split(","))), tuple(output))
    return lambda arguments: equation


multilinear(aten.mul.Tensor, _product, rewrite=squared_root)
multilinear(aten.mul.Scalar, _product)
multilinear(aten.mm.default, _equation("ik,kj->ij"))


def _unrepeated(self: torch.Tensor, mat2: torch.Tensor) -> Any:
    """One matrix repeated along the axis of products (PyTorch repeats the weight of a linear layer
    on an operand that is not contiguous): one flat product, with that matrix itself."""
    if _is_repeated(mat2):
        one = torch.sum(mat2[:1], 0)  # not mat2[0]: of an empty batch, there is none
        flat = torch.mm(self.reshape(-1, self.shape[-1]), one)
        return flat.reshape(*self.shape[:-1], mat2.shape[-1])
    if _is_repeated(self):
        return _unrepeated(mat2.mT, self.mT).mT
    return NotImplemented


def _is_repeated(matrices: torch.Tensor) -> bool:
    stride = matrices.stride(0)
    return isinstance(stride, int) and stride == 0


multilinear(aten.bmm.default, _equation("nik,nkj->nij"), rewrite=_unrepeated)
multilinear(aten.mv.default, _equation("ik,k->i"))
multilinear(aten.dot.default, _equation("k,k->"))
multilinear(aten.vdot.default, _equation("k,k->"))


def _trilinear(a: Mapping[str, Any]) -> Equation:
    """Three tensors, each with axes of size 1 inserted at ``expand``, multiplied and summed."""
    rank = a["i1"].ndim + len(a["expand1"])
    inputs: list[tuple[int | None, ...]] = []
    for i in (1, 2, 3):
        shape, expand = a[f"i{i}"].shape, [d % rank for d in a[f"expand{i}"]]
        axes = [d for d in range(rank) if d not in expand]
        inputs.append(tuple(None if n == 1 else d for d, n in zip(axes, shape, strict=True)))
    summed = [d % rank for d in a["sumdim"]]
    varying = {d for axes in inputs for d in axes}
    output = tuple(d if d in varying else None for d in range(rank) if d not in summed)
    return Equation(tuple(inputs), output)


multilinear(aten._trilinear.default, _trilinear)


# --- products added to something --------------------------------------------------------------


def _added(self: torch.Tensor, beta: float, product: torch.Tensor, alpha: float) -> torch.Tensor:
    """``beta self + alpha product``; with beta = 0 even a NaN in ``self`` is left out."""
    product = product if alpha == 1 else product * alpha
    return product if beta == 0 else product + (self if beta == 1 else self * beta)


@composite(aten.addmm.default)
def addmm(
    self: torch.Tensor, mat1: torch.Tensor, mat2: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    return _added(self, beta, torch.mm(mat1, mat2), alpha)


@composite(aten.addmv.default)
def addmv(
    self: torch.Tensor, mat: torch.Tensor, vec: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    return _added(self, beta, torch.mv(mat, vec), alpha)


@composite(aten.addr.default)
def addr(
    self: torch.Tensor, vec1: torch.Tensor, vec2: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    return _added(self, beta, vec1[:, None] * vec2, alpha)


@composite(aten.baddbmm.default)
def baddbmm(
    self: torch.Tensor,
    batch1: torch.Tensor,
    batch2: torch.Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> torch.Tensor:
    return _added(self, beta, torch.bmm(batch1, batch2), alpha)


@composite(aten.addbmm.default)
def addbmm(
    self: torch.Tensor,
    batch1: torch.Tensor,
    batch2: torch.Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> torch.Tensor:
    return _added(self, beta, torch.sum(torch.bmm(batch1, batch2), 0), alpha)


@composite(aten.linalg_cross.default)
def cross(self: torch.Tensor, other: torch.Tensor, *, dim: int = -1) -> torch.Tensor:
    """Component i is ``a_(i+1) b_(i+2) - a_(i+2) b_(i+1)``, indices modulo 3."""
    a1, a2 = torch.roll(self, -1, dim), torch.roll(self, -2, dim)
    b1, b2 = torch.roll(other, -1, dim), torch.roll(other, -2, dim)
    return a1 * b2 - a2 * b1


# --- distances --------------------------------------------------------------------------------
# PyTorch's own backward of these is not differentiable again; norms are.


@composite(aten._cdist_forward.default)
def cdist(
    x1: torch.Tensor, x2: torch.Tensor, p: float, compute_mode: int | None = None
) -> torch.Tensor:
    difference = torch.unsqueeze(x1, -2) - torch.unsqueeze(x2, -3)
    return torch.linalg.vector_norm(difference, p, -1)


@composite(aten._euclidean_dist.default)
def euclidean_distance(x1: torch.Tensor, x2: torch.Tensor) -> torch.Tensor:
    return cdist(x1, x2, 2.0)


@composite(aten._pdist_forward.default)
def pdist(self: torch.Tensor, p: float = 2) -> torch.Tensor:
    n = event_size(self.shape[0])
    ends = torch.triu_indices(n, n, 1, device=self.device)
    difference = torch.index_select(self, 0, ends[0]) - torch.index_select(self, 0, ends[1])
    return torch.linalg.vector_norm(difference, p, -1)


# --- functions of PyTorch that read sizes as numbers ------------------------------------------


@substitute(F.linear)
def affine(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    if input.ndim <= 2 or bias is None:
        return F.linear(input, weight, bias)
    return torch.matmul(input, weight.t()) + bias


@substitute(torch.einsum)
def einsum(*arguments: Any) -> torch.Tensor:
    """From left to right: the search for a better order reads sizes, and is ours to make."""
    with torch.backends.opt_einsum.flags(enabled=False):
        return torch.einsum(*arguments)


@substitute(torch.linalg.multi_dot, torch.chain_matmul)
def multi_dot(*tensors: Any) -> torch.Tensor:
    chain = tensors if isinstance(tensors[0], torch.Tensor) else tensors[0]
    return functools.reduce(torch.matmul, chain)


@substitute(torch.kron, torch.Tensor.kron)
def kron(input: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    rank = max(input.ndim, other.ndim)
    a = input[(None,) * (rank - input.ndim)]
    b = other[(None,) * (rank - other.ndim)]
    shape = [m * n for m, n in zip(a.shape, b.shape, strict=True)]
    for axis in range(rank):
        a, b = torch.unsqueeze(a, 2 * axis + 1), torch.unsqueeze(b, 2 * axis)
    return (a * b).reshape(shape)
