"""Structure that depends on values: captured at the values seen, guarded, captured again; always
compared with double backward of one sample at a time."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import ALL, assert_close, check, randn
from torch import nn

import fxhess
from fxhess import CaptureError, SampleMixingError, oracle

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


# --- structure that depends on the model's own tensors --------------------------------------------


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


CONSTANT = {  # model, name of the buffer, what it becomes
    "mask": (Mask, "mask", torch.tensor([True, True, False, False])),
    "nonzero": (Nonzero, "mask", torch.tensor([False, True, False, True])),
    "masked_select": (Selected, "mask", torch.tensor([False, True, False, False])),
    "if": (Flag, "flag", torch.tensor(False)),
    "range": (Order, "order", torch.tensor(3)),
    "split": (Split, "sizes", torch.tensor([2, 2])),
    "tensor_split": (TensorSplit, "sizes", torch.tensor([3, 1])),
    "unique": (Unique, "index", torch.tensor([1, 3, 0, 2])),
    "repeat_interleave": (Repeated, "counts", torch.tensor([0, 3, 1, 2])),
    "a loop over edges": (Edges, "edges", torch.tensor([[0, 0], [2, 3]])),
}


@pytest.mark.parametrize("name", CONSTANT)
def test_constants_that_make_structure(name):
    make, buffer, new = CONSTANT[name]
    model = make()
    hess = check(model, X)
    before = fxhess.cache_info().misses
    hess(X)
    assert fxhess.cache_info().misses == before
    old = getattr(model, buffer)
    if new.shape == old.shape:
        old.copy_(new)
    else:
        setattr(model, buffer, new)
    same(hess, model, X)


def test_no_change_of_a_tensor_goes_unnoticed():
    model = Mask()
    hess = check(model, X)
    old, new = model.mask.clone(), torch.tensor([True, True, False, False])
    model.mask = new.clone()  # replaced
    same(hess, model, X)
    model.mask.data[...] = old  # behind PyTorch's back
    same(hess, model, X)
    model.mask.numpy()[:] = new.numpy()
    same(hess, model, X)
    model.load_state_dict({**model.state_dict(), "mask": old})
    same(hess, model, X)
    text = str(hess.explain(X))
    assert "guarded: [[0], [2], [3]]" in text and ", of mask" in text and "x[:, self.mask]" in text


def test_a_float_that_is_only_computed_with_needs_no_guard():
    model = Scalar()
    hess = check(model, X)
    assert "guarded" not in str(hess.explain(X))
    with torch.no_grad():
        model.lin.weight.mul_(2)
    same(hess, model, X)


def test_torch_cond_takes_the_branch_of_a_constant():
    """PyTorch's own double backward through ``torch.cond`` is zero: the referee is the branch."""
    model = Cond()
    hess = fxhess.transform(model, ALL)
    for flag, branch in ((True, torch.exp), (False, torch.cos), (True, torch.exp)):
        model.flag.fill_(flag)
        got = hess(X)
        assert_close(got.hessian, oracle.hessian(lambda x, f=branch: f(x).sum(-1), X))
        assert_close(got.hessian, oracle.differences(model, X), 1e-5)


# --- structure that depends on x ------------------------------------------------------------------


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


VARYING = {
    f.__name__: f for f in (boolean, rows, where, selected, written, counted, steps, branch, unique)
}


@pytest.mark.parametrize("name", VARYING)
def test_structure_of_x(name):
    model = VARYING[name]
    hess = fxhess.transform(model, ALL)
    for seed in range(2):
        x = randn(2, 4, seed=seed)
        if name == "steps":  # not differentiable twice in PyTorch
            got = hess(x)
            assert_close(got.hessian, oracle.differences(model, x), 1e-5)
        else:
            same(hess, model, x)
    assert "structures so far" in str(hess.explain(x))


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


def test_a_neighbour_list_that_moves_across_the_cutoff():
    model = energy(1.5)
    hess = fxhess.transform(model, ALL, event_ndim=2)
    still = torch.tensor([[0.0, 0, 0], [1, 0.1, 0], [0, 1.1, 0.2]], dtype=torch.float64)
    counts = set()
    for distance in (1.2, 1.6, 2.6, 1.25):  # the fourth atom leaves one after the other
        atom = torch.tensor([[distance, distance / 2, 0.0]], dtype=torch.float64)
        p = torch.cat([still, atom])[None]
        same(hess, model, p, 2)
        counts.add(int((torch.cdist(p, p) < 1.5).sum()))
    assert len(counts) > 2


def test_each_sample_has_its_own_neighbours():
    model = energy(1.3)
    p = 0.6 * randn(4, 4, 3)
    hess = fxhess.transform(model, ALL, event_ndim=2)
    same(hess, model, p, 2)
    assert len(set((torch.cdist(p, p) < 1.3).sum((1, 2)).tolist())) > 2
    same(hess, model, p.flip(0)[:2], 2)
    text = str(hess.explain(p))
    assert "run as a batch" in text and "slower" not in text
    assert "guarded" in text and "nonzero(as_tuple=True)" in text
    result = torch.empty(4, 4, 3, 4, 3, dtype=p.dtype)
    only = fxhess.transform(model, event_ndim=2)
    assert only(p, out=result) is result
    assert_close(result, hess(p).hessian)
    assert only(p[:0]).shape == (0, 4, 3, 4, 3)
    hess.verify(p)


def test_two_batch_axes():
    def model(x):
        a, b, i = torch.where(x > 0)
        return x.new_zeros(x.shape[:2]).index_put((a, b), x[a, b, i].exp(), accumulate=True)

    same(fxhess.transform(model, ALL), model, randn(2, 2, 3))


def test_gradients_flow_through_samples_of_several_structures():
    scale = torch.tensor([1.0, 2.0, 0.5, 1.5], dtype=torch.float64, requires_grad=True)

    def model(x):
        b, i = torch.where(x > 0)
        return x.new_zeros(len(x)).index_add(0, b, (scale * x).sin()[b, i])

    x = X.clone().requires_grad_()
    fxhess.transform(model)(x).square().sum().backward()
    want = torch.diag_embed((x > 0) * -(scale**2) * (scale * x).sin())
    expected = torch.autograd.grad(want.square().sum(), (scale, x))
    assert_close(scale.grad, expected[0])
    assert_close(x.grad, expected[1])


def test_one_sample_without_batch_axes():
    def model(x):
        y = x[x > 0]
        return (y.exp().sum() if y.sum() > 2 else y.prod()) * x.sum()

    hess = fxhess.transform(model, ALL, event_ndim=2)
    for seed in range(3):
        x = randn(2, 3, seed=seed)
        same(hess, model, x, 2)


def test_samples_that_run_one_at_a_time():
    def model(x):  # a matrix of each sample, with no rule for it
        return torch.stack([torch.linalg.matrix_exp(torch.outer(s, s))[s > 0].sum() for s in x])

    hess = fxhess.transform(model, ALL)
    x = 0.5 * randn(3, 3)
    same(hess, model, x)
    assert "one at a time" in str(hess.explain(x))


def shared(x):
    return x.exp().sum(-1) if x.sum() > 0 else x.cos().sum(-1)


def test_a_branch_that_the_batch_shares():
    hess = fxhess.transform(shared, ALL)
    same(hess, shared, X.abs())
    same(hess, shared, -X.abs())
    with pytest.raises(SampleMixingError, match=r"test_structure_guards\.py:\d+: return x\.exp"):
        hess(torch.stack([X[0].abs(), -0.1 * X[1].abs()]))


def test_a_number_of_python_that_is_never_the_same():
    def model(x):
        return x.exp().sum() * float(x.max())

    hess = fxhess.transform(model, ALL, event_ndim=2)
    with pytest.raises(CaptureError, match=r"(?s)number of Python.*float\(x\.max\(\)\).*keep it"):
        for seed in range(20):
            same(hess, model, randn(2, 2, seed=seed), 2)
    other = fxhess.transform(lambda x: x.exp().sum() * x.max().item(), ALL, event_ndim=2)
    for seed in range(20):  # a constant of the derivative, as in PyTorch, without a guard
        other(randn(2, 2, seed=seed))
    assert_close(other(X).hessian, oracle.hessian(model, X, 2))


def test_many_structures_are_kept_and_warned_of():
    hess = fxhess.transform(lambda x: x[x > 0].exp().sum())
    with pytest.warns(fxhess.StructureWarning, match="captured 16 times"):
        for k in range(16):
            x = torch.where(torch.arange(16) < k, 1.0, -1.0)[None]
            assert hess(x).diagonal(dim1=1, dim2=2).count_nonzero() == k


# --- scan, map: loops over entries ----------------------------------------------------------------


def scanned(x):
    last, all_ = torch._higher_order_ops.scan(
        lambda c, s: (c + s.sin(), c * s), x.new_zeros(len(x)), x.T.contiguous()
    )
    return last * all_.sum(0)


def test_scan_and_map():
    def plain(x):
        before = x.sin().cumsum(-1) - x.sin()
        return x.sin().sum(-1) * (before * x).sum(-1)

    got = fxhess.transform(scanned)(X)
    assert_close(got, oracle.hessian(plain, X))
    mapped = fxhess.transform(lambda x: torch._higher_order_ops.map(lambda s: s.exp().prod(), x))
    assert_close(mapped(X), oracle.hessian(lambda x: x.exp().prod(-1), X))


# --- where it is used -----------------------------------------------------------------------------


def test_compiled_and_exported_programs_notice():
    model = Mask()
    hess = fxhess.transform(model)
    hess(X)
    compiled = torch.compile(hess, fullgraph=True, backend="eager")
    exported = torch.export.export(hess, (X,)).module()
    assert_close(compiled(X), oracle.hessian(model, X))
    assert_close(exported(X), oracle.hessian(model, X))
    new = torch.tensor([False, True, False, True])
    model.mask.copy_(new)
    with pytest.raises(RuntimeError, match="structure of the model has changed"):
        compiled(X)
    exported.get_buffer("model.mask").copy_(new)
    with pytest.raises(RuntimeError, match="structure of the model has changed"):
        exported(X)
    hess(X)
    assert_close(compiled(X), oracle.hessian(model, X))


def test_compiled_for_samples_of_one_structure():
    hess = fxhess.transform(where)
    x = torch.tensor([[1.0, 2, -1, -2], [0.5, -1, 1, -3]], dtype=torch.float64)
    hess(x)
    compiled = torch.compile(hess, fullgraph=True, backend="eager")
    assert_close(compiled(x), oracle.hessian(where, x))
    with pytest.raises(RuntimeError, match="structure of the model has changed"):
        compiled(x.abs())


def test_copies_have_structures_of_their_own():
    model = Mask()
    hess = fxhess.transform(model, ALL)
    hess(X)
    for other in (copy.deepcopy(hess), pickle.loads(pickle.dumps(hess))):
        other.model.mask.logical_not_()
        same(other, other.model, X)
    same(hess, model, X)
    model.load_state_dict({**model.state_dict(), "mask": torch.tensor([True, True, False, False])})
    same(hess, model, X)
    new = {"model.mask": torch.tensor([False, False, True, False])}
    got = torch.func.functional_call(hess, new, (X,)).hessian
    model.mask = new["model.mask"]
    assert_close(got, oracle.hessian(model, X))


def test_inside_of_transforms():
    hess = fxhess.transform(Mask())
    hess(X)
    assert_close(torch.vmap(hess)(X[:, None])[:, 0], hess(X))
    with pytest.raises(fxhess.InputError, match="functional transform"):
        torch.vmap(fxhess.transform(where))(X[:, None])
    with pytest.raises(fxhess.InputError, match="functional transform"):
        torch.vmap(fxhess.transform(boolean))(X)


# --- what else asks for values --------------------------------------------------------------------

INDEX = torch.tensor([0, 2])


def changed_answer(x):
    places = (INDEX + 0 > -1).nonzero()[:, 0]
    places += 1
    return x[:, places].exp().prod(-1)


def by_numpy(x):
    order = np.argsort(x.detach().numpy().sum(0))
    return x[:, torch.as_tensor(order[:2].copy())].exp().prod()


def after_a_recurrent_layer(x):
    y, _ = LSTM(x[None])
    return y.exp().sum() if y.sum() > 0 else y.cos().sum()


def counts(x):
    hot = torch.nn.functional.one_hot(x.argmax(-1))
    many = torch.bincount(x.argmax(-1), minlength=4)
    return (many * x).sin().sum() + hot.sum() * x.prod()


def may_fail(x):
    s = torch.outer(x[0], x[0]) + x[0, 0] * torch.eye(4, dtype=x.dtype)
    if x[0, 0] > 0:
        lower = torch.linalg.cholesky(s)
        return lower.diagonal().log().sum() if lower[0, 0] > 1 else lower.sum()
    return x.exp().sum()


torch.manual_seed(0)
LSTM = nn.LSTM(4, 3, batch_first=True).double()
OTHERS = (changed_answer, by_numpy, after_a_recurrent_layer, counts, may_fail)


@pytest.mark.parametrize("model", OTHERS, ids=lambda f: f.__name__)
def test_others(model):
    event_ndim = 1 if model is changed_answer else 2
    hess = fxhess.transform(model, ALL, event_ndim=event_ndim)
    for x in (X, -X):
        same(hess, model, x, event_ndim)


def test_the_page_of_the_docs_runs():
    text = (Path(__file__).parent.parent / "docs" / "structure.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    names = {}
    exec(compile(code, "structure.md", "exec"), names)
    assert names["H"].shape == (8, 5, 3, 5, 3)


@settings(max_examples=4, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.integers(1, 3), st.sampled_from(["where", "rows", "written"]))
def test_random_batches(seed, batch, name):
    same(RANDOM[name], VARYING[name], randn(batch, 3, seed=seed))


RANDOM = {name: fxhess.transform(VARYING[name], ALL) for name in ("where", "rows", "written")}
