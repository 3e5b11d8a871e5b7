"""The documentation: every block of Python runs, every command exists, links lead somewhere."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fxhess import __main__ as command_line

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


def test_the_site_builds(tmp_path):
    for needed in ("material", "matplotlib"):
        pytest.importorskip(needed, reason="extra docs is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, timeout=240,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    index = (tmp_path / "site" / "index.html").read_text()
    assert "Exact Hessians" in index and "fonts.googleapis" not in index
    for name in ("results/cpu.html", "results/cpu.png", "changelog.html", "tutorials/laplace.html"):
        assert (tmp_path / "site" / name).exists(), name
    for path in PAGES:  # every formula is drawn, none left as TeX
        page = (tmp_path / "site" / path.relative_to(DOCS)).with_suffix(".html").read_text("utf-8")
        assert page.count('<div class="formula"><svg') == len(_blocks(path, "math")), path
        assert "```" not in page, path
