"""The cache's folder: what may stand in place of it, of its entries and of its lock."""

from __future__ import annotations

import os
import signal
import time
import warnings

import pytest
import torch
from forked import finished, forked
from reference import assert_close, mlp, randn

import fxhess
from fxhess import disk as module
from fxhess import oracle
from fxhess.cache import programs

pytestmark = pytest.mark.skipif(os.name != "posix", reason="pipes and links of POSIX")


def _made_anew(disk, replace):
    """A model's numbers where something else stands in place of its entries."""
    model, x = mlp(3, 4, 1), randn(2, 3)
    want = fxhess.transform(model)(x)
    for path in [p for p in disk.iterdir() if not p.name.startswith(".")]:
        path.unlink()
        replace(path)
    fxhess.cache_clear()
    assert torch.equal(fxhess.transform(model)(x), want)


def test_pipes_in_place_of_entries_are_not_waited_for(disk):
    _made_anew(disk, os.mkfifo)
    assert fxhess.cache_info().disk.problem.startswith("OSError")
    assert all(p.is_file() for p in disk.iterdir()), "new entries stand there now"


def test_folders_in_place_of_entries(disk):
    _made_anew(disk, os.mkdir)
    info = fxhess.cache_info().disk
    assert "Error" in info.problem and info.hits == 0
    fxhess.cache_clear(disk=True)
    assert fxhess.cache_info().disk.entries == 0


def _holding(path, ready):
    with module.filelock.FileLock(path):
        os.write(ready, b"!")
        time.sleep(600)


def test_a_lock_that_is_never_released_is_waited_for_once(disk, monkeypatch):
    monkeypatch.setattr(programs.disk, "_patience", 0.5)
    disk.mkdir(parents=True, mode=0o700)
    reading, writing = os.pipe()
    holder = forked(_holding, disk / ".lock", writing)
    try:
        os.read(reading, 1)
        first, *others = (f"program-{i:064x}" for i in range(4))
        start = time.monotonic()
        assert not programs.disk.put(first, "1") and time.monotonic() - start > 0.4
        assert "Timeout" in fxhess.cache_info().disk.problem
        start = time.monotonic()
        assert not any(programs.disk.put(name, "1") for name in others)
        assert time.monotonic() - start < 0.4
    finally:
        os.kill(holder, signal.SIGKILL)
        finished(holder)
        os.close(reading)
        os.close(writing)
    assert programs.disk.put(first, "1") and programs.disk._patience == module._PATIENCE


def test_links_lead_to_the_folder_that_counts(disk, tmp_path, monkeypatch):
    """Of a link in place of the folder, what it leads to is asked: who can write into it."""
    x, places = randn(2, 3), {}
    for name, mode in (("own", 0o700), ("everyone's", 0o777)):
        places[name] = tmp_path / name
        places[name].mkdir()
        places[name].chmod(mode)
    for name in (*places, "nowhere"):
        fxhess.cache_clear()
        link = tmp_path / f"to {name}"
        link.symlink_to(tmp_path / name)
        monkeypatch.setenv("FXHESS_CACHE_DIR", str(link))
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            assert_close(fxhess.transform(mlp(3, 4, 1))(x), oracle.hessian(mlp(3, 4, 1), x))
        assert bool([w for w in warned if "others can write" in str(w.message)]) == (
            name == "everyone's"
        )
    assert len(list((places["own"] / "plans").glob("*-*"))) == 2
    assert not list(places["everyone's"].iterdir()) and not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("given", ["", "~nobody-of-this-name/x"])
def test_a_user_without_a_home_has_no_cache(given, tmp_path, monkeypatch):
    """And no folder of the name ``~`` where the process stands."""
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where the system knows none
    monkeypatch.chdir(tmp_path)
    for name in ("FXHESS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FXHESS_CACHE_DIR", given)
    fxhess.cache_clear()
    x = randn(2, 3)
    assert_close(fxhess.transform(mlp(3, 4, 1))(x), oracle.hessian(mlp(3, 4, 1), x))
    assert fxhess.cache_info().disk.path is None and not list(tmp_path.iterdir())


def test_a_folder_of_the_users_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("FXHESS_CACHE", raising=False)
    monkeypatch.setenv("FXHESS_CACHE_DIR", "~/plans of mine")
    assert fxhess.cache_info().disk.path == tmp_path / "plans of mine" / "plans"
