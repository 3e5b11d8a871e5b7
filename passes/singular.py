"""Where a pointwise operation is singular: tried on numbers, once for each operation.

*Needs* a fact of kind elementwise.  *Gives* arguments at which its value and derivatives are
finite, if there are others at which they are not::

    log ==> (0.5,)      div ==> (0.5, 0.5)      acosh ==> (2.0,)      tanh ==> None
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import fx

from fxhess.emit import VAL
from fxhess.facts import Fact
from fxhess.kinds import Elementwise

# Poles, ends of domains and kinks lie at small numbers; 1000 overflows what grows exponentially.
# In the order in which they are preferred as harmless.
_TRIED = (0.5, 2.0, 1.5, -0.5, -1.5, 3.0, 1.0, -1.0, 0.0, -2.0, -3.0)
_LARGE = (1e3, -1e3)
_INFINITE = (math.inf, -math.inf)
_known: dict[Hashable, tuple[float, ...] | None] = {}


def safe_point(known: Fact, active: tuple[bool, ...]) -> tuple[float, ...] | None:
    """A harmless value for each operand, or None: the operation is finite everywhere, or cannot be
    tried."""
    return _cached(known, active, False)


def constant_point(known: Fact, active: tuple[bool, ...]) -> tuple[float, ...] | None:
    """The same for arguments that are constants, which are put in by hand: small numbers, or
    infinite ones where the value is finite there."""
    return _cached(known, active, True)


def _cached(known: Fact, active: tuple[bool, ...], constants: bool) -> tuple[float, ...] | None:
    plain = fx.node.map_arg((known.args, dict(known.kwargs)), lambda n: None)
    key = (known.operator, repr(plain), active, constants)
    if key not in _known:
        _known[key] = _try(known, active, constants)
    return _known[key]


def finite_at(known: Fact, numbers: Sequence[float]) -> bool:
    """Whether an operation of one operand has finite derivatives at all these numbers."""
    points = torch.tensor(list(numbers), dtype=torch.float64)[:, None]
    finite = _finite(known, (True,), points, True) if len(known.operands) == 1 else None
    return finite is not None and bool(finite.all())


def _try(known: Fact, active: tuple[bool, ...], constants: bool) -> tuple[float, ...] | None:
    k = len(known.operands)
    numbers = (*_TRIED, *(_INFINITE if constants else _LARGE))
    grids = torch.cartesian_prod(*[torch.arange(len(numbers))] * k).reshape(-1, k)
    points = torch.tensor(numbers, dtype=torch.float64)[grids]
    finite = _finite(known, active, points, constants)
    if finite is None or finite.all() or not finite.any():
        return None
    best = int(finite.nonzero()[0])
    return tuple(points[best].tolist())


def _finite(
    known: Fact, active: tuple[bool, ...], points: torch.Tensor, constants: bool
) -> torch.Tensor | None:
    """At which of the points ``[n, operands]`` value and derivatives are finite; of constants the
    derivatives, and where an infinite one gives no finite value there is nothing to keep finite."""
    kind = known.kind
    assert isinstance(kind, Elementwise) and known.operator is not None
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
    for value in values[1:] if constants else values:
        finite &= torch.isfinite(torch.as_tensor(value))
    if constants:
        finite |= ~torch.isfinite(y) & ~torch.isfinite(points).all(1)
    return finite


def _like(numbers: torch.Tensor, node: fx.Node) -> Any:
    """Numbers of a node's type, double where it is real."""
    value = node.meta[VAL]
    if not isinstance(value, torch.Tensor):
        return 2
    if value.dtype.is_complex:
        return numbers.to(torch.complex128)
    return numbers.to(torch.float64) if value.dtype.is_floating_point else numbers.to(value.dtype)
