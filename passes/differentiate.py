"""Differentiation: values forward, adjoints backward, one contraction for each curved operation.

*Needs* canonical facts with activity, and a plan.  *Gives* a graph of plain PyTorch operations
with the wanted outputs::

    v1 = W x;  v2 = tanh v1;  y = w . v2
    ==>  g2 = w;  c = g2 tanh''(v1);   H = W^T diag(c) W

For one sample, with tangents ``J_v = dv/dx``, adjoints ``g_v = dy/dv`` and the curvature
``C_k = sum_o g_o d2 op_k[o] / d in d in`` of each operation,

    H = sum over curved operations k of  J_in(k)^T  C_k  J_in(k)                             (1)

(Gower & Mello 2012; tensor form: Laue, Mitterreiter & Giesen 2018, 2020).  Each term ends in one
of three ways:

- *close*: contracted on the spot with the tangents on both sides.
- *pull*: ``C_k J_in(k)`` is carried back by the earlier operations' pullbacks, summed with what
  joins it (forward-over-reverse proper).
- *rebase*: with *bases* ``x = z_0, z_1, ..``, values that every path from x passes through,
  tangents start afresh from the identity at each base, and (1) is summed piece by piece::

      H_(i) = J^T H_(i+1) J  +  sum over k between z_i and z_(i+1),       J = d z_(i+1) / d z_i

Parts of H are the same sum with fewer index pairs: for the diagonal (and its sum, the Laplacian)
both tangents carry one index, for selected entries one of a list of pairs; along given vectors,
tangents start from these (``v^T H v``), or all terms are pulled (``H v``).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxhess.emit import VAL, Var
from fxhess.errors import Origin
from fxhess.facts import Canonical
from fxhess.outputs import Output, flat
from fxhess.passes.draft import Draft, Piece, Start, Term
from fxhess.passes.half import Half, Part
from fxhess.structure import Structured


@dataclass
class Derivative:
    """The graph with its results by name, how each term ended, where tangents lost structure (the
    operation, and the size of the axis), adjoints by value, and tangents by base and start, by
    value."""

    graph: fx.Graph
    results: dict[str, Var]
    terms: list[Term]
    losses: list[tuple[Origin | None, int]]
    adjoints: Mapping[fx.Node, Structured]
    tangents: Mapping[tuple[fx.Node, Hashable], Mapping[fx.Node, Structured]]


def differentiate(
    canonical: Canonical,
    plans: Mapping[str, Sequence[Piece]],
    outputs: Sequence[Output],
    given: Mapping[str, torch.Tensor] | None = None,
) -> Derivative:
    """Write the graph of the wanted ``outputs``; see the module's docstring.  ``plans``: the
    pieces, starting with x's, of each output that needs some; ``given``: stand-ins of what is given
    at the call besides x (``vector``, ``metric``)."""
    draft = Draft(canonical, given)
    if any(output.order for output in outputs):
        draft.reverse()
    writer = _Writer(draft, plans)
    results = {output.name: writer.finished(output) for output in outputs}
    return Derivative(
        draft.emitter.graph, results, draft.terms, draft.algebra.losses, draft.adjoints,
        draft.tangents_of,
    )  # fmt: skip


def planned(outputs: Sequence[Output]) -> list[Output]:
    """The outputs that need a plan: what is read off the Hessian, where that is wanted too, needs
    none, nor do products with vectors, of which all terms are pulled."""
    second = [output for output in outputs if output.order == 2]
    whole = [output for output in second if output.name == "hessian"]
    return whole or [output for output in second if output.name != "hvp"]


def start_of(draft: Draft, output: Output) -> Start:
    """What the tangents at x start from, and which part of the second form is wanted."""
    x = draft.canonical.x
    event = draft.canonical.event(x)
    everything = draft.start(x)
    axes = frozenset(range(len(event)))
    if output.name == "blocks":
        return Start(everything.left, everything.right, Part(frozenset(output.axes)), key="blocks")
    if output.name == "diagonal":
        return Start(everything.left, everything.right, Part(axes), key="diagonal")
    if output.name == "laplacian":
        right = _metric(draft) if "metric" in draft.given else everything.right
        return Start(everything.left, right, Part(axes, traced=True), key="laplacian")
    if output.name == "quadratic":
        along = direction(draft)
        tied = frozenset(range(len(along.basis)))
        return Start(along, along, Part(tied), key="quadratic")
    if output.name == "entries":
        return _entries(draft, output, event)
    return everything


def direction(draft: Draft) -> Structured:
    """The given vectors as a tangent of x: ``[*batch, *event]``, or with a leading axis."""
    event = draft.canonical.event(draft.canonical.x)
    vector = draft.given["vector"]
    leading = vector.ndim - draft.nb - len(event)
    basis = tuple(int(n) for n in vector.val.shape[:leading])
    return Structured(vector, (None,) * len(event), basis, event)


def _metric(draft: Draft) -> Structured:
    """The symmetric part of the given metric as tangents of x, one for each of its rows."""
    event = draft.canonical.event(draft.canonical.x)
    n, nb = len(event), draft.nb
    given: Any = draft.given["metric"]
    a = given.ndim - 2 * n
    swapped = [*range(a), *range(a + n, a + 2 * n), *range(a, a + n)]
    core: Any = (given + torch.permute(given, swapped)) * 0.5
    if a == 0:
        core = core[(slice(None),) * n + (None,) * nb]
    else:
        core = torch.permute(core, [*range(a, a + n), *range(a), *range(a + n, a + 2 * n)])
    return Structured(core, (None,) * n, event, event)


def _entries(draft: Draft, output: Output, event: tuple[int, ...]) -> Start:
    """One direction for each coordinate that occurs in a pair, and who is paired with whom."""
    pairs = [(flat(i, event), flat(j, event)) for i, j in output.entries]
    places = sorted({k for pair in pairs for k in pair})
    at = {k: n for n, k in enumerate(places)}
    algebra = draft.algebra
    size = torch.Size(event).numel()
    chosen = torch.index_select(algebra.eye(size), 0, _constant(draft, places))  # type: ignore[arg-type]
    core: Any = torch.reshape(chosen, (len(places), *(1,) * draft.nb, *event))
    along = Structured(core, (None,) * len(event), (len(places),), event)
    rows = _constant(draft, [at[i] for i, _ in pairs])
    columns = _constant(draft, [at[j] for _, j in pairs])
    return Start(along, along, Part(frozenset({0}), doubled=False), rows, columns, "entries")


def _constant(draft: Draft, numbers: Sequence[int]) -> Var:
    return draft.emitter.call(
        torch.tensor, list(numbers), dtype=torch.long, device=draft.algebra.device
    )


class _Writer:
    """Writes single outputs into a draft."""

    def __init__(self, draft: Draft, plans: Mapping[str, Sequence[Piece]]) -> None:
        self.draft = draft
        self.plans = plans
        self.nb = draft.nb
        self.event = draft.canonical.event(draft.canonical.x)
        self._hessian: Var | None = None

    def finished(self, output: Output) -> Var:
        """The output in the type of the model's own, and with the model's own axes."""
        canonical = self.draft.canonical
        result: Any = self.write(output)
        dtype = canonical.output.meta[VAL].dtype
        with self.draft.emitter.at(None, "result"):
            if canonical.outputs:
                at = self.nb + (len(direction(self.draft).basis) if output.takes_vector else 0)
                if canonical.vector:
                    result = torch.unflatten(result, at, canonical.outputs)
                else:
                    result = result[(slice(None),) * at + (None,) * len(canonical.outputs)]
            return result if result.dtype == dtype else result.to(dtype)  # type: ignore[no-any-return]

    def write(self, output: Output) -> Var:
        makers: dict[str, Callable[[], Var]] = {
            "value": self.value,
            "gradient": self.gradient,
            "jacobian": self.gradient,
            "hvp": self.product,
        }
        if output.order == 2 and "hessian" in self.plans:
            return self.read_off(output)
        return makers.get(output.name, lambda: self.second(output))()

    def second(self, output: Output) -> Var:
        """A part of the second form, piece by piece from the last base to x."""
        draft = self.draft
        if output.name == "entries" and not output.entries:
            return draft.halves.zeros((*draft.outputs, 0))
        with draft.emitter.at(None, "tangent"):
            start = start_of(draft, output)
        later: Half | None = None
        following: fx.Node | None = None
        for piece in reversed(self.plans[output.name]):
            here = start if piece.base is draft.canonical.x else None
            later, _ = draft.piece(piece, following, later, here)
            following = piece.base
        assert later is not None
        with draft.emitter.at(None, "result"):
            result: Any = draft.halves.whole(later)
            if output.name == "quadratic" and later.basis:  # [*batch, *outputs, k] -> [k, ...]
                return torch.movedim(result, -1, 0)  # type: ignore[return-value]
            return result  # type: ignore[no-any-return]

    def product(self) -> Var:
        """``[*leading, *batch, *outputs, *event]``: H times the given vectors."""
        draft = self.draft
        along = direction(draft)
        moved = draft.product(along)
        sizes = (*draft.outputs, *self.event)
        with draft.emitter.at(None, "result"):
            if moved is None:
                zeros = draft.halves.zeros(sizes)
                return torch.stack([zeros] * along.basis[0]) if along.basis else zeros  # type: ignore[return-value, list-item]
            moved = draft.algebra.untie(moved, range(len(self.event)))
            core: Any = draft.algebra.tensor(moved)
            m, k = len(draft.outputs), len(along.basis)
            order = [*range(m, m + k + self.nb), *range(m), *range(m + k + self.nb, core.ndim)]
            if m and order != list(range(core.ndim)):
                core = torch.permute(core, order)
            if not k:
                return draft.halves.full_size(core, sizes)
            if tuple(core.val.shape[1:]) == (*draft.x.val.shape[: self.nb], *sizes) and (
                core.val.shape[0] == along.basis[0]
            ):
                return core  # type: ignore[no-any-return]
            count = core.val.shape[0]
            rows = [draft.halves.full_size(core[i % count], sizes) for i in range(along.basis[0])]
            return torch.stack(rows)  # type: ignore[return-value, arg-type]

    def value(self) -> Var:
        """The model's own output: ``[*batch]``, ``[*batch, m]`` or a scalar."""
        draft, canonical = self.draft, self.draft.canonical
        out: Var = draft.values[canonical.output]
        with draft.emitter.at(None, "result"):
            if canonical.summed:
                return torch.reshape(out, ())  # type: ignore[return-value]
            event = canonical.event(canonical.output)
            out = draft.halves.full_size(out, event)
            return out if canonical.vector or not event else torch.squeeze(out, -1)  # type: ignore[return-value]

    def gradient(self) -> Var:
        """``[*batch, *outputs, *event]``."""
        draft = self.draft
        x = draft.canonical.x
        sizes = (*draft.outputs, *self.event)
        with draft.emitter.at(None, "result"):
            if x not in draft.adjoints:
                return draft.halves.zeros(sizes)
            g = draft.algebra.untie(draft.adjoints[x], range(len(self.event)))
            core = draft.algebra.tensor(g)
            if draft.outputs:
                core = torch.movedim(core, 0, self.nb)  # type: ignore[assignment]
            return draft.halves.full_size(core, sizes)

    # --- off the Hessian --------------------------------------------------------------------------

    def read_off(self, output: Output) -> Var:
        """An output of second order, where the Hessian is there anyway."""
        if self._hessian is None:
            self._hessian = self.second(Output("hessian"))
        H: Any = self._hessian
        if output.name == "hessian":
            return H  # type: ignore[no-any-return]
        with self.draft.emitter.at(None, "result"):
            return getattr(self, f"_{output.name}")(H, output)  # type: ignore[no-any-return]

    def _flat(self, H: Any) -> Any:
        n = len(self.event)
        if n == 1:
            return H
        if n == 0:
            return H[..., None, None]
        return torch.flatten(torch.flatten(H, -n, -1), -n - 1, -2)

    def _diagonal(self, H: Any, output: Output) -> Any:
        diagonal = torch.diagonal(self._flat(H), 0, -2, -1)
        if len(self.event) == 1:
            return torch.clone(diagonal)
        return torch.clone(
            torch.unflatten(diagonal, -1, self.event) if self.event else diagonal[..., 0]
        )

    def _laplacian(self, H: Any, output: Output) -> Any:
        if "metric" not in self.draft.given:
            return torch.sum(torch.diagonal(self._flat(H), 0, -2, -1), -1)
        metric: Any = self.draft.given["metric"]
        if self.draft.outputs and metric.ndim > 2 * len(self.event):
            metric = torch.unsqueeze(metric, self.nb)
        weighted = H * metric
        return (
            torch.sum(torch.flatten(weighted, -2 * len(self.event)), -1) if self.event else weighted
        )

    def _entries(self, H: Any, output: Output) -> Any:
        n = torch.Size(self.event).numel()
        places = [flat(i, self.event) * n + flat(j, self.event) for i, j in output.entries]
        return torch.index_select(
            torch.flatten(self._flat(H), -2), -1, _constant(self.draft, places)
        )  # type: ignore[arg-type]

    def _blocks(self, H: Any, output: Output) -> Any:
        """Axes that are tied keep one index: the diagonal over each pair of axes, moved back."""
        n = len(self.event)
        lead = H.ndim - 2 * n
        for axis in reversed(output.axes):
            both = torch.diagonal(H, 0, lead + axis, lead + n + axis)
            H = torch.movedim(both, -1, lead + axis)
        return torch.clone(H)

    def _along(self, H: Any) -> tuple[Any, Any]:
        """The given vectors as columns and flat H: ``[*batch, *outputs, n, leading]``."""
        along = direction(self.draft)
        v: Any = along.core
        if not self.event:
            v = v[..., None]
        elif len(self.event) > 1:
            v = torch.flatten(v, -len(self.event))
        v = torch.movedim(v, 0, -1) if along.basis else v[..., None]
        for _ in self.draft.outputs:
            v = torch.unsqueeze(v, self.nb)
        return v, torch.matmul(self._flat(H), v)

    def _hvp(self, H: Any, output: Output) -> Any:
        _, product = self._along(H)
        leading = direction(self.draft).basis
        product = torch.movedim(product, -1, 0) if leading else product[..., 0]
        if not self.event:
            return product[..., 0]
        return torch.unflatten(product, -1, self.event) if len(self.event) > 1 else product

    def _quadratic(self, H: Any, output: Output) -> Any:
        v, product = self._along(H)
        result = torch.sum(v * product, -2)
        return torch.movedim(result, -1, 0) if direction(self.draft).basis else result[..., 0]


__all__ = ["Derivative", "differentiate", "planned", "start_of"]
