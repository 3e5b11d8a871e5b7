"""Plans on disk: found again by later processes, data only, and replaceable at any time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference import assert_close, mlp, randn
from torch import nn

import fxhess
from fxhess import binding, cache, oracle, rates, recall, serial
from fxhess.cache import programs

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def frozen(monkeypatch):
    """Call it, and nothing can be planned any more (``capture=True``: nor captured); memory is
    empty, as in a new process."""

    def freeze(capture=False):
        fxhess.cache_clear()

        def refuse(*_):
            raise AssertionError("planned anew")

        monkeypatch.setattr(binding, "compile_captured", refuse)
        if capture:
            monkeypatch.setattr(recall, "capture", refuse)

    return freeze


class Encoder(nn.Module):
    """Two layers of PyTorch's own transformer, and reads of its own sizes."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, "gelu", batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(4 * 8, 1)

    def forward(self, x):
        batch, tokens, width = x.shape
        return self.head(self.layers(x).reshape(batch, tokens * width)).tanh().view(batch)


@pytest.mark.parametrize("outputs", [("hessian",), ("value", "gradient", "laplacian")], ids=str)
def test_neither_captured_nor_planned_again(disk, frozen, outputs):
    model, x = Encoder().double(), randn(3, 4, 8)
    want = fxhess.transform(model, outputs, event_ndim=2)(x)
    frozen(capture=True)
    got = fxhess.transform(model, outputs, event_ndim=2)(x)
    assert all(map(torch.equal, got, want))
    other = Encoder().double()  # of the same structure: the weights are its own
    hessian = oracle.hessian(other, x, 2)
    again = fxhess.transform(other, outputs, event_ndim=2)(x)
    if outputs == ("hessian",):
        assert_close(again.hessian, hessian)
    else:
        assert_close(again.value, other(x))
        assert_close(again.laplacian, torch.einsum("bijij->b", hessian))
    info = fxhess.cache_info()
    assert info.disk.hits >= 2 and info.disk.entries == 2 and info.disk.path == disk
    assert 0 < info.disk.bytes < info.disk.maxbytes and not info.disk.problem


SECOND = """
import sys, torch, fxhess
from fxhess import binding, recall
sys.path.insert(0, {tests!r})
from reference import mlp, randn
if {frozen}:
    binding.compile_captured = recall.capture = None
model, x = mlp(4, 8, 8, 1), randn(5, 4)
H = fxhess.transform(model)(x)
print([float(v).hex() for v in H.flatten()])
print(*fxhess.cache_info().disk[4:6])
"""


def run(code: str, folder: Path, **environment: str) -> list[str]:
    """The lines that a process of its own prints."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("FXHESS")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240,
        env={**kept, "PYTHONPATH": str(ROOT), "FXHESS_CACHE_DIR": str(folder), **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_second_process_neither_captures_nor_plans(tmp_path):
    tests = str(ROOT / "tests")
    first, counts = run(SECOND.format(tests=tests, frozen=False), tmp_path / "new")
    assert counts == "0 2"
    second, counts = run(SECOND.format(tests=tests, frozen=True), tmp_path / "new")
    assert counts == "2 0"
    assert first == second
    want = oracle.hessian(mlp(4, 8, 8, 1), randn(5, 4)).flatten()
    numbers = [float.fromhex(v) for v in json.loads(first.replace("'", '"'))]
    got = torch.tensor(numbers, dtype=torch.float64)
    assert_close(got, want)
    mode = (tmp_path / "new").stat().st_mode, (tmp_path / "new" / "plans").stat().st_mode
    assert [m & 0o777 for m in mode] == [0o700, 0o700]


# --- what is not kept, and what is dropped --------------------------------------------------------


@pytest.mark.usefixtures("rule_table")
def test_own_rules_and_operators_stay_in_memory(disk):
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**2

        @staticmethod
        def backward(ctx, g):
            return 2 * ctx.saved_tensors[0] * g

    hess = fxhess.transform(lambda x: Twice.apply(x).sum(-1))
    x = randn(2, 3)
    assert_close(hess(x), 2 * torch.eye(3).double().expand(2, 3, 3))
    assert any("not kept on disk" in note for note in hess.explain(x).notes)
    doubled = fxhess.kinds.Elementwise((1,), {(0, 0): lambda y, x: -4 * y * (1 - y * y)})
    rule = fxhess.Rule(torch.ops.aten.tanh.default, fxhess.kinds.Pointwise(), doubled)
    fxhess.register_rule(rule, override=True)
    fxhess.transform(lambda x: x.tanh().sum(-1))(x)
    assert fxhess.cache_info().disk.entries == 0


def test_entries_hold_for_these_sources_rates_and_lines_only(disk, monkeypatch):
    x = randn(2, 3)
    fxhess.transform(mlp(3, 4, 1))(x)
    assert fxhess.cache_info().disk.entries == 2
    changed = "other sources", rates.BUILT_IN["cpu", 4]
    for change in (
        lambda: monkeypatch.setattr(recall, "environment", lambda: changed[0]),
        lambda: monkeypatch.setattr(recall, "rates_for", lambda *_: changed[1]),
        lambda: torch.set_default_dtype(torch.float64),
    ):
        fxhess.cache_clear()
        change()
        before = fxhess.cache_info().disk
        try:
            fxhess.transform(mlp(3, 4, 1))(x)
        finally:
            torch.set_default_dtype(torch.float32)
        assert fxhess.cache_info().disk.misses > before.misses


def test_the_environment_is_a_hash_of_the_sources(tmp_path):
    """A change of any source file is a change of all keys."""
    folders = [tmp_path / name for name in ("rules", "passes")]
    for folder in folders:
        folder.mkdir()
        (folder / "a.py").write_text("1")
    found = {cache.digest_of(folders)}
    for change in ("rules/a.py", "passes/a.py", "passes/b.py"):
        (tmp_path / change).write_text("2")
        found.add(cache.digest_of(folders))
    assert len(found) == 4
    assert cache.environment() not in found
    with pytest.raises(serial.NotPlainError):
        cache.digest_of([tmp_path])


def _entries(disk):
    return sorted(p for p in disk.iterdir() if not p.name.startswith("."))


@pytest.mark.parametrize("kind", ["program", "sketch"])
@pytest.mark.parametrize("damage", ["empty", "half", "foreign", "other key", "old format"])
def test_damaged_entries_are_dropped_and_made_anew(disk, kind, damage):
    model, x = mlp(3, 4, 1), randn(2, 3)
    want = fxhess.transform(model)(x)
    (path,) = [p for p in _entries(disk) if p.name.startswith(kind)]
    whole = path.read_bytes()
    path.write_bytes({
        "empty": b"", "half": whole[: len(whole) // 2], "foreign": b"\x80\x04\x95" + whole,
        "other key": whole.replace(path.name.encode(), path.name[::-1].encode()),
        "old format": whole.replace(b"fxhess 1", b"fxhess 0"),
    }[damage])  # fmt: skip
    fxhess.cache_clear()
    assert torch.equal(fxhess.transform(model)(x), want)
    assert path.read_bytes()[:40] == whole[:40]
    assert len(_entries(disk)) == 2


def test_a_sketch_of_nonsense_is_dropped(disk):
    model, x = mlp(3, 4, 1), randn(2, 3)
    want = fxhess.transform(model)(x)
    (path,) = [p for p in _entries(disk) if p.name.startswith("sketch")]
    key, name, converts, numbers = json.loads(programs.disk.get(path.name))
    for entry in (
        [key, "../../../etc/passwd", converts, numbers], [key, name, converts, [99]],
        [key, name, converts, [-1]], [key, name, 1, numbers], [key, name, converts, numbers[:-1]],
        [[], name, converts, numbers], {}, 3, [key, name, converts, "abc"],
    ):  # fmt: skip
        fxhess.cache_clear()
        programs.disk.put(path.name, json.dumps(entry))
        assert torch.equal(fxhess.transform(model)(x), want)


# --- room -----------------------------------------------------------------------------------------


def test_the_least_recently_used_go_first(disk, monkeypatch):
    text = "x" * 1000
    names = [f"program-{i:064x}" for i in range(6)]
    for i, name in enumerate(names[:4]):
        assert programs.disk.put(name, text)
        os.utime(disk / name, (i, i))
    assert programs.disk.get(names[0]) == text  # used again
    monkeypatch.setenv("FXHESS_CACHE_SIZE", "5k")
    assert programs.disk.put(names[4], text)
    assert programs.disk.put(names[5], "y" * 100)
    left = [p.name for p in _entries(disk)]
    assert names[0] in left and names[4] in left and names[1] not in left
    assert fxhess.cache_info().disk.bytes <= 5 << 10


@pytest.mark.parametrize("asked,want", [
    ("", 256 << 20), ("1000", 1000), ("64MB", 64 << 20), ("2 GiB", 2 << 30), ("1k", 1024),
])  # fmt: skip
def test_sizes(disk, monkeypatch, asked, want):
    monkeypatch.setenv("FXHESS_CACHE_SIZE", asked)
    assert fxhess.cache_info().disk.maxbytes == want


def test_a_size_that_is_none_is_named(disk, monkeypatch):
    monkeypatch.setenv("FXHESS_CACHE_SIZE", "much")
    with pytest.warns(UserWarning, match="FXHESS_CACHE_SIZE='much'"):
        assert fxhess.cache_info().disk.maxbytes == 256 << 20


def test_nothing_is_kept_where_nothing_fits(disk, monkeypatch):
    monkeypatch.setenv("FXHESS_CACHE_SIZE", "100")
    x = randn(2, 3)
    assert_close(fxhess.transform(mlp(3, 4, 1))(x), oracle.hessian(mlp(3, 4, 1), x))
    info = fxhess.cache_info().disk
    assert info.entries == 0 and "bytes" in info.problem


def test_clear(disk):
    x = randn(2, 3)
    hess = fxhess.transform(mlp(3, 4, 1))
    hess(x)
    fxhess.cache_clear()
    assert fxhess.cache_info().size == 0 and fxhess.cache_info().disk.entries == 2
    fxhess.cache_clear(disk=True)
    assert fxhess.cache_info().disk[1:3] == (0, 0)
    hess(x)
    assert fxhess.cache_info().disk.entries == 2


def test_turned_off(disk, monkeypatch):
    monkeypatch.setenv("FXHESS_CACHE", "0")
    x = randn(2, 3)
    fxhess.transform(mlp(3, 4, 1))(x)
    info = fxhess.cache_info().disk
    assert info.path is None and info.misses == 0 and not disk.exists()


@pytest.mark.skipif(os.name != "posix", reason="modes of files")
@pytest.mark.parametrize("where", ["above", "below"])
def test_a_folder_that_others_can_write_to_is_left_alone(disk, where):
    folder = disk if where == "below" else disk.parent
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    x = randn(2, 3)
    with pytest.warns(UserWarning, match="others can write into it"):
        fxhess.transform(mlp(3, 4, 1))(x)
    assert not list(folder.iterdir())
    assert folder.stat().st_mode & 0o777 == 0o777
