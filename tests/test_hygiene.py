"""What keeps the repository in order: directions of imports, sizes, names, reproducible code."""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fxhess
from fxhess import __main__ as command_line

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(p for d in ("fxhess", "passes", "rules") for p in (ROOT / d).glob("*.py"))
EVERYTHING = SOURCES + sorted(
    p
    for d in ("tests", "tests/samples", "tests/conformance", "benchmarks", "examples")
    for p in (ROOT / d).glob("*.py")
)

# Layers, lowest first: a module imports from its own layer or below.  "passes" and "rules" stand
# for all modules of these packages.
LAYERS = (
    {"errors", "lines", "units", "layered", "locks", "interrupts", "progress", "_kept"},
    {
        "emit",
        "kinds",
        "triangle",
        "symmetric",
        "windows",
        "outputs",
        "steps",
        "_torch",
        "_settings",
        "_traced",
        "_running",
        "_recycled",
        "_direct",
    },
    {"store", "clock", "rates", "disk", "naming", "_outside"},
    {"functions", "closures", "collector", "intake", "oracle", "sources", "trees", "packing"},
    {"form", "wrt"},
    {"in_dims"},
    {"arguments"},
    {"registry", "facts", "cost", "structure", "contraction", "arrangement"},
    {"reads", "guards", "capture", "_sketch"},
    {"splice", "graft", "derive", "memory", "_batched", "lane_values", "lane_graph"},
    {"lane_code"},
    {"lane_products"},
    {"lane_results"},
    {"lanes"},
    {"lane_views"},
    {"lane_operations"},
    {"_lanes"},
    {"passes", "rules"},
    {"kernels"},
    {"overwrite"},
    {"execute", "pipeline"},
    {"runner"},
    {"serial"},
    {"cache", "explain", "listing", "page", "picture", "verify", "calibrate", "checks", "rows"},
    {"repeat"},
    {"binding", "apart", "recall"},
    {"specialize"},
    {"module"},
    {"api", "container", "_aoti", "saved"},
    {"testing", "demo", "named", "compared"},
    {"terminal"},
    {"cli"},
    {"__main__", "__init__"},
)
RULES_MAY_IMPORT = {"registry", "kinds", "emit", "errors", "rules"}
RULE_EXCEPTIONS = {
    "indexing.py": {"_torch", "_traced"},  # is an index, as traced, the axis' own positions?
    "roots.py": {"_traced"},  # is a value a root, and of what?
    "selection.py": {"_traced"},  # does a mask, or an index, depend on x?
    "writing.py": {"_traced"},
}


def _name(path: Path) -> str:
    return path.stem if path.parent.name == "fxhess" else path.parent.name


def _imports(path: Path) -> set[str]:
    """Modules imported anywhere in the file, except for type checkers only."""
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    hidden = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _own_imports(path: Path) -> set[str]:
    names = {i.split(".")[1] for i in _imports(path) if i.startswith("fxhess.")}
    known = set().union(*LAYERS)
    return names & known


def _relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_every_module_has_a_layer():
    known = set().union(*LAYERS)
    assert {_name(p) for p in SOURCES} <= known
    assert known - {"passes", "rules"} <= {p.stem for p in SOURCES}


@pytest.mark.parametrize("path", SOURCES, ids=_relative)
def test_imports_go_one_way(path):
    rank = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    # `check_rule` transforms at run time: it is used by what it uses.
    lazy = {("testing", "api"), ("verify", "module"), ("__init__", "__init__")}
    upward = {
        i
        for i in _own_imports(path)
        if rank[i] > rank[_name(path)] and (_name(path), i) not in lazy
    }
    assert not upward, f"{_name(path)} imports {sorted(upward)}"


@pytest.mark.parametrize("path", [p for p in SOURCES if _name(p) == "rules"], ids=_relative)
def test_rules_are_data(path):
    assert _own_imports(path) <= RULES_MAY_IMPORT | RULE_EXCEPTIONS.get(path.name, set())


def test_only_the_pipeline_imports_rules_and_passes():
    both = {_name(p) for p in SOURCES if {"rules", "passes"} <= _own_imports(p)}
    assert both == {"pipeline"}
    assert not [p for p in SOURCES if _name(p) == "passes" and "rules" in _own_imports(p)]


def test_only_contraction_imports_opt_einsum():
    assert [p.name for p in SOURCES if any("opt_einsum" in i for i in _imports(p))] == [
        "contraction.py"
    ]


# Internals of PyTorch belong into the adapters, whose names begin with an underscore; what else is
# used elsewhere, and why.
INTERNALS = (
    "torch._ops",  # OpOverload, the type: it has no public name
    "torch._C.DisableTorchFunctionSubclass",  # documented under this name only
    "torch.utils._pytree",  # nested containers; the C++ one has no public name in torch 2.11
)
INTERNAL = re.compile(r"\btorch(?:\.\w+)*?\._(?!_)\w+")


@pytest.mark.parametrize("path", SOURCES, ids=_relative)
def test_internals_of_pytorch_stay_behind_the_adapter(path):
    if path.name.startswith("_") and not path.name.startswith("__"):
        return  # an adapter
    tree = ast.parse(path.read_text())
    used = {i for i in _imports(path) if INTERNAL.match(i)}
    used |= {
        text
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and (text := ast.unparse(node)).startswith("torch.")
        and INTERNAL.fullmatch(text)
    }
    allowed = ("torch.ops.", *INTERNALS)
    used = {u for u in used if not u.startswith(allowed) and not f"{allowed}".count(f"'{u}.")}
    assert not used, f"{_relative(path)} uses {sorted(used)}"


@pytest.mark.parametrize("path", EVERYTHING, ids=_relative)
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("path", EVERYTHING, ids=_relative)
def test_files_say_what_they_are(path):
    assert ast.get_docstring(ast.parse(path.read_text())), f"{_relative(path)} has no docstring"


def test_public_names_have_docstrings():
    for name in fxhess.__all__:
        value = getattr(fxhess, name)
        if name == "__version__":
            continue
        assert inspect.getdoc(value), name
        if inspect.isclass(value) and not issubclass(value, Exception):
            for member, function in vars(value).items():
                if not member.startswith("_") and inspect.isfunction(function):
                    assert inspect.getdoc(function), f"{name}.{member}"


def test_public_names_are_there_and_only_they():
    assert fxhess.__all__ == sorted(fxhess.__all__, key=lambda n: (n.lower() != n, n)) or set(
        fxhess.__all__
    ) == {n for n in fxhess.__all__ if hasattr(fxhess, n)}
    for name in fxhess.testing.__all__ if hasattr(fxhess.testing, "__all__") else ():
        assert hasattr(fxhess.testing, name)


PROGRAM = """
import torch, fxhess
torch.manual_seed(0)
norm = torch.nn.LayerNorm(6)
model = torch.nn.Sequential(torch.nn.Linear(4, 6), norm, torch.nn.GELU(), torch.nn.Linear(6, 2))
f = lambda x: (torch.softmax(x @ x.mT, -1) @ x).sum((-1, -2)) * x.prod(-1).sum(-1)
for m, shape, n in ((model, (3, 4), 1), (f, (2, 3, 4), 2)):
    hess = fxhess.transform(m, ("value", "gradient", "hessian"), event_ndim=n)
    print(hess.graph_module(torch.randn(shape)).code)
"""


def _run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, capture_output=True, text=True, timeout=240,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_generated_code_does_not_depend_on_the_hash_seed():
    first, second = (_run(PROGRAM, PYTHONHASHSEED=seed) for seed in ("1", "2"))
    assert "forward" in first
    assert first == second


def test_a_checkout_imports_without_being_installed():
    assert "6" in _run("import fxhess; print(fxhess.transform(lambda x: (x**2).sum(-1)*3)"
                       "(__import__('torch').ones(1, 1)).item())")  # fmt: skip


def test_command_line_help(capsys):
    for arguments in (["--help"], ["demo", "--help"]):
        with pytest.raises(SystemExit) as done:
            command_line.main(arguments)
        assert done.value.code == 0
        assert "usage: fxhess" in capsys.readouterr().out


def test_command_line_without_a_command(capsys):
    with pytest.raises(SystemExit) as done:
        command_line.main([])
    assert done.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


# --- the README -----------------------------------------------------------------------------------

README = ROOT / "README.md"


def _blocks() -> list[str]:
    text = README.read_text() if README.exists() else ""
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.mark.skipif(not README.exists(), reason="no README yet")
def test_readme_code_runs():
    """All blocks in order, in one namespace and a process of its own."""
    blocks = _blocks()
    assert blocks
    _run("\n\n".join(blocks))


@pytest.mark.skipif(not README.exists(), reason="no README yet")
def test_readme_names_exist():
    text = README.read_text()
    for name in re.findall(r"\bfxhess\.(\w+)", "\n".join(_blocks())):
        assert hasattr(fxhess, name), name
    assert "pip install -c constraints.txt . && fxhess demo" in text
    assert "pip install -c constraints.txt -e '.[test]' && pytest" in text


def test_no_path_of_a_machine_is_named():
    for path in EVERYTHING:
        text = path.read_text()
        assert not re.search(r"[\"'\s](/home/|/work/|/tmp/|/root/)", text), _relative(path)
