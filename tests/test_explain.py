"""What explain tells: facts of the graph, and the page that shows them."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxhess
from fxhess.layered import draw
from fxhess.page import page, sections


@pytest.fixture(autouse=True)
def briefly(monkeypatch):
    """Times are looked at nowhere here, so they are taken for a moment only."""
    monkeypatch.setattr("fxhess.explain._MEASURING", 0.005)


def mlp(*widths):
    layers = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class DeepSet(nn.Module):
    def __init__(self):
        super().__init__()
        self.phi, self.rho = mlp(4, 16, 16), mlp(16, 16, 1)

    def forward(self, x):
        return self.rho(torch.tanh(self.phi(x)).sum(1))


class Encoder(nn.Module):
    def __init__(self, depth, width=8):
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 2, 16, 0.0, "gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, 1)

    def forward(self, x):
        return self.head(self.encoder(x).mean(1))


def explained(model, x, outputs="hessian", event_ndim=1, **options):
    return fxhess.transform(model, outputs, event_ndim=event_ndim, **options).explain(x)


def by_name(explanation):
    return {o.step.op.split(".")[0]: o.step for o in explanation.steps}


# --- facts ----------------------------------------------------------------------------------------


def test_steps_of_a_network():
    e = explained(mlp(5, 7, 1), torch.randn(4, 5), strategy="close")
    x, first, tanh, last = [o.step for o in e.steps]
    assert [s.kind for s in (x, first, tanh, last)] == ["input", "linear", "elementwise", "linear"]
    assert [s.module for s in (first, tanh, last)] == ["0", "1", "2"]
    assert [s.shape for s in (x, first, tanh, last)] == [(5,), (7,), (7,), (1,)]
    assert (x.inputs, first.inputs, tanh.inputs) == ((), (0,), (first.number,))
    (told,) = x.tangents
    assert (told.structure, told.kept, told.full) == ("identity", 1, 25)
    (told,) = first.tangents  # the weight itself
    assert (told.structure, told.shared, told.kept, told.full) == ("dense", True, 35, 35)
    assert not first.endings and [e.how for e in tanh.endings] == ["close"]
    assert first.parts == ("einsum", "add")


def test_pointwise_tangents_stay_diagonal_until_something_mixes_them():
    e = explained(lambda x: torch.cumsum(x.exp().sin(), -1).square().sum(-1), torch.randn(3, 4))
    names = by_name(e)
    # Planned from bases of its own, or from x: diagonal until the sum, dense after it.
    told = {t.structure for s in (names["exp"], names["sin"]) for t in s.tangents}
    assert told and told <= {"identity", "diagonal"}
    e = explained(
        lambda x: torch.cumsum(x.exp(), -1).square().sum(-1), torch.randn(3, 4), strategy="close"
    )
    names = by_name(e)
    assert names["exp"].tangents[0].structure == "diagonal"
    assert names["exp"].tangents[0].kept == 4 and names["exp"].tangents[0].full == 16
    assert not names["exp"].tangents[0].shared
    assert names["cumsum"].tangents[0].structure == "dense"
    assert names["cumsum"].lost == (4,) and not names["exp"].lost


def test_a_set_is_tied_over_its_members():
    e = explained(DeepSet(), torch.randn(3, 6, 4), event_ndim=2, strategy="close")
    tanh = [o.step for o in e.steps if o.step.op.startswith("tanh")]
    told = tanh[0].tangents[0]
    assert told.structure == "tied" and not told.shared
    assert (told.kept, told.full) == (4 * 6 * 16, 24 * 6 * 16)
    assert not any(o.step.lost for o in e.steps)


@pytest.mark.parametrize(
    ("function", "name", "kind"),
    [
        (lambda x: (x * x.sin()).sum(-1), "mul", "multilinear"),
        (lambda x: x.softmax(-1)[..., 0], "softmax", "smooth"),
        (lambda x: nn.functional.layer_norm(x, (4,)).square().sum(-1), "layer_norm", "composite"),
        (lambda x: (x.sin() * (x > 0)).sum(-1), "gt", "zero"),
        (lambda x: torch.linalg.inv(torch.diag_embed(x.exp())).sum((-1, -2)), "inv", "opaque"),
    ],
)
def test_kinds(function, name, kind):
    e = explained(function, torch.randn(3, 4))
    assert kind in {o.step.kind for o in e.steps if name in o.step.op}, [o.step for o in e.steps]


@pytest.mark.parametrize("strategy", ["auto", "close", "pull", "rebase"])
def test_every_term_is_told_once_and_every_node_belongs_to_one_step(strategy):
    hess = fxhess.transform(Encoder(1), event_ndim=2, strategy=strategy)
    x = torch.randn(3, 4, 8)
    e = hess.explain(x)
    endings = [ending for o in e.steps for ending in o.step.endings]
    assert len(endings) == len(e.rows)
    if strategy in ("close", "pull"):
        assert {ending.how for ending in endings} == {strategy}
    else:
        assert {ending.base for ending in endings} != {0}  # rebased
        assert "rebase" in {ending.how for ending in endings}
    owned = [name for o in e.steps for name in o.step.nodes]
    calls = {n.name for n in hess.graph_module(x).graph.nodes if n.op.startswith("call")}
    assert len(owned) == len(set(owned)) and set(owned) <= calls
    assert len(owned) > 0.9 * len(calls)
    assert 0 < sum(o.predicted for o in e.steps) <= e.predicted * 1.0001
    assert 0 < sum(o.flops for o in e.steps) <= e.flops
    numbers = [o.step.number for o in e.steps]
    assert numbers == sorted(numbers) and {i for o in e.steps for i in o.step.inputs} <= {*numbers}


def test_directions_are_told_of_products():
    e = explained(mlp(5, 7, 1), torch.randn(4, 5), "hvp")
    assert {t.structure for o in e.steps for t in o.step.tangents} == {"vector"}
    assert all(o.measured is not None for o in e.steps)


def test_steps_are_plain_data():
    e = explained(Encoder(1), torch.randn(2, 4, 8), event_ndim=2)
    for o in e.steps:
        told = json.loads(json.dumps(dataclasses.asdict(o.step)))
        assert told["number"] == o.step.number and told["op"] == o.step.op


def test_tiles_and_kept_bytes():
    model = mlp(60, 60, 60, 1).requires_grad_(False)
    e = explained(model, torch.randn(3000, 60))
    assert e.tiles > 1 and f"{e.tiles} tiles" in str(e)
    assert explained(model, torch.randn(2, 60)).tiles == 1
    limited = explained(model, torch.randn(3000, 60), max_memory=60 << 20)
    assert limited.tiles >= e.tiles


# --- the page -------------------------------------------------------------------------------------

VOID = {"meta", "br", "path", "rect", "circle"}


class Checked(HTMLParser):
    """Balanced tags, no script of others, nothing fetched; what is said."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.text, self.scripts, self.cards, self.hrefs = [], [], 0, [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.scripts += tag == "script"
        assert tag not in ("link", "iframe", "img", "object", "embed", "base"), tag
        assert not {"src", "srcset", "xlink:href", "style"} & {*attributes} - {"style"}
        assert not [name for name in attributes if name.startswith("on")]
        if "href" in attributes:
            self.hrefs.append(attributes["href"])
        if "data-step" in attributes:
            self.cards.append(int(attributes["data-step"]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_whole_and_needs_nothing_else(tmp_path):
    e = explained(Encoder(1), torch.randn(2, 4, 8), event_ndim=2)
    path = tmp_path / "plan.html"
    e.write_html(path)
    text = path.read_text(encoding="utf-8")
    found = Checked(text)
    assert found.scripts == 1
    assert sorted(found.cards) == sorted(o.step.number for o in e.steps)
    assert not re.search(r"(?i)https?:|url\(|@import|fetch\(|XMLHttp", text)
    said = " ".join(found.text)
    for words in ("native_layer_norm", "encoder.layers.0.self_attn", "hessian", "structure lost"):
        assert words in said
    assert "test_explain.py" in said  # the user's line
    assert "predicted" in said and "measured" in said


def test_a_notebook_shows_the_picture():
    e = explained(mlp(5, 7, 1), torch.randn(4, 5))
    found = Checked(e._repr_html_())
    assert found.scripts == 0 and len(found.cards) == len(e.steps)


def test_names_and_lines_of_the_user_stay_text():
    evil = "<script>alert(1)</script>"
    model = nn.Sequential()
    model.add_module(evil, nn.Linear(3, 4))
    model.add_module("\"'&<b>", nn.Tanh())
    model.add_module("last\n</svg>", nn.Linear(4, 1))
    x = torch.randn(2, 3)
    for text in (explained(model, x).html(), explained(model, x)._repr_html_()):
        found = Checked(text)
        assert "<script>alert" not in text and "<b>" not in re.sub(r"<b>[\w ,.:µ-]*</b>", "", text)
        assert found.scripts <= 1
    assert evil in " ".join(Checked(explained(model, x).html()).text)


def test_a_deep_model_is_shown_in_parts():
    e = explained(Encoder(5), torch.randn(2, 4, 8), "gradient", event_ndim=2)
    parts = sections(e.steps)
    names = [part.name for part in parts]
    assert [f"encoder.layers.{i}" for i in range(5)] == [n for n in names if "layers" in n]
    assert [o for part in parts for o in part.operations] == list(e.steps)
    text = page(e)
    assert len(text) < 600_000  # twelve layers, with their Hessian: 0.8 MB
    found = Checked(text)
    assert sorted(found.cards) == sorted(o.step.number for o in e.steps)
    assert {f"#part-{k}" for k in range(len(parts))} == {*found.hrefs}
    assert all(f'id="part-{k}"' in text for k in range(len(parts)))


def test_a_long_function_is_shown_in_parts():
    def long(x):
        for _ in range(150):
            x = x.sin()
        return x.sum(-1)

    e = explained(long, torch.randn(2, 3), "gradient")
    parts = sections(e.steps)
    assert 3 < len(parts) < 6 and max(len(part.operations) for part in parts) <= 64
    Checked(page(e))


# --- drawing --------------------------------------------------------------------------------------


@st.composite
def graphs(draw_from):
    count = draw_from(st.integers(1, 14))
    pairs = [(i, j) for j in range(count) for i in range(j)]
    chosen = draw_from(st.lists(st.sampled_from(pairs), unique=True, max_size=24)) if pairs else []
    sizes = [(draw_from(st.sampled_from([40, 100])), draw_from(st.sampled_from([20, 60])))
             for _ in range(count)]  # fmt: skip
    return sizes, chosen


@settings(max_examples=60, deadline=None)
@given(graphs())
def test_drawings_do_not_overlap_and_run_downwards(graph):
    sizes, edges = graph
    plan = draw(sizes, edges)
    boxes = [(x, y, x + w, y + h) for (x, y), (w, h) in zip(plan.corners, sizes, strict=True)]
    for a, b in combinations(boxes, 2):
        assert a[2] <= b[0] + 1e-6 or b[2] <= a[0] + 1e-6 or a[3] <= b[1] or b[3] <= a[1]
    for box in boxes:
        assert box[0] >= -1e-6 and box[2] <= plan.width + 1e-6
        assert box[1] >= 0 and box[3] <= plan.height + 1e-6
    for (i, j), route in zip(edges, plan.routes, strict=True):
        assert boxes[i][3] < boxes[j][1]
        ys = [y for _, y in route]
        assert ys == sorted(ys) and ys[0] == boxes[i][3] and ys[-1] == boxes[j][1]
        for (x0, y0), (x1, y1) in pairwise(route):  # runs straight through no box of another
            if abs(x0 - x1) < 1e-6:
                for k, box in enumerate(boxes):
                    inside = box[0] < x0 < box[2] and y0 < box[3] - 1e-6 and box[1] + 1e-6 < y1
                    assert k in (i, j) or not inside
    assert draw(sizes, edges) == plan


# --- in a browser ---------------------------------------------------------------------------------

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-first-run", "--dump-dom",
    "--window-size=1440,1200", "--virtual-time-budget=2000",
)  # fmt: skip

# What only a browser knows: whether text fits its card, whether cards overlap, whether pointing at
# an operation tells of it.
PROBE = """<script>
const problems = [];
const cards = [...document.querySelectorAll('.fx-card')];
const boxes = cards.map(c => c.querySelector('.fx-box').getBoundingClientRect());
cards.forEach((card, i) => {
  if (card.closest('details:not([open])')) return;
  for (const text of card.querySelectorAll('text')) {
    const b = text.getBoundingClientRect(), o = boxes[i];
    if (b.left < o.left - 1 || b.right > o.right + 1) problems.push('outside: ' + text.textContent);
  }
  const lines = [...card.querySelectorAll(':scope > text')].map(t => t.getBoundingClientRect());
  lines.forEach((a, m) => lines.slice(m + 1).forEach(b => {
    if (a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 6
        && b.top < a.bottom - 6) problems.push('over each other: ' + card.textContent);
  }));
  const chips = [...card.querySelectorAll('.fx-chip')].map(c => c.getBoundingClientRect());
  const ends = [...card.querySelectorAll('.fx-end')].map(t => t.getBoundingClientRect());
  chips.forEach(a => ends.forEach(b => {
    if (b.left < a.right + 1 && a.top < b.bottom && b.top < a.bottom)
      problems.push('over a chip: ' + card.textContent);
  }));
  for (let k = i + 1; k < boxes.length; k++) {
    const a = boxes[i], b = boxes[k];
    if (a.width && b.width && a.left < b.right && b.left < a.right && a.top < b.bottom
        && b.top < a.bottom && a.left + a.top !== 0) problems.push('overlap');
  }
});
const curved = document.querySelector('[data-step].fx-curved');
curved.dispatchEvent(new Event('mouseenter'));
const told = document.querySelector('.fx-aside').textContent;
if (!/term/.test(told) || !/predicted/.test(told)) problems.push('not told: ' + told);
if (document.documentElement.scrollWidth > window.innerWidth) problems.push('wide');
document.title = 'problems: ' + JSON.stringify(problems) + ' of ' + cards.length;
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
@pytest.mark.parametrize(
    ("model", "shape"),
    [(mlp(20, 30, 30, 1), (8, 20)), (Encoder(1), (4, 6, 8)), (DeepSet(), (4, 6, 4))],
    ids=["network", "transformer layer", "deep set"],
)
def test_in_a_browser(model, shape, tmp_path):
    e = explained(model, torch.randn(shape), event_ndim=len(shape) - 1)
    path = tmp_path / "plan.html"
    path.write_text(e.html().replace("</body>", PROBE), encoding="utf-8")
    done = subprocess.run(
        [CHROMIUM, *QUIET, f"--user-data-dir={tmp_path / 'profile'}", path.as_uri()],
        capture_output=True, text=True, timeout=120, env={**os.environ, "HOME": str(tmp_path)},
    )  # fmt: skip
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None, done.stderr[-2000:]
    assert title.group(1) == f"problems: [] of {len(e.steps)}"
