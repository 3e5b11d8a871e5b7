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
from reference import ALL, assert_close, check
from structures import (
    Cond,
    Edges,
    Flag,
    Mask,
    Nonzero,
    Order,
    Repeated,
    Scalar,
    Selected,
    Split,
    TensorSplit,
    Unique,
    X,
    boolean,
    same,
    where,
)
from torch import nn

import fxhess
from fxhess import oracle

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
