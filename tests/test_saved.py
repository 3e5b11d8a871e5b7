"""Modules of derivatives in files: the same numbers without the model's source; clear errors."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from reference import assert_close, mlp, randn
from torch import nn

import fxhess
from fxhess import container, oracle

ROOT = Path(__file__).resolve().parent.parent


class Encoder(nn.Module):
    """A layer of PyTorch's own transformer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, "gelu", batch_first=True)

    def forward(self, x):
        return self.layer(x).tanh().sum((-1, -2))


class Scaled(nn.Module):
    """Takes positions, one matrix for all, and a number."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(randn(3, seed=9))

    def forward(self, x, q, power=2):
        return ((x @ q) ** power * self.weight).sum(-1)


def _saved(tmp_path, hess, *args, **kwargs):
    path = tmp_path / "hess.fxhess"
    fxhess.save(hess, path, *args, **kwargs)
    return fxhess.load(path)


@pytest.mark.parametrize("example", [0, 1, 5])
def test_any_batch_size(tmp_path, example):
    model = mlp(3, 6, 1)
    hess = fxhess.transform(model)
    loaded = _saved(tmp_path, hess, randn(example, 3))
    for n in (0, 1, 2, 5, 1009):
        x = randn(n, 3, seed=n)
        assert_close(loaded(x), hess(x), 1e-13)
    assert_close(loaded(x[:4]), oracle.hessian(model, x[:4]))


def test_a_transformer_layer_and_its_weights(tmp_path):
    model, x = Encoder().double(), randn(3, 4, 8)
    hess = fxhess.transform(model, event_ndim=2)
    loaded = _saved(tmp_path, hess, x)
    want = oracle.hessian(model, x[:1], 2)
    with torch.no_grad():  # the file has the weights as they were
        for p in model.parameters():
            p.zero_()
    assert_close(loaded(x[:1]), want)
    name = loaded.weights["layer.linear1.weight"]
    assert getattr(loaded, name).shape == (16, 8)


@pytest.mark.parametrize("lead", [(), (2,)])
def test_several_outputs_along_vectors(tmp_path, lead):
    hess = fxhess.transform(mlp(3, 6, 1), ("value", "hessian", "hvp", "laplacian"))
    x = randn(4, 3)
    given = {"vector": randn(*lead, 4, 3, seed=1), "metric": randn(4, 3, 3, seed=2)}
    loaded = _saved(tmp_path, hess, x, **given)
    x, given = x[:3] + 1, {"vector": given["vector"][..., :3, :], "metric": given["metric"][:3]}
    want, got = hess(x, **given), loaded(x, **given)
    assert got._fields == want._fields
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, 1e-13)


def test_several_arguments(tmp_path):
    hess = fxhess.transform(
        Scaled(), ("gradient", "hessian"), wrt=("x", "q"), in_dims=(0, None)
    )  # fmt: skip
    x, q = randn(2, 3), randn(3, 3, seed=1)
    want = hess(x, q, power=3)
    got = _saved(tmp_path, hess, x, q, power=3)(x, q, power=3)
    assert_close(got.gradient[1], want.gradient[1], 1e-13)
    for a, b in zip(got.hessian, want.hessian, strict=True):
        for c, d in zip(a, b, strict=True):
            assert_close(c, d, 1e-13)


def test_a_constant_that_all_share(tmp_path):
    hess = fxhess.transform(Scaled(), in_dims=(0, None))
    x, q = randn(2, 3), randn(3, 3, seed=1)
    loaded = _saved(tmp_path, hess, x, q)
    assert_close(loaded(randn(7, 3), q), hess(randn(7, 3), q), 1e-13)


def test_it_is_a_module_like_others(tmp_path):
    hess = fxhess.transform(mlp(3, 6, 1))
    loaded, x = _saved(tmp_path, hess, randn(2, 3)), randn(4, 3)
    want = hess(x)
    assert_close(fxhess.load(tmp_path / "hess.fxhess")(x), want, 1e-13)
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loaded(leaf).sum(), leaf)
    (ours,) = torch.autograd.grad(hess(leaf).sum(), leaf)
    assert_close(grad, ours, 1e-12)
    assert_close(pickle.loads(pickle.dumps(loaded))(x), want, 1e-13)
    dims = ({0: torch.export.Dim.AUTO},)
    exported = torch.export.export(loaded, (x,), dynamic_shapes=(dims,)).module()
    assert_close(exported(x[:3]), want[:3], 1e-13)


LOAD = """
import sys, torch, fxhess
loaded = fxhess.load(sys.argv[1])
H = loaded(torch.tensor([[0.1, -0.2, 0.3]], dtype=torch.float64))
print([float(v).hex() for v in H.flatten()])
assert "reference" not in sys.modules
"""


def test_another_process_needs_no_source(tmp_path):
    hess = fxhess.transform(mlp(3, 6, 1))
    path = tmp_path / "a name"
    fxhess.save(hess, path, randn(2, 3))
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(path)], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120, check=True,
    )  # fmt: skip
    numbers = json.loads(done.stdout.replace("'", '"'))
    got = torch.tensor([float.fromhex(v) for v in numbers], dtype=torch.float64).view(1, 3, 3)
    assert_close(
        got, oracle.hessian(mlp(3, 6, 1), torch.tensor([[0.1, -0.2, 0.3]], dtype=torch.float64))
    )


# --- what does not fit ------------------------------------------------------------------------


@pytest.mark.parametrize("args,kwargs", [
    ((randn(2, 4),), {}), ((randn(2, 3).float(),), {}), ((randn(3),), {}), ((), {}),
    ((randn(2, 3), randn(2, 3)), {}), ((randn(2, 3),), {"vector": randn(2, 3)}), ((1,), {}),
])  # fmt: skip
def test_other_calls_are_refused(tmp_path, args, kwargs):
    loaded = _saved(tmp_path, fxhess.transform(mlp(3, 6, 1)), randn(2, 3))
    with pytest.raises(fxhess.InputError, match="saved"):
        loaded(*args, **kwargs)


def test_batches_that_differ_are_refused(tmp_path):
    hess = fxhess.transform(mlp(3, 6, 1), "hvp")
    loaded = _saved(tmp_path, hess, randn(4, 3), vector=randn(4, 3))
    with pytest.raises(fxhess.InputError, match="batch"):
        loaded(randn(4, 3), vector=randn(1, 3))


class Slow(torch.autograd.Function):
    """Nothing that could be traced."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.from_numpy(x.detach().numpy() ** 2)

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


def test_what_no_file_holds_is_refused(tmp_path):
    hess = fxhess.transform(lambda x: Slow.apply(x).sum(-1))
    with pytest.raises(fxhess.FxhessError):
        fxhess.save(hess, tmp_path / "x", randn(2, 3))
    assert not (tmp_path / "x").exists()


def test_a_program_for_some_batch_sizes_only_is_refused(tmp_path):
    q = randn(4, 3, seed=3)
    hess = fxhess.transform(lambda x: (x * q).sin().sum(-1))
    with pytest.raises(fxhess.FxhessError):
        fxhess.save(hess, tmp_path / "x", randn(4, 3))


# --- files that are none ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A file's bytes, and where there is room for others."""
    folder = tmp_path_factory.mktemp("saved")
    fxhess.save(fxhess.transform(mlp(3, 6, 1)), folder / "whole", randn(2, 3))
    return folder, (folder / "whole").read_bytes()


def _load(whole, content):
    path = whole[0] / "other"
    path.write_bytes(content)
    return fxhess.load(path)


def test_other_files_are_refused(whole):
    for content in (b"", b"PK\x03\x04 a zip", pickle.dumps([1]), b"\0" * 100, b"FXHESX" * 20):
        with pytest.raises(fxhess.FileError, match="not written by"):
            _load(whole, content)
    with pytest.raises(FileNotFoundError):
        fxhess.load(whole[0] / "none")


def test_newer_files_are_refused(whole):
    newer = whole[1][:6] + struct.pack("<H", 2) + whole[1][8:]
    with pytest.raises(fxhess.FileError, match="version 2, and this fxhess reads up to 1"):
        _load(whole, newer)


@hypothesis.given(st.data())
def test_truncated_files_are_refused(whole, data):
    length = data.draw(st.integers(0, len(whole[1]) - 1))
    with pytest.raises(fxhess.FileError):
        _load(whole, whole[1][:length])


@hypothesis.given(st.data())
def test_changed_files_are_refused(whole, data):
    content = bytearray(whole[1])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] ^= data.draw(st.integers(1, 255))
    hypothesis.assume(bytes(content) != whole[1])
    with pytest.raises(fxhess.FileError):
        _load(whole, bytes(content))


class Evil:
    """Runs code where it is unpickled."""

    def __reduce__(self):
        return os.abort, ()


def test_nothing_is_unpickled_or_evaluated(whole):
    """Files with a right checksum and something else inside, at every place of the document."""
    evil = pickle.dumps(Evil()).decode("latin1")
    code = "__import__('os').abort()"
    path = whole[0] / "evil"
    document, tensors = container.read(whole[0] / "whole")

    def places(value, found=()):
        yield found
        if isinstance(value, (dict, list)):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, inner in items:
                yield from places(inner, (*found, key))

    x, refused = randn(2, 3), 0
    for place in list(places(document))[1::2]:
        for bad in (evil, code, {"exec": code}):
            changed = json.loads(json.dumps(document))
            target = changed
            for key in place[:-1]:
                target = target[key]
            target[place[-1]] = bad
            container.write(path, changed, tensors)
            try:
                fxhess.load(path)(x)  # where this is only told: a version, the name of a weight
            except (fxhess.FxhessError, RuntimeError, TypeError, IndexError, ValueError):
                refused += 1
    assert refused > 100


def test_the_files_of_torch_export_are_not_taken(whole, tmp_path):
    """They hold pickles, which PyTorch itself loads."""
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(mlp(3, 4, 1), (randn(2, 3),)), buffer)
    assert zipfile.is_zipfile(buffer)
    with pytest.raises(fxhess.FileError, match="not written by"):
        _load(whole, buffer.getvalue())


def test_an_old_file_stays_where_a_new_one_cannot_be_written(whole, monkeypatch):
    path = whole[0] / "kept"
    path.write_bytes(whole[1])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(container.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        fxhess.save(fxhess.transform(mlp(3, 6, 1)), path, randn(2, 3))
    assert path.read_bytes() == whole[1]
    assert not list(whole[0].glob(".kept.*"))


# --- other ways out of Python -----------------------------------------------------------------


@pytest.mark.parametrize("outputs", ["hessian", ("value", "gradient", "hvp")], ids=str)
def test_onnx(tmp_path, outputs):
    """Exported by PyTorch, run by onnxruntime, for other batch sizes too."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = mlp(3, 8, 8, 1).float()
    hess = fxhess.transform(model, outputs)
    x = randn(4, 3).float()
    given = {} if outputs == "hessian" else {"vector": randn(4, 3, seed=1).float()}
    hess(x, **given)
    path = tmp_path / "hess.onnx"
    batch = {0: torch.export.Dim("batch")}
    dims = {"x": batch, **dict.fromkeys(given, batch)}
    program = torch.onnx.export(
        hess, (x,), kwargs=given, dynamo=True, dynamic_shapes=dims, verbose=False
    )
    program.save(path)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for n in (4, 9):
        inputs = {"x": randn(n, 3, seed=n).float()}
        inputs |= {name: randn(n, 3, seed=n + 1).float() for name in given}
        want = hess(**inputs) if given else [hess(**inputs)]
        got = session.run(None, {k: v.numpy() for k, v in inputs.items()})
        for a, b in zip(got, want, strict=True):
            assert_close(torch.from_numpy(a), b, 1e-5)


def test_packages_are_named_pt2(tmp_path):
    with pytest.raises(fxhess.InputError, match=r"\.pt2"):
        fxhess.package(fxhess.transform(mlp(3, 4, 1)), tmp_path / "x", randn(2, 3))


@pytest.mark.slow
def test_package(tmp_path):
    """Compiled ahead of time, run from Python."""
    model = mlp(3, 8, 1)
    hess = fxhess.transform(model, ("value", "hessian"))
    path = fxhess.package(hess, tmp_path / "hess.pt2", randn(4, 3))
    run = torch._inductor.aoti_load_package(path)
    for n in (2, 4, 33):
        x = randn(n, 3, seed=n)
        value, hessian = run(x)
        assert_close(hessian, oracle.hessian(model, x))
        assert_close(value, model(x)[:, 0])
