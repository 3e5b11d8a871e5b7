"""Products whose result is symmetric: one triangle is computed, the Hessian is the same."""

import json
import warnings

import pytest
import torch
from reference import assert_close, mlp, randn
from torch import nn

import fxhess
from fxhess import _lanes, cost, oracle, serial
from fxhess.emit import SYMMETRIC
from fxhess.execute import Execution
from fxhess.kernels import for_compiler
from fxhess.rates import BUILT_IN
from fxhess.symmetric import blocks, share, symmetric_product, use_symmetric_products


@pytest.mark.parametrize("size", [1, 47, 95, 96, 100, 200, 500, 1001])
def test_blocks_cover_all_rows(size):
    found = list(blocks(size))
    assert [row for start, stop in found for row in range(start, stop)] == list(range(size))
    assert (share(size) < 1) == (size >= 96)
    assert 0.5 < share(1001) < 0.57


@pytest.mark.parametrize("size", [97, 100, 203])
@pytest.mark.parametrize("form", ["rows first", "batch first", "by sample"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_the_product_and_its_transpose(size, form, dtype):
    k, batch = 31, 5
    root, scale = randn(k, size, seed=1), randn(batch, k, seed=2)
    rows = root.mT[None] * scale[:, None]  # [B, d, k]
    matrix = root if form != "by sample" else (root[None] * scale[..., None])
    want = 2 * rows @ matrix
    rows, matrix = rows.to(dtype), matrix.to(dtype)
    if form == "rows first":
        rows = rows.movedim(0, 1).contiguous()
    axis = 0 if form == "rows first" else 1
    limit = 40 * torch.finfo(dtype).eps * float(want.abs().max())
    out = torch.full((batch, size, size), torch.nan, dtype=dtype)
    for got in (symmetric_product(rows, matrix, axis, out=out), out):
        assert float((got.double() - want).abs().max()) <= limit
        assert torch.equal(got, got.mT)
    compiled = torch.ops.fxhess.symmetric_product(rows, matrix, axis)
    assert float((compiled.double() - want).abs().max()) <= limit
    if dtype == torch.float64:
        torch.library.opcheck(torch.ops.fxhess.symmetric_product, (rows, matrix, axis))


def body(hess, x):
    """The program as it runs without autograd, and its inputs but for x and the result."""
    module = hess.graph_module(x)
    execution = Execution.of(module, 1, False)
    return execution, execution.prologue.forward(*hess.tensors(x).values())


def names(graph):
    return [getattr(n.target, "__name__", "") for n in graph.nodes]


class Gated(nn.Module):
    """A product of two functions of x: no part of its curvature is symmetric by itself."""

    def __init__(self, width):
        super().__init__()
        self.first, self.second = nn.Linear(width, 20), nn.Linear(width, 20)

    def forward(self, x):
        return (self.first(x) * self.second(x)).sum(-1)


class Residual(nn.Module):
    """Terms at several places, of which some are pulled back through others."""

    def __init__(self, width):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(3)])

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x.sum(-1)


@pytest.mark.parametrize(
    "model, used",
    [
        (lambda: mlp(100, 60, 1), True),
        (lambda: mlp(130, 30, 40, 1, activation=nn.GELU), True),
        (lambda: Residual(97), False),  # a sum of a product and of what passed by it
        (lambda: Gated(100), False),
        (lambda: mlp(90, 60, 1), False),
    ],
    ids=["net", "gelu net", "residual", "gated", "small"],
)
@pytest.mark.parametrize("strategy", ["auto", "pull"])
def test_a_program_uses_it_where_it_may(model, used, strategy):
    torch.manual_seed(0)
    model = model().double().requires_grad_(False)
    hess = fxhess.transform(model, strategy=strategy)
    width = next(p.shape[1] for p in model.parameters() if p.ndim == 2)
    x = randn(7, width)
    execution, hoisted = body(hess, x)
    found = "symmetric_product" in names(execution.functional)
    if strategy == "pull":
        assert found == used
    out = torch.full((7, width, width), torch.nan, dtype=x.dtype)
    execution.body.forward(x, *hoisted, out)
    want = oracle.hessian(model, x)
    assert_close(out, want, 1e-12)
    assert torch.equal(out, out.mT)
    compiled = torch.zeros_like(out)
    text = str(for_compiler(execution.functional))
    assert ("fxhess.symmetric_product" in text) == found
    code = _lanes.compiled(execution.functional, [x, *hoisted, compiled], 1, 1)
    code([x, *hoisted, compiled])
    assert_close(compiled, want, 1e-12)
    assert torch.equal(compiled, compiled.mT)


def test_large_calls_run_by_it_in_both_types_and_follow_the_batch():
    model = mlp(110, 70, 1).requires_grad_(False)
    given = [randn(batch, 110, seed=batch).float().double() for batch in (12, 5, 20)]
    want = [oracle.hessian(model, x) for x in given]
    for dtype, options in (
        (torch.float32, {}), (torch.float64, {}), (torch.float32, {"compile": True})
    ):  # fmt: skip
        hess = fxhess.transform(model.to(dtype), **options)
        for x, expected in zip(given, want, strict=True):
            got = hess(x.to(dtype))
            assert_close(got.double(), expected, 60 * torch.finfo(dtype).eps)


def test_the_mark_is_kept_on_disk_and_read_from_files_without_it():
    model = mlp(100, 60, 1).double().requires_grad_(False)
    hess = fxhess.transform(model, strategy="pull")
    x = randn(3, 100)
    graph = hess.graph_module(x).graph
    marked = [n.name for n in graph.nodes if n.meta.get(SYMMETRIC)]
    assert len(marked) == 1
    again, _ = serial.graph_from_data(json.loads(json.dumps(serial.graph_to_data(graph, {}))))
    assert [n.name for n in again.nodes if n.meta.get(SYMMETRIC)] == marked
    assert "symmetric_product" in names(use_symmetric_products(again))
    data = serial.graph_to_data(graph, {})
    for node in data["nodes"]:
        node.pop()  # as earlier versions wrote it
    earlier, _ = serial.graph_from_data(data)
    assert [n.name for n in earlier.nodes if n.meta.get(SYMMETRIC)] == []


@pytest.mark.parametrize("strategy", ["auto", "close", "rebase"])
def test_it_is_written_without_a_warning(strategy):
    hess = fxhess.transform(mlp(100, 100, 100, 1).requires_grad_(False), strategy=strategy)
    x = randn(7, 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = hess(x)
    assert_close(got, oracle.hessian(hess.model, x), 1e-12)


@pytest.mark.parametrize(
    "widths",
    [(200, 200, 200, 1), (200, 64, 1), (120, 300, 300, 1), (20, 64, 64, 1), (2, 64, 64, 1)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_plan_counts_what_it_saves(widths, dtype):
    """No forced strategy is estimated faster once one triangle does where it may."""
    model = mlp(*widths).to(dtype).requires_grad_(False)
    x = randn(3, widths[0]).to(dtype)
    rates = BUILT_IN["cpu", dtype.itemsize]
    estimates = {}
    for strategy in ("auto", "close", "pull", "rebase"):
        graph = fxhess.transform(model, strategy=strategy).graph_module(x).graph
        estimates[strategy] = cost.total(use_symmetric_products(graph).nodes, rates)
    assert estimates["auto"] <= 1.001 * min(estimates.values()), estimates
