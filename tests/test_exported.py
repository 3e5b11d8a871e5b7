"""Saved and exported derivatives of more kinds of models; files that others wrote.

What takes PyTorch's exporters runs with ``python -m tests.faults``, what takes its compiler with
``-m slow``.
"""

from __future__ import annotations

import os
import pickle

import pytest
import torch
from forked import MORE
from reference import assert_close, mlp, randn
from torch import nn

import fxhess
from fxhess import oracle

long = pytest.mark.skipif(MORE <= 1, reason="in the long battery: python -m tests.faults")


class Attention(nn.Module):
    """Attention by hand, a layer norm, gelu: [*, 3, 4] -> [*]."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.norm = nn.LayerNorm(4)
        self.out = nn.Linear(4, 4)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        weights = (q @ k.transpose(-1, -2) / 2).softmax(-1)
        return nn.functional.gelu(self.out(x + weights @ v)).sum((-1, -2))


class Normed(nn.Module):
    """Statistics in buffers."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 6), nn.Linear(6, 1)
        self.norm = nn.BatchNorm1d(6)
        self.norm.running_mean.uniform_(-1, 1)
        self.norm.running_var.uniform_(1, 2)

    def forward(self, x):
        return self.last(self.norm(self.first(x)).sigmoid())


class Tied(nn.Module):
    """One weight used twice, under two names."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x).tanh()).exp().sum(-1)


MODELS = {
    "gelu, layer norm, attention": (Attention, (3, 4)),
    "batch norm": (lambda: Normed().eval(), (3,)),
    "tied weights": (Tied, (3,)),
    "vector output": (lambda: mlp(3, 6, 2), (3,)),
}


def _made(name):
    torch.manual_seed(0)
    make, event = MODELS[name]
    return make().double(), event


def _cases():
    """In the suite: the small ones, in double precision."""
    for name in MODELS:
        for dtype in (torch.float64, torch.float32):
            brief = dtype is torch.float64 and MODELS[name][1] == (3,)
            marks = () if brief else long
            yield pytest.param(name, dtype, id=f"{name}-{dtype}", marks=marks)


@pytest.mark.parametrize("name, dtype", _cases())
def test_saved(name, dtype, tmp_path):
    """For any batch size, one sample after many, or the other way round; the weights once."""
    model, event = _made(name)
    hess = fxhess.transform(model.to(dtype), event_ndim=len(event))
    for example in (1, 4):
        path = tmp_path / f"{example}"
        fxhess.save(hess, path, randn(example, *event).to(dtype))
        loaded = fxhess.load(path)
        for n in (5, 1, 0):
            x = randn(n, *event, seed=n).to(dtype)
            assert_close(loaded(x), hess(x), 1e-12 if dtype is torch.float64 else 1e-5)
    x = randn(2, *event).to(dtype)
    reference = _made(name)[0]
    assert_close(
        loaded(x).double(), oracle.hessian(reference, x.double(), len(event)),
        1e-10 if dtype is torch.float64 else 1e-4,
    )  # fmt: skip
    if name == "tied weights":
        tensors = [getattr(loaded, k) for k in loaded.weights.values()]
        assert sum(t.shape == (3, 3) for t in tensors) <= 2


def _loaded(tmp_path, hess, *args, **kwargs):
    fxhess.save(hess, tmp_path / "saved", *args, **kwargs)
    return fxhess.load(tmp_path / "saved")


class Pairs(nn.Module):
    """Makes tensors of its own: which pairs there are."""

    def __init__(self):
        super().__init__()
        self.net = mlp(1, 4, 1)

    def forward(self, p):
        i, j = torch.triu_indices(p.shape[-2], p.shape[-2], 1)
        return self.net((p[..., i, :] - p[..., j, :]).square().sum(-1, keepdim=True)).sum((-1, -2))


def test_a_model_that_makes_tensors(tmp_path):
    model = Pairs().double()
    outputs = ("hessian", ("entries", [((0, 0), (2, 1)), ((1, 1), (1, 1))]))
    hess = fxhess.transform(model, outputs, event_ndim=2)
    loaded, x = _loaded(tmp_path, hess, randn(3, 3, 2)), randn(5, 3, 2, seed=4)
    got, want = loaded(x), oracle.hessian(model, x, 2)
    assert_close(got.hessian, want)
    assert_close(got.entries, torch.stack([want[:, 0, 0, 2, 1], want[:, 1, 1, 1, 1]], 1))


def test_vectors_by_name(tmp_path):
    """Of several inputs, each with its own vector: their batch is one and the same."""
    hess = fxhess.transform(
        lambda state, control, gain: (torch.tanh(state * gain) * control.exp()).sum(-1),
        ("gradient", "hvp"), wrt={"x": "state", "u": 1},
    )  # fmt: skip

    def given(n, seed):
        v = {"x": randn(n, 3, seed=seed), "u": randn(n, 3, seed=seed + 1)}
        named = {"gain": randn(3, seed=9), "vector": v}
        return (randn(n, 3, seed=seed + 2), randn(n, 3, seed=seed + 3)), named

    args, kwargs = given(4, 0)
    loaded = _loaded(tmp_path, hess, *args, **kwargs)
    for n in (1, 5):
        args, kwargs = given(n, n)
        got, want = loaded(*args, **kwargs), hess(*args, **kwargs)
        for a, b in zip(got, want, strict=True):
            for name in ("x", "u"):
                assert_close(a[name], b[name], 1e-13)


def test_a_sum_over_the_batch_is_of_that_batch(tmp_path):
    """Its program is one for a number of samples, and so is its file."""
    hess = fxhess.transform(mlp(3, 4, 1), wrt=fxhess.parameters("0"), reduce="sum")
    x = randn(4, 3)
    loaded = _loaded(tmp_path, hess, x)
    for names in (("0.weight", "0.bias"), ("0.bias", "0.bias")):
        got, want = (h(x)[names[0]][names[1]] for h in (loaded, hess))
        assert_close(got, want, 1e-13)
    with pytest.raises(fxhess.InputError, match=r"saved for torch.float64 \[4, 3\]"):
        loaded(x[:2])


class Evil:
    """Ends the process where it is unpickled."""

    def __reduce__(self):
        return os.abort, ()


def test_files_that_others_wrote_are_not_executed(tmp_path):
    path = tmp_path / "evil"
    pickled = pickle.dumps(Evil())
    torch.save({"weights": Evil()}, path)
    for content in (path.read_bytes(), pickled, b"FXHESS" + pickled, b"FXHESS\1\0" + pickled * 9):
        path.write_bytes(content)
        with pytest.raises(fxhess.FileError):
            fxhess.load(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(OSError):
        fxhess.load(path)


OUTPUTS = {
    "hessian": "hessian",
    "several": ("value", "gradient", "hessian", "diagonal", "laplacian"),
}


@long
@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize("name", MODELS)
def test_onnx(name, outputs, tmp_path):
    """Exported by PyTorch, run by onnxruntime."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, event = _made(name)
    hess = fxhess.transform(model.float(), OUTPUTS[outputs], event_ndim=len(event))
    x = randn(4, *event).float()
    hess(x)
    program = torch.onnx.export(
        hess, (x,), dynamo=True, dynamic_shapes={"x": {0: torch.export.Dim("batch")}}, verbose=False
    )
    program.save(tmp_path / "hess.onnx")
    session = runtime.InferenceSession(tmp_path / "hess.onnx", providers=["CPUExecutionProvider"])
    for n in (4, 9):
        x = randn(n, *event, seed=n).float()
        want = hess(x) if outputs == "several" else [hess(x)]
        got = session.run(None, {"x": x.numpy()})
        for a, b in zip(got, want, strict=True):
            assert_close(torch.from_numpy(a), b, 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gelu, layer norm, attention", "vector output"])
def test_package(name, tmp_path):
    """Compiled ahead of time by AOTInductor, run from Python."""
    model, event = _made(name)
    hess = fxhess.transform(model, ("value", "hessian"), event_ndim=len(event))
    path = fxhess.package(hess, tmp_path / "hess.pt2", randn(4, *event))
    run = torch._inductor.aoti_load_package(path)
    for n in (2, 33):
        x = randn(n, *event, seed=n)
        value, hessian = run(x)
        assert_close(value, hess(x).value)
        assert_close(hessian, oracle.hessian(model, x, len(event)))
