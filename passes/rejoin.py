"""Rejoining: what was taken apart and put together again is what it was.

*Needs* canonical facts and activity.  *Gives* a graph in which a value that holds all entries of
another one, each in its own place, is that other one::

    cat([x[..., :1], x[..., 1:]], -1)   ==>   x

Models of several coordinates are written so (``torch.cat([x, t], -1)``), and so is a call with
several inputs that become one.  Operations that move entries only are run on the entries' numbers;
no number of the model's is needed, and which operations they are does not matter.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fxhess.emit import VAL, Var
from fxhess.facts import FACT, Canonical, fact, is_active
from fxhess.kinds import Linear, Multilinear


@dataclass(frozen=True)
class _Moved:
    """A value as entries of another one: their numbers, with batch axes of size 1."""

    root: fx.Node
    numbers: torch.Tensor

    @functools.cached_property
    def key(self) -> Hashable:
        """Equal for equal values."""
        content = self.numbers.contiguous().numpy().tobytes()
        return self.root, tuple(self.numbers.shape), hashlib.sha256(content).digest()


def rejoin(canonical: Canonical) -> Canonical:
    """Replace each value that equals an earlier one by moving entries only."""
    found: dict[fx.Node, _Moved] = {}
    first: dict[Hashable, fx.Node] = {}
    instead: dict[fx.Node, fx.Node] = {}
    for node in list(canonical.nodes()):
        _redirect(node, instead)
        if not is_active(node):
            continue
        moved = _moved(canonical, node, found)
        if moved is None:
            continue
        found[node] = moved
        if moved.root not in found:
            found[moved.root] = whole = _whole(canonical, moved.root)
            first[whole.key] = moved.root
        earlier = first.setdefault(moved.key, node)
        if earlier is not node and _alike(earlier, node):
            instead[node] = earlier
    canonical.output = instead.get(canonical.output, canonical.output)
    if instead:
        _sweep(canonical, {*instead, *found})
    return canonical


def _alike(one: fx.Node, other: fx.Node) -> bool:
    """Whether batch axes and type are the same, too."""
    a, b = one.meta[VAL], other.meta[VAL]
    return bool(a.shape == b.shape and a.dtype == b.dtype)


def _sweep(canonical: Canonical, candidates: set[fx.Node]) -> None:
    """Remove those that nothing needs any more, not even what is known of another node."""
    spoken_of: set[fx.Node] = set()
    for node in reversed(list(canonical.nodes())):
        free = not node.users and node not in spoken_of and node is not canonical.output
        if free and node in candidates and node.op != "placeholder":
            canonical.graph.erase_node(node)
            continue
        known = fact(node)
        if known is not None:
            spoken_of.update(known.operands)
            fx.node.map_arg((known.args, dict(known.kwargs)), spoken_of.add)  # type: ignore[arg-type]


def _moved(canonical: Canonical, node: fx.Node, found: dict[fx.Node, _Moved]) -> _Moved | None:
    """The node as moved entries of one value, if its kind says that it only moves them."""
    known = fact(node)
    assert known is not None
    kind, operands, event = known.kind, known.operands, canonical.event(node)
    if isinstance(kind, Multilinear):
        if len(operands) > 1 or isinstance(kind.scale, Var) or kind.scale != 1.0:
            return None
    elif not (isinstance(kind, Linear) and kind.moves):
        return None
    if not all(map(is_active, operands)):
        return None
    parts = [found.get(operand) or _whole(canonical, operand) for operand in operands]
    root = parts[0].root
    if any(part.root is not root for part in parts):
        return None
    if isinstance(kind, Multilinear):
        numbers = _rearranged(kind, parts[0].numbers)
        if numbers is None or numbers.shape[canonical.batch_ndim :] != event:
            return None
        return _Moved(root, numbers)
    values = {o: part.numbers for o, part in zip(operands, parts, strict=True)}
    lookup: Any = values.__getitem__
    args, kwargs = fx.node.map_arg((known.args, dict(known.kwargs)), lookup)  # type: ignore[misc]
    assert known.operator is not None
    return _Moved(root, known.operator(*args, **kwargs))


def _rearranged(kind: Multilinear, numbers: torch.Tensor) -> torch.Tensor | None:
    """Numbers permuted, with axes of size 1 dropped and added; None where entries are summed."""
    (labels,) = kind.inputs
    kept = [label for label in kind.output if label in labels]
    dropped = [label for label in labels if label not in kind.output]
    numbers = numbers.permute([labels.index(label) for label in (*dropped, *kept)])
    if any(n != 1 for n in numbers.shape[: len(dropped)]):
        return None
    numbers = numbers[(0,) * len(dropped)]
    return numbers[tuple(slice(None) if label in labels else None for label in kind.output)]


def _whole(canonical: Canonical, node: fx.Node) -> _Moved:
    event = canonical.event(node)
    numbers = torch.arange(math.prod(event)).reshape([1] * canonical.batch_ndim + list(event))
    return _Moved(node, numbers)


def _redirect(node: fx.Node, instead: dict[fx.Node, fx.Node]) -> None:
    """Let an operation, and what is known of it, speak of other operands."""
    if not instead:
        return
    lookup: Any = lambda n: instead.get(n, n)  # noqa: E731
    if any(n in instead for n in node.all_input_nodes):
        node.args = fx.node.map_arg(node.args, lookup)
        node.kwargs = fx.node.map_arg(node.kwargs, lookup)
    known = fact(node)
    if known is not None:
        node.meta[FACT] = replace(
            known,
            operands=tuple(map(lookup, known.operands)),
            args=fx.node.map_arg(known.args, lookup),
            kwargs=fx.node.map_arg(dict(known.kwargs), lookup),
        )
