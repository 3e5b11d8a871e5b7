"""Second forms of which only the entries of a band differ from zero, packed.

*Needs* moved tangents that arrived at their base, near it.  *Gives* the upper triangle of ``A +
A^T``, its entries in the band only::

    C [colours, *batch, *event]  ==>  A + A^T: [*batch, entries]
"""

from __future__ import annotations

from typing import Any

import torch

from fxhess import windows
from fxhess.emit import Var
from fxhess.structure import Algebra, Structured
from fxhess.windows import Band


def band_of(moved: Structured, basis: tuple[int, ...], m: int, nb: int) -> Band | None:
    """The band that moved tangents, along m axes of outputs and the ``basis``, are all of; None
    where an axis of the basis is near another than itself."""
    if not moved.places or not isinstance(moved.core, Var) or set(moved.ties) != {None}:
        return None
    near = {p.basis - m: p for p in moved.places}
    if any(p.event != k or p.window.step != 1 for k, p in near.items()):
        return None
    band = tuple(
        (near[k].period, *near[k].window.ends(0)) if k in near else (n, -n, n)
        for k, n in enumerate(basis)
    )
    lead = m + len(basis)
    shape = moved.core.val.shape
    full = (*(period for period, _, _ in band), *basis)
    return band if (*shape[m:lead], *shape[lead + nb :]) == full else None


def pack(algebra: Algebra, moved: Structured, basis: tuple[int, ...], band: Band) -> Var:
    """``[*batch, *outputs, entries]``, as :func:`fxhess.windows.pairs` orders them."""
    nb, n = algebra.nb, len(basis)
    lead = len(moved.basis)
    order = [*range(lead, lead + nb), *range(lead), *range(lead + nb, lead + nb + n)]
    core: Any = torch.permute(algebra.tensor(moved), order)
    flat: Any = torch.nn.functional.pad(torch.flatten(core, -2 * n), (0, 1))
    ends: Any = algebra.emitter.call(windows.pairs, basis, band, device=algebra.device)
    one, other = (torch.index_select(flat, -1, ends[i]) for i in range(2))
    return one + other  # type: ignore[return-value]
