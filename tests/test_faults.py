"""Faults of disks, files and names: never a wrong number, a crash or executed code.

A representative part runs with the suite; ``python -m tests.faults`` does ten times as much.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import resource
import signal
import tempfile
import time
import warnings
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from forked import MORE, answers, finished, forked, times
from reference import assert_close, mlp, randn
from torch import nn

import fxhess
from fxhess import disk as module
from fxhess import oracle
from fxhess.cache import programs

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and limits of POSIX")

# --- the cache on disk -------------------------------------------------------------------------


def _names(n=4):
    return [f"program-{i:064x}" for i in range(n)]


def _writing(ready):
    os.write(ready, b"!")
    n = 0
    while True:
        n += 1
        for i, name in enumerate(_names()):
            programs.disk.put(name, f"{i} " * (20000 + n % 7))
            _check(i, name)


def _check(i, name):
    found = programs.disk.get(name)
    assert found is None or set(found.split()) == {str(i)}, found[:99]


def test_writers_killed_at_any_time_leave_whole_entries_or_none(disk):
    """Two at once, killed while they write; what is left is right, and others go on at once."""
    chosen = random.Random(0)
    for _ in range(times(8)):
        reading, writing = os.pipe()
        writers = [forked(_writing, writing) for _ in range(2)]
        for _ in writers:
            os.read(reading, 1)
        for writer in writers:
            time.sleep(chosen.uniform(0.0, 0.15))
            os.kill(writer, signal.SIGKILL)
            assert finished(writer) == -signal.SIGKILL
            for i, name in enumerate(_names()):
                _check(i, name)
        os.close(reading)
        os.close(writing)
    assert programs.disk.put(f"program-{9:064x}", "9")
    assert not list(disk.glob(".new-*")), "what killed writers left is removed by the next"
    info = fxhess.cache_info().disk
    assert 1 < info.entries <= 5 and not info.problem


def _dying(name, text, at):
    """Write a part of the file, and be gone; or all of it, and be gone."""
    real = module._write

    def write(path, content):
        (path.parent / ".new-half").write_bytes(content[: int(at * len(content))])
        if at >= 0.9:
            real(path, content)
        os.kill(os.getpid(), signal.SIGKILL)

    module._write = write
    programs.disk.put(name, text)


@hypothesis.settings(
    max_examples=int(15 * MORE) + 1,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(at=st.floats(0, 1))
def test_a_writer_killed_at_a_chosen_byte(disk, at):
    """What stands there is the old entry, until the new one is whole."""
    (name,), old, new = _names(1), "old " * 9000, "new " * 9999
    assert programs.disk.put(name, old)
    assert finished(forked(_dying, name, new, at)) == -signal.SIGKILL
    assert programs.disk.get(name) == (old if at < 0.9 else new)
    assert programs.disk.put(name, new)  # the lock went with the process
    assert programs.disk.get(name) == new
    assert not list(disk.glob(".new-*"))


def test_eight_processes_on_one_key(disk):
    model, x = mlp(4, 8, 8, 1), randn(5, 4)
    start = time.time() + 0.5

    def work(tell):
        while time.time() < start:
            pass
        hessian = fxhess.transform(model)(x)
        assert_close(hessian, oracle.hessian(model, x))
        tell(" ".join(float(v).hex() for v in hessian.flatten()))

    with answers() as (tell, told):
        workers = [forked(work, tell) for _ in range(8)]
        assert [finished(w) for w in workers] == [0] * 8
        lines = told()
    assert len(lines) == 8 and len(set(lines)) == 1
    info = fxhess.cache_info().disk
    assert info.entries == 2 and not list(disk.glob(".new-*"))
    for path in (p for p in disk.iterdir() if not p.name.startswith(".")):
        assert programs.disk.get(path.name) is not None, "the entries are whole"


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A folder with the entries of one model, and what it gives."""
    folder = tmp_path_factory.mktemp("flipped")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FXHESS_CACHE", raising=False)
        patch.setenv("FXHESS_CACHE_DIR", str(folder))
        fxhess.cache_clear()
        model, x = mlp(3, 4, 1), randn(2, 3)
        want = fxhess.transform(model)(x)
        entries = {p: p.read_bytes() for p in (folder / "plans").iterdir() if p.name[0] != "."}
        assert len(entries) == 2
        yield model, x, want, entries
        fxhess.cache_clear()


@hypothesis.settings(max_examples=int(40 * MORE))
@hypothesis.given(st.data())
def test_flipped_bytes_in_entries(kept, data):
    model, x, want, entries = kept
    for path, whole in entries.items():
        content = bytearray(whole)
        for _ in range(data.draw(st.integers(0, 3))):
            at = data.draw(st.integers(0, len(content) - 1))
            content[at] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content[: data.draw(st.integers(len(content) // 2, 2 * len(content)))])
    fxhess.cache_clear()
    assert torch.equal(fxhess.transform(model)(x), want)


def _limited(limit, tell):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    model, x = mlp(4, 8, 8, 1), randn(5, 4)
    assert_close(fxhess.transform(model)(x), oracle.hessian(model, x))
    info = fxhess.cache_info().disk
    tell(f"{info.entries} {info.problem}")


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_limit_of_file_sizes_is_reached_while_writing(disk):
    with answers() as (tell, told):
        assert finished(forked(_limited, 2000, tell)) == 0
        assert not [p for p in disk.iterdir() if p.name.startswith((".new-", "program-"))]
        assert finished(forked(_limited, 2_000_000, tell)) == 0
        first, second = told()
    assert "File too large" in first and first[0] in "01"
    assert second.strip() == "2"


def _saving(limit, path, tell):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    hess, x = fxhess.transform(mlp(4, 8, 8, 1)), randn(5, 4)
    hess(x)
    try:
        fxhess.save(hess, path, x)
    except OSError as error:
        tell(str(error))


def test_a_limit_of_file_sizes_is_reached_while_saving(tmp_path):
    """The file that was there stays, and nothing else is left."""
    path = tmp_path / "saved"
    model, x = mlp(4, 8, 1), randn(5, 4)
    fxhess.save(fxhess.transform(model), path, x)
    with answers() as (tell, told):
        assert finished(forked(_saving, 3000, path, tell)) == 0
        (line,) = told()
    assert "File too large" in line
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]
    assert_close(fxhess.load(path)(x), oracle.hessian(model, x))


@hypothesis.settings(max_examples=int(40 * MORE))
@hypothesis.given(st.data())
def test_flipped_bytes_in_saved_files(saved, data):
    """Refused, each time; and behind a right checksum too (as somebody else could write it), never
    anything but an error of ours or a module of the closed set."""
    path, whole = saved
    content = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    if content != whole:
        path.write_bytes(content)
        with pytest.raises(fxhess.FileError):
            fxhess.load(path)
    content[24:56] = hashlib.sha256(content[56:]).digest()
    path.write_bytes(content)
    with contextlib.suppress(fxhess.FileError):
        assert isinstance(fxhess.load(path), nn.Module)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "saved"
    fxhess.save(fxhess.transform(mlp(3, 4, 1)), path, randn(2, 3))
    return path, path.read_bytes()


def test_a_folder_that_refuses(disk, monkeypatch):
    """As where a disk is read-only or full; the tests may run as root, whom nothing refuses."""
    model, x = mlp(3, 4, 1), randn(2, 3)
    for error in (PermissionError(13, "denied"), OSError(28, "full"), OSError(30, "read-only")):
        for name in ("mkstemp", "FileLock"):
            fxhess.cache_clear(disk=True)

            def refuse(*_, error=error, **__):
                raise error

            with monkeypatch.context() as patch:
                patch.setattr(
                    module.tempfile if name == "mkstemp" else module.filelock, name, refuse
                )
                assert_close(fxhess.transform(model)(x), oracle.hessian(model, x))
                assert str(error) in fxhess.cache_info().disk.problem
    assert fxhess.cache_info().disk.entries == 0


NOBODY = 65534


def _as_nobody(folder, wants, tell):
    os.environ["FXHESS_CACHE_DIR"] = str(folder)
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    fxhess.cache_clear()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for model, x, want in wants:
            assert_close(fxhess.transform(model)(x), want)
        info = fxhess.cache_info().disk
    told = [str(w.message) for w in warned if issubclass(w.category, UserWarning)]
    tell(json.dumps([info.entries, info.hits, info.problem, told]))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid(), reason="only root can be another")
@pytest.mark.parametrize("owner", [NOBODY, 0, 54321])
def test_a_folder_that_may_only_be_read(owner, monkeypatch):
    """As a user whom the system refuses: what is there is read, of root's too, and nothing is
    added; what another user owns is left alone."""
    models = [mlp(3, 4, 1), mlp(3, 5, 1)]
    x = randn(2, 3)
    monkeypatch.delenv("FXHESS_CACHE", raising=False)
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        place = Path(folder, "kept")
        monkeypatch.setenv("FXHESS_CACHE_DIR", str(place))
        wants = []
        for model in models:
            fxhess.cache_clear()
            wants.append((model, x, fxhess.transform(model)(x).detach()))
            if len(wants) == 1:
                kept = fxhess.cache_info().disk.entries
        later = [p for p in place.rglob("*-*") if p.is_file()]
        for path in sorted(later, key=lambda p: p.stat().st_mtime_ns)[kept:]:
            path.unlink()
        before = {p: p.read_bytes() for p in place.rglob("*") if p.is_file()}
        for path in [place, *place.rglob("*")]:
            os.chown(path, owner, owner)
            os.chmod(path, 0o555 if path.is_dir() else 0o444)
        with answers() as (tell, told):
            assert finished(forked(_as_nobody, place, wants, tell)) == 0
            (line,) = told()
        assert before == {p: p.read_bytes() for p in place.rglob("*") if p.is_file()}
    fxhess.cache_clear()
    entries, hits, problem, warned = json.loads(line)
    if owner != 54321:
        assert (entries, hits) == (kept, kept) and "denied" in problem and not warned
    else:
        assert hits == 0 and len(set(warned)) == 1 and f"{place}: it belongs" in warned[0], warned


def test_a_file_in_place_of_the_folder(disk):
    disk.parent.mkdir(parents=True)
    disk.write_text("not a folder")
    with pytest.warns(UserWarning, match="not a folder"):
        assert_close(
            fxhess.transform(mlp(3, 4, 1))(randn(2, 3)),
            oracle.hessian(mlp(3, 4, 1), randn(2, 3)),
        )
    assert disk.read_text() == "not a folder"


# --- names ----------------------------------------------------------------------------------------

NAMES = [
    "class", "None", "torch", "x", "self", "operator", "a b", "quote'", 'double"', "line\nbreak",
    "exec('1/0')", "ｔorch", "é", "H", "math", "inf", "nan", "device", "0", "-", "",
    "x)\n    exec('1/0')\n#", "forward", "lambda", "fx_pytree", "_tensor", "{0}", "%s",
]  # fmt: skip


class Named(nn.Module):
    """A module, and in it a parameter, a buffer and an attribute, of each of some odd names.  (No
    name is empty, or one of the class' own: PyTorch refuses these.)"""

    def __init__(self, names):
        super().__init__()
        self.names = [f"{n}_" if not n or hasattr(nn.Module, n) else n for n in names]
        for i, name in enumerate(self.names):
            place, tensor = nn.Module(), randn(3, seed=i)
            place.register_parameter(name, nn.Parameter(tensor))
            place.register_buffer(f"{name}b", tensor + 1)
            setattr(place, f"{name}c", tensor + 2)
            self.add_module(name, place)

    def forward(self, x):
        for name in self.names:
            place = getattr(self, name)
            x = x * getattr(place, name) + getattr(place, f"{name}b")
            x = (x + getattr(place, f"{name}c")).sin()
        return x.sum(-1)


@pytest.mark.parametrize("name", NAMES)
def test_names_made_to_break_generated_code(disk, name, tmp_path):
    model, x = Named([name]).double(), randn(2, 3)
    want = oracle.hessian(model, x)
    assert_close(fxhess.transform(model)(x), want)
    fxhess.cache_clear()
    hess = fxhess.transform(model)
    assert_close(hess(x), want)
    explanation = hess.explain(x)
    assert str(explanation) and hess.graph_module(x).code
    explanation.write_html(tmp_path / "page.html")
    assert "<html" in (tmp_path / "page.html").read_text()
    fxhess.save(hess, tmp_path / "saved", x)
    assert_close(fxhess.load(tmp_path / "saved")(x), want)


def test_all_these_names_at_once(disk):
    model, x = Named(NAMES).double(), randn(2, 3)
    for _ in range(2):
        assert_close(fxhess.transform(model)(x), oracle.hessian(model, x), 1e-8)
        fxhess.cache_clear()
