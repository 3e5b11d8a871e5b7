"""Every output of second order, against parts of the referee's Hessian."""

from __future__ import annotations

import pytest
import torch
from reference import assert_close, mlp, randn
from torch import nn
from torch.nn import functional as F

import fxhess
from fxhess import oracle
from fxhess.errors import InputError


def _pairs(x):
    r = (x[:, :, None] - x[:, None] + 1e-3).square().sum(-1).sqrt()
    return (torch.sin(r) * x.sum((-1, -2))[:, None, None].cos()).sum((-1, -2))


def _deep_set(x):
    return torch.tanh(torch.tanh(x @ P).mean(-2) @ Q).sum(-1)


def _attention(x):
    return (torch.softmax(x @ P @ (x @ P).mT / 3, -1) @ x).square().sum((-1, -2))


def _normalized(x):
    return F.layer_norm(torch.sin(x @ P), (5,)).prod(-1)


P, Q, R = randn(4, 5, seed=21), randn(5, 6, seed=22), randn(4, 130, seed=23)
MODELS = {  # name: model, event shape
    "mlp": (mlp(4, 7, 6, 1, seed=1), (4,)),
    "vector": (mlp(4, 7, 3, seed=2), (4,)),
    "bottleneck": (mlp(9, 3, 8, 1, seed=3), (9,)),
    "generalized linear": (lambda x: F.softplus(x @ R).sum(-1), (4,)),
    "normalized": (_normalized, (4,)),
    "pairs": (_pairs, (3, 2)),
    "deep set": (_deep_set, (3, 4)),
    "attention": (_attention, (3, 4)),
    "convolution": (
        nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(9, 2)).double(),
        (2, 4),
    ),
    "affine": (lambda x: x.sum(-1) * 3, (4,)),
    "numbers": (lambda x: torch.sin(x) * x, ()),
}
every_model = pytest.mark.parametrize("name", MODELS)


def _case(name, batch=(3,), seed=0):
    model, event = MODELS[name]
    x = randn(*batch, *event, seed=seed)
    H = oracle.hessian(model, x, len(event))
    n = torch.Size(event).numel()
    m = H.shape[len(batch) : H.ndim - 2 * len(event)]
    return model, event, x, H, H.reshape(*batch, *m, n, n)


def _ask(model, event, output, x, **given):
    hess = fxhess.transform(model, output, event_ndim=len(event))
    got = hess(x, **given)
    with torch.no_grad():
        assert_close(hess(x, out=torch.empty_like(got), **given), got.detach())
    return got


@every_model
def test_diagonal_and_laplacian(name):
    model, event, x, _, flat = _case(name)
    diagonal = flat.diagonal(dim1=-2, dim2=-1)
    want = diagonal.reshape(*diagonal.shape[:-1], *event)
    assert_close(_ask(model, event, "diagonal", x), want)
    assert_close(_ask(model, event, "laplacian", x), diagonal.sum(-1))


@every_model
@pytest.mark.parametrize("each", [False, True], ids=["shared", "each"])
def test_laplacian_with_a_metric(name, each):
    model, event, x, _, flat = _case(name)
    n = flat.shape[-1]
    metric = randn(*((3,) if each else ()), n, n, seed=4)
    whole = metric.reshape((*metric.shape[:-2], *event, *event))
    a = metric[:, None] if each and flat.ndim > 3 else metric
    want = (a * flat).sum((-1, -2))
    assert_close(_ask(model, event, "laplacian", x, metric=whole), want)


@every_model
@pytest.mark.parametrize("leading", [(), (1,), (2,)])
def test_products_with_vectors(name, leading):
    model, event, x, _, flat = _case(name)
    v = randn(*leading, *x.shape, seed=6)
    columns = v.reshape(*leading, 3, *([1] * (flat.ndim - 3)), -1)
    product = (flat @ columns[..., None])[..., 0]
    m = flat.shape[1:-2]
    want = product.reshape(*leading, 3, *m, *event)
    assert_close(_ask(model, event, "hvp", x, vector=v), want)
    assert_close(_ask(model, event, "quadratic", x, vector=v), (columns * product).sum(-1))


@every_model
def test_entries(name):
    model, event, x, H, _ = _case(name)
    index = [tuple(torch.randint(0, n, ()).item() for n in event) for _ in range(6)]
    pairs = [*zip(index[:3], index[3:], strict=True), (index[0], index[0])]
    got = _ask(model, event, ("entries", pairs), x)
    n = len(event)
    want = torch.stack([H[(..., *i, *j)] if n else H for i, j in pairs], -1)
    assert_close(got, want)


@pytest.mark.parametrize("axes", [0, 1, (0, 1), -1, ()])
@pytest.mark.parametrize("name", ["pairs", "deep set", "attention", "convolution"])
def test_blocks(name, axes):
    model, event, x, H, _ = _case(name)
    tied = {a % 2 for a in ((axes,) if isinstance(axes, int) else axes)}
    letters = ["ab", "".join("ab"[k] if k in tied else "cd"[k] for k in range(2))]
    rest = "".join("cd"[k] for k in range(2) if k not in tied)
    want = torch.einsum(f"...{letters[0]}{letters[1]}->...ab{rest}", H)
    assert_close(_ask(model, event, ("blocks", axes), x), want)


@every_model
def test_all_at_once_and_beside_the_hessian(name):
    model, event, x, H, _ = _case(name, seed=8)
    v = randn(*x.shape, seed=9)
    zero = tuple(0 for _ in event)
    parts = ("laplacian", "diagonal", "hvp", "quadratic", ("entries", [(zero, zero)]))
    alone = fxhess.transform(model, ("value", "gradient", *parts), event_ndim=len(event))
    beside = fxhess.transform(model, (*parts, "hessian"), event_ndim=len(event))
    a, b = alone(x, vector=v), beside(x, vector=v)
    assert_close(b.hessian, H)
    assert_close(a.gradient, oracle.gradient(model, x, len(event)))
    for field in ("laplacian", "diagonal", "hvp", "quadratic", "entries"):
        assert_close(getattr(a, field), getattr(b, field), what=field)


def test_blocks_and_metric_beside_the_hessian():
    model, event, x, H, _ = _case("attention")
    metric = randn(3, *event, *event, seed=3)
    outputs = ("hessian", "laplacian", ("blocks", 0))
    got = fxhess.transform(model, outputs, event_ndim=2)(x, metric=metric)
    assert_close(got.laplacian, (metric * H).sum((-4, -3, -2, -1)))
    assert_close(got.blocks, torch.einsum("...abad->...abd", H))


@pytest.mark.parametrize("output", ["laplacian", "diagonal", "hvp", "quadratic"])
@pytest.mark.parametrize("batch", [(), (0,), (1,), (2, 3)])
def test_any_batch(output, batch):
    model, event = MODELS["mlp"]
    x, flat = randn(*batch, *event), None
    if 0 not in batch:
        _, _, x, _, flat = _case("mlp", batch)
    v = randn(*x.shape, seed=2)
    given = {"vector": v} if output in ("hvp", "quadratic") else {}
    got = fxhess.transform(model, output)(x, **given)
    assert got.shape == (x.shape if output in ("diagonal", "hvp") else x.shape[:-1])
    if flat is not None:
        want = {
            "laplacian": flat.diagonal(dim1=-2, dim2=-1).sum(-1),
            "diagonal": flat.diagonal(dim1=-2, dim2=-1),
            "hvp": (flat @ v[..., None])[..., 0],
            "quadratic": (v * (flat @ v[..., None])[..., 0]).sum(-1),
        }[output]
        assert_close(got, want)


def test_parts_never_hold_a_hessian():
    """No value of the generated programs is as large as a Hessian."""
    d = 50
    model = mlp(d, 20, 20, 1)
    x = randn(4, d)
    for output, given in (
        ("laplacian", {}), ("diagonal", {}), ("hvp", {"vector": x}), ("quadratic", {"vector": x}),
        ("laplacian", {"metric": randn(d, d)}),
    ):  # fmt: skip
        hess = fxhess.transform(model, output)
        hess(x, **given)
        binding = next(iter(hess.programs.bindings.values()))[0]
        for node in binding.program.graph_module.graph.nodes:
            val = node.meta.get("val")
            if isinstance(val, torch.Tensor) and node.meta.get("varies") and val.numel():
                per_sample = val.numel() / 509 if val.shape and 509 in val.shape else 0
                assert per_sample < d * d, (output, node.format_node())


def test_gradients_flow_through_every_output():
    model = mlp(3, 5, 1, seed=7)
    x = randn(4, 3)
    v = randn(4, 3, seed=1)
    parameters = list(model.parameters())

    def by_autograd(output):
        point = x.clone().requires_grad_()
        H = []
        (g,) = torch.autograd.grad(model(point).sum(), point, create_graph=True)
        for i in range(3):
            H.append(torch.autograd.grad(g[:, i].sum(), point, create_graph=True)[0])
        H = torch.stack(H, 1)
        value = {
            "laplacian": H.diagonal(dim1=1, dim2=2).sum(-1),
            "diagonal": H.diagonal(dim1=1, dim2=2),
            "hvp": (H @ v[..., None])[..., 0],
            "quadratic": (v * (H @ v[..., None])[..., 0]).sum(-1),
        }[output]
        loss = value.square().sum()
        return torch.autograd.grad(loss, [*parameters, point], allow_unused=True)

    for output in ("laplacian", "diagonal", "hvp", "quadratic"):
        point = x.clone().requires_grad_()
        given = {"vector": v} if output in ("hvp", "quadratic") else {}
        loss = fxhess.transform(model, output)(point, **given).square().sum()
        got = torch.autograd.grad(loss, [*parameters, point], allow_unused=True)
        for a, b in zip(got, by_autograd(output), strict=True):
            zero = torch.zeros(())
            assert_close(zero if a is None else a, zero if b is None else b, what=output)


def test_programs_with_what_is_given_are_shown():
    """For several vectors, or with a metric, a program is another one."""
    model, _, x, *_ = _case("mlp")
    shown = {"laplacian": {"metric": randn(4, 4, seed=2)}, "hvp": {"vector": randn(7, 3, 4)}}
    for output, given in shown.items():
        hess = fxhess.transform(model, output)
        code = hess.graph_module(x, **given)
        (name,) = given
        (own,) = (n for n in code.graph.nodes if n.op == "placeholder" and n.name == name)
        assert list(own.meta["val"].shape)[:1] == list(given[name].shape)[:1]
        tensors = hess.tensors(x, **given).values()
        assert_close(code(x, given[name], *tensors).detach(), hess(x, **given).detach())
        assert output in hess.explain(x, **given).outputs


def test_one_vector_for_all_samples():
    model, _, x, _, flat = _case("mlp")
    v = randn(4, seed=5)
    got = fxhess.transform(model, "hvp")(x, vector=v)
    assert_close(got, flat @ v)


@pytest.mark.parametrize(
    ("outputs", "given", "message"),
    [
        ("hesian", {}, "'hessian'\\? valid outputs are 'value', 'gradient'"),
        (("value", "Laplace"), {}, "'laplacian'\\? valid"),
        (("entries", [(0.5, 1)]), {}, "cannot read output"),
        (("entries", [((0.5,), (1,))]), {}, "cannot read output"),
        (("entries", [(0, 1, 2)]), {}, "pairs of indices"),
        (("blocks", [0.5]), {}, "cannot read output"),
        (("hessian", "hessian"), {}, "once each"),
        ((), {}, "named"),
        ("entries", {}, r"\(\"entries\", \[\(0, 1\)"),
        (("entries", [(0, 9)]), {}, "outside of a sample"),
        (("entries", [((0, 1), 2)]), {}, "2 numbers where"),
        (("blocks", 3), {}, r"a sample has 1 axes\n.*event_ndim="),
        ("hvp", {}, "needs a vector"),
        ("hvp", {"vector": torch.zeros(3, 5).double()}, r"shape \[3, 5\] where x has \[3, 4\]"),
        ("hvp", {"vector": torch.zeros(3, 4)}, r"float32.*\n.*vector\.to\(x\)"),
        ("hvp", {"vector": torch.zeros(7, 4).double()}, "several for all samples: v.reshape"),
        ("hvp", {"vector": [1.0]}, "must be a tensor"),
        ("hessian", {"out": [1.0]}, r"must be a tensor, not list.*\n.*torch.empty\(\[3, 4, 4\]"),
        ("hessian", {"vector": torch.zeros(3, 4).double()}, "no output takes one"),
        ("hessian", {"metric": torch.zeros(4, 4).double()}, "no Laplacian"),
        ("laplacian", {"metric": torch.zeros(4, 3).double()}, r"has to be \[4, 4\]"),
    ],
)
def test_bad_input(outputs, given, message):
    model, _ = MODELS["mlp"]
    with pytest.raises(InputError, match=message):
        fxhess.transform(model, outputs)(randn(3, 4), **given)
