"""Hooks of the site: what lies outside of docs/ but belongs on it, links, formulas.

Pages read well where they lie, too: a link such as ``../benchmarks/results/cpu.md`` is
one in the repository, and becomes one of the site here.  So is a block of TeX marked
``math``, which becomes a drawing here: it looks the same in every browser, and nothing
is fetched to show it.
"""

from __future__ import annotations

import html
import io
import re
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import mathtext
from matplotlib.font_manager import FontProperties
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pymdownx.superfences import SuperFencesException

ROOT = Path(__file__).resolve().parent.parent
_TITLES = {  # in this order
    "cpu": "Beside its rivals",
    "cpu-strategies": "Strategies forced",
    "outputs": "Cost of each output",
    "compile_time": "Time to trace and plan",
    "cold": "The first call",
}
# The page's width is for the table, whose rows are nothing to search for.
_ONLY_NUMBERS = "---\nhide: [toc]\nsearch: {exclude: true}\n---\n"
_LINK = re.compile(
    r"\[(?P<text>[^\[\]]*)\]"
    r"\((?P<target>(?:\.\./)+(?!https?:)[^)#\s]+)(?P<anchor>#[^)\s]*)?\)"
)


def _results() -> dict[str, str]:
    """Titles of the benchmarks' results by name, those known first."""
    there = sorted(path.stem for path in (ROOT / "benchmarks" / "results").glob("*.md"))
    names = [*(name for name in _TITLES if name in there), *there]
    return {
        name: _TITLES.get(name, name.replace("-", " ").capitalize()) for name in names
    }


def formula(source: str, *_: object, **__: object) -> str:
    """TeX as an SVG in the colour of the text; what it says stays as a label.

    Raises:
        SuperFencesException: TeX that is none, or more than mathtext knows.
    """
    tex = " ".join(source.split())
    look = {
        "mathtext.fontset": "cm",
        "svg.hashsalt": "fxhess",
        "savefig.transparent": True,
    }
    file = io.BytesIO()
    with matplotlib.rc_context(look):
        try:
            mathtext.math_to_image(
                f"${tex}$", file, prop=FontProperties(size=14), format="svg"
            )
        except ValueError as error:  # of any other kind, the page would show the TeX
            raise SuperFencesException(f"not a formula: {tex}") from error
    svg = file.getvalue().decode()
    svg = re.sub(
        r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL
    )
    label = html.escape(tex, quote=True)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    return f'<div class="formula">{svg}</div>'


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Formulas; in the navigation, tutorials in the order of their own list, and
    results of benchmarks."""
    fence = {"name": "math", "class": "math", "format": formula}
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": [fence]}
    nav: list[Any] = list(config.nav or [])
    listed = (ROOT / "docs" / "tutorials" / "index.md").read_text("utf-8")
    tutorials = dict.fromkeys(["index.md", *re.findall(r"\]\(([\w-]+\.md)\)", listed)])
    nav.insert(2, {"Tutorials": [f"tutorials/{name}" for name in tutorials]})
    for entry in nav:
        if "Benchmarks" in entry:
            own = [{title: f"results/{name}.md"} for name, title in _results().items()]
            entry["Benchmarks"] = [{"Overview": entry["Benchmarks"]}, *own]
    config.nav = nav
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The changelog, the benchmarks' tables and plots."""
    files.append(
        File.generated(
            config, "changelog.md", content=(ROOT / "CHANGELOG.md").read_text("utf-8")
        )
    )
    results = ROOT / "benchmarks" / "results"
    for name, title in _results().items():
        text = (results / f"{name}.md").read_text("utf-8")
        if not text.startswith("# "):
            text = f"# {title}\n\n{text}"
        text = f"{_ONLY_NUMBERS}{text}"
        files.append(File.generated(config, f"results/{name}.md", content=text))
    for path in sorted(results.glob("*.png")):
        files.append(
            File.generated(config, f"results/{path.name}", abs_src_path=str(path))
        )
    return files


def on_page_markdown(
    markdown: str, page: Page, config: MkDocsConfig, files: Files
) -> str:
    """Links that lead out of docs/: to the page of the site where there is one, else
    the file's name instead of a link."""
    depth = page.file.src_uri.count("/")

    def replaced(match: re.Match[str]) -> str:
        target = match["target"]
        ups = target.count("../")
        if ups <= depth:  # within docs/
            return match[0]
        path = target[3 * ups :]
        back = "../" * depth
        if path.startswith("benchmarks/results/"):
            found = path.replace("benchmarks/results/", "results/")
        elif path.startswith("docs/"):
            found = path.removeprefix("docs/")
        else:
            found = {"CHANGELOG.md": "changelog.md"}.get(path, "")
        if found and files.get_file_from_path(found) is not None:
            return f"[{match['text']}]({back}{found}{match['anchor'] or ''})"
        return f"{match['text']} (`{path}`)"

    return _LINK.sub(replaced, markdown)
