"""Rates of this machine: measured, kept, read again, refused, and what plans make of them."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from reference import mlp, randn
from torch import fx

import fxhess
from fxhess import cost, rates, store

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A cache folder of the test's own, and no rates known before or after it."""
    monkeypatch.delenv("FXHESS_CACHE", raising=False)
    monkeypatch.setenv("FXHESS_CACHE_DIR", str(tmp_path / "kept"))
    monkeypatch.setattr(rates, "MEASURED", {})
    yield tmp_path / "kept"
    fxhess.cache_clear()


def _quick(**options):
    return fxhess.calibrate(seconds=0.05, **options)


def _forget():
    """As a new process would know it."""
    rates.MEASURED.clear()


def _numbers(found):
    for field in dataclasses.fields(found):
        value = getattr(found, field.name)
        yield from (rate for _, rate in value) if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_field_is_measured(dtype):
    found = fxhess.calibrate(dtype=dtype, seconds=0.2)
    assert all(math.isfinite(v) and v > 0 for v in _numbers(found))
    for curve in (found.flat, found.batched):
        sizes = [size for size, _ in curve]
        assert sizes == sorted(set(sizes)) and len(sizes) >= 6
        # A larger matrix makes more of the machine: by far more from one end to the other.
        assert curve[-1][1] > 3 * curve[0][1]
    assert found.launch < 1e-3
    # Each number apart from the next by more than a unit's mistake would let it be.
    assert 1e8 < found.memory < 1e13 and 1e9 < found.stream < 1e14
    assert found.scattered <= found.stream and found.loops < found.stream


def test_rates_are_used_and_kept(folder):
    before = rates.rates_for(CPU, torch.float32)
    assert before == rates.BUILT_IN["cpu", 4]
    found = _quick()
    assert rates.rates_for(CPU, torch.float32) == found != before
    assert rates.rates_for(CPU, torch.bfloat16) == found
    assert rates.rates_for(CPU, torch.float64) == rates.BUILT_IN["cpu", 8]
    (file,) = folder.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    _forget()
    assert rates.rates_for(CPU, torch.float32) == found


def test_a_second_process_reads_them():
    found = _quick()
    code = (
        "import torch; torch.set_num_threads(1)\n"
        "from fxhess import rates\n"
        "print(repr(rates.rates_for(torch.device('cpu'), torch.float32)))\n"
        "torch.set_num_threads(2)\n"
        "print(rates.rates_for(torch.device('cpu'), torch.float32) == rates.BUILT_IN['cpu', 4])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    same, other_threads = done.stdout.splitlines()
    assert same == repr(found)
    assert other_threads == "True"


def test_every_call_measures_anew(folder, monkeypatch):
    first = _quick()
    (file,) = folder.iterdir()
    text = file.read_text()
    second = _quick()
    assert second != first  # no clock repeats itself in all of these digits
    assert list(folder.iterdir()) == [file] and file.read_text() != text


def _spoil_json(document):
    return "{ not JSON"


def _spoil_machine(document):
    document["machine"]["name"] += " of another kind"
    return json.dumps(document)


def _spoil_format(document):
    document["format"] += 1
    return json.dumps(document)


def _spoil_number(document):
    document["rates"]["memory"] = -1.0
    return json.dumps(document)


def _spoil_fields(document):
    del document["rates"]["gather"]
    return json.dumps(document)


def _spoil_curve(document):
    document["rates"]["flat"].reverse()
    return json.dumps(document)


def _spoil_curve_value(document):
    document["rates"]["batched"][0][1] = "fast"
    return json.dumps(document)


def _spoil_curve_away(document):
    document["rates"]["batched"] = []
    return json.dumps(document)


@pytest.mark.parametrize(
    "spoil",
    [_spoil_json, _spoil_machine, _spoil_format, _spoil_number, _spoil_fields, _spoil_curve,
     _spoil_curve_value, _spoil_curve_away, lambda document: "[1, 2]", lambda document: "NaN"],
)  # fmt: skip
def test_a_file_that_is_no_good_is_ignored_and_replaced(folder, spoil):
    found = rates.BUILT_IN["cuda", 4]
    file = rates.keep(CPU, torch.float32, found)
    document = json.loads(file.read_text())
    _forget()
    assert rates.rates_for(CPU, torch.float32) == found  # before it is spoiled
    file.write_text(spoil(document))
    _forget()
    assert rates.rates_for(CPU, torch.float32) == rates.BUILT_IN["cpu", 4]
    rates.keep(CPU, torch.float32, found)
    _forget()
    assert rates.rates_for(CPU, torch.float32) == found
    assert list(folder.iterdir()) == [file]


def test_turned_off_nothing_is_kept(folder, monkeypatch):
    monkeypatch.setenv("FXHESS_CACHE", "0")
    assert store.folder() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = _quick()
    assert rates.rates_for(CPU, torch.float32) == found
    assert not folder.exists()


def test_turned_off_nothing_is_read(monkeypatch):
    rates.keep(CPU, torch.float32, rates.BUILT_IN["cuda", 4])
    _forget()
    monkeypatch.setenv("FXHESS_CACHE", "0")
    assert rates.rates_for(CPU, torch.float32) == rates.BUILT_IN["cpu", 4]


posix = pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")


@posix
@pytest.mark.parametrize("mode", [0o770, 0o702])
def test_a_folder_that_others_can_write_into_is_refused(folder, mode):
    rates.keep(CPU, torch.float32, rates.BUILT_IN["cuda", 4])
    folder.chmod(mode)
    _forget()
    with pytest.warns(UserWarning, match="others can write"):
        assert rates.rates_for(CPU, torch.float32) == rates.BUILT_IN["cpu", 4]
    with pytest.warns(UserWarning, match="others can write"):
        assert rates.keep(CPU, torch.float32, rates.BUILT_IN["cuda", 8]) is None
    assert rates.rates_for(CPU, torch.float32) == rates.BUILT_IN["cuda", 8]  # in this process


def test_where_nothing_can_be_written_it_says_so(folder, monkeypatch):
    folder.mkdir(mode=0o700)

    def refuse(*arguments, **options):
        raise PermissionError(13, "read-only file system")

    monkeypatch.setattr(store.tempfile, "mkstemp", refuse)  # the tests may run as root
    with pytest.warns(UserWarning, match="read-only"):
        found = _quick()
    assert rates.rates_for(CPU, torch.float32) == found
    assert not list(folder.iterdir())


@posix
@pytest.mark.skipif(os.name == "posix" and os.getuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder_is_left_alone(folder):
    folder.mkdir(mode=0o500)
    with pytest.warns(UserWarning, match="cannot keep"):
        _quick()
    assert not list(folder.iterdir())


def test_a_file_in_the_folders_place_is_refused(folder):
    folder.write_text("mine")
    with pytest.warns(UserWarning, match="not a folder"):
        _quick()
    assert folder.read_text() == "mine"


def test_a_write_that_breaks_off_leaves_the_old_file(folder, monkeypatch):
    file = rates.keep(CPU, torch.float32, rates.BUILT_IN["cuda", 4])
    text = file.read_text()

    def break_off(document, stream, **options):
        stream.write('{"format"')
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(store.json, "dump", break_off)
    with pytest.warns(UserWarning, match="no space"):
        rates.keep(CPU, torch.float32, rates.BUILT_IN["cuda", 8])
    assert file.read_text() == text and list(folder.iterdir()) == [file]


def test_the_users_random_numbers_stay():
    state = torch.random.get_rng_state()
    _quick()
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    "options",
    [{"dtype": torch.float16}, {"dtype": torch.int32}, {"device": "meta"}, {"seconds": 0.0},
     {"seconds": float("nan")}],
)  # fmt: skip
def test_what_cannot_be_measured_is_an_error(options):
    with pytest.raises(fxhess.errors.InputError):
        fxhess.calibrate(**{"seconds": 0.05, **options})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is such a device")
def test_a_device_that_is_not_there_is_an_error():
    with pytest.raises(fxhess.errors.InputError, match="cuda"):
        fxhess.calibrate("cuda", seconds=0.05)


# --- plans ----------------------------------------------------------------------------------------


def _with(**changes):
    """Rates of a machine unlike this one, used from now on."""
    found = dataclasses.replace(rates.BUILT_IN["cpu", 8], **changes)
    rates.keep(CPU, torch.float64, found)


def test_other_rates_make_another_plan():
    """Where a matrix product costs next to nothing and passes over memory do, terms end
    elsewhere than where products are dear."""
    model, x = mlp(40, 40, 40, 6, 1), randn(8, 40)
    plans = {}
    for name, changes in {
        "products free": {"flat": ((2, 1e18),), "batched": ((2, 1e18),), "launch": 1e-9},
        "passes free": {"stream": 1e18, "scattered": 1e18, "memory": 1e18, "launch": 1e-9},
    }.items():
        _with(**changes)
        hess = fxhess.transform(model)
        plans[name] = [(r.ending, r.base) for r in hess.explain(x).rows], hess(x)
    assert fxhess.cache_info().misses == 2
    (one, h1), (two, h2) = plans.values()
    assert one != two
    torch.testing.assert_close(h1, h2, rtol=1e-10, atol=1e-10)


def test_a_pass_out_of_order_costs_its_inner_loops():
    """What lies next to each other in all operands is one inner loop; a view costs nothing."""
    graph = fx.Graph()
    known = {}

    def add(name, value, *operands, target=torch.add):
        node = graph.call_function(target, operands) if operands else graph.placeholder(name)
        node.meta["val"] = value
        known[name] = cost.seconds(node, rates.BUILT_IN["cpu", 8])
        return node

    x = randn(64, 64, 16)
    a, b, c = add("a", x), add("b", x.transpose(0, 1)), add("c", x.permute(2, 1, 0))
    add("ordered", x + x, a, a)
    add("both turned", b.meta["val"] + b.meta["val"], b, b)
    add("rows", x + b.meta["val"], a, b)
    add("entries", x.permute(2, 1, 0) + randn(16, 64, 64), c, add("d", randn(16, 64, 64)))
    add("copied", b.meta["val"].flatten(), b, target=torch.flatten)
    add("viewed", x.flatten(), a, target=torch.flatten)
    loops = 64 * 64 / rates.BUILT_IN["cpu", 8].loops
    assert known["viewed"] < known["ordered"] <= known["both turned"] < known["rows"]
    assert known["rows"] - known["both turned"] == pytest.approx(loops, rel=0.5)
    assert known["copied"] > loops
    assert known["entries"] > known["rows"] + loops


def test_same_rates_share_a_program():
    fxhess.transform(mlp(3, 4, 1))(randn(2, 3))
    _with(memory=rates.BUILT_IN["cpu", 8].memory)
    fxhess.transform(mlp(3, 4, 1))(randn(2, 3))
    assert fxhess.cache_info()[:2] == (1, 1)


# --- predicted beside measured --------------------------------------------------------------------


def test_explain_shows_both_times():
    x = randn(5, 3)
    hess = fxhess.transform(mlp(3, 4, 1))
    found = hess.explain(x)
    assert 0 < found.predicted < 1 and 0 < found.measured < 1
    assert " ms predicted, " in str(found)
    assert " ms measured (without autograd)" in str(found)
    again = hess.explain(x)
    steps = tuple(
        dataclasses.replace(b, measured=a.measured)
        for a, b in zip(found.steps, again.steps, strict=True)
    )
    assert all(0 <= operation.measured < 1 for operation in found.steps)
    assert sum(operation.measured for operation in found.steps) > 0
    assert dataclasses.replace(again, measured=found.measured, steps=steps) == found


def test_the_measured_time_is_that_of_the_module(monkeypatch):
    import time

    hess = fxhess.transform(mlp(3, 4, 1))
    plain = hess.explain(randn(5, 3)).measured
    results, calls = type(hess).results, []

    def slow(self, call, out=None):
        assert not torch.is_grad_enabled()
        calls.append(call.x.shape)
        time.sleep(0.02)
        return results(self, call, out)

    monkeypatch.setattr(type(hess), "results", slow)
    assert 0.02 <= hess.explain(randn(5, 3)).measured < 0.2
    assert plain < 0.02
    assert set(calls) == {(5, 3)} and 2 < len(calls) <= 26


def test_explain_leaves_the_random_numbers_alone():
    model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Dropout(0.5))
    hess = fxhess.transform(torch.nn.Sequential(model, torch.nn.Linear(8, 1)).double().train())
    x = randn(4, 3)
    hess(x)
    state = torch.random.get_rng_state()
    assert hess.explain(x).measured > 0
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_result_that_fills_the_memory_is_not_made():
    x = torch.randn(1).expand(1 << 27, 64)
    found = fxhess.transform(lambda x: (x**3).sum(-1)).explain(x)
    assert found.measured is None and found.predicted > 1
    assert "not measured" in str(found)


def test_a_call_that_its_limit_forbids_is_explained_all_the_same():
    hess = fxhess.transform(mlp(6, 64, 1), max_memory=1)
    with pytest.raises(fxhess.errors.InputError, match="max_memory"):
        hess(randn(4000, 6))
    found = hess.explain(randn(4000, 6))
    assert found.measured is None and found.predicted > 0
