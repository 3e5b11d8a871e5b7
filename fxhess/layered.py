"""Drawing a directed graph in layers (Sugiyama, Tagawa & Toda 1981), for pictures of programs.

Every node stands below all that it takes values of; long edges bend around what lies between; the
order within a layer is found by barycenters, positions by least squares with the order kept (pooled
adjacent violators).  Deterministic: the same graph gives the same picture.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

_SWEEPS = 12
_ROUNDS = 24
_THREAD = 14.0  # width that a passing edge takes
_STRAIGHT = 4.0  # how much more a bend in a passing edge counts than one at a node

Point = tuple[float, float]


@dataclass(frozen=True)
class Drawing:
    """``corners``: top left corner of each node; ``routes``: for each edge the points that it runs
    through, from the bottom of its first node to the top of its second."""

    corners: list[Point]
    routes: list[list[Point]]
    width: float
    height: float


@dataclass
class _Place:
    """A node, or what a long edge needs of a layer."""

    width: float
    height: float
    weight: float = 1.0
    x: float = 0.0  # of its middle
    above: list[int] = field(default_factory=list)
    below: list[int] = field(default_factory=list)


def draw(
    sizes: Sequence[tuple[float, float]],
    edges: Sequence[tuple[int, int]],
    gaps: tuple[float, float] = (26.0, 26.0),
) -> Drawing:
    """Positions for nodes of these (width, height), and routes for ``edges``, pairs (i, j) with
    i < j; ``gaps``: between neighbours in a layer, and between layers."""
    if not sizes:
        return Drawing([], [], 0.0, 0.0)
    rank = _ranks(len(sizes), edges)
    places = [_Place(w, h) for w, h in sizes]
    layers: list[list[int]] = [[] for _ in range(max(rank) + 1)]
    for i, r in enumerate(rank):
        layers[r].append(i)
    chains = []
    for i, j in edges:
        chain = [i]
        for r in range(rank[i] + 1, rank[j]):
            places.append(_Place(_THREAD, 0.0, _STRAIGHT))
            layers[r].append(len(places) - 1)
            chain.append(len(places) - 1)
        chain.append(j)
        for a, b in itertools.pairwise(chain):
            places[a].below.append(b)
            places[b].above.append(a)
        chains.append(chain)
    _order(places, layers)
    _spread(places, layers, gaps[0])
    left = min(p.x - p.width / 2 for p in places)
    for place in places:
        place.x -= left
    tops, y = [], 0.0
    for layer in layers:
        tops.append(y)
        y += max(places[k].height for k in layer) + gaps[1]
    heights = [max(places[k].height for k in layer) for layer in layers]
    corners = [
        (p.x - p.width / 2, tops[r] + (heights[r] - p.height) / 2)
        for p, r in zip(places, rank, strict=False)
    ]
    routes = []
    for (i, j), chain in zip(edges, chains, strict=True):
        points = [(places[i].x, corners[i][1] + places[i].height)]
        if places[i].height < heights[rank[i]]:
            points.append((places[i].x, tops[rank[i]] + heights[rank[i]]))
        for r, k in enumerate(chain[1:-1], rank[i] + 1):
            points += [(places[k].x, tops[r]), (places[k].x, tops[r] + heights[r])]
        if places[j].height < heights[rank[j]]:
            points.append((places[j].x, tops[rank[j]]))
        routes.append([*points, (places[j].x, corners[j][1])])
    width = max(p.x + p.width / 2 for p in places)
    return Drawing(corners, routes, width, y - gaps[1])


def _ranks(count: int, edges: Sequence[tuple[int, int]]) -> list[int]:
    """Each node's layer: below all that come before it; those that nothing comes before stand
    right above what follows them."""
    rank = [0] * count
    first = set(range(count))
    for i, j in sorted(edges, key=lambda edge: edge[1]):
        rank[j] = max(rank[j], rank[i] + 1)
        first.discard(j)
    for i in first:
        following = [rank[j] for a, j in edges if a == i]
        if following:
            rank[i] = min(following) - 1
    return rank


def _order(places: list[_Place], layers: list[list[int]]) -> None:
    """Sort each layer so that few edges cross."""
    best = [list(layer) for layer in layers]
    fewest = _crossings(places, layers)
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        for r in range(len(layers)) if down else reversed(range(len(layers))):
            beside = r - 1 if down else r + 1
            if not 0 <= beside < len(layers):
                continue
            at = {k: n for n, k in enumerate(layers[beside])}
            keys = {}
            for n, k in enumerate(layers[r]):
                near = [at[m] for m in (places[k].above if down else places[k].below) if m in at]
                keys[k] = sum(near) / len(near) if near else float(n)
            layers[r].sort(key=keys.__getitem__)
        found = _crossings(places, layers)
        if found < fewest:
            fewest, best = found, [list(layer) for layer in layers]
        if fewest == 0:
            break
    layers[:] = best


def _crossings(places: list[_Place], layers: list[list[int]]) -> int:
    total = 0
    for upper, lower in itertools.pairwise(layers):
        at = {k: n for n, k in enumerate(lower)}
        ends = [at[m] for k in upper for m in sorted(places[k].below, key=lambda m: at.get(m, 0))]
        total += sum(a > b for i, a in enumerate(ends) for b in ends[i + 1 :])
    return total


def _spread(places: list[_Place], layers: list[list[int]], gap: float) -> None:
    """Move every node to the mean of its neighbours, as far as the order allows."""
    for layer in layers:
        x = 0.0
        for k in layer:
            places[k].x = x + places[k].width / 2
            x += places[k].width + gap
    for sweep in range(_ROUNDS):
        down = sweep % 2 == 0
        for layer in layers if down else reversed(layers):
            wanted = []
            for k in layer:
                place = places[k]
                near = (place.above or place.below) if down else (place.below or place.above)
                xs = [(places[m].x, places[m].weight) for m in near]
                weight = sum(w for _, w in xs)
                wanted.append(sum(x * w for x, w in xs) / weight if xs else place.x)
            _settle([places[k] for k in layer], wanted, gap)


def _settle(layer: list[_Place], wanted: list[float], gap: float) -> None:
    """The positions nearest to the wanted ones that keep the order and the gaps."""
    offsets, offset = [], 0.0
    for n, place in enumerate(layer):
        if n:
            offset += (layer[n - 1].width + place.width) / 2 + gap
        offsets.append(offset)
    blocks: list[list[float]] = []  # weighted sum, weight, count
    for place, target, own in zip(layer, wanted, offsets, strict=True):
        weight = place.weight
        blocks.append([(target - own) * weight, weight, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, weight, count = blocks.pop()
            blocks[-1] = [blocks[-1][0] + total, blocks[-1][1] + weight, blocks[-1][2] + count]
    n = 0
    for total, weight, count in blocks:
        for _ in range(int(count)):
            layer[n].x = total / weight + offsets[n]
            n += 1


__all__ = ["Drawing", "draw"]
