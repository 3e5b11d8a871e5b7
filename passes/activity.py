"""Activity: through which values a derivative with respect to x flows.

*Needs* canonical facts.  *Gives* ``Fact.active`` on every node that depends on x: it does where
the kind is not zero and some operand it speaks of is active.
"""

from __future__ import annotations

from fxhess.facts import Canonical, fact, is_active, set_active
from fxhess.kinds import Elementwise, Multilinear, Zero


def mark_activity(canonical: Canonical) -> Canonical:
    """Set ``Fact.active`` everywhere; x itself is active."""
    for node in canonical.nodes():
        known = fact(node)
        if known is None or node is canonical.x:
            continue
        active = [is_active(operand) for operand in known.operands]
        match known.kind:
            case Zero():
                flows = False
            case Elementwise(first=first):
                flows = any(a and d != 0 for a, d in zip(active, first, strict=True))
            case Multilinear():  # by the number 0 as much a constant as what has no derivative
                flows = any(active) and known.args[3] != 0
            case _:
                flows = any(active)
        set_active(node, flows)
    return canonical
