"""Gradients through every output, to parameters and to x: third derivatives, against nested double
backward in float64."""

from __future__ import annotations

import pytest
import torch
from architectures import SMOOTH, Network, cases
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import assert_close, mlp, randn
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import fxhess
from fxhess._settings import plain_attention

TOLERANCE = 1e-8


class Referee(Network):
    """The same network; PyTorch's own layer norm has wrong third derivatives (its double backward
    takes mean and variance for constants), so here it is composed."""

    def _step(self, h, step, argument, weights, nb):
        if step != "affine norm":
            return super()._step(h, step, argument, weights, nb)
        centred = h - h.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + 0.1).rsqrt()
        return centred * scale * next(weights) + next(weights)


def _gradient(y, x):
    """dy/dx for another backward; zeros where y does not depend on x."""
    if not y.requires_grad:
        return torch.zeros_like(x)
    (g,) = torch.autograd.grad(y, x, create_graph=True, allow_unused=True)
    return torch.zeros_like(x) if g is None else g


def derivatives(model, x, event_ndim):
    """Value ``[*batch, *m]``, gradient ``[.., n]`` and Hessian ``[.., n, n]``, all of which can be
    differentiated again: one backward for each output, one more for each entry of the gradient."""
    nb = x.ndim - event_ndim
    n = x.shape[nb:].numel()
    with plain_attention():
        value = model(x)
    if value.ndim > nb and value.shape[nb:].numel() == 1:
        value = value.flatten(nb)[..., 0]
    gs, hs = [], []
    count = value.shape[nb:].numel()
    for y in value.reshape(*x.shape[:nb], count).unbind(-1):
        g = _gradient(y.sum(), x)
        flat = g.reshape(*x.shape[:nb], n)
        rows = [_gradient(flat[..., i].sum(), x).reshape(flat.shape) for i in range(n)]
        gs.append(flat)
        hs.append(torch.stack(rows, -2) if rows else flat.new_zeros(*flat.shape, n))
    outputs = value.shape[nb:]
    return (
        value,
        torch.stack(gs, nb).reshape(*x.shape[:nb], *outputs, n),
        torch.stack(hs, nb).reshape(*x.shape[:nb], *outputs, n, n),
    )


def wanted(output, parts, x, event_ndim, given):
    """What an output is made of ``derivatives``."""
    value, g, H = parts
    nb = x.ndim - event_ndim
    batch, event = x.shape[:nb], x.shape[nb:]
    lead = H.shape[:-2]
    name = output if isinstance(output, str) else output[0]
    columns = None
    if name in ("hvp", "quadratic"):
        v = given["vector"].reshape(-1, *batch, *[1] * (len(lead) - nb), event.numel())
        columns, product = v, (H @ v[..., None])[..., 0]
    if name == "value":
        return value
    if name in ("gradient", "jacobian"):
        return g.reshape(*lead, *event)
    if name == "hessian":
        return H.reshape(*lead, *event, *event)
    if name == "diagonal":
        return H.diagonal(dim1=-2, dim2=-1).reshape(*lead, *event)
    if name == "laplacian":
        metric = given.get("metric")
        if metric is None:
            return H.diagonal(dim1=-2, dim2=-1).sum(-1)
        return (metric.reshape(H.shape[-2:]) * H).sum((-1, -2))
    if name == "entries":
        return torch.stack([H[..., i, j] for i, j in _flat(output[1], event)], -1)
    if name == "blocks":
        H = H.reshape(*lead, *event, *event)
        a = len(lead)
        return H.diagonal(dim1=a, dim2=a + len(event)).movedim(-1, a)
    if name == "hvp":
        return product.reshape(-1, *lead, *event)
    return (columns * product).sum(-1)


def _flat(pairs, event):
    """Pairs of indices into a sample read as one list."""
    steps = [event[k + 1 :].numel() for k in range(len(event))]
    return [[sum(i * n for i, n in zip(one, steps, strict=True)) for one in p] for p in pairs]


OUTPUTS = (
    "value", "gradient", "jacobian", "hessian", "diagonal", "laplacian", "metric", "entries",
    "blocks", "hvp", "quadratic",
)  # fmt: skip


def asked(name, x, event_ndim):
    """An output and what is given for it, at random."""
    event = x.shape[x.ndim - event_ndim :]
    if name == "metric":
        return "laplacian", {"metric": randn(*event, *event, seed=3)}
    if name == "entries":
        index = [tuple(int(torch.randint(n, ())) for n in event) for _ in range(4)]
        return ("entries", [(index[0], index[1]), (index[2], index[3]), (index[0], index[0])]), {}
    if name == "blocks":
        return ("blocks", 0 if event else ()), {}
    if name in ("hvp", "quadratic"):
        return name, {"vector": randn(2, *x.shape, seed=4)}
    return name, {}


def check_gradients(network, referee, x, name, event_ndim):
    """Gradients of a random linear combination of an output's entries."""
    output, given = asked(name, x, event_ndim)
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    got = fxhess.transform(network, output, event_ndim=event_ndim)(ours, **given)
    want = wanted(output, derivatives(referee, theirs, event_ndim), theirs, event_ndim, given)
    assert_close(got.detach(), want.detach(), TOLERANCE, what=name)
    weights = randn(*want.shape, seed=5)
    found = []
    for result, model, point in ((got, network, ours), (want, referee, theirs)):
        leaves = [point, *model.parameters()]
        if not result.requires_grad:
            found.append([torch.zeros_like(leaf) for leaf in leaves])
            continue
        found.append(
            torch.autograd.grad((weights * result).sum(), leaves, materialize_grads=True,
                                allow_unused=True)
        )  # fmt: skip
    names = ["x", *(n for n, _ in network.named_parameters())]
    scale = max(g.abs().max().item() if g.numel() else 0.0 for g in found[1])
    for label, a, b in zip(names, *found, strict=True):
        error = (a - b).abs().max().item() if b.numel() else 0.0
        assert error <= TOLERANCE * max(scale, 1e-3), f"d {name} / d {label}: off by {error:.3g}"


def _case(recipe, batch, seed):
    network, referee = Network(recipe), Referee(recipe)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # fresh weights, not only those of the recipe
        for own, other in zip(network.parameters(), referee.parameters(), strict=True):
            own.add_(0.3 * torch.randn(own.shape, generator=generator, dtype=own.dtype))
            other.copy_(own)
    return network, referee, randn(*batch, *recipe.event, seed=seed + 1)


def _check(case, name, seed):
    recipe, batch = case
    check_gradients(*_case(recipe, batch, seed), name, len(recipe.event))


random = (cases(tuple(SMOOTH), max_batch=3), st.sampled_from(OUTPUTS), st.integers(0, 2**20))


@settings(max_examples=15)
@given(*random)
def test_gradients_are_those_of_nested_double_backward(case, name, seed):
    _check(case, name, seed)


@pytest.mark.slow
@settings(
    max_examples=500, derandomize=False, suppress_health_check=[HealthCheck.too_slow], deadline=None
)
@given(*random)
def test_gradients_of_many_architectures(case, name, seed):
    """``pytest -m slow tests/test_training.py``: other draws at every run."""
    _check(case, name, seed)


class _Particles(nn.Module):
    def __init__(self):
        super().__init__()
        self.pair = mlp(1, 5, 1, seed=2)
        self.weight = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, x):
        r = (x[..., :, None, :] - x[..., None, :, :]).square().sum(-1, keepdim=True)
        return self.pair(r + 0.5).sum((-1, -2, -3)) * torch.exp(
            -self.weight * x.square().sum((-1, -2))
        )


MODELS = {
    "net": (mlp(3, 6, 5, 1, seed=1), (3,)),
    "vector": (mlp(3, 6, 2, seed=3, activation=nn.Softplus), (3,)),
    "particles": (_Particles(), (3, 2)),
}


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("model", MODELS)
def test_every_output_of(model, name):
    network, event = MODELS[model]
    check_gradients(network, network, randn(4, *event, seed=6), name, len(event))


def test_several_outputs_at_once():
    """A residual of value, gradient and Laplacian, as of a PINN: one backward through all."""
    network = MODELS["net"][0]
    x = randn(5, 3, seed=8)
    u = fxhess.transform(network, ("value", "gradient", "laplacian", "diagonal"))(x)
    value, g, H = derivatives(network, x.clone().requires_grad_(), 1)
    diagonal = H.diagonal(dim1=-2, dim2=-1)
    loss = (u.laplacian + u.value * u.gradient.square().sum(-1) + u.diagonal.prod(-1)).square()
    want = (diagonal.sum(-1) + value * g.square().sum(-1) + diagonal.prod(-1)).square()
    parameters = list(network.parameters())
    got = torch.autograd.grad(loss.sum(), parameters)
    for a, b in zip(got, torch.autograd.grad(want.sum(), parameters), strict=True):
        assert_close(a, b, TOLERANCE)


# --- what is kept ---------------------------------------------------------------------------------


def _saved(call):
    """Bytes that autograd keeps of a call, and its result."""
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        result = call()
    return sum(storages.values()), result


@pytest.mark.parametrize("name", OUTPUTS)
def test_nothing_is_kept_when_no_gradient_is_wanted(name):
    network = mlp(6, 30, 30, 1, seed=1)
    x = randn(50, 6)
    output, given = asked(name, x, 1)
    derived = fxhess.transform(network, output)
    kept, result = _saved(lambda: derived(x, **given))
    assert result.requires_grad and kept > 0  # the count counts
    with torch.no_grad():
        kept, result = _saved(lambda: derived(x, **given))
    assert kept == 0 and result.grad_fn is None and not result.requires_grad
    network.requires_grad_(False)
    kept, result = _saved(lambda: derived(x, **given))
    assert kept == 0 and result.grad_fn is None
    with torch.inference_mode():
        assert derived(x, **given).grad_fn is None


def test_a_frozen_part_keeps_only_what_the_rest_needs():
    """Fine tuning the last layer: nothing of the layers before it is kept for their weights."""
    network = mlp(6, 40, 40, 1, seed=1)
    x = randn(200, 6)
    laplacian = fxhess.transform(network, "laplacian")
    whole, _ = _saved(lambda: laplacian(x))
    network.requires_grad_(False)
    network[-1].requires_grad_(True)
    part, result = _saved(lambda: laplacian(x))
    assert part < whole / 2
    result.sum().backward()
    assert network[-1].weight.grad is not None and network[0].weight.grad is None


def test_training_step_after_step_leaves_nothing_behind():
    """No graph of an earlier step is held by the module."""
    network = mlp(4, 8, 1, seed=1)
    laplacian = fxhess.transform(network, "laplacian")
    result = laplacian(randn(5, 4))
    gone = []
    result.grad_fn.metadata["gone"] = _Flag(gone)
    del result
    laplacian(randn(5, 4)).sum().backward()
    assert gone == [True]


class _Flag:
    def __init__(self, gone):
        self.gone = gone

    def __del__(self):
        self.gone.append(True)
