"""Models whose structure depends on values: of their own tensors, or of x."""

from __future__ import annotations

import torch
from reference import assert_close, randn
from torch import nn

from fxhess import oracle

X = randn(5, 4)


def same(hess, model, x, event_ndim=1):
    """Compare a transform that has seen other values with the referee."""
    got = hess(x)
    nb = x.ndim - event_ndim
    assert_close(got.hessian, oracle.hessian(model, x, event_ndim), what="hessian")
    assert_close(got.gradient, oracle.gradient(model, x, event_ndim), what="gradient")
    value = model(x)
    assert_close(
        got.value, value.reshape(x.shape[:nb]) if nb and value.ndim else value, what="value"
    )


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 1).double()
        self.register_buffer("mask", torch.tensor([True, False, True, True]))
        self.register_buffer("flag", torch.tensor(True))
        self.register_buffer("sizes", torch.tensor([1, 3]))
        self.register_buffer("index", torch.tensor([0, 2, 2, 1]))
        self.register_buffer("counts", torch.tensor([1, 0, 2, 1]))
        self.register_buffer("edges", torch.tensor([[0, 1, 2], [1, 2, 3]]))
        self.register_buffer("order", torch.tensor(2))


class Mask(Masked):
    def forward(self, x):
        return x[:, self.mask].exp().prod(-1)


class Nonzero(Masked):
    def forward(self, x):
        return x[..., self.mask.nonzero().squeeze(-1)].sin().square().sum(-1)


class Selected(Masked):
    def forward(self, x):
        return torch.masked_select(x, self.mask).reshape(len(x), -1).exp().sum(-1)


class Flag(Masked):
    def forward(self, x):
        return x.exp().sum(-1) if self.flag else x.square().prod(-1)


class Order(Masked):
    def forward(self, x):
        for _ in range(int(self.order)):
            x = torch.sin(x) * x
        return x.sum(-1)


class Split(Masked):
    def forward(self, x):
        a, b = torch.split(x, self.sizes.tolist(), -1)
        return a.exp().sum(-1) * b.cos().prod(-1)


class TensorSplit(Masked):
    def forward(self, x):
        a, b = torch.tensor_split(x, self.sizes[:1], -1)
        return a.exp().sum(-1) * b.cos().prod(-1)


class Unique(Masked):
    def forward(self, x):
        values, inverse = torch.unique(self.index, return_inverse=True)
        pooled = torch.zeros(len(x), len(values), dtype=x.dtype).index_add(1, inverse, x)
        return pooled.sin().square().sum(-1)


class Repeated(Masked):
    def forward(self, x):
        return x.repeat_interleave(self.counts, 1).exp().sum(-1) * x.sum(-1)


class Edges(Masked):
    def forward(self, x):
        return sum((x[:, i] - x[:, j]).cos() for i, j in self.edges.T.tolist())


class Scalar(Masked):
    def forward(self, x):
        return (x * self.lin.weight[0, 0].item()).sin().sum(-1)


class Cond(Masked):
    def forward(self, x):
        return torch.cond(self.flag, lambda x: x.exp().sum(-1), lambda x: x.cos().sum(-1), (x,))


def boolean(x):
    return x[x > 0].exp().sum()


def rows(x):  # of every sample on its own
    return torch.stack([s[s > 0].square().sum() * s.sum() for s in x])


def where(x):
    b, i = torch.where(x > 0)
    return torch.zeros(len(x), dtype=x.dtype).index_add(0, b, x[b, i].exp()) * x[:, 0].cos()


def selected(x):
    return torch.masked_select(x, x.abs() < 1).cos().sum()


def branch(x):
    return torch.stack([s.exp().sum() if s.sum() > 0 else s.cos().prod() for s in x])


def written(x):
    y = x * x
    y[x > 0] = x[x > 0] ** 3
    return y.sum(1)


def scattered(x):
    return x.masked_scatter(x <= 0, x[x <= 0].exp()).sin().sum(1)


def counted(x):  # a Python number of each sample
    return torch.stack([(s * int((s > 0).sum())).sin().sum() for s in x])


def steps(x):
    def one(s):
        return torch._higher_order_ops.while_loop(
            lambda s: s.norm() > 1, lambda s: (0.5 * s.sin(),), (s,)
        )[0]

    return torch.stack([one(s).square().sum() for s in x])


def unique(x):
    each = []
    for s in x:
        bins, inverse = torch.unique((s > 0).long() + (s > 1).long(), return_inverse=True)
        each.append(torch.zeros(len(bins), dtype=x.dtype).index_add(0, inverse, s).exp().sum())
    return torch.stack(each)


_FUNCTIONS = (
    boolean, rows, where, selected, written, scattered, counted, steps, branch, unique,
)  # fmt: skip
VARYING = {f.__name__: f for f in _FUNCTIONS}


def energy(cutoff):
    """Radial functions of the distances within a cutoff, summed into each atom, then a nonlinear
    function of that (an embedded-atom potential)."""

    def model(p):
        n = p.shape[-2]
        near = (p[:, :, None] - p[:, None]).square().sum(-1) < cutoff**2
        b, i, j = (near & ~torch.eye(n, dtype=torch.bool)).nonzero(as_tuple=True)
        r = (p[b, i] - p[b, j]).norm(dim=-1)
        switch = 0.5 * (torch.cos(torch.pi * r / cutoff) + 1)
        density = p.new_zeros(p.shape[:2]).index_put((b, i), torch.exp(-r) * switch, True)
        pair = p.new_zeros(len(p)).index_add(0, b, switch / r)
        return 0.5 * pair - density.tanh().sum(-1) if b.numel() else 0.0 * p.sum((1, 2))

    return model
