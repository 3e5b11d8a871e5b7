"""Numbers of colours worth a try for tangents from a base on: see :mod:`fxhess.windows`.

*Needs* a draft.  *Gives* for each number of positions that some term's tangents meet, how many
colours each axis of the base needs::

    conv1d of 3 -> tanh -> sum at x: [8, 100]    ==>    [(0, 5)]
"""

from __future__ import annotations

import itertools
import math

from torch import fx

from fxhess.facts import known_fact
from fxhess.kinds import Linear
from fxhess.passes.draft import Draft
from fxhess.passes.half import Half

_LEAST = 2  # times fewer tangents: below, packing and unpacking them is not worth it


def colours(
    draft: Draft, base: fx.Node, following: fx.Node | None = None, later: Half | None = None
) -> list[tuple[int, ...]]:
    """What the terms of a piece need whose tangents are near the base, 0 for axes that they are not
    near; the most first."""
    nodes = draft.between(base, following)
    kinds = [known_fact(node).kind for node in nodes]
    if not any(isinstance(kind, Linear) and kind.windows for kind in kinds):
        return []
    event = draft.canonical.event(base)
    start = draft.start(base, tuple(n if n > 1 else 0 for n in event))
    terms = draft.terms_of(base, nodes, following, later)
    wanted = {n for *_, term in terms for n in (term.i, term.j)}
    tangents = draft.tangents(base, nodes, wanted, start.left, (start.key, "left"))
    found: dict[tuple[int, ...], int] = {}
    for *_, term in terms:
        widths = [0] * len(event)
        for one, other in itertools.product(tangents[term.i].places, tangents[term.j].places):
            if (one.basis, one.event) == (other.basis, other.event):
                width = one.window.reversed().then(other.window).width
                widths[one.basis] = width if width < event[one.basis] else 0
        count = math.prod(w or n for w, n in zip(widths, event, strict=True))
        if count * _LEAST <= math.prod(event):
            found[tuple(widths)] = count
    return sorted(found, key=lambda widths: (-found[widths], widths))
