"""An explanation as one HTML page that needs nothing else: no network, no scripts of others."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from typing import TYPE_CHECKING

from fxhess.listing import Listing, costliest, listings, time_of
from fxhess.picture import (
    ENDINGS,
    KINDS,
    STRUCTURES,
    Card,
    card_of,
    costs,
    icon,
    name_of,
    sentence,
    shape_of,
    svg,
    widest,
)
from fxhess.steps import Tangent
from fxhess.units import duration, si

if TYPE_CHECKING:
    from fxhess.explain import Explanation, Operation

_WHOLE = 64  # operations up to which a model is one picture
_PART = 40  # operations of a part, where module paths do not tell parts apart
_FEW = 4  # neighbouring parts as small as this are one
_COSTLIEST = 12


@dataclass(frozen=True)
class Section:
    """A part of the model: operations that follow each other."""

    name: str
    operations: tuple[Operation, ...]


def page(explanation: Explanation) -> str:
    """The whole page."""
    head = _Facts(explanation)
    parts = head.sections
    body = [f"<header>{head.title('h1')}{head.tiles()}{head.notes()}</header>", "<main>"]
    body += [head.costliest(), "<h2>Operations</h2>", head.legend()]
    if len(parts) == 1:
        body.append(f'<div class="fx-scroll">{head.picture(parts[0])}</div>')
    else:
        body.append(f'<div class="fx-scroll">{head.overview()}</div>')
        body += [head.section(k) for k in range(len(parts))]
    body += [head.tables(), "</main>", head.aside(), head.store()]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(head.heading)} - fxhess</title><style>{_data('page.css')}</style></head>"
        f'<body class="fx"><div class="fx-page">{"".join(body)}</div>'
        f"<script>{_data('page.js')}</script></body></html>\n"
    )


def fragment(explanation: Explanation) -> str:
    """What a notebook shows: the summary and the picture, without scripts."""
    head = _Facts(explanation)
    parts = head.sections
    picture = head.picture(parts[0]) if len(parts) == 1 else head.overview(links=False)
    return (
        f'<style>{_data("page.css")}</style><div class="fx">{head.title("strong")}{head.tiles()}'
        f'{head.notes()}<div class="fx-scroll" style="max-height:760px;margin-top:12px">{picture}'
        '</div><p class="fx-note">explanation.write_html(path) writes the whole page.</p></div>'
    )


@functools.cache
def _data(name: str) -> str:
    return resources.files("fxhess").joinpath("data", name).read_text(encoding="utf-8")


def sections(operations: Sequence[Operation]) -> list[Section]:
    """The model in parts by module path, each small enough for a picture."""
    found = list(_split(tuple(operations), 0))
    merged: list[Section] = []
    for part in found:
        if merged and max(len(merged[-1].operations), len(part.operations)) <= _FEW:
            before = merged.pop()
            names = dict.fromkeys((before.name, part.name))
            part = Section(", ".join(names), before.operations + part.operations)
        merged.append(part)
    return merged


def _split(operations: tuple[Operation, ...], depth: int) -> Iterator[Section]:
    paths = [o.step.module.split(".") if o.step.module else [] for o in operations]
    if len(operations) <= _WHOLE and (depth == 0 or len({tuple(p[:depth]) for p in paths}) == 1):
        yield Section(".".join(paths[-1][:depth]) or _names(operations), operations)
        return
    if all(len(path) <= depth for path in paths):
        for i in range(0, len(operations), _PART):
            run = operations[i : i + _PART]
            name = ".".join(paths[0]) or "operations"
            yield Section(f"{name} {i + 1} to {i + len(run)}", run)
        return
    pairs = zip(operations, paths, strict=True)
    for _, group in itertools.groupby(pairs, lambda pair: tuple(pair[1][: depth + 1])):
        yield from _split(tuple(operation for operation, _ in group), depth + 1)


class _Facts:
    """The parts of a page."""

    def __init__(self, explanation: Explanation) -> None:
        self.explanation = explanation
        self.operations = explanation.steps
        self.sections = sections(self.operations)
        self.names = {o.step.number: _named(o) for o in self.operations}
        bases = [t.base for o in self.operations for t in o.step.tangents]
        self.starts = {base for base in bases if base}
        self.total = sum(map(time_of, self.operations))
        self.heading = f"{', '.join(explanation.outputs)} at x {list(explanation.shape)}"

    def title(self, tag: str) -> str:
        vector = " of every output" if self.explanation.vector else ""
        shape = "×".join(map(str, self.explanation.shape))
        return (
            f"<{tag}>{escape(', '.join(self.explanation.outputs))}{vector}"
            f"<small> at x: {shape}</small></{tag}>"
        )

    def tiles(self) -> str:
        e = self.explanation
        told = [
            (duration(e.measured) if e.measured is not None else "-", "measured, a call"),
            (duration(e.predicted), "predicted"),
            (f"{si(e.peak_bytes)}B", "at the peak, untiled"),
            (f"{si(e.flops)}FLOP", f"{e.operations:,} operations"),
            (str(e.tiles), "tiles of the batch"),
            (f"{si(e.kept_bytes)}B", "kept: weights alone"),
            (str(len(e.rows)), "terms of H = Σ Jᵀ C J"),
        ]
        cells = "".join(
            f'<div class="fx-tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>'
            for value, name in told
        )
        return f'<div class="fx-tiles">{cells}</div>'

    def notes(self) -> str:
        if not self.explanation.notes:
            return ""
        items = "".join(f"<li>{escape(note)}</li>" for note in self.explanation.notes)
        count = len(self.explanation.notes)
        if count <= 3:
            return f'<ul class="fx-notes">{items}</ul>'
        return f"<details><summary><b>{count} notes</b></summary>" + (
            f'<ul class="fx-notes">{items}</ul></details>'
        )

    def costliest(self) -> str:
        """The operations that take longest, predicted beside measured."""
        first = costliest(self.explanation, _COSTLIEST)
        if not first:
            return ""
        most = max(max(o.predicted, o.measured or 0.0) for o in first)
        rows = []
        for o in first:
            bars = f'<i class="fx-p" style="width:{100 * o.predicted / most:.1f}%"></i>'
            told = f"{duration(o.predicted)} predicted"
            if o.measured is not None:
                wide = 100 * o.measured / most
                bars = f'<i class="fx-m" style="width:{wide:.1f}%"></i>' + bars
                told = f"{duration(o.measured)} · {told}"
            rows.append(
                f'<span class="fx-who">{escape(name_of(o.step))} <i>{escape(o.step.module)}</i>'
                "</span>"
                f'<span class="fx-pair">{bars}</span><span class="fx-num">{told}</span>'
            )
        return (
            f'<h2>Where the time goes</h2><div class="fx-bars">{"".join(rows)}</div>'
            '<p class="fx-note">All that became of an operation: values, adjoints, tangents, terms.'
            " Filled: measured one by one, the whole batch at once, so the sum exceeds a call in"
            " tiles. Outlined: predicted by this device's rates.</p>"
        )

    def legend(self) -> str:
        kinds = {o.step.kind for o in self.operations}
        cells = [
            f'<div><i style="background:var(--k-{kind})"></i><span><b>{kind}</b> {meaning}</span>'
            "</div>"
            for kind, meaning in KINDS.items()
            if kind in kinds
        ]
        found = {t.structure for o in self.operations for t in o.step.tangents}
        for structure, meaning in STRUCTURES.items():
            if structure in found:
                small = icon(Tangent(0, structure, True, 0, 0), 1, 1, 20)
                cells.append(
                    f'<div><svg width="22" height="22">{small}</svg><span><b>{structure}</b>'
                    f" {meaning}</span></div>"
                )
        if any(not t.shared for o in self.operations for t in o.step.tangents):
            small = icon(Tangent(0, "dense", False, 0, 0), 1, 5, 18)
            cells.append(
                f'<div><svg width="26" height="24">{small}</svg><span><b>two sheets</b>'
                " different for each sample; one: the same for all</span></div>"
            )
        ended = {e.how for o in self.operations for e in o.step.endings}
        cells += [
            f'<div><em class="fx-{how}">{sign}</em><span><b>{how}</b> {meaning}</span></div>'
            for how, (sign, meaning) in ENDINGS.items()
            if how in ended
        ]
        return f'<div class="fx-legend">{"".join(cells)}</div>'

    # --- pictures -------------------------------------------------------------------------------

    def picture(self, section: Section) -> str:
        """A section's operations; what they take of others stands above them."""
        inside = {o.step.number for o in section.operations}
        known = {o.step.number: o for o in self.operations}
        outside = dict.fromkeys(
            i for o in section.operations for i in o.step.inputs if i not in inside
        )
        scale = max(map(_longest, self.operations), default=0.0)
        cards = [
            Card(f"from {self.names[i]}", kind="group", detail=self.names[i], stub=True)
            for i in outside
        ]
        cards += [
            card_of(o, self.names, self.starts, scale, self.total) for o in section.operations
        ]
        place = {
            n: k for k, n in enumerate([*outside, *(o.step.number for o in section.operations)])
        }
        edges = [
            (place[i], place[o.step.number], widest(known[i].step))
            for o in section.operations
            for i in o.step.inputs
            if place[i] < place[o.step.number]
        ]
        return svg(cards, edges, f"operations of {section.name}")

    def overview(self, links: bool = True) -> str:
        """The sections as one picture."""
        home = {o.step.number: k for k, s in enumerate(self.sections) for o in s.operations}
        times = [sum(map(time_of, s.operations)) for s in self.sections]
        predicted = [sum(o.predicted for o in s.operations) for s in self.sections]
        measured = [sum(o.measured or 0.0 for o in s.operations) for s in self.sections]
        most = max(*times, *predicted) or 1.0
        edges: dict[tuple[int, int], str] = {}
        for o in self.operations:
            for i in o.step.inputs:
                a, b = home[i], home[o.step.number]
                if a < b:
                    source = next(p for p in self.sections[a].operations if p.step.number == i)
                    edges.setdefault((a, b), widest(source.step))
        cards = []
        for k, section in enumerate(self.sections):
            last = section.operations[-1].step
            counts: dict[str, int] = {}
            for o in section.operations:
                for ending in o.step.endings:
                    counts[ending.how] = counts.get(ending.how, 0) + 1
            cards.append(
                Card(
                    section.name,
                    _count(len(section.operations), "operation"),
                    "group",
                    "\n".join(name_of(o.step) for o in section.operations),
                    shape_of(last.shape),
                    duration(times[k]) if times[k] else "",
                    (predicted[k] / most, measured[k] / most),
                    last.tangents[0] if last.tangents else None,
                    counts,
                    any(o.step.lost for o in section.operations),
                    any(o.step.number in self.starts for o in section.operations),
                    link=f"part-{k}" if links else "",
                )
            )
        return svg(cards, [(a, b, s) for (a, b), s in edges.items()], "parts of the model")

    def section(self, k: int) -> str:
        section = self.sections[k]
        time = sum(map(time_of, section.operations))
        terms = sum(len(o.step.endings) for o in section.operations)
        lost = sum(bool(o.step.lost) for o in section.operations)
        told = [_count(len(section.operations), "operation"), _count(terms, "term")]
        if time:
            told.append(f"{duration(time)} ({time / self.total:.0%})")
        warning = f'<span class="fx-warn">structure lost at {lost}</span>' if lost else ""
        return (
            f'<details class="fx-section"><summary id="part-{k}"><b>{escape(section.name)}</b>'
            + "".join(f"<span>{text}</span>" for text in told)
            + f'{warning}</summary><div class="fx-scroll">{self.picture(section)}</div></details>'
        )

    # --- words ----------------------------------------------------------------------------------

    def tables(self) -> str:
        found = [_table(listing) for listing in listings(self.explanation)]
        return f"<h2>Tables</h2>{''.join(found)}" if found else ""

    def aside(self) -> str:
        return (
            '<aside class="fx-aside"><h3>Details</h3><p class="fx-soft">Point at an operation to'
            " see your line, its tangents, its terms and its cost; click to hold it.</p></aside>"
        )

    def store(self) -> str:
        """What the page shows beside the picture, by step."""
        told = []
        for o in self.operations:
            step = o.step
            first, *lines = sentence(o, self.names).split("\n")
            code = f"<code>{escape(step.line)}</code>" if step.line else ""
            rest = "".join(
                f"<p>{escape(line)}</p>" for line in lines if line not in (step.line, costs(o))
            )
            cost = "".join(f"<p>{escape(line)}</p>" for line in costs(o).split("; "))
            told.append(
                f'<div id="step-{step.number}"><h3>{escape(name_of(step))}</h3>'
                f'<p class="fx-soft">{escape(first)}</p>{code}{rest}<p class="fx-soft">shape of one'
                f" sample: {shape_of(step.shape)}</p>{cost}</div>"
            )
        return f'<div class="fx-store">{"".join(told)}</div>'


def _names(operations: Sequence[Operation]) -> str:
    """What operations of no module of their own are called together."""
    first, last = (name_of(operations[k].step) for k in (0, -1))
    return first if len(operations) == 1 else f"{first} to {last}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _longest(operation: Operation) -> float:
    return max(operation.predicted, operation.measured or 0.0)


def _named(operation: Operation) -> str:
    name = name_of(operation.step)
    return f"{name} ({operation.step.module})" if operation.step.module else name


def _table(listing: Listing) -> str:
    right = [name.startswith("*") for name in listing.header]

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=fx-r' if r else ''}>{escape(text)}</{tag}>"
            for text, r in zip(row, right, strict=True)
        )

    head = cells("th", [name.lstrip("*") for name in listing.header])
    lines = "".join(f"<tr>{cells('td', row)}</tr>" for row in listing.rows)
    return (
        f'<details class="fx-section"><summary><b>{escape(listing.title)}</b></summary>'
        f'<div class="fx-tablebox"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody>'
        "</table></div></details>"
    )


__all__ = ["fragment", "page", "sections"]
