"""Sketches: what tells models apart without capturing them.  A sketch that is the same for two
models that differ would be a wrong number, so most of these are pairs that differ in one thing."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from reference import assert_close, mlp, randn
from torch import nn
from torch.nn import functional as F

import fxhess
from fxhess import oracle, recall
from fxhess._sketch import sketch
from fxhess.closures import as_module

W = randn(3, 3, seed=5)


def _sketch(model, *shape, batch_ndim=1):
    return sketch(as_module(model), randn(*(shape or (2, 3))), batch_ndim)


class Net(nn.Module):
    """``forward`` is given; what else is given becomes attributes."""

    def __init__(self, forward, **attributes):
        super().__init__()
        self.own = forward
        for name, value in attributes.items():
            if isinstance(value, torch.Tensor) and not name.startswith("plain"):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, x):
        return self.own(self, x)


def _graded(enabled):
    def forward(self, x):
        with torch.set_grad_enabled(enabled):
            y = x.sin()
        return (x * y).sum(-1)

    return forward


def _cast(enabled):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return (x.float() @ self.w).sum(-1)

    return forward


def _inner(create_graph):
    """The force times the position: with the force a function of the position, or a constant."""

    def forward(self, x):
        x = x if x.requires_grad else x.detach().requires_grad_()
        with torch.enable_grad():
            (g,) = torch.autograd.grad(x.sin().exp().sum(), x, create_graph=create_graph)
        return (g * x * x).sum(-1)

    return forward


def _quiet(function):
    def forward(self, x):
        with torch._C.DisableTorchFunction():
            return function(x)

    return forward


def _guarded(self, x):
    """A model that hides what it asks."""
    y = x.sin().sum(-1)
    with contextlib.suppress(Exception):
        if x.shape[0] > self.limit:
            y = 2 * y
    return y


_scaled = lambda self, x: (x * self.scale).exp().sum(-1)  # noqa: E731
_times = lambda self, x: (x @ self.w).tanh().sum(-1)  # noqa: E731
_chosen = lambda self, x: self.chosen(x).sum(-1)  # noqa: E731
DIFFERENT = {
    "a number": (_scaled, {"scale": 2.0}, {"scale": 2.5}),
    "a type of number": (_scaled, {"scale": 2.0}, {"scale": 2}),
    "the sign of zero": (_scaled, {"scale": 0.0}, {"scale": -0.0}),
    "a shape": (_times, {"w": randn(3, 3)}, {"w": randn(3, 4)}),
    "a dtype": (_scaled, {"scale": randn(3)}, {"scale": randn(3).float()}),
    "strides": (_times, {"w": randn(3, 3)}, {"w": randn(3, 3).T}),
    "a buffer or an attribute": (_times, {"w": W}, {"plain_w": W, "w": None}),
    "a function": (_chosen, {"chosen": torch.sin}, {"chosen": torch.cos}),
    "an operator by another name": (
        _chosen,
        {"chosen": lambda x: torch.ops.aten.sin(x)},
        {"chosen": lambda x: torch.ops.aten.cos(x)},
    ),
    "a keyword": (_chosen, {"chosen": F.gelu}, {"chosen": lambda x: F.gelu(x, approximate="tanh")}),
    "a dimension": (_chosen, {"chosen": lambda x: x.softmax(-1)},
                    {"chosen": lambda x: x.softmax(0)}),
    "the line": (_chosen, {"chosen": lambda x: x.sin()},
                 {"chosen": lambda x: x.sin()}),
    "no_grad": (None, _graded(True), _graded(False)),
    "the graph of a gradient": (None, _inner(True), _inner(False)),
    "autocast inside": (None, _cast(True), _cast(False)),
    "what no Python mode sees": (None, _quiet(lambda x: x.sin().sum(-1)),
                                 _quiet(lambda x: x.cos().sum(-1))),
    "training": (None, nn.Dropout(0.5).train(), nn.Dropout(0.5).eval()),
    "names": (None, nn.Sequential(nn.Linear(3, 1)), nn.ModuleList([nn.Linear(3, 1)])[0]),
    "ties": (None, nn.Sequential(*[nn.Linear(3, 3)] * 2),
             nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))),
    "operands": (None, lambda s, x: (x.sin() - x.cos()).sum(-1),
                 lambda s, x: (x.cos() - x.sin()).sum(-1)),
}  # fmt: skip


def _made(forward, given):
    if isinstance(given, nn.Module):
        return given
    if forward is None:
        return Net(given, w=torch.ones(3, 3))
    if "plain_w" in given:
        net = Net(forward)
        net.w = W
        return net
    return Net(forward, **given)


@pytest.mark.parametrize("what", DIFFERENT)
def test_sketches_differ_by(what):
    forward, one, other = DIFFERENT[what]
    first, second = (_sketch(_made(forward, given)) for given in (one, other))
    again = _sketch(_made(forward, one))
    assert first is not None and first == again, "not reproducible"
    assert second is None or second.digest != first.digest or second.places != first.places


def test_a_gradient_inside_has_a_graph_where_it_was_asked_for(disk):
    """Without ``create_graph`` it is a constant of what follows."""
    x = randn(4, 3)
    for create_graph in (True, False, True):
        model = Net(_inner(create_graph))
        assert_close(fxhess.transform(model)(x), oracle.hessian(model, x))
        fxhess.cache_clear()


def test_sketches_are_of_structure():
    one, two = (_sketch(mlp(3, 4, 1, seed=s)) for s in (1, 2))
    assert one == two is not None
    assert one.places == (("0", "weight"), ("0", "bias"), ("2", "weight"), ("2", "bias"))
    many = [_sketch(mlp(3, 4, 1), n, 3) for n in (0, 1, 2, 1009)]
    assert many == [one] * 4
    assert _sketch(mlp(3, 4, 1), 2, 2, 3, batch_ndim=2).digest != one.digest


def test_tensors_that_functions_close_over_have_places():
    q = randn(3, 3)
    assert _sketch(lambda x: (x @ q).tanh().sum(-1)).places == (("free:q",),)


def _append(seen):
    def forward(self, x):
        seen.append(1)
        return x.sin().sum(-1) * len(seen)

    return forward


def _counting(self, x):
    self.calls += 1
    return (x * self.calls).sin().sum(-1)


def _caching(self, x):
    if self.kept is None:
        self.kept = torch.arange(3, dtype=x.dtype)
    return (x * self.kept).sin().sum(-1)


class Squared(torch.autograd.Function):
    """With a derivative of its own, which no trace shows."""

    @staticmethod
    def forward(ctx, x):
        return x * x

    @staticmethod
    def backward(ctx, g):
        return g


NONE = {
    "a condition on the batch": Net(lambda s, x: (x if x.shape[0] > 4 else 2 * x).sum(-1)),
    "a condition that is hidden": Net(_guarded, limit=4),
    "a batch size as a key": Net(lambda s, x: {4: x}.get(len(x), x).sin().sum(-1)),
    "a batch size in words": Net(lambda s, x: (x if f"{x.shape[0]}" == "4" else 2 * x).sum(-1)),
    "a batch size, multiplied": Net(lambda s, x: (x if x.shape[:1].numel() > 5 else 2 * x).sum(-1)),
    "all sizes, multiplied": Net(lambda s, x: (x if x.numel() > 5 else 2 * x).sum(-1)),
    "a root of a batch size": Net(lambda s, x: (x * math.sqrt(x.size(0))).sum(-1)),
    "the least of sizes": Net(lambda s, x: (x * min(x.shape)).sum(-1)),
    "arithmetic with a batch size": Net(lambda s, x: (x * (x.shape[0] + 1)).sum(-1)),
    "a tensor from elsewhere": Net(lambda s, x: (x @ s.found[0]).sum(-1), found=[W]),
    "values": Net(lambda s, x: x.sum(-1) if x.sum() > 0 else x.sin().sum(-1)),
    "shapes by values": Net(lambda s, x: x[x > 0].sum()),
    "an array": Net(lambda s, x: (x * s.array).sum(-1), array=W[0].numpy()),
    "a function of the user's own": Net(lambda s, x: Squared.apply(x).sum(-1)),
    "a state": Net(_counting, calls=0),
    "a state that is kept": Net(_caching, kept=None),
    "a state in a list": Net(lambda s, x: (s.seen.append(0), x.sin().sum(-1) * len(s.seen))[1],
                             seen=[]),
    "no tensor": Net(lambda s, x: None),
    "an error": Net(lambda s, x: x.nonsense()),
    "one batch size": Net(lambda s, x: x.view(2, 3).sin().sum(-1)),
}  # fmt: skip


@pytest.mark.parametrize("what", NONE)
def test_no_sketch_of(what):
    model = NONE[what]
    before = {k: list(v) if isinstance(v, list) else v for k, v in vars(model).items()}
    assert _sketch(model) is None
    after = vars(model)
    assert list(after) == list(before)
    assert all(after[k] is v or after[k] == v for k, v in before.items() if k != "array")


def test_a_model_that_goes_on_changing_is_not_remembered(disk):
    """What it does is no attribute of it, so that only doing it again shows it."""
    model, x = Net(_append([])), randn(2, 3)
    fxhess.transform(model)(x)
    assert not [p for p in disk.iterdir() if p.name.startswith("sketch")]


def test_models_that_hold_for_some_batch_sizes_only_are_not_remembered(disk):
    model = lambda x: (x if x.shape[0] > 4 else 2 * x).square().sum(-1)  # noqa: E731
    for _ in range(2):
        hess = fxhess.transform(model)
        for n, factor in ((3, 4), (7, 1), (4, 4)):
            want = 2 * factor * torch.eye(3).double().expand(n, 3, 3)
            assert_close(hess(randn(n, 3)), want)
        fxhess.cache_clear()
    assert not [p for p in disk.iterdir() if p.name.startswith("sketch")]


def test_no_sketch_inside_of_modes_and_transforms():
    model, x = mlp(3, 4, 1), randn(2, 3)
    assert sketch(model, x, 1) is not None
    with torch.device("cpu"):
        assert sketch(model, x, 1) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert sketch(model, x, 1) is None
    assert torch.func.vmap(lambda x: torch.tensor(sketch(model, x, 0) is None))(x).all()


def test_attributes_are_read_anew(disk, monkeypatch):
    """A plain tensor of the model is found by its place, not by its value."""
    x, nets = randn(2, 3), []
    for seed in (1, 2):
        net = Net(_times)
        net.w = randn(3, 3, seed=seed)
        nets.append(net)
    fxhess.transform(nets[0])(x)
    fxhess.cache_clear()
    monkeypatch.setattr(recall, "capture", None)
    assert_close(fxhess.transform(nets[1])(x), oracle.hessian(nets[1], x))


def test_a_mistake_of_types_is_named_in_a_later_process_too(disk):
    x = randn(2, 3)
    for _ in range(2):
        with pytest.raises(fxhess.InputError, match="float64"):
            fxhess.transform(mlp(3, 4, 1).float())(x)
        fxhess.transform(mlp(3, 4, 1))(x)
        fxhess.cache_clear()


def test_other_arguments_are_told_by_form_and_plain_values(disk, monkeypatch):
    class Scaled(nn.Module):
        def forward(self, x, q, power=2):
            return ((x @ q) ** power).sum(-1)

    x, q = randn(4, 3), randn(3, 3, seed=2)
    calls = [({}, 2), ({"power": 3}, 3), ({"power": 4}, 4)]
    model = Scaled()
    want = [oracle.hessian(lambda x, n=n: ((x @ q) ** n).sum(-1), x) for _, n in calls]
    for (given, _), each in zip(calls, want, strict=True):
        assert_close(fxhess.transform(model, in_dims=(0, None))(x, q, **given), each)
    assert len([p for p in disk.iterdir() if p.name.startswith("sketch")]) == 3
    fxhess.cache_clear()
    monkeypatch.setattr(recall, "capture", None)
    for (given, _), each in zip(calls, want, strict=True):
        assert_close(fxhess.transform(model, in_dims=(0, None))(x, q, **given), each)
    with pytest.raises(TypeError, match="NoneType"):  # another power is another capture
        fxhess.transform(model, in_dims=(0, None))(x, q, power=5)
