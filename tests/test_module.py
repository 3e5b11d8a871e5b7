"""The module that ``transform`` returns, as PyTorch users use modules."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from reference import ALL, assert_close, mlp, randn
from torch import nn
from torch.func import functional_call

import fxhess
from fxhess import InputError, oracle

X = randn(3, 4)


class Scaled(nn.Module):
    """A module with a parameter, a buffer, a plain attribute and tied weights."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.register_buffer("shift", torch.ones(4))
        self.plain = torch.full((4,), 0.5)
        self.gate = nn.Sigmoid()

    def forward(self, x):
        h = torch.tanh(self.first(x) + self.shift)
        return (self.gate(self.second(h)) * self.plain).sum(-1)


def scaled() -> Scaled:
    torch.manual_seed(1)
    model = Scaled().double()
    model.plain = model.plain.double()
    return model


def assert_right(hess, x=X):
    assert_close(hess(x).detach(), oracle.hessian(hess.model, x))


# --- modes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("first", [True, False], ids=["at the first call", "later"])
def test_modes(mode, first):
    model = mlp(4, 5, 1)
    hess = fxhess.transform(model, ALL)
    if not first:
        hess(X)
    with mode():
        got = hess(X)
    assert_close(got.hessian.detach().clone(), oracle.hessian(model, X))
    assert got.hessian.requires_grad == (mode is torch.enable_grad)
    assert got.hessian.is_inference() == (mode is torch.inference_mode)
    assert_close(hess(X).hessian.detach(), oracle.hessian(model, X))


def test_inference_tensors_as_input():
    hess = fxhess.transform(mlp(4, 5, 1))
    with torch.inference_mode():
        x = X.clone()
        got = hess(x)
    assert_close(got.clone(), hess(X).detach())


@pytest.mark.parametrize("model", [mlp(4, 5, 1), mlp(4, 6, 5, 2, activation=nn.Softplus)])
@pytest.mark.parametrize("strategy", ["auto", "close", "rebase"])
def test_gradients_through_the_hessian_are_third_derivatives(model, strategy):
    x = X[:2].clone().requires_grad_()
    outputs = 2 if model[-1].out_features == 2 else 1
    weights = randn(2, *([2] if outputs == 2 else []), 4, 4, seed=3)
    parameters = [x, *model.parameters()]

    def triple():
        rows = []
        for sample in x:
            per_output = [
                torch.autograd.functional.hessian(
                    lambda s, o=o: model(s[None])[0, o], sample, create_graph=True
                )
                for o in range(outputs)
            ]
            rows.append(torch.stack(per_output) if outputs > 1 else per_output[0])
        return torch.stack(rows)

    want = torch.autograd.grad((triple() * weights).sum(), parameters, allow_unused=True)
    hess = fxhess.transform(model, strategy=strategy)
    got = torch.autograd.grad((hess(x) * weights).sum(), parameters, allow_unused=True)
    for g, w, p in zip(got, want, parameters, strict=True):
        zero = torch.zeros_like(p)
        assert_close(zero if g is None else g, zero if w is None else w)


def test_training_on_the_hessian_lowers_a_loss():
    model = mlp(4, 5, 1)
    hess = fxhess.transform(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = hess(X).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert_right(hess)
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]


def test_func_grad_of_a_loss_on_the_hessian():
    model = mlp(4, 5, 1)
    hess = fxhess.transform(model, example=X)
    state = dict(hess.named_parameters())
    loss = lambda p: functional_call(hess, p, (X,)).square().sum()  # noqa: E731
    got = torch.func.grad(loss)({k: v.detach() for k, v in state.items()})
    want = torch.autograd.grad(hess(X).square().sum(), list(state.values()), allow_unused=True)
    for name, w in zip(state, want, strict=True):
        assert_close(got[name], torch.zeros_like(got[name]) if w is None else w)


# --- changes act at the next call ---------------------------------------------------------------


def _load(model):
    model.load_state_dict(scaled_with(7).state_dict())


def scaled_with(seed):
    model = scaled()
    with torch.no_grad():
        for i, p in enumerate([*model.parameters(), *model.buffers()]):
            p.copy_(randn(*p.shape, seed=seed + i))
    return model


def _in_place(model):
    with torch.no_grad():
        model.first.weight.mul_(1.5)
        model.shift.sub_(0.3)


def _through_data(model):
    model.second.bias.data = randn(4, seed=5)


CHANGES = {
    "weights in place": _in_place,
    "load_state_dict": _load,
    "data": _through_data,
    "new parameter": lambda m: setattr(m.first, "weight", nn.Parameter(randn(4, 4, seed=2))),
    "untied": lambda m: setattr(m.second, "weight", nn.Parameter(randn(4, 4, seed=3))),
    "new buffer": lambda m: setattr(m, "shift", randn(4, seed=4)),
    "new plain tensor": lambda m: setattr(m, "plain", randn(4, seed=6)),
    "frozen": lambda m: m.first.requires_grad_(False),
    "submodule": lambda m: setattr(m, "second", nn.Linear(4, 4).double()),
    "submodule of another width": lambda m: (
        setattr(m, "first", nn.Linear(4, 6).double()),
        setattr(m, "second", nn.Linear(6, 4).double()),
        setattr(m, "shift", torch.ones(6, dtype=torch.float64)),
    ),
    "submodule of the same weights": lambda m: m.register_module("gate", nn.Tanh()),
    "submodule of another kind": lambda m: setattr(
        m, "second", nn.Sequential(nn.Linear(4, 5), nn.SiLU(), nn.Linear(5, 4)).double()
    ),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_a_change_acts_at_the_next_call(name, grad):
    hess = fxhess.transform(scaled())
    with torch.set_grad_enabled(grad):
        before = hess(X).detach()
        hess(X)
        CHANGES[name](hess.model)
        after = hess(X).detach()
    assert_close(after, oracle.hessian(hess.model, X))
    if name != "frozen":
        assert (after - before).abs().max() > 1e-3


def test_closures_are_read_at_every_call():
    table = {"w": randn(4, 4, seed=1)}
    w = randn(4, seed=2)
    inner = mlp(4, 3, 1)

    def model(x):
        return torch.tanh(x @ w) * inner(x).squeeze(-1)

    hess = fxhess.transform(model)
    assert_close(hess(X).detach(), oracle.hessian(model, X))
    w = randn(4, seed=3)
    assert_close(hess(X).detach(), oracle.hessian(model, X))
    inner = mlp(4, 3, 1, seed=8)
    assert_close(hess(X).detach(), oracle.hessian(model, X))
    held = lambda x: torch.tanh(x @ table["w"]).sum(-1)  # noqa: E731
    hess = fxhess.transform(held)
    hess(X)
    table["w"].mul_(2)
    assert_close(hess(X), oracle.hessian(held, X))


@pytest.mark.parametrize("change", [torch.float32, torch.float64])
def test_dtype_changes(change):
    model = mlp(4, 5, 1)
    hess = fxhess.transform(model)
    want = hess(X).detach()
    hess.to(change)
    got = hess(X.to(change))
    assert got.dtype == change
    assert_close(got.detach().double(), want, 1e-5 if change == torch.float32 else 1e-14)
    hess.double()
    assert_close(hess(X).detach(), want, 1e-6)


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 64)
        self.dropout = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(64)

    def forward(self, x):
        return self.dropout(torch.tanh(self.linear(x))).sum(-1)


def test_dropout_draws_one_mask_a_call_for_all_orders():
    x = randn(50, 4)
    hess = fxhess.transform(lambda x: nn.functional.dropout(torch.sin(x), 0.5).sum(-1), ALL)
    got = hess(x)
    mask = got.gradient / x.cos()
    assert_close(mask * (mask - 2), torch.zeros_like(x))
    assert 0.3 < mask.mean() / 2 < 0.7
    assert_close(got.value, (mask * x.sin()).sum(-1))
    assert_close(got.hessian, torch.diag_embed(-mask * x.sin()))
    assert (hess(x).gradient - got.gradient).abs().max() > 1e-3


def test_train_and_eval_act_at_the_next_call():
    model = Noisy().double()
    hess = fxhess.transform(model)
    random = hess(X)
    hess.eval()
    assert not model.training
    assert_right(hess)
    assert torch.equal(hess(X), hess(X))
    model.train()
    assert (hess(X) - hess(X)).abs().max() > 1e-3
    model.dropout.eval()
    assert_right(hess)
    assert random.shape == hess(X).shape


def test_functional_call():
    one, two = mlp(4, 5, 1, seed=1), mlp(4, 5, 1, seed=2)
    hess = fxhess.transform(one)
    want_one = hess(X).detach()
    weights = {f"model.{k}": v for k, v in two.named_parameters()}
    assert_close(functional_call(hess, weights, (X,)).detach(), oracle.hessian(two, X))
    assert torch.equal(hess(X), want_one)


def test_tied_weights_in_functional_call():
    hess = fxhess.transform(scaled())
    hess(X)
    w = randn(4, 4, seed=9)
    got = functional_call(hess, {"model.first.weight": w}, (X,)).detach()
    changed = scaled()
    changed.first.weight.data.copy_(w)
    assert_close(got, oracle.hessian(changed, X))
    assert_right(hess)


def test_ensembles_by_vmap_over_weights():
    models = [mlp(4, 5, 1, seed=s) for s in range(3)]
    hess = fxhess.transform(models[0], example=X)
    stacked = {
        f"model.{k}": torch.stack([dict(m.named_parameters())[k].detach() for m in models])
        for k in dict(models[0].named_parameters())
    }
    got = torch.vmap(lambda p: functional_call(hess, p, (X,)))(stacked)
    assert_close(got, torch.stack([oracle.hessian(m, X) for m in models]))


# --- copies -------------------------------------------------------------------------------------


@pytest.mark.parametrize("called", [True, False])
def test_deepcopy_is_independent(called):
    hess = fxhess.transform(scaled())
    if called:
        hess(X)
    copied = copy.deepcopy(hess)
    before = hess(X).detach()
    _in_place(copied.model)
    assert_right(copied)
    assert torch.equal(hess(X), before)
    assert copied.model.first.weight is copied.model.second.weight


@pytest.mark.parametrize("called", [True, False])
def test_pickle(called):
    hess = fxhess.transform(scaled(), ("value", "hessian"), strategy="close")
    if called:
        hess(X)
    loaded = pickle.loads(pickle.dumps(hess))
    got, want = loaded(X), hess(X)
    assert torch.equal(got.hessian, want.hessian) and torch.equal(got.value, want.value)
    assert loaded.options == hess.options and loaded.outputs == ("value", "hessian")


def test_torch_save():
    hess = fxhess.transform(scaled())
    want = hess(X)
    file = io.BytesIO()
    torch.save(hess, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(X), want)


def test_state_dict_is_the_models():
    model = scaled()
    hess = fxhess.transform(model)
    hess(X)
    assert set(hess.state_dict()) == {f"model.{k}" for k in model.state_dict()}
    assert all(p is q for p, q in zip(hess.parameters(), model.parameters(), strict=True))


def test_results_are_a_named_tuple_in_the_order_asked_for():
    got = fxhess.transform(mlp(4, 5, 1), ("hessian", "value"))(X)
    assert got._fields == ("hessian", "value")
    hessian, value = got
    assert hessian.shape == (3, 4, 4) and value.shape == (3,)
    single = fxhess.transform(mlp(4, 5, 1), ("gradient",))(X)
    assert single._fields == ("gradient",) and single.gradient.shape == (3, 4)


def test_repr_names_outputs_and_model():
    text = repr(fxhess.transform(mlp(4, 5, 1), event_ndim=1))
    assert "outputs='hessian'" in text and "event_ndim=1" in text and "Tanh" in text


def test_verify_and_explain():
    hess = fxhess.transform(mlp(4, 5, 1))
    report = hess.verify(X)
    assert report.symmetric and report.error <= report.allowed == 1e-9
    text = str(hess.explain(X))
    assert "tanh" in text and "test_module" not in text.splitlines()[0]
    with pytest.raises(fxhess.VerificationError):
        broken = fxhess.transform(mlp(4, 5, 1))
        broken.specialize(X)
        program = next(iter(broken.programs.bindings.values()))[0].program
        program.graph_module.forward = lambda x, *rest: torch.zeros(3, 4, 4, dtype=x.dtype)
        try:
            broken.verify(X)
        finally:
            fxhess.cache_clear()


def test_out_has_to_be_a_tensor():
    with pytest.raises((InputError, TypeError, AttributeError)):
        fxhess.transform(mlp(4, 5, 1))(X, out=3)
