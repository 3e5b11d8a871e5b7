"""What is differentiated, and what is constant: several inputs, nested ones, parameters."""

from __future__ import annotations

import collections
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import assert_close, randn, referee
from torch import nn
from torch.nn import functional as F

import fxhess
from fxhess import CaptureError, InputError
from fxhess.packing import Packing

W, V = randn(5, 8, seed=1), randn(8, seed=2)


def dynamics(x, u, scale=1.0):
    return torch.tanh(torch.cat([x, u], -1) @ W) @ V * scale


def several(x, u, scale=1.0):
    return torch.tanh(torch.cat([x, u], -1) @ W)[..., :3] * scale


def each(function, count, *batched):
    """The referee's blocks for each sample, stacked."""
    found = [referee(*function(i), *(p[i] for p in batched)) for i in range(count)]
    n = len(found[0])
    return [[torch.stack([f[a][b] for f in found]) for b in range(n)] for a in range(n)]


def check_blocks(got, want):
    assert len(got) == len(want)
    for row, expected in zip(got, want, strict=True):
        for block, reference in zip(row, expected, strict=True):
            assert_close(block.detach(), reference)


@pytest.mark.parametrize("model", [dynamics, several])
def test_blocks_of_two_inputs(model):
    x, u = randn(4, 3, seed=3), randn(4, 2, seed=4)
    want = each(lambda i: (lambda a, b: model(a[None], b[None])[0],), 4, x, u)
    hess = fxhess.transform(model, wrt=("x", "u"))
    got = hess(x, u)
    check_blocks(got, want)
    check_blocks(hess(x[:2], u=u[:2]), [[b[:2] for b in row] for row in want])
    assert torch.equal(got[0][1], got[1][0].mT)
    named = fxhess.transform(model, wrt={"state": 0, "control": "u"})(x, u)
    assert torch.equal(named["control"]["state"], got[1][0])
    one = fxhess.transform(model, wrt="u")(x, u)
    assert_close(one, want[1][1])
    doubled = fxhess.transform(model, wrt="u")(x, u, scale=2.0)
    assert_close(doubled, 2 * want[1][1])
    (only,) = fxhess.transform(model, wrt=["u"])(x, u)
    assert torch.equal(only[0], one)


def test_all_outputs_of_two_inputs():
    outputs = ("value", "gradient", "hessian", "diagonal", "laplacian", "hvp", "quadratic")
    x, u = randn(4, 3, seed=3), randn(4, 2, seed=4)
    v, w = randn(2, 4, 3, seed=5), randn(2, 4, 2, seed=6)
    z = torch.cat([x, u], -1)
    whole = fxhess.transform(lambda z: dynamics(z[:, :3], z[:, 3:]), outputs)
    want = whole(z, vector=torch.cat([v, w], -1))
    got = fxhess.transform(dynamics, outputs, wrt=("x", "u"))(x, u, vector=(v, w))
    for name in ("value", "laplacian", "quadratic"):
        assert_close(getattr(got, name), getattr(want, name))
    for name in ("gradient", "diagonal", "hvp"):
        assert_close(torch.cat(getattr(got, name), -1), getattr(want, name))
    rows = [torch.cat(row, -1) for row in got.hessian]
    assert_close(torch.cat(rows, -2), want.hessian)
    metric = randn(5, 5, seed=7)
    blocks = tuple(tuple(b for b in row.split([3, 2], -1)) for row in metric.split([3, 2], -2))
    laplacian = fxhess.transform(dynamics, "laplacian", wrt=("x", "u"))(x, u, metric=blocks)
    assert_close(laplacian, (metric * want.hessian).sum((-1, -2)))


SHAPES = st.lists(st.lists(st.integers(1, 3), max_size=3).map(tuple), min_size=1, max_size=4)


@given(SHAPES, st.lists(st.integers(1, 3), max_size=2).map(tuple), st.integers(0, 2**31))
@settings(max_examples=60)
def test_packing(shapes, batch, seed):
    packing = Packing.of(shapes)
    torch.manual_seed(seed)
    parts = [torch.randn((*batch, *shape)) for shape in shapes]
    x = packing.pack(parts)
    assert x.shape == (*batch, *packing.event)
    assert all(map(torch.equal, packing.split(x), parts))
    blocks = [[torch.randn((*batch, *a, *b)) for b in shapes] for a in shapes]
    whole = packing.pack_matrix(lambda a, b: blocks[a][b])
    assert whole.shape == (*batch, *packing.event, *packing.event)
    for a, row in enumerate(blocks):
        assert all(torch.equal(packing.block(whole, a, b), own) for b, own in enumerate(row))


def test_axes_that_inputs_share_stay_axes():
    assert Packing.of([(10, 3), (10,)]).event == (10, 4)
    assert Packing.of([(4,), (4,)]).event == (8,)
    assert Packing.of([(10, 3), (3,)]).event == (33,)
    model = lambda p, q: torch.tanh(p @ W[:3] + q[..., None] * V).square().sum((-1, -2))  # noqa: E731
    p, q = randn(3, 6, 3, seed=1), randn(3, 6, seed=2)
    hess = fxhess.transform(model, wrt=("p", "q"), event_ndim=2)
    check_blocks(hess(p, q), each(lambda i: (model,), 3, p, q))
    assert all(row.structure == "diagonal" for row in hess.explain(p, q).rows)


# --- constants ------------------------------------------------------------------------------------


def energy(x, cell, charge, k=2):
    return (torch.sin(x @ cell).sum(-1) * charge) ** k


@pytest.mark.parametrize("n", [3, 5], ids=["as many samples as features", "others"])
def test_shared_and_batched_constants(n):
    x, cell, charge = randn(n, 3, seed=1), randn(3, 3, seed=2), randn(n, seed=3)
    (want,) = each(lambda i: (lambda a: energy(a, cell, charge[i]),), n, x)
    for in_dims in (None, (0, None, 0), {"cell": None}, {"charge": 0, 1: None}):
        hess = fxhess.transform(energy, in_dims=in_dims)
        assert_close(hess(x, cell, charge), want[0])
        assert_close(hess(x, charge=charge, cell=cell), want[0])
        assert_close(hess(x, 2 * cell, charge, 1), fxhess.transform(
            lambda x: energy(x, 2 * cell, charge, 1))(x))  # fmt: skip
    assert_close(fxhess.transform(energy).specialize(x, cell, charge)(x, cell, charge), want[0])


def test_another_batch_axis():
    model = lambda x, c: torch.tanh(x @ W[:2]).mean(0).sum(-1) * c.sum(0)  # noqa: E731
    x, c = randn(7, 4, 2, seed=1), randn(3, 4, seed=2)  # time first
    hess = fxhess.transform(model, in_dims=(1, 1), event_ndim=2)
    (want,) = each(lambda i: (lambda a: model(a[:, None], c[:, i, None])[0],), 4, x.movedim(1, 0))
    assert_close(hess(x, c), want[0])
    hess.verify(x, c)


def test_tiles_and_gradients_through_constants():
    x, c = randn(3000, 20, seed=1), randn(3000, seed=2)
    model = lambda x, c: torch.tanh(x @ M).sum(-1) * c  # noqa: E731
    M = randn(20, 64, seed=3)
    want = fxhess.transform(lambda x: torch.tanh(x @ M).sum(-1))(x) * c[:, None, None]
    hess = fxhess.transform(model, max_memory=22 << 20)
    with torch.no_grad():
        got = hess(x, c)
    assert hess.explain(x, c).tiles > 1
    assert_close(got, want)
    out = torch.empty_like(want)
    assert hess(x, c, out=out) is out
    assert_close(out, want)
    small, own = x[:3], c[:3].clone().requires_grad_(True)
    fxhess.transform(model)(small, own).sum().backward()
    assert_close(own.grad, want[:3].sum((1, 2)) / c[:3])


@dataclasses.dataclass
class Batch:
    pos: torch.Tensor
    kind: torch.Tensor
    cell: torch.Tensor
    power: int = 2


Pair = collections.namedtuple("Pair", "left right")


class Molecules(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(5, 3)
        self.layer = nn.Linear(6, 4)

    def forward(self, batch):
        found = batch if isinstance(batch, dict) else vars(batch)
        inputs = torch.cat([found["pos"] @ found["cell"], self.embedding(found["kind"])], -1)
        return torch.tanh(self.layer(inputs)).sum((-1, -2)) ** found["power"]


def test_nested_arguments():
    model = Molecules().double()
    kinds = torch.randint(0, 5, (4, 5), generator=torch.Generator().manual_seed(0))
    batch = Batch(randn(4, 5, 3, seed=1), kinds, randn(3, 3, seed=2))
    hess = fxhess.transform(model, wrt="batch.pos", event_ndim=2)

    def of_one(i):
        return (lambda p: model(Batch(p[None], kinds[i : i + 1], batch.cell))[0],)

    want = each(of_one, 4, batch.pos)[0][0]
    assert_close(hess(batch).detach(), want)
    assert_close(hess(vars(batch)).detach(), want)
    hess.verify(batch)
    assert "C_" in hess.graph_module(batch).code
    two = fxhess.transform(lambda pair: dynamics(pair.left, pair.right))
    pair = Pair(randn(4, 3, seed=3), randn(4, 2, seed=4))
    got = two(pair)
    assert type(got) is Pair and type(got.left) is Pair
    check_blocks(got, fxhess.transform(dynamics, wrt=("x", "u"))(*pair))
    with pytest.raises(InputError, match="int64"):
        fxhess.transform(model, wrt="batch")(batch)


def test_structure_read_from_constants():
    def model(x, mask, pairs):
        i, j = pairs.nonzero(as_tuple=True)
        kept = x[:, mask]
        return (torch.sin(x[:, i] * x[:, j]).sum(-1) + kept.prod(-1)).exp()

    x, mask = 0.3 * randn(3, 4, seed=1), torch.tensor([True, False, True, True])
    hess = fxhess.transform(model)
    for seed in range(3):
        pairs = torch.rand(4, 4, generator=torch.Generator().manual_seed(seed)) < 0.4
        (want,) = each(lambda i, p=pairs: (lambda a: model(a[None], mask, p)[0],), 3, x)
        assert_close(hess(x, mask, pairs), want[0])
    each_mask = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(5)) < 0.4

    def own(x, pairs):
        i, j, k = pairs.nonzero(as_tuple=True)
        return torch.zeros(len(x), dtype=x.dtype).index_add(0, i, torch.sin(x[i, j] * x[i, k]))

    (want,) = each(lambda i: (lambda a: own(a[None], each_mask[i : i + 1])[0],), 3, x)
    assert_close(fxhess.transform(own)(x, each_mask), want[0])


def test_compiled_and_pickled():
    import pickle

    x, u = randn(4, 3, seed=3), randn(4, 2, seed=4)
    hess = fxhess.transform(dynamics, wrt=("x", "u"))
    want = hess(x, u)
    check_blocks(torch.compile(hess, fullgraph=True)(x, u), want)
    check_blocks(fxhess.transform(dynamics, wrt=("x", "u"), compile=True)(x, u), want)
    check_blocks(pickle.loads(pickle.dumps(hess))(x, u), want)
    assert "wrt=('x', 'u')" in repr(hess)


# --- bad input ------------------------------------------------------------------------------------

X, U = randn(6, 3), randn(6, 2)
BAD = {  # name: transform's options, arguments, error, parts of the message
    "an unknown name": ({"wrt": "w"}, (X, U), InputError, ("'w'", "x, u, scale")),
    "a position": ({"wrt": 7}, (X, U), InputError, ("position 7", "x, u, scale")),
    "a tensor": ({"wrt": X}, (X, U), InputError, ("a tensor as wrt", "fxhess.parameters")),
    "reduced u": ({"wrt": "u", "reduce": "sum"}, (X, U), InputError, ("its own 'u'",)),
    "nothing at all": ({}, (), InputError, ("'x' is to be differentiated", "no tensors")),
    "not given": ({"wrt": "u"}, (X,), InputError, ("'u'", "it has x")),
    "integers": ({"wrt": "u"}, (X, torch.ones(6, 2, dtype=torch.long)), InputError, ("int64",)),
    "a number": ({"wrt": "scale"}, (X, U, 2.0), InputError, ("'scale'", "float")),
    "twice": ({"wrt": ("x", 0)}, (X, U), InputError, ("'x' twice",)),
    "no parameter": (
        {"wrt": fxhess.parameters("9.weight")}, (X, U), InputError, ("'9.weight'", "none"),
    ),
    "no name": ({"wrt": 1.5}, (X, U), InputError, ("1.5", "fxhess.parameters")),
    "reduced x": ({"reduce": "sum"}, (X, U), InputError, ("'sum'", "parameters")),
    "unknown reduce": ({"reduce": "max"}, (X, U), InputError, ("'max'", "'mean'")),
    "batches": ({"wrt": ("x", "u")}, (X, U[:3]), InputError, ("[3]", "[6]", "in_dims")),
    "constants of another batch": (
        {"wrt": "u"}, (X[:2], U), CaptureError, ("for all of them: x", "in_dims"),
    ),
    "in_dims out of range": ({"in_dims": (0, 2)}, (X, U), InputError, ("axis 2", "'u'")),
    "in_dims of what": ({"in_dims": {"v": 0}}, (X, U), InputError, ("'v'",)),
    "in_dims is what": ({"in_dims": "all"}, (X, U), InputError, ("'all'",)),
    "types": ({"wrt": ("x", "u")}, (X, U.float()), InputError, ("float32", "float64")),
    "an object": ({}, (X, object()), InputError, ("'u'", "object")),
    "entries of several": (
        {"wrt": ("x", "u"), "outputs": ("entries", [(0, 1)])}, (X, U), InputError, ("'entries'",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    options, arguments, error, parts = BAD[name]
    with pytest.raises(error) as caught:
        fxhess.transform(dynamics, **options)(*arguments)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.parametrize("name", ["0.weight", "net.bias"])
def test_a_parameter_named_like_an_argument(name):
    first = name.split(".")[0]
    model = nn.Module()
    setattr(model, first, nn.Linear(3, 1))
    model.forward = lambda x: getattr(model, first)(x)  # type: ignore[method-assign]
    with pytest.raises(InputError, match=rf"fxhess\.parameters\('{name}'\)"):
        fxhess.transform(model, wrt=name)(X.float())


def test_a_vector_as_a_dataclass():
    """In the structure of the argument that is differentiated, as that was given."""
    model = lambda state: dynamics(state.pos, state.cell)  # noqa: E731
    x, u = Batch(X, None, U), Batch(randn(6, 3, seed=8), None, randn(6, 2, seed=9))
    got = fxhess.transform(model, "hvp")(x, vector=u)
    same = fxhess.transform(model, "hvp")(x, vector={"pos": u.pos, "cell": u.cell})
    assert torch.equal(got["pos"], same["pos"]) and torch.equal(got["cell"], same["cell"])


def test_explain_tells_constants_from_one_another():
    x, cell, charge = randn(3, 3, seed=1), randn(3, 3, seed=2), randn(3, seed=3)
    said = str(fxhess.transform(energy).explain(x, cell, charge))
    assert "given for each sample: charge; for all of them: cell (in_dims=" in said


def test_bad_vectors_and_results():
    hess = fxhess.transform(dynamics, "hvp", wrt=("x", "u"))
    for vector, parts in (
        (None, ("needs a vector",)),
        (X, ("each of the inputs: 0, 1",)),
        ((X, X), ("[6, 3], [6, 3]", "[[3], [2]]")),
        ((X, 1.0), ("float",)),
        ({0: X, 1: U, 2: U}, ("each of the inputs: 0, 1", "no others")),
    ):
        with pytest.raises(InputError) as caught:
            hess(X, U, vector=vector)
        assert all(part in str(caught.value) for part in parts), str(caught.value)
    with pytest.raises(InputError, match="one tensor"):
        fxhess.transform(dynamics, wrt=("x", "u"))(X, U, out=torch.empty(6, 5, 5))
    softplus = fxhess.transform(lambda x: F.softplus(x).sum(-1), in_dims=(None,))
    with pytest.raises(InputError):
        softplus(X, vector=X)
