"""Where a pointwise operation is singular: tried on numbers, once for each operation.

*Needs* a fact of kind elementwise.  *Gives* arguments at which its value and derivatives are
finite, if there are others at which they are not::

    log ==> (0.5,)      div ==> (0.5, 0.5)      acosh ==> (2.0,)      tanh ==> None
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import fx

from fxhess.emit import VAL
from fxhess.facts import Fact
from fxhess.kinds import Elementwise

# Poles, ends of domains and kinks lie at small numbers; 1000 overflows what grows exponentially.
# In the order in which they are preferred as harmless.
_TRIED = (0.5, 2.0, 1.5, -0.5, -1.5, 3.0, 1.0, -1.0, 0.0, -2.0, -3.0, 1e3, -1e3)
_known: dict[Hashable, tuple[float, ...] | None] = {}


def safe_point(known: Fact, active: tuple[bool, ...]) -> tuple[float, ...] | None:
    """A harmless value for each operand, or None: the operation is finite everywhere, or cannot be
    tried."""
    plain = fx.node.map_arg((known.args, dict(known.kwargs)), lambda n: None)
    key = (known.operator, repr(plain), active)
    if key not in _known:
        _known[key] = _try(known, active)
    return _known[key]


def _try(known: Fact, active: tuple[bool, ...]) -> tuple[float, ...] | None:
    kind = known.kind
    assert isinstance(kind, Elementwise) and known.operator is not None
    k = len(known.operands)
    grids = torch.cartesian_prod(*[torch.arange(len(_TRIED))] * k).reshape(-1, k)
    points = torch.tensor(_TRIED, dtype=torch.float64)[grids]
    made = {node: _like(points[:, i], node) for i, node in enumerate(known.operands)}

    def stand_in(node: fx.Node) -> Any:
        return made[node] if node in made else _like(torch.ones(()), node)

    args = fx.node.map_arg(known.args, stand_in)
    kwargs = fx.node.map_arg(dict(known.kwargs), stand_in)
    finite = torch.ones(len(points), dtype=torch.bool)
    try:
        y = known.operator(*args, **kwargs)
        values = [y]
        for i, first in enumerate(kind.first):
            if active[i]:
                values.append(first(y, *args, **kwargs) if callable(first) else first)
        for (i, j), second in kind.second.items():
            if active[i] and active[j]:
                values.append(second(y, *args, **kwargs) if callable(second) else second)
    except Exception:  # it takes more than numbers (or has no derivative at all)
        return None
    for value in values:
        finite &= torch.isfinite(torch.as_tensor(value))
    if finite.all() or not finite.any():
        return None
    best = int(finite.nonzero()[0])
    return tuple(points[best].tolist())


def _like(numbers: torch.Tensor, node: fx.Node) -> Any:
    """Numbers of a node's type, double where it is real."""
    value = node.meta[VAL]
    if not isinstance(value, torch.Tensor):
        return 2
    if value.dtype.is_complex:
        return numbers.to(torch.complex128)
    return numbers.to(torch.float64) if value.dtype.is_floating_point else numbers.to(value.dtype)
