"""The command line: what it prints, writes and returns."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fxhess
from fxhess import __main__ as command_line
from fxhess import cli, named
from fxhess.named import UsageError, find_model

ROOT = Path(__file__).resolve().parent.parent

MODELS = """
import torch
from torch import nn


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))


class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.inner = nn.Linear(5, width)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.inner(x).sin()).sum(-1)

    @classmethod
    def wide(cls):
        return cls(9)


class Needy(nn.Module):
    def __init__(self, width):
        super().__init__()


made = net()
number = 3


def energy(x):
    return x.sin().prod(-1)


def mixing(x):
    return (x - x.mean(0)).square().sum(-1)


class Wrong(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        return 3.0 * g


def gives_nothing():
    return None


def fails():
    raise RuntimeError("no weights here")
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "cli_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fxhess.explain._MEASURING", 0.005)
    before = list(sys.path)
    yield tmp_path
    sys.path[:] = before
    sys.modules.pop("cli_models", None)


def run(*arguments):
    return command_line.main(list(arguments))


# --- models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["cli_models", "cli_models.py", "./cli_models.py"])
def test_models_by_name(place):
    x = torch.randn(3, 5)
    for name in ("net", "made", "Net", "Net.wide", "energy"):
        assert find_model(f"{place}:{name}")(x).shape[0] == 3
    assert find_model(f"{place}:Net.wide").inner.out_features == 9


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("cli_models", "names no model"),
        (":net", "names no model"),
        ("cli_models:", "names no model"),
        ("nowhere_at_all:net", "no module 'nowhere_at_all'"),
        ("nowhere.py:net", "no file nowhere.py"),
        ("cli_models:nett", "has no 'nett'; it has:"),
        ("cli_models:Net.inner", "has no 'inner'"),
        ("cli_models:number", "is a int, no module and no function"),
        ("cli_models:gives_nothing", "returns a NoneType"),
        ("cli_models:Needy", "needs width"),
    ],
)
def test_names_of_no_model(name, says):
    with pytest.raises(UsageError, match=re.escape(says)):
        find_model(name)


def test_an_error_in_the_models_own_code_is_its_own(folder):
    (folder / "cli_broken.py").write_text("import there_is_no_such_module")
    for name in ("cli_broken:net", "cli_broken.py:net"):
        with pytest.raises(ModuleNotFoundError, match="there_is_no_such_module"):
            find_model(name)
    with pytest.raises(RuntimeError, match="no weights here"):
        find_model("cli_models:fails")


@pytest.mark.parametrize(
    ("text", "value"), [("500,200", (500, 200)), ("4x3x2", (4, 3, 2)), ("0, 2", (0, 2))]
)
def test_shapes(text, value):
    assert named.shape(text) == value


@pytest.mark.parametrize(("text", "value"), [("4096", 4096), ("64M", 64 << 20), ("1.5G", 3 << 29)])
def test_sizes(text, value):
    assert named.size(text) == value


@pytest.mark.parametrize(
    "arguments",
    [
        ["--shape", "3,a"],
        ["--shape", ""],
        ["--shape", "3,-5"],
        ["--shape", "3,5", "--dtype", "int64"],
        ["--shape", "3,5", "--device", "nothing"],
        ["--shape", "3,5", "--max-memory", "0"],
        ["--shape", "3,5", "--max-memory", "lots"],
        ["--shape", "3,5", "--event-ndim", "3"],
        ["--shape", "3,5", "--event-ndim", "-1"],
        [],
    ],
)
def test_arguments_that_do_not_fit(arguments, capsys):
    try:
        status = run("verify", "cli_models:net", *arguments)
    except SystemExit as done:
        status = done.code
    assert status == 2
    assert "usage: fxhess verify" in capsys.readouterr().err


# --- commands -------------------------------------------------------------------------------------


def test_explain(capsys, folder):
    assert run("explain", "cli_models:net", "--shape", "4,5", "--html", "plan.html") == 0
    told = capsys.readouterr().out
    for words in ("hessian at x: 4×5", "addmm", "tanh", "elementwise", "predicted", "plan.html"):
        assert words in told
    assert "<svg" in (folder / "plan.html").read_text()
    assert run("explain", "cli_models:net", "--shape", "4,5", "--all", "--eval") == 0
    told = capsys.readouterr().out
    assert "All 4 operations" in told and "matrix products" in told
    assert run("explain", "cli_models:net", "--shape", "4,5", "--code") == 0
    assert capsys.readouterr().out.startswith("def forward(self, x")


def test_explain_in_json(capsys):
    name = "cli_models.py:energy"
    assert run("explain", name, "--shape", "4,3", "--outputs", "value,laplacian", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["outputs"] == ["value", "laplacian"] and told["shape"] == [4, 3]
    assert {s["step"]["kind"] for s in told["steps"]} >= {"input", "elementwise"}
    assert told["predicted"] > 0 and told["measured"] > 0


def test_a_page_that_cannot_be_written_is_a_usage_error(capsys):
    assert run("explain", "cli_models:net", "--shape", "4,5", "--html", "no/such/plan.html") == 2
    assert "no/such/plan.html" in capsys.readouterr().err


def test_verify(capsys):
    assert run("verify", "cli_models:net", "--shape", "4,5") == 0
    assert "verified on 4 samples" in capsys.readouterr().out
    assert run("verify", "cli_models:energy", "--shape", "9,5", "--samples", "2", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["passed"] and told["samples"] == 2 and told["symmetric"]


def test_verify_of_a_wrong_hessian_fails(capsys, rule_table, folder):
    op = _wrong_operator()
    (folder / "cli_wrong.py").write_text(
        "import torch\nmodel = lambda x: torch.ops.cli_test.cube(x).sum(-1)\n"
    )
    assert op is not None
    assert run("verify", "cli_wrong:model", "--shape", "4,5") == 1
    assert "the Hessian is off" in capsys.readouterr().out
    assert run("verify", "cli_wrong:model", "--shape", "4,5", "--json") == 1
    assert json.loads(capsys.readouterr().out)["passed"] is False
    assert run("bench", "cli_wrong:model", "--shape", "4,5", "--seconds", "0.01") == 1
    assert "the Hessian is off" in capsys.readouterr().out
    assert run("bench", "cli_wrong:model", "--shape", "4,5", "--seconds", "0.01", "--json") == 1
    assert json.loads(capsys.readouterr().out)["passed"] is False


def _wrong_operator():
    """An operator whose rule is wrong: 7 x instead of 6 x."""
    if not hasattr(torch.ops.cli_test, "cube"):
        cube = torch.library.custom_op("cli_test::cube", mutates_args=())(_cube)
        cube.register_fake(torch.empty_like)
        cube.register_autograd(
            lambda ctx, g: 3 * ctx.x**2 * g,
            setup_context=lambda ctx, inputs, output: setattr(ctx, "x", inputs[0]),
        )
    fxhess.register_rule(
        fxhess.Rule(
            torch.ops.cli_test.cube.default,
            axes=fxhess.kinds.Pointwise(),
            kind=fxhess.kinds.Elementwise((lambda y, x: 3 * x * x,), {(0, 0): lambda y, x: 7 * x}),
        )
    )
    return torch.ops.cli_test.cube


def _cube(x: torch.Tensor) -> torch.Tensor:
    return x**3


def test_bench(capsys):
    arguments = ["bench", "cli_models:net", "--shape", "6,5", "--seconds", "0.05"]
    assert run(*arguments, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert [way["name"] for way in told["ways"]] == [
        "fxhess", "fxhess out=", "vmap(hessian)", "vmap(jacrev²)",
    ]  # fmt: skip
    assert all(way["seconds"] > 0 and way["error"] < 1e-5 for way in told["ways"])
    others = [way["seconds"] for way in told["ways"][2:]]
    assert told["speedup"] == pytest.approx(min(others) / told["ways"][0]["seconds"])
    assert told["verified"] <= told["allowed"]
    assert run(*arguments, "--at-least", "1e9") == 1
    told = capsys.readouterr().out
    assert "too slow" in told and "vmap(hessian)" in told


def test_bench_tells_of_ways_that_fail(capsys, folder):
    (folder / "cli_writes.py").write_text(
        "import torch\n"
        "def model(x):\n"
        "    out = torch.zeros(x.shape[0])\n"
        "    out[:] = x.sin().sum(-1)\n"
        "    return out\n"
    )
    assert run("bench", "cli_writes:model", "--shape", "6,5", "--seconds", "0.01") == 0
    assert "Error" in capsys.readouterr().out


def test_what_is_refused_has_a_status_of_its_own(capsys):
    assert run("explain", "cli_models:mixing", "--shape", "6,5") == 3
    told = capsys.readouterr().err
    assert "SampleMixingError" in told and "cli_models.py" in told and "next:" in told


@pytest.mark.parametrize(("text", "kind"), [
    ("def net(x:\n", "SyntaxError"), ("raise KeyError('gone')\n", "KeyError"),
    ("def net():\n    raise OSError('no weights here')\n", "OSError"),
    ("def net(x):\n    return x.nothing()\n", "nothing"),
])  # fmt: skip
def test_what_the_models_own_code_raises_is_no_failed_check(text, kind, capsys, folder):
    (folder / "cli_raises.py").write_text(text)
    assert run("verify", "cli_raises.py:net", "--shape", "6,5") == 3
    told = capsys.readouterr().err
    assert kind in told and "cli_raises.py" in told
    assert told.splitlines()[-1].startswith("fxhess verify: ") or "next:" in told


def test_calibrate(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("FXHESS_CACHE", "1")
    monkeypatch.setenv("FXHESS_CACHE_DIR", str(tmp_path / "kept"))
    monkeypatch.setattr("fxhess.rates.MEASURED", {})  # nothing of it is left for other tests
    assert run("calibrate", "--seconds", "0.05", "--dtype", "float64") == 0
    told = capsys.readouterr().out
    assert "launch" not in told and "flat products" in told and "kept in" in told
    assert list((tmp_path / "kept").iterdir())
    assert run("calibrate", "--seconds", "-1") == 3
    assert "has to be positive" in capsys.readouterr().err
    fxhess.cache_clear()


def test_cache(capsys, tmp_path, monkeypatch):
    assert run("cache", "info", "--json") == 0  # turned off in tests
    assert json.loads(capsys.readouterr().out)["path"] is None
    monkeypatch.setenv("FXHESS_CACHE", "1")
    monkeypatch.setenv("FXHESS_CACHE_DIR", str(tmp_path / "kept"))
    fxhess.cache_clear()
    assert run("explain", "cli_models:net", "--shape", "4,5", "--json") == 0
    capsys.readouterr()
    assert run("cache", "info", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["entries"] > 0 and told["bytes"] > 0 and str(tmp_path) in told["path"]
    assert run("cache", "info") == 0
    assert re.search(rf"programs +{told['entries']}\b", capsys.readouterr().out)
    assert run("cache", "clear") == 0
    assert "programs removed" in capsys.readouterr().out
    assert run("cache", "info", "--json") == 0
    assert json.loads(capsys.readouterr().out)["entries"] == 0
    with pytest.raises(SystemExit) as done:
        run("cache", "burn")
    assert done.value.code == 2


@pytest.mark.parametrize("command", [*cli.COMMANDS, "demo"])
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit) as done:
        run(command, "--help")
    told = capsys.readouterr().out
    assert done.value.code == 0 and f"  fxhess {command}" in told and "exit status" in told


def test_an_interrupt_is_told(capsys, monkeypatch):
    def interrupted(arguments):
        raise KeyboardInterrupt

    command = command_line.COMMANDS["cache"]._replace(run=interrupted)
    monkeypatch.setitem(command_line.COMMANDS, "cache", command)
    assert run("cache", "info") == 130
    assert "interrupted" in capsys.readouterr().err


def test_as_a_process(folder):
    """From a folder, the model beside it, into a pipe that closes early; importing fxhess does
    not bring rich along."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = f"{sys.executable} -m fxhess explain cli_models:net --shape 4,5 | head -n 1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout == "hessian at x: 4×5\n" and "Traceback" not in done.stderr, done.stderr
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for last in ("--all", "--json"):
        done = subprocess.run(
            [sys.executable, "-m", "fxhess", "explain", "cli_models:net", "--shape", "4,5", last],
            cwd=folder, env={**environment, **locale}, capture_output=True, timeout=120, check=True,
        )  # fmt: skip
        assert done.stdout.isascii() and (last == "--all" or json.loads(done.stdout))
    code = "import sys, fxhess; print('rich' in sys.modules, 'argparse' in vars(fxhess))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout == "False False\n", done.stderr
