"""The operations of a model as an inline SVG: what each is, how its tangents look, how its terms
end, what it costs.  Text of the user's (module paths, lines) is escaped here and nowhere else."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING

from fxhess.layered import Point, draw
from fxhess.steps import Step, Tangent
from fxhess.units import duration, si

if TYPE_CHECKING:
    from fxhess.explain import Operation

KINDS = {
    "input": "where the derivative is taken",
    "zero": "no derivative flows through",
    "linear": "linear in what depends on x: adds nothing to H",
    "elementwise": "entry by entry, with f′ and f″",
    "multilinear": "a product of values that depend on x",
    "smooth": "first and second form of its own",
    "composite": "rewritten to several simpler operations",
    "opaque": "no rule: PyTorch's own double backward",
}
STRUCTURES = {
    "identity": "the identity, no tensor at all",
    "diagonal": "one entry for each position",
    "tied": "block-diagonal: dense along some axes only",
    "near": "a band: few directions meet each position, those that never meet are taken together",
    "dense": "every entry by every direction",
    "vector": "along given directions",
}
ENDINGS = {
    "close": ("●", "contracted on the spot: H += Jᵀ C J"),
    "pull": ("▲", "C J carried back through the operations before"),
    "rebase": ("◆", "the Hessian at this value, finished with its tangents"),
}
_WIDTH, _HEIGHT, _SLIM = 264.0, 66.0, 28.0
_SHRINKS = 0.7  # to fit its place; what is still too wide scrolls
_GAP = 4.0  # between chips
_MINOR = 0.04  # the share of all time below which an operation that only passes on is drawn slim


@dataclass(frozen=True)
class Card:
    """A node of a picture.  ``costs``: predicted and measured seconds, each a share of the largest
    in the picture; ``link``: where a click leads."""

    title: str
    module: str = ""
    kind: str = "linear"
    detail: str = ""
    corner: str = ""
    cost: str = ""
    shares: tuple[float, float] = (0.0, 0.0)
    tangent: Tangent | None = None
    endings: Mapping[str, int] = field(default_factory=dict)
    lost: bool = False
    starts: bool = False
    slim: bool = False
    stub: bool = False
    number: int | None = None
    link: str = ""


def svg(cards: Sequence[Card], edges: Sequence[tuple[int, int, str]], label: str) -> str:
    """The picture; an edge is (from, to, structure of what flows along it), from < to."""
    sizes = [(_WIDTH, _SLIM if card.slim or card.stub else _HEIGHT) for card in cards]
    plan = draw(sizes, [(i, j) for i, j, _ in edges])
    margin = 18.0
    width, height = plan.width + 2 * margin, plan.height + 2 * margin
    parts = [
        f'<svg class="fx-graph" role="img" aria-label="{escape(label)}" width="{width:.0f}"'
        f' height="{height:.0f}" viewBox="{-margin:.0f} {-margin:.0f} {width:.0f} {height:.0f}"'
        f' style="min-width:{_SHRINKS * width:.0f}px">'
    ]
    for (_, _, structure), route in zip(edges, plan.routes, strict=True):
        parts.append(f'<path class="fx-edge fx-{structure or "none"}" d="{_curve(route)}"/>')
    for card, corner in zip(cards, plan.corners, strict=True):
        parts.append(_card(card, corner))
    parts.append("</svg>")
    return "".join(parts)


def _curve(route: Sequence[Point]) -> str:
    (x, y), *rest = route
    path = [f"M{x:.1f} {y:.1f}"]
    for to_x, to_y in rest:
        if abs(to_x - x) < 0.05:
            path.append(f"V{to_y:.1f}")
        else:
            middle = (y + to_y) / 2
            path.append(f"C{x:.1f} {middle:.1f} {to_x:.1f} {middle:.1f} {to_x:.1f} {to_y:.1f}")
        x, y = to_x, to_y
    return "".join(path)


def _card(card: Card, corner: Point) -> str:
    height = _SLIM if card.slim or card.stub else _HEIGHT
    names = ["fx-card", f"fx-k-{card.kind}"]
    names += [n for n, on in (("fx-slim", card.slim), ("fx-stub", card.stub)) if on]
    names += [n for n, on in (("fx-curved", card.endings), ("fx-lost", card.lost)) if on]
    data = "" if card.number is None else f' data-step="{card.number}" tabindex="0"'
    parts = [
        f'<g class="{" ".join(names)}" transform="translate({corner[0]:.1f} {corner[1]:.1f})"'
        f"{data}>",
        f"<title>{escape(card.detail or card.title)}</title>",
        f'<rect class="fx-box" width="{_WIDTH:.0f}" height="{height:.0f}" rx="7"/>',
    ]
    if card.stub:
        text = _short(card.title, 38)
        parts.append(f'<text class="fx-small" x="12" y="18">{escape(text)}</text>')
    elif card.slim:
        parts.append(f'<rect class="fx-stripe" width="5" height="{height:.0f}" rx="2.5"/>')
        parts.append(
            f'<text class="fx-name" x="14" y="18.5">{escape(_short(card.title, 24))}</text>'
        )
        parts.append(_text("fx-small fx-end", _WIDTH - 10, 18.5, card.corner))
    else:
        parts += _full(card, height)
    parts.append("</g>")
    whole = "".join(parts)
    return f'<a href="#{escape(card.link)}">{whole}</a>' if card.link else whole


def _full(card: Card, height: float) -> list[str]:
    left = 16.0
    parts = [f'<rect class="fx-stripe" width="5" height="{height:.0f}" rx="2.5"/>']
    if card.tangent is not None:
        parts.append(icon(card.tangent, 14, 11, 38))
        left = 64.0
    room = int((_WIDTH - left - 66) / 7.4)
    parts.append(_text("fx-name", left, 21, _short(card.title, room)))
    parts.append(_text("fx-small fx-end", _WIDTH - 10, 21, card.corner))
    parts.append(_text("fx-small", left, 37, _short(card.module, int((_WIDTH - left) / 6.2), True)))
    parts += _chips(card.endings, left, _WIDTH - 16 - 6.6 * len(card.cost))
    parts.append(_text("fx-small fx-end", _WIDTH - 10, 54.5, card.cost))
    predicted, measured = card.shares
    full = _WIDTH - 16
    parts.append(f'<rect class="fx-time" x="8" y="{height - 5:.0f}" width="{full * measured:.1f}"'
                 f' height="3" rx="1.5"/>')  # fmt: skip
    if predicted:
        at = 8 + full * min(1.0, predicted)
        parts.append(f'<path class="fx-tick" d="M{at:.1f} {height - 7:.0f}v6"/>')
    if card.starts:
        parts.append(
            f'<g class="fx-tab"><rect x="{_WIDTH - 138:.0f}" y="-9" width="126" height="16"'
            + ' rx="8"/>'
            + _text("", _WIDTH - 75, 2.6, "tangents start here") + "</g>"
        )  # fmt: skip
    if card.lost:
        parts.append(
            '<g class="fx-alarm"><rect x="10" y="-9" width="88" height="16" rx="8"/>'
            + _text("", 54, 2.6, "structure lost") + "</g>"
        )  # fmt: skip
    return parts


def _chips(endings: Mapping[str, int], x: float, right: float) -> list[str]:
    """How terms end, between two edges: in words, or by signs where these do not fit."""
    signs = {how: ENDINGS[how][0] for how in endings}
    counts = {how: f" ×{count}" if count > 1 else "" for how, count in endings.items()}
    labels = {how: f"{signs[how]} {how}{counts[how]}" for how in endings}
    if x + sum(_chip_width(label) + _GAP for label in labels.values()) > right:
        labels = {how: f"{signs[how]}{counts[how]}" for how in endings}
    parts = []
    for how, label in labels.items():
        wide = _chip_width(label)
        parts.append(
            f'<rect class="fx-chip fx-{how}" x="{x:.1f}" y="43.5" width="{wide:.1f}" height="15"'
            f' rx="7.5"/>' + _text(f"fx-chiptext fx-{how}", x + wide / 2, 54.6, label)
        )
        x += wide + _GAP
    return parts


def _chip_width(label: str) -> float:
    return 6.0 * len(label) + 9


def _text(names: str, x: float, y: float, text: str) -> str:
    if not text:
        return ""
    return f'<text class="{names}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def icon(tangent: Tangent, x: float, y: float, size: float) -> str:
    """A small matrix that shows the structure of a tangent; a second sheet behind it where it
    differs from sample to sample."""
    s = tangent.structure
    parts = [f'<g class="fx-icon fx-i-{s}" transform="translate({x} {y})">']
    if not tangent.shared:
        parts.append(f'<rect class="fx-sheet" x="4" y="-4" width="{size}" height="{size}" rx="3"/>')
    parts.append(f'<rect class="fx-sheet" width="{size}" height="{size}" rx="3"/>')
    inner, pad = size - 8, 4
    if s in ("identity", "diagonal"):
        n = 5
        cell = inner / n
        for k in range(n):
            at = pad + k * cell
            shape = f'x="{at:.1f}" y="{at:.1f}" width="{cell:.1f}" height="{cell:.1f}"'
            if s == "identity":
                mid = at + cell / 2
                parts.append(f'<circle class="fx-ink" cx="{mid:.1f}" cy="{mid:.1f}" r="1.7"/>')
            else:
                parts.append(f'<rect class="fx-ink" {shape}/>')
    elif s == "tied":
        cell = inner / 3
        for k in range(3):
            at = pad + k * cell
            parts.append(
                f'<rect class="fx-ink" x="{at:.1f}" y="{at:.1f}" width="{cell - 1:.1f}"'
                f' height="{cell - 1:.1f}"/>'
            )
    elif s == "near":
        n = 5
        cell = inner / n
        for k in range(n):
            left, right = max(k - 1, 0), min(k + 2, n)
            parts.append(
                f'<rect class="fx-ink" x="{pad + left * cell:.1f}" y="{pad + k * cell:.1f}"'
                f' width="{(right - left) * cell:.1f}" height="{cell:.1f}"/>'
            )
    elif s == "vector":
        at = pad + inner * 0.38
        parts.append(f'<rect class="fx-ink" x="{at:.1f}" y="{pad}" width="{inner * 0.24:.1f}"'
                     f' height="{inner:.1f}"/>')  # fmt: skip
    else:
        parts.append(f'<rect class="fx-ink" x="{pad}" y="{pad}" width="{inner}" height="{inner}"/>')
    return "".join([*parts, "</g>"])


# --- cards of operations --------------------------------------------------------------------------


def name_of(step: Step) -> str:
    """The operation's name without overload: ``tanh``."""
    if step.kind == "input":
        return "x"
    return step.op.split(".")[0].strip("_") or step.op


def sentence(operation: Operation, names: Mapping[int, str]) -> str:
    """All that is known of an operation, in lines."""
    step = operation.step
    lines = [f"{step.op} ({step.kind}: {KINDS[step.kind]})"]
    lines += [f"module {step.module}"] if step.module else []
    lines += [step.line] if step.line else []
    if len(step.parts) > 1:
        lines.append("rewritten to: " + ", ".join(step.parts))
    for t in step.tangents:
        shared = "the same for every sample" if t.shared else "different for each sample"
        lines.append(
            f"tangent from {names.get(t.base, 'x')}: {t.structure}, {shared}, {t.kept:,} of"
            f" {t.full:,} entries"
        )
    terms = [
        f"{e.how} at {names.get(e.base, 'x')}"
        + (f", {e.structure}" if e.structure != "-" else ", carried back")
        for e in step.endings
    ]
    for text, count in Counter(terms).items():
        lines.append(f"{count} terms: {text}" if count > 1 else f"term: {text}")
    for size in step.lost:
        lines.append(f"structure lost: an axis of {size} became dense here")
    lines.append(costs(operation))
    return "\n".join(lines)


def costs(operation: Operation) -> str:
    """Time and memory of an operation, in words."""
    measured = "" if operation.measured is None else f", {duration(operation.measured)} measured"
    kept = f"; {operation.hoisted} of them kept between calls" if operation.hoisted else ""
    return (
        f"{duration(operation.predicted)} predicted{measured}; {si(operation.flops)}FLOP,"
        f" {si(operation.bytes)}B written, {len(operation.step.nodes)} operations of the"
        f" program{kept}"
    )


def card_of(
    operation: Operation,
    names: Mapping[int, str],
    starts: set[int],
    scale: float,
    total: float,
) -> Card:
    """One operation; ``scale``: the seconds that fill its bar, ``total``: those of a whole call."""
    step = operation.step
    time = operation.predicted if operation.measured is None else operation.measured
    counts: dict[str, int] = {}
    for ending in step.endings:
        counts[ending.how] = counts.get(ending.how, 0) + 1
    only_passes = step.kind in ("linear", "elementwise", "zero") and not counts and not step.lost
    slim = only_passes and step.number not in starts and time < _MINOR * total
    return Card(
        name_of(step),
        step.module,
        step.kind,
        sentence(operation, names),
        shape_of(step.shape),
        duration(time) if time else "",
        (operation.predicted / scale, (operation.measured or 0.0) / scale) if scale else (0.0, 0.0),
        step.tangents[0] if step.tangents else None,
        counts,
        bool(step.lost),
        step.number in starts,
        slim and step.kind != "input",
        number=step.number,
    )


def shape_of(shape: Sequence[int]) -> str:
    """One sample's shape: ``8×16``."""
    return "×".join(map(str, shape)) if shape else "scalar"


def widest(step: Step) -> str:
    """The structure that an edge from this step shows."""
    if not step.active:
        return "none"
    return step.tangents[0].structure if step.tangents else "none"


def _short(text: str, room: int, tail: bool = False) -> str:
    room = max(4, math.floor(room))
    if len(text) <= room:
        return text
    return f"…{text[-room + 1 :]}" if tail else f"{text[: room - 1]}…"
