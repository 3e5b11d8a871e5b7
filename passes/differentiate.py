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
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxhess.contraction import Factor, contract, evaluate
from fxhess.emit import ORIGIN, VAL, Emitter, Var
from fxhess.errors import Origin, SampleMixingError
from fxhess.facts import Canonical, Fact, fact, is_active
from fxhess.kinds import Label, is_curved
from fxhess.passes.curvature import Curvature, Moved, curvature
from fxhess.passes.forms import Forms
from fxhess.passes.guard import guard
from fxhess.passes.halves import Half, Halves, Pattern
from fxhess.structure import Algebra, Structured


@dataclass(frozen=True)
class Piece:
    """How the part of the Hessian from one base to the next is made: the base, and how many of
    its terms (the first ones, in the order of the program) are pulled; the others are closed."""

    base: fx.Node
    pulled: int = 0


@dataclass(frozen=True)
class Term:
    """One term of formula (1), for ``explain``: the curved operation (or the later base), the
    base it is relative to, how it ends and the pattern of its result."""

    node: fx.Node
    base: fx.Node
    ending: str
    pattern: tuple[int, ...]


@dataclass
class Derivative:
    """The graph with its results by name, how each term ended, and where tangents lost structure
    (the operation, and the size of the axis)."""

    graph: fx.Graph
    results: dict[str, Var]
    terms: list[Term]
    losses: list[tuple[Origin | None, int]]


def differentiate(
    canonical: Canonical, pieces: Sequence[Piece], outputs: Sequence[str]
) -> Derivative:
    """Write the graph of the wanted ``outputs``; see the module's docstring.  ``pieces`` start
    with x's."""
    draft = Draft(canonical, outputs)
    makers = {
        "value": draft.value,
        "gradient": draft.gradient,
        "hessian": lambda: draft.hessian(pieces),
    }
    results = {name: draft.typed(makers[name]()) for name in outputs}
    return Derivative(draft.emitter.graph, results, draft.terms, draft.algebra.losses)


class Draft:
    """A derivative being written: values and adjoints are there, pieces are added on demand."""

    def __init__(self, canonical: Canonical, outputs: Sequence[str]) -> None:
        self.canonical = canonical
        self.nb = canonical.batch_ndim
        self.emitter = Emitter()
        self.values: dict[fx.Node, Any] = {}
        self.adjoints: dict[fx.Node, Structured] = {}
        self.terms: list[Term] = []
        # What pieces have in common, written once: a planner tries many of them.
        self._curvatures: dict[fx.Node, list[Curvature | Moved]] = {}
        self._tangents_of: dict[fx.Node, dict[fx.Node, Structured]] = {}  # by base, by value
        self._parts: dict[Hashable, Structured | tuple[Pattern, Half]] = {}
        self._sizes: dict[int, Var] = {}
        self._primal()
        self.algebra = Algebra(self.emitter, self.nb, self.x, self.batch_size, canonical.device)
        self.forms = self._guarded()
        self.halves = Halves(self.forms)
        self.path = self._path()
        self._outputs = canonical.event(canonical.output) if canonical.vector else ()
        if "gradient" in outputs or "hessian" in outputs:
            self._reverse()

    # --- values ---------------------------------------------------------------------------------

    def _primal(self) -> None:
        """Every value of the canonical graph, as plain operations."""
        for node in self.canonical.nodes():
            if node.op == "placeholder":
                self.values[node] = self.emitter.placeholder(str(node.target), node.meta[VAL])
                continue
            with self.emitter.at(node.meta.get(ORIGIN), "value"):
                self.values[node] = self._write(node, self.values.__getitem__)
        self.x: Var = self.values[self.canonical.x]

    def _write(self, node: fx.Node, value: Callable[[fx.Node], Any]) -> Any:
        """A node's operation, of these values of its operands."""
        args = fx.node.map_arg(node.args, value)
        kwargs = fx.node.map_arg(node.kwargs, value)
        if node.target is evaluate:
            return self._evaluate(node, *args)  # type: ignore[arg-type]
        return self.emitter.create_proxy(node.op, node.target, args, kwargs)  # type: ignore[arg-type]

    def _guarded(self) -> Forms:
        """First forms at harmless values of what is not chosen."""
        raw = Forms(self.canonical, self.algebra, self.values)
        values, calls = guard(self.canonical, raw, self._write)
        if not values:
            return raw
        self.values = {**self.values, **values}
        return Forms(self.canonical, self.algebra, self.values, calls)

    def _evaluate(
        self,
        node: fx.Node,
        inputs: Sequence[Sequence[Label]],
        output: Sequence[Label],
        sizes: Mapping[Label, int],
        scale: Any,
        *operands: Var,
    ) -> Var:
        factors: list[Factor] = [*zip(operands, inputs, strict=True), (scale, ())]
        out = contract(
            self.emitter, factors, output, None, lambda a: self.batch_size(int(str(a)[1:]))
        )
        assert isinstance(out, Var)
        shape = node.meta[VAL].shape
        expand = [
            sizes[a] if out.val.shape[i] != shape[i] and a in sizes else -1
            for i, a in enumerate(output)
        ]
        return out if all(n == -1 for n in expand) else out.expand(expand)  # type: ignore[no-any-return]

    def batch_size(self, index: int) -> Var:
        """The size of a batch axis as a value of the graph, defined before all else."""
        if index not in self._sizes:
            first = next(n for n in self.emitter.graph.nodes if n.op != "placeholder")
            with self.emitter.graph.inserting_before(first):
                self._sizes[index] = self.emitter.call(torch.ops.aten.sym_size.int, self.x, index)
        return self._sizes[index]

    def _path(self) -> list[fx.Node]:
        """Active nodes on a path from x to the output, in order."""
        needed = {self.canonical.output}
        path = []
        for node in reversed(list(self.canonical.nodes())):
            if node in needed and is_active(node):
                path.append(node)
                needed.update(_active_operands(node))
        return path[::-1]

    # --- adjoints -------------------------------------------------------------------------------

    def _reverse(self) -> None:
        """The adjoint of every value on the path, ``dy/dv``."""
        output = self.canonical.output
        event = self.canonical.event(output)
        if self.canonical.vector:
            seed = self.algebra.identity(event)
        else:
            seed = Structured(1.0, (None,) * len(event), (), event)
        pending: dict[fx.Node, list[Structured]] = {output: [seed]}
        for node in reversed(self.path):
            if node not in pending:
                continue
            with self.emitter.at(node.meta.get(ORIGIN), "adjoint"):
                g = self.algebra.add(pending.pop(node))
                self.adjoints[node] = g
                if node is not self.canonical.x:
                    for operand, part in self.forms.pull(node, g):
                        pending.setdefault(operand, []).append(part)

    # --- pieces ---------------------------------------------------------------------------------

    def between(self, base: fx.Node, following: fx.Node | None) -> list[fx.Node]:
        """The nodes after ``base`` up to and including ``following``, on the path."""
        inside = {base}
        found = []
        for node in self.path:
            if node is not base and any(o in inside for o in _active_operands(node)):
                found.append(node)
                if node is following:
                    break
                inside.add(node)
        return found

    def piece(
        self, piece: Piece, following: fx.Node | None = None, later: Half | None = None
    ) -> tuple[Half, int]:
        """Formula (1) from a base up to the next, whose half is ``later``; also how many terms it
        has."""
        base = piece.base
        nodes = self.between(base, following)
        half = Half(self.canonical.event(base), self._outputs)
        terms: list[tuple[fx.Node, str, Curvature | Moved]] = []
        for node in nodes:
            if is_curved(_fact(node).kind) and node in self.adjoints:
                terms += [(node, "close", term) for term in self._curvature(node)]
        if following is not None and later is not None:
            carried = self.halves.later_terms(following, later)
            terms += [(following, "rebase", term) for term in carried]
        needed = {term.j for *_, term in terms} | {term.i for *_, term in terms[piece.pulled :]}
        tangents = self._tangents(base, nodes, needed)
        moved: dict[fx.Node, list[Structured]] = {}
        for i, (node, ending, term) in enumerate(terms):
            pulls = i < piece.pulled
            # A term of a node's own curvature lives as long as the draft: its identity is a name.
            key = (base, pulls, id(term)) if ending == "close" else None
            part = self._parts.get(key)
            if part is None:
                with self.emitter.at(node.meta.get(ORIGIN), "curvature"):
                    part = self._part(half, term, tangents, pulls)
            if key is not None:
                self._parts[key] = part
            if isinstance(part, Structured):
                moved.setdefault(term.i, []).append(part)
                self.terms.append(Term(node, base, "pull", ()))
                continue
            pattern, closed = part
            with self.emitter.at(node.meta.get(ORIGIN), "curvature"):
                half.join(closed)
            self.terms.append(Term(node, base, ending, pattern))
        self._pull_back(half, base, nodes, moved)
        return half, len(terms)

    def _curvature(self, node: fx.Node) -> list[Curvature | Moved]:
        if node not in self._curvatures:
            with self.emitter.at(node.meta.get(ORIGIN), "curvature"):
                self._curvatures[node] = curvature(self.forms, node, self.adjoints[node])
        return self._curvatures[node]

    def _part(
        self,
        half: Half,
        term: Curvature | Moved,
        tangents: Mapping[fx.Node, Structured],
        pulls: bool,
    ) -> Structured | tuple[Pattern, Half]:
        """One term for a half like ``half``: moved, or closed and its pattern."""
        if pulls:
            return self.halves.apply(half, term, tangents[term.j])
        closed = Half(half.basis, half.outputs)
        return self.halves.close(closed, term, tangents[term.i], tangents[term.j]), closed

    def _pull_back(
        self,
        half: Half,
        base: fx.Node,
        nodes: Sequence[fx.Node],
        moved: dict[fx.Node, list[Structured]],
    ) -> None:
        """Carry moved tangents back to the base, where they are rows of the half."""
        for node in reversed(nodes):
            if node not in moved:
                continue
            with self.emitter.at(node.meta.get(ORIGIN), "curvature"):
                total = self.algebra.add(moved.pop(node))
                for operand, part in self.forms.pull(node, total):
                    moved.setdefault(operand, []).append(part)
        if base in moved:
            with self.emitter.at(base.meta.get(ORIGIN), "curvature"):
                self.halves.absorb(half, self.algebra.add(moved[base]))

    def _tangents(
        self, base: fx.Node, nodes: Sequence[fx.Node], wanted: set[fx.Node]
    ) -> dict[fx.Node, Structured]:
        """Tangents of the wanted values along the base, and of what they are made of."""
        needed = set(wanted)
        for node in reversed(nodes):
            if node in needed:
                needed.update(_active_operands(node))
        if base not in self._tangents_of:
            self._tangents_of[base] = {base: self.algebra.identity(self.canonical.event(base))}
        tangents = self._tangents_of[base]
        for node in nodes:
            if node in needed and node not in tangents:
                self._check_summed(node)
                with self.emitter.at(node.meta.get(ORIGIN), "tangent"):
                    parts = [tangents.get(o) for o in _fact(node).operands]
                    tangents[node] = self.forms.push(node, parts)
        return tangents

    def _check_summed(self, node: fx.Node) -> None:
        shape = node.meta[VAL].shape[: self.nb]
        if shape != self.canonical.x.meta[VAL].shape[: self.nb]:
            raise SampleMixingError(
                "samples of the batch see each other: a sum over the batch is used nonlinearly",
                where=node.meta.get(ORIGIN),
                hint="return the plain sum over the batch, or a value for each sample",
            )

    # --- results ----------------------------------------------------------------------------------

    def typed(self, result: Var) -> Var:
        """The result in the type of the model's own output."""
        dtype = self.canonical.output.meta[VAL].dtype
        with self.emitter.at(None, "result"):
            return result if result.dtype == dtype else result.to(dtype)  # type: ignore[no-any-return]

    def hessian(self, pieces: Sequence[Piece]) -> Var:
        """``[*batch, *outputs, *event, *event]``, piece by piece from the last base to x."""
        later: Half | None = None
        following: fx.Node | None = None
        for piece in reversed(pieces):
            later, _ = self.piece(piece, following, later)
            following = piece.base
        assert later is not None
        with self.emitter.at(None, "result"):
            return self.halves.hessian(later)

    def value(self) -> Var:
        """The model's own output: ``[*batch]``, ``[*batch, m]`` or a scalar."""
        out: Var = self.values[self.canonical.output]
        with self.emitter.at(None, "result"):
            if self.canonical.summed:
                return torch.reshape(out, ())  # type: ignore[return-value]
            event = self.canonical.event(self.canonical.output)
            out = self.halves.full_size(out, event)
            return out if self.canonical.vector or not event else torch.squeeze(out, -1)  # type: ignore[return-value]

    def gradient(self) -> Var:
        """``[*batch, *outputs, *event]``."""
        x = self.canonical.x
        sizes = (*self._outputs, *self.canonical.event(x))
        with self.emitter.at(None, "result"):
            if x not in self.adjoints:
                return self.halves.zeros(sizes)
            g = self.algebra.untie(self.adjoints[x], range(len(self.canonical.event(x))))
            core = self.algebra.tensor(g)
            if self._outputs:
                core = torch.movedim(core, 0, self.nb)  # type: ignore[assignment]
            return self.halves.full_size(core, sizes)


def _fact(node: fx.Node) -> Fact:
    known = fact(node)
    assert known is not None
    return known


def _active_operands(node: fx.Node) -> list[fx.Node]:
    return [o for o in _fact(node).operands if is_active(o)]
