"""What a distribution says of itself, and what it would hold; ``python -m tests.distribution``
builds and checks it."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest

import fxhess

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import distribution  # noqa: E402

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_version_stands_in_one_place():
    version = PROJECT["project"]["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", version)
    if fxhess.__version__ != "0+unknown":
        assert importlib.metadata.version("fxhess") == fxhess.__version__
    literal = re.compile(rf"""(?<![\d.]){re.escape(version)}(?![\d.])""")
    elsewhere = [
        name
        for name in distribution.tracked()
        if name.endswith((".py", ".cff", ".toml", ".yml")) and literal.search(
            (ROOT / name).read_text(encoding="utf-8"))
    ]  # fmt: skip
    assert [n for n in elsewhere if "version" in _lines_with((ROOT / n), literal)] == [
        "pyproject.toml"
    ]


def _lines_with(path: Path, literal: re.Pattern[str]) -> str:
    return "\n".join(line for line in path.read_text().splitlines() if literal.search(line))


def test_every_dependency_is_bounded_and_has_a_reason():
    text = (ROOT / "pyproject.toml").read_text()
    body = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL).group(1)
    for line in body.splitlines():
        assert re.search(r'"[\w-]+>=[\d.]+,<\d+",\s+# \w+', line), line
    assert len(body.splitlines()) == len(PROJECT["project"]["dependencies"])


def test_dependencies_are_those_that_the_code_imports():
    names = {re.match(r"[\w-]+", d).group().lower() for d in PROJECT["project"]["dependencies"]}
    imported = set()
    for folder in ("fxhess", "rules", "passes"):
        for path in (ROOT / folder).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    imported.add(str(node.module).partition(".")[0])
    third = imported - set(sys.stdlib_module_names) - {"fxhess"}
    # sympy comes with PyTorch, whose symbolic sizes are made of it.
    assert third - {"sympy"} == names


def test_every_file_of_the_package_is_packaged():
    names = [n for n in distribution.tracked() if n.startswith(("fxhess/", "rules/", "passes/"))]
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["fxhess"]
    for name in names:
        inside = Path(name.partition("/")[2])
        packaged = inside.suffix == ".py" or any(inside.match(p) for p in patterns)
        assert packaged, name
    assert distribution.expected_in_wheel(["rules/zero.py", "fxhess/a/b.csv", "README.md"]) == {
        "fxhess/rules/zero.py", "fxhess/a/b.csv",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["LICENSE", "CHANGELOG.md", "README.md", "CITATION.cff"])
def test_what_belongs_to_a_project_is_there(name):
    assert len((ROOT / name).read_text(encoding="utf-8")) > 400
    assert name in (ROOT / "MANIFEST.in").read_text()
