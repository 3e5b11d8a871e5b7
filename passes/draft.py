"""A derivative being written: values, adjoints, and pieces of formula (1) of ``differentiate``.

*Needs* canonical facts with activity.  *Gives* a :class:`Draft`: values and adjoints are there from
the start, pieces are added on demand, as often as a planner wants to try.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fxhess.contraction import Factor, contract, evaluate
from fxhess.emit import ORIGIN, VAL, VARIES, Emitter, Var
from fxhess.errors import SampleMixingError
from fxhess.facts import Canonical, is_active, known_fact, operands
from fxhess.kinds import Label, Smooth, is_curved
from fxhess.passes.curvature import Curvature, Moved, curvature
from fxhess.passes.forms import Forms
from fxhess.passes.guard import guard
from fxhess.passes.half import FULL, Half, Part, Pattern
from fxhess.passes.halves import Halves
from fxhess.passes.shelter import shelter
from fxhess.structure import Algebra, Near, Structured


@dataclass(frozen=True)
class Piece:
    """How the part of the Hessian from one base to the next is made: the base, and how many of
    its terms (the first ones, in the order of the program) are pulled; the others are closed.
    ``colours``: how many there are of each axis of the base, for tangents near it (0: for none);
    their terms are pulled, apart from the others."""

    base: fx.Node
    pulled: int = 0
    colours: tuple[int, ...] = ()


@dataclass(frozen=True)
class Start:
    """What a piece's tangents start from at its base, on the left and on the right of ``J^T C J``,
    and which part of it is wanted.  ``rows``, ``columns``: which of the directions, as a constant
    of positions, are paired with each other (all, in order, where None).  ``key`` tells starts at
    one base apart; that of all directions is empty."""

    left: Structured
    right: Structured
    part: Part = FULL
    rows: Var | None = None
    columns: Var | None = None
    key: str = ""


@dataclass(frozen=True)
class Term:
    """One term of formula (1), for ``explain``: the curved operation (or the later base), the
    base it is relative to, how it ends and the pattern of its result; ``carried``: whether it is
    the Hessian of what follows a later base."""

    node: fx.Node
    base: fx.Node
    ending: str
    pattern: tuple[int, ...]
    carried: bool = False


class Draft:
    """A derivative being written: values and adjoints are there, pieces are added on demand."""

    def __init__(
        self, canonical: Canonical, given: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        """``given``: stand-ins of further inputs of the program, by name, that differ from sample
        to sample."""
        self.canonical = canonical
        self.nb = canonical.batch_ndim
        self.emitter = Emitter()
        self.values: dict[fx.Node, Any] = {}
        self.adjoints: dict[fx.Node, Structured] = {}
        self.terms: list[Term] = []
        # What pieces have in common, written once: a planner tries many of them.
        self._curvatures: dict[fx.Node, list[Curvature | Moved]] = {}
        # By base and start, by value.
        self.tangents_of: dict[tuple[fx.Node, Hashable], dict[fx.Node, Structured]] = {}
        self._parts: dict[Hashable, Structured | tuple[Pattern, Half]] = {}
        self._sizes: dict[int, Var] = {}
        self.given: dict[str, Var] = {}
        self._primal(given or {})
        self.algebra = Algebra(self.emitter, self.nb, self.x, self.batch_size, canonical.device)
        self.forms = self._guarded()
        self.halves = Halves(self.forms)
        self.path = self._path()
        self.outputs = canonical.event(canonical.output) if canonical.vector else ()

    # --- values ---------------------------------------------------------------------------------

    def _primal(self, given: Mapping[str, torch.Tensor]) -> None:
        """Every value of the canonical graph, as plain operations."""
        inputs = [n for n in self.canonical.nodes() if n.op == "placeholder" and n.meta[VARIES]]
        for node in self.canonical.nodes():
            if node.op == "placeholder":
                self.values[node] = self.emitter.placeholder(
                    str(node.target), node.meta[VAL], node.meta[VARIES]
                )
                if node is inputs[-1]:
                    for name, val in given.items():
                        self.given[name] = self.emitter.placeholder(name, val, varies=True)
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
        """First forms at harmless values of what is not chosen, or does not depend on x."""
        forms = Forms(self.canonical, self.algebra, self.values)
        values, calls = guard(self.canonical, forms, self._write)
        if values:
            self.values = {**self.values, **values}
            forms = Forms(self.canonical, self.algebra, self.values, calls)
        sheltered = shelter(self.canonical, forms, self._write)
        if not sheltered:
            return forms
        return Forms(self.canonical, self.algebra, self.values, {**calls, **sheltered})

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

    def reverse(self) -> None:
        """Write the adjoint of every value on the path, ``dy/dv``."""
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

    def start(self, base: fx.Node, colours: tuple[int, ...] = ()) -> Start:
        """All directions at a base; ``colours`` as for :class:`Piece`."""
        identity = self.algebra.identity(self.canonical.event(base))
        near = tuple(Near(k, period) for k, period in enumerate(colours) if period)
        if not near:
            return Start(identity, identity)
        identity = replace(identity, near=near)
        return Start(identity, identity, key=f"near {colours}")

    def piece(
        self,
        piece: Piece,
        following: fx.Node | None = None,
        later: Half | None = None,
        start: Start | None = None,
    ) -> tuple[Half, int]:
        """Formula (1) from a base up to the next, whose half is ``later``; also how many terms it
        has.  ``start``: along what; all directions where None, or of which there are colours."""
        base = piece.base
        nodes = self.between(base, following)
        if start is None or piece.colours:
            start = self.start(base, piece.colours)
        basis = start.left.basis if start.rows is None else (start.rows.size(0),)
        half = Half(basis, self.outputs, part=start.part)
        terms = self.terms_of(base, nodes, following, later)
        needed = {term.j for *_, term in terms} | {term.i for *_, term in terms[piece.pulled :]}
        left = self.tangents(base, nodes, needed, start.left, (start.key, "left"))
        right = left
        if start.right is not start.left:
            right = self.tangents(base, nodes, needed, start.right, (start.key, "right"))
        plain = right is left and start.rows is None and not piece.colours
        half.symmetric = plain and all(term.symmetric for *_, term in terms)
        moved, near = (dict[fx.Node, list[Structured]]() for _ in range(2))  # by value
        for i, (node, ending, term) in enumerate(terms):
            is_near = bool(right[term.j].places)
            pulls = i < piece.pulled or is_near
            # A term of a node's own curvature lives as long as the draft: its identity is a name.
            key = (base, start.key, pulls, id(term)) if ending == "close" else None
            part = self._parts.get(key)
            if part is None:
                with self.emitter.at(node.meta.get(ORIGIN), "curvature"):
                    part = self._part(half, term, left, right, pulls, start)
            if key is not None:
                self._parts[key] = part
            if isinstance(part, Structured):
                (near if is_near else moved).setdefault(term.i, []).append(part)
                self.terms.append(Term(node, base, "pull", (), ending == "rebase"))
                continue
            pattern, closed = part
            with self.emitter.at(node.meta.get(ORIGIN), "curvature"):
                half.join(closed)
            self.terms.append(Term(node, base, ending, pattern))
        for parts in (near, moved):
            self._pull_back(nodes, parts)
            if base in parts:
                with self.emitter.at(base.meta.get(ORIGIN), "curvature"):
                    self.halves.absorb(half, self.algebra.add(parts[base]))
        return half, len(terms)

    def terms_of(
        self,
        base: fx.Node,
        nodes: Sequence[fx.Node],
        following: fx.Node | None,
        later: Half | None,
    ) -> list[tuple[fx.Node, str, Curvature | Moved]]:
        """The terms of a piece, with the operations that they are of."""
        inside, terms = {base, *nodes}, []
        for node in nodes:
            if is_curved(known_fact(node).kind) and node in self.adjoints:
                own = self._curvature(node)
                terms += [(node, "close", t) for t in own if t.i in inside and t.j in inside]
        if following is not None and later is not None:
            carried = self.halves.later_terms(following, later)
            terms += [(following, "rebase", term) for term in carried]
        return terms

    def product(self, direction: Structured) -> Structured | None:
        """The Hessian times directions at x, as an adjoint of x; None where it is zero."""
        x = self.canonical.x
        nodes = self.between(x, None)
        half = Half(direction.basis, self.outputs)
        terms = [
            (node, term)
            for node in nodes
            if is_curved(known_fact(node).kind) and node in self.adjoints
            for term in self._curvature(node)
        ]
        needed = {term.i for _, term in terms} | {term.j for _, term in terms}
        tangents = self.tangents(x, nodes, needed, direction, "product")
        moved: dict[fx.Node, list[Structured]] = {}
        for node, term in terms:
            self.terms.append(Term(node, x, "pull", ()))
            with self.emitter.at(node.meta.get(ORIGIN), "curvature"):
                for whole in term.sides():
                    part = self.halves.apply(half, whole, tangents[whole.j])
                    moved.setdefault(whole.i, []).append(part)
        self._pull_back(nodes, moved)
        return self.algebra.add(moved[x]) if x in moved else None

    def _curvature(self, node: fx.Node) -> list[Curvature | Moved]:
        if node not in self._curvatures:
            with self.emitter.at(node.meta.get(ORIGIN), "curvature"):
                kind = known_fact(node).kind
                h = self._later(node) if isinstance(kind, Smooth) and kind.later else None
                self._curvatures[node] = curvature(self.forms, node, self.adjoints[node], h)
        return self._curvatures[node]

    def _later(self, node: fx.Node) -> Var:
        """The second derivative of all that follows by the node's value, everything else fixed:
        ``[*outputs, *batch, *event, *mixed axes]``."""
        passed = frozenset(out for out in known_fact(node).axes[0] if out is not None)
        start = self.start(node)
        count = len(self.terms)
        part = Start(start.left, start.right, Part(passed), key="later")
        half, _ = self.piece(Piece(node), start=part)
        del self.terms[count:]  # no terms of the Hessian
        whole: Any = self.halves.whole(half)
        m = len(self.outputs)
        order = [*range(self.nb, self.nb + m), *range(self.nb), *range(self.nb + m, whole.ndim)]
        return torch.permute(whole, order) if m else whole  # type: ignore[no-any-return, return-value]

    def _part(
        self,
        half: Half,
        term: Curvature | Moved,
        left: Mapping[fx.Node, Structured],
        right: Mapping[fx.Node, Structured],
        pulls: bool,
        start: Start,
    ) -> Structured | tuple[Pattern, Half]:
        """One term for a half like ``half``: moved, or closed and its pattern."""
        if pulls:
            return self.halves.apply(half, term, right[term.j])
        closed = Half(half.basis, half.outputs, part=half.part)
        if start.rows is None or start.columns is None:
            return self.halves.close(closed, term, left[term.i], right[term.j]), closed
        pattern: Pattern = ()
        for rows, columns in ((start.rows, start.columns), (start.columns, start.rows)):
            one = self.algebra.select(left[term.i], rows)
            other = self.algebra.select(right[term.j], columns)
            pattern = self.halves.close(closed, term, one, other)
        return pattern, closed

    def _pull_back(self, nodes: Sequence[fx.Node], moved: dict[fx.Node, list[Structured]]) -> None:
        """Carry moved tangents back to the base."""
        for node in reversed(nodes):
            if node not in moved:
                continue
            with self.emitter.at(node.meta.get(ORIGIN), "curvature"):
                total = self.algebra.add(moved.pop(node))
                for operand, part in self.forms.pull(node, total):
                    moved.setdefault(operand, []).append(part)

    def tangents(
        self,
        base: fx.Node,
        nodes: Sequence[fx.Node],
        wanted: set[fx.Node],
        start: Structured,
        key: Hashable,
    ) -> dict[fx.Node, Structured]:
        """Tangents of the wanted values, and of what they are made of, from ``start`` at the
        base on; ``key`` names the start."""
        needed = set(wanted)
        for node in reversed(nodes):
            if node in needed:
                needed.update(_active_operands(node))
        tangents = self.tangents_of.setdefault((base, key), {base: start})
        for node in nodes:
            if node in needed and node not in tangents:
                self._check_summed(node)
                with self.emitter.at(node.meta.get(ORIGIN), "tangent"):
                    parts = [tangents.get(o) for o in known_fact(node).operands]
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


def _active_operands(node: fx.Node) -> list[fx.Node]:
    return [o for o in operands(node) if is_active(o)]
