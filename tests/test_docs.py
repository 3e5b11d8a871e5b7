"""The documentation: every block of Python runs, every command exists, links lead somewhere."""

from __future__ import annotations

import doctest
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fxhess
from fxhess import __main__ as command_line
from fxhess.module import HessianModule

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))

# Runs the blocks of each page in order, in a namespace of its own; errors name the page and line.
RUNNER = """
import re, sys, time
from pathlib import Path

for name in sys.argv[1:]:
    text = Path(name).read_text(encoding="utf-8")
    namespace = {"__name__": Path(name).stem}
    for block in re.finditer(r"^```python\\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        line = text.count("\\n", 0, block.start()) + 1
        exec(compile("\\n" * line + block[1], name, "exec"), namespace)
    print("finished", name, flush=True)
"""


def _blocks(path: Path, language: str) -> list[str]:
    text = path.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_every_block_of_python_runs(tmp_path):
    pages = [str(path) for path in PAGES if _blocks(path, "python")]
    assert len(pages) >= 8
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, *pages],
        cwd=tmp_path, capture_output=True, text=True, timeout=280,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-1500:]}\n{done.stderr[-4000:]}"
    assert [line.split()[1] for line in done.stdout.splitlines() if "finished " in line] == pages


@pytest.mark.parametrize("page", ["README.md", "docs/outputs.md"])
def test_table_of_outputs(page):
    """Every example in it runs, and has the shape that its row tells."""
    rows = re.findall(r"^\| (`.*) \|$", (ROOT / page).read_text("utf-8"), re.MULTILINE)
    cells = [row.split(" | ") for row in rows if "`transform(" in row]
    inputs = {"x": (32, 10), "p": (6, 5, 3)}
    batch, k = {"x": (32,), "p": (6,)}, (4,)
    named = set()
    for output, shape, *_, example in cells:
        called = {
            "f": nn.Sequential(nn.Linear(10, 4), nn.Tanh(), nn.Linear(4, 1)),
            "pair": lambda p: (p[:, :, None] - p[:, None]).square().sum((1, 2, 3)).sin(),
            "transform": fxhess.transform, "A": torch.randn(10, 10),
            **{name: torch.randn(sizes) for name, sizes in inputs.items()},
        }  # fmt: skip
        (of,) = re.findall(r"\)\((\w)", example)
        sizes = {
            "*batch": batch[of], "*event": inputs[of][1:], "n": (2,), "k": k,
            "*other event axes": inputs[of][2:],
        }  # fmt: skip
        told = [
            sum((sizes[axis] for axis in form.split(", ")), ())
            for form in re.findall(r"\[([^]]*)\]", shape)
        ]
        for v, want in zip((torch.randn(32, 10), torch.randn(4, 32, 10)), told, strict=False):
            assert eval(example.strip("`| "), called | {"v": v}).shape == want, example
        named |= set(re.findall(r'"(\w+)"', output))
    assert named == set(fxhess.outputs.NAMES)


@pytest.mark.parametrize("documented", [fxhess.transform, fxhess.parameters, HessianModule.forward])
def test_examples_in_docstrings(documented):
    given = {"torch": torch, "nn": nn, "fxhess": fxhess}
    (test,) = doctest.DocTestFinder().find(documented, globs=given)
    assert test.examples
    assert not doctest.DocTestRunner().run(test).failed


def test_code_fits_the_page():
    """88 characters: more would make a scroll bar at the width of a laptop."""
    long = [
        f"{path.name}: {line}"
        for path in PAGES
        for block in _blocks(path, "python")
        for line in block.splitlines()
        if len(line) > 88
    ]
    assert not long


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(DOCS)))
def test_every_command_is_one(path):
    parser, _ = command_line.parsers()
    for block in _blocks(path, "sh"):
        for line in block.splitlines():
            for command in re.split(r"&&|\|\|", line):
                words = shlex.split(command, comments=True)
                if words[:1] == ["fxhess"]:
                    parser.parse_args(words[1:])


def _anchors(path: Path) -> set[str]:
    """As Markdown's own table of contents names headings."""
    text = re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    names = [re.sub(r"[^\w\s-]", "", title.replace("`", "")).strip().lower() for title in titles]
    return {re.sub(r"[-\s]+", "-", name) for name in names}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(DOCS)))
def test_every_link_leads_somewhere(path):
    text = re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    made = {"changelog.md"}  # by the build
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:|mailto:", target):
            continue
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.exists() or file in made, f"{path.name}: {target}"
        if anchor and found.suffix == ".md":
            assert anchor in _anchors(found), f"{path.name}: {target}"


def test_every_page_can_be_found():
    """In the navigation; tutorials by their own list, from which the build takes their order."""
    nav = (ROOT / "mkdocs.yml").read_text()
    listed = (DOCS / "tutorials" / "index.md").read_text("utf-8")
    for path in PAGES:
        name = str(path.relative_to(DOCS))
        if name.startswith("tutorials/"):
            assert path.name == "index.md" or f"]({path.name})" in listed, name
        else:
            assert f" {name}\n" in nav + "\n", name


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for needed in ("material", "matplotlib"):
        pytest.importorskip(needed, reason="extra docs is not installed")
    path = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(path)],
        cwd=ROOT, capture_output=True, text=True, timeout=240,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return path


def test_the_site(site):
    assert "Exact Hessians" in (site / "index.html").read_text("utf-8")
    for name in ("results/cpu.html", "results/cpu.png", "changelog.html", "tutorials/laplace.html"):
        assert (site / name).exists(), name
    for path in PAGES:  # every formula is drawn, none left as TeX
        page = (site / path.relative_to(DOCS)).with_suffix(".html").read_text("utf-8")
        assert page.count('<div class="formula"><svg') == len(_blocks(path, "math")), path
        assert "```" not in page, path
        for fetched in re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=\"?([^\s\">]+)", page):
            assert not re.match(r"(https?:)?//", fetched), f"{path}: {fetched}"


def test_tex_that_is_none_stops_the_build(site, tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("```math\n\\nonsense{x\n```\n")
    config = (ROOT / "mkdocs.yml").read_text().partition("nav:\n")[0]
    config = config.replace("[docs/hooks.py]", f"[{DOCS / 'hooks.py'}]")
    (tmp_path / "mkdocs.yml").write_text(config)
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "-f", str(tmp_path / "mkdocs.yml")],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode != 0 and "not a formula: \\nonsense{x" in done.stderr


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
PROBE = """<script>addEventListener("load", () => setTimeout(() => {
  const typed = document.querySelector(".md-search__input");
  typed.focus();
  typed.value = "laplacian";
  typed.dispatchEvent(new Event("keyup", { bubbles: true }));
}, 500));</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_search_from_a_folder(site, tmp_path):
    """Without a server, where browsers start no worker, from a page in a folder."""
    page = (site / "tutorials" / "newton.html").read_text("utf-8")
    probe = site / "tutorials" / "probe.html"
    probe.write_text(page.replace("</body>", PROBE), encoding="utf-8")
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--dump-dom",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--virtual-time-budget=8000", f"--user-data-dir={tmp_path / 'profile'}",
            probe.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, env={**os.environ, "HOME": str(tmp_path)},
    )  # fmt: skip
    found = re.findall(r'<a href="([^"]*)" class="md-search-result__link', done.stdout)
    assert (site / "tutorials" / "poisson.html").as_uri() in found, done.stderr[-2000:]
