"""Differentiation: values forward, adjoints backward, one contraction for each curved operation.

*Needs* canonical facts with activity, and the plan's rebase points.  *Gives* a graph of plain
PyTorch operations with the wanted outputs::

    v1 = W x;  v2 = tanh v1;  y = w . v2
    ==>  g2 = w;  c = g2 tanh''(v1);   H = W^T diag(c) W

For one sample, with tangents ``J_v = dv/dx``, adjoints ``g_v = dy/dv`` and the curvature
``C_k = sum_o g_o d2 op_k[o] / d in d in`` of each operation,

    H = sum over curved operations k of  J_in(k)^T  C_k  J_in(k)                             (1)

(Gower & Mello 2012; tensor form: Laue, Mitterreiter & Giesen 2018, 2020).  With *bases*
``x = z_0, z_1, ..``, values that every path from x passes through, tangents start afresh from the
identity at each base and (1) is summed piece by piece, from the last to the first:

    H_(i) = J_{z_(i+1)}^T H_(i+1) J_{z_(i+1)}  +  sum over k between z_i and z_(i+1)

All terms are kept as *halves* A with H = A + A^T, which makes the result exactly symmetric.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxhess.contraction import Factor, contract, evaluate
from fxhess.emit import ORIGIN, VAL, Emitter, Var
from fxhess.errors import SampleMixingError
from fxhess.facts import Canonical, fact, is_active
from fxhess.kinds import Label, Zero, is_curved
from fxhess.passes.forms import Curvature, Forms, Moved
from fxhess.structure import Algebra, Structured

OUTPUTS = ("value", "gradient", "hessian")


@dataclass
class Half:
    """A half Hessian relative to a basis: a sum of cores, by pattern.

    A *pattern* names for each of the axes (outputs.., basis.., basis again..) the core's axis
    that stands for it; two axes with one name are tied: the core is diagonal over them.  A core's
    axes are the batch axes, then one for each distinct name, in order.
    """

    basis: tuple[int, ...]
    outputs: tuple[int, ...]
    cores: dict[tuple[int, ...], Var | float] = field(default_factory=dict)


@dataclass
class Term:
    """One closing, for ``explain``: the curved operation (None for a rebase), the base it is
    closed at and the axes that stayed diagonal."""

    node: fx.Node
    base: fx.Node
    kind: str
    pattern: tuple[int, ...]


@dataclass
class Derivative:
    """The graph with its results by name, and what was done."""

    graph: fx.Graph
    results: dict[str, Var]
    terms: list[Term]
    inputs: list[str]


def differentiate(
    canonical: Canonical, bases: Sequence[fx.Node], outputs: Sequence[str]
) -> Derivative:
    """Write the graph of the wanted ``outputs``; see the module's docstring."""
    return _Differentiation(canonical).run(list(bases), outputs)


class _Differentiation:
    def __init__(self, canonical: Canonical) -> None:
        self.canonical = canonical
        self.nb = canonical.batch_ndim
        self.emitter = Emitter()
        self.values: dict[fx.Node, Any] = {}
        self.adjoints: dict[fx.Node, Structured] = {}
        self.terms: list[Term] = []
        self._sizes: dict[int, Var] = {}

    def prepare(self, outputs: Sequence[str]) -> None:
        """Values, and the adjoints if some output needs them."""
        self._primal()
        self.algebra = Algebra(
            self.emitter, self.nb, self.x, self.batch_size, self.canonical.device
        )
        self.forms = Forms(self.canonical, self.algebra, self.values)
        self.path = self._path()
        if "gradient" in outputs or "hessian" in outputs:
            self._reverse()

    def run(self, bases: list[fx.Node], outputs: Sequence[str]) -> Derivative:
        self.prepare(outputs)
        makers = {"value": self._value, "gradient": self._gradient}
        results: dict[str, Var] = {}
        for name in outputs:
            if name == "hessian":
                results[name] = self._hessian(bases)
            else:
                results[name] = makers[name]()
        inputs = [n.name for n in self.emitter.graph.nodes if n.op == "placeholder"]
        return Derivative(self.emitter.graph, results, self.terms, inputs)

    # --- values ---------------------------------------------------------------------------------

    def _primal(self) -> None:
        """Every value of the canonical graph, as plain operations."""
        for node in self.canonical.nodes():
            if node.op == "placeholder":
                self.values[node] = self.emitter.placeholder(str(node.target), node.meta[VAL])
                continue
            args = fx.node.map_arg(node.args, self.values.__getitem__)
            kwargs = fx.node.map_arg(node.kwargs, self.values.__getitem__)
            with self.emitter.at(node.meta.get(ORIGIN), "value"):
                if node.target is evaluate:
                    self.values[node] = self._evaluate(node, *args)
                else:
                    assert callable(node.target)
                    self.values[node] = self.emitter.call(node.target, *args, **kwargs)
        self.x = self.values[self.canonical.x]

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
        out = contract(self.emitter, factors, output, None, self._batch_of)
        assert isinstance(out, Var)
        shape = node.meta[VAL].shape
        expand = [
            sizes[a] if out.val.shape[i] != shape[i] and a in sizes else -1
            for i, a in enumerate(output)
        ]
        return out if all(n == -1 for n in expand) else out.expand(expand)  # type: ignore[no-any-return]

    def batch_size(self, index: int) -> Var:
        if index not in self._sizes:
            first = next(n for n in self.emitter.graph.nodes if n.op != "placeholder")
            with self.emitter.graph.inserting_before(first):
                self._sizes[index] = self.emitter.call(torch.ops.aten.sym_size.int, self.x, index)
        return self._sizes[index]

    def _batch_of(self, label: Label) -> Var:
        return self.batch_size(int(str(label)[1:]))

    def _path(self) -> list[fx.Node]:
        """Active nodes on a path from x to the output, in order."""
        needed = {self.canonical.output}
        path = []
        for node in reversed(list(self.canonical.nodes())):
            if node in needed and is_active(node):
                path.append(node)
                known = fact(node)
                assert known is not None
                needed.update(o for o in known.operands if is_active(o))
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

    # --- tangents and closings --------------------------------------------------------------------

    def _hessian(self, bases: list[fx.Node]) -> Var:
        half = self._half(bases)
        with self.emitter.at(None, "result"):
            return self.finish(half)

    def _half(self, bases: list[fx.Node]) -> Half:
        """The half Hessian at x, piece by piece from the last base to the first."""
        starts = [self.canonical.x, *bases]
        pieces = self.pieces(starts)
        later: Half | None = None
        for i in reversed(range(len(starts))):
            following = starts[i + 1] if i + 1 < len(starts) else None
            later = self.piece(starts[i], pieces[i], following, later)
        assert later is not None
        return later

    def pieces(self, starts: Sequence[fx.Node]) -> list[list[fx.Node]]:
        """The nodes between consecutive bases; a base ends the piece that makes it.  What comes
        before the first is left out."""
        index = {starts[0]: 0}
        pieces: list[list[fx.Node]] = [[] for _ in starts]
        order = {node: i for i, node in enumerate(starts)}
        for node in self.path[1:] if self.path else []:
            known = fact(node)
            assert known is not None
            known_pieces = [index[o] for o in known.operands if o in index]
            if known_pieces:
                pieces[max(known_pieces)].append(node)
                index[node] = order.get(node, max(known_pieces))
        return pieces

    def piece(
        self, base: fx.Node, nodes: Sequence[fx.Node], following: fx.Node | None, later: Half | None
    ) -> Half:
        """Formula (1) between two bases."""
        basis = self.canonical.event(base)
        outputs = self.canonical.event(self.canonical.output) if self.canonical.vector else ()
        half = Half(basis, outputs)
        curvatures: dict[fx.Node, list[Curvature | Moved]] = {}
        needed: set[fx.Node] = set()
        for node in nodes:
            known = fact(node)
            assert known is not None
            if not is_curved(known.kind) or node not in self.adjoints:
                continue
            with self.emitter.at(node.meta.get(ORIGIN), "curvature"):
                curvatures[node] = self.forms.curvature(node, self.adjoints[node])
            for term in curvatures[node]:
                needed |= {term.i, term.j}
        if following is not None and later is not None and later.cores:
            needed.add(following)
        tangents = self._tangents(base, nodes, needed)
        for node, terms in curvatures.items():
            with self.emitter.at(node.meta.get(ORIGIN), "curvature"):
                for term in terms:
                    self._close(half, base, node, term, tangents)
        if following is not None and later is not None:
            with self.emitter.at(following.meta.get(ORIGIN), "curvature"):
                self._carry(half, base, following, later, tangents)
        return half

    def _tangents(
        self, base: fx.Node, nodes: Sequence[fx.Node], wanted: set[fx.Node]
    ) -> dict[fx.Node, Structured]:
        """Tangents of the wanted values along the base, and of what they are made of."""
        needed = set(wanted)
        for node in reversed(nodes):
            if node in needed:
                known = fact(node)
                assert known is not None
                needed.update(o for o in known.operands if is_active(o))
        tangents = {base: self.algebra.identity(self.canonical.event(base))}
        for node in nodes:
            if node not in needed:
                continue
            known = fact(node)
            assert known is not None and not isinstance(known.kind, Zero)
            self._check_summed(node)
            with self.emitter.at(node.meta.get(ORIGIN), "tangent"):
                parts = [tangents.get(o) for o in known.operands]
                tangents[node] = self.forms.push(node, parts)
        return tangents

    def _check_summed(self, node: fx.Node) -> None:
        shape = node.meta[VAL].shape[: self.nb]
        full = self.canonical.x.meta[VAL].shape[: self.nb]
        if shape != full:
            raise SampleMixingError(
                "samples of the batch see each other: a sum over the batch is used nonlinearly",
                where=node.meta.get(ORIGIN),
                hint="return the plain sum over the batch, or a value for each sample",
            )

    def _close(
        self,
        half: Half,
        base: fx.Node,
        node: fx.Node,
        term: Curvature | Moved,
        tangents: Mapping[fx.Node, Structured],
    ) -> None:
        """``J_i^T C J_j``, added to the half."""
        left, right = tangents[term.i], tangents[term.j]
        if isinstance(term, Moved):
            moved = term.apply(right)
            m = len(half.outputs)
            event: list[Label] = [("e", k) for k in range(len(moved.event))]
            outputs: list[Label] = [("m", k) for k in range(m)]
            basis: list[Label] = [("u", k) for k in range(len(half.basis))]
            batch = self.forms.batch()
            factor: Factor = (moved.core, [*outputs, *basis, *batch, *event])
            pattern = self._sandwich(
                half, [factor], outputs, event, left, basis, None, term.weight
            )
        else:
            pattern = self._sandwich(
                half, term.factors, term.outputs, term.left, left, term.right, right, term.weight
            )
        self.terms.append(Term(node, base, "close", pattern))

    def _carry(
        self,
        half: Half,
        base: fx.Node,
        following: fx.Node,
        later: Half,
        tangents: Mapping[fx.Node, Structured],
    ) -> None:
        """``J_z^T A_z J_z``: the later half, carried to this base."""
        m, n = len(half.outputs), len(later.basis)
        for pattern, core in later.cores.items():
            names: list[Label] = [("c", name) for name in pattern]
            distinct = list(dict.fromkeys(names))
            factor: Factor = (core, [*self.forms.batch(), *distinct])
            tangent = tangents[following]
            done = self._sandwich(
                half, [factor], names[:m], names[m : m + n], tangent,
                names[m + n :], tangent, 1.0,
            )
            self.terms.append(Term(following, base, "rebase", done))

    def _sandwich(
        self,
        half: Half,
        factors: Sequence[Factor],
        outputs: Sequence[Label],
        left_labels: Sequence[Label],
        left: Structured,
        right_labels: Sequence[Label],
        right: Structured | None,
        weight: float,
    ) -> tuple[int, ...]:
        """Contract a second form with tangents on both sides and add it to the half.  Without
        ``right``, the labels on the right are those of the basis already."""
        left = self._simple(left, left_labels)
        batch = self.forms.batch()
        rows: list[Label] = [("t", k) for k in range(len(half.basis))]
        columns: list[Label] = [("u", k) for k in range(len(half.basis))]
        everything: list[Factor] = [*factors, (weight, ())]
        everything.append((left.core, left.labels(rows, batch, left_labels)))
        t = left.basis_labels(rows, left_labels)
        if right is None:
            u = list(right_labels)
        else:
            right = self._simple(right, right_labels)
            everything.append((right.core, right.labels(columns, batch, right_labels)))
            u = right.basis_labels(columns, right_labels)
        names = [*outputs, *t, *u]
        distinct = list(dict.fromkeys(names))
        sizes = dict(zip(left_labels, left.event, strict=True))
        if right is not None:
            sizes.update(zip(right_labels, right.event, strict=True))
        universe = {a: n for a, n in sizes.items() if a not in distinct}
        core = contract(
            self.emitter, everything, [*batch, *distinct], universe, self._batch_of
        )
        pattern = tuple(distinct.index(a) for a in names)
        known = half.cores.get(pattern)
        half.cores[pattern] = core if known is None else known + core  # type: ignore[operator]
        return pattern

    def _simple(self, s: Structured, labels: Sequence[Label]) -> Structured:
        repeated = [e for e, a in enumerate(labels) if list(labels).count(a) > 1]
        return self.algebra.untie(s, repeated) if repeated else s

    # --- results ----------------------------------------------------------------------------------

    def finish(self, half: Half) -> Var:
        """``H = A + A^T`` as ``[*batch, *outputs, *basis, *basis]``."""
        n, m = len(half.basis), len(half.outputs)
        if not half.cores:
            sizes = [*map(self.batch_size, range(self.nb)), *half.outputs, *half.basis * 2]
            return self.emitter.call(torch.Tensor.new_zeros, self.x, tuple(sizes))
        diagonal: list[Var] = []
        total: Var | None = None
        for pattern, core in half.cores.items():
            if self._is_diagonal(pattern, m, n):
                diagonal.append(self._dense(half, pattern, core) * 2.0)
            else:
                dense = self._dense(half, pattern, core)
                total = dense if total is None else total + dense
        result: Var | None = None
        if total is not None:
            a = total.ndim - 2 * n
            order = [*range(a), *range(a + n, a + 2 * n), *range(a, a + n)]
            result = total + torch.permute(total, order)
        for dense in diagonal:
            result = dense if result is None else result + dense
        assert result is not None
        return self._broadcast(result, (*half.outputs, *half.basis, *half.basis))

    def _is_diagonal(self, pattern: Sequence[int], m: int, n: int) -> bool:
        """Whether rows and columns are tied to each other on every axis: symmetric as it is."""
        return list(pattern[m : m + n]) == list(pattern[m + n :])

    def _dense(self, half: Half, pattern: Sequence[int], core: Var | float) -> Var:
        """The core with an axis of its own for every axis of the result."""
        sizes = (*half.outputs, *half.basis, *half.basis)
        batch = self.forms.batch()
        distinct = max(pattern, default=-1) + 1
        factors: list[Factor] = [(core, [*batch, *(("c", i) for i in range(distinct))])]
        output: list[Label] = []
        for axis, name in enumerate(pattern):
            if name in pattern[:axis] and sizes[axis] != 1:
                factors.append((self.algebra.eye(sizes[axis]), [("c", name), ("d", axis)]))
                output.append(("d", axis))
            elif name in pattern[:axis]:
                output.append(("d", axis))
            else:
                output.append(("c", name))
        out = contract(self.emitter, factors, [*batch, *output], None, self._batch_of)
        if isinstance(out, Var):
            return out
        return self.algebra.full([1] * (self.nb + len(output)), out)

    def _broadcast(self, var: Var, sizes: Sequence[int]) -> Var:
        """The result at its full size, in memory of its own."""
        shape = var.val.shape
        full = self.canonical.x.meta[VAL].shape[: self.nb]
        want: list[Any] = []
        for i in range(var.ndim):
            n = full[i] if i < self.nb else sizes[i - self.nb]
            grow = shape[i] != n
            want.append((self.batch_size(i) if i < self.nb else int(n)) if grow else -1)
        if all(isinstance(n, int) and n == -1 for n in want):
            return var
        return torch.clone(var.expand(want), memory_format=torch.contiguous_format)  # type: ignore[return-value]

    def _value(self) -> Var:
        """The model's own output: ``[*batch]``, ``[*batch, m]`` or a scalar."""
        out: Var = self.values[self.canonical.output]
        with self.emitter.at(None, "result"):
            if self.canonical.summed:
                return torch.reshape(out, ())  # type: ignore[return-value]
            event = self.canonical.event(self.canonical.output)
            out = self._broadcast(out, event)
            return out if self.canonical.vector or not event else torch.squeeze(out, -1)  # type: ignore[return-value]

    def _gradient(self) -> Var:
        """``[*batch, *outputs, *event]``."""
        x = self.canonical.x
        event = self.canonical.event(x)
        outputs = self.canonical.event(self.canonical.output) if self.canonical.vector else ()
        with self.emitter.at(None, "result"):
            if x not in self.adjoints:
                sizes = [*map(self.batch_size, range(self.nb)), *outputs, *event]
                return self.emitter.call(torch.Tensor.new_zeros, self.x, tuple(sizes))
            g = self.adjoints[x]
            g = self.algebra.untie(g, range(len(event)))
            core = self.algebra.tensor(g)
            if outputs:
                core = torch.movedim(core, 0, self.nb)  # type: ignore[assignment]
            return self._broadcast(core, (*outputs, *event))


class Sketch:
    """Pieces of the derivative written on scratch paper, for the planner to cost."""

    def __init__(self, canonical: Canonical) -> None:
        self.canonical = canonical
        self._draft = _Differentiation(canonical)
        self._draft.prepare(("hessian",))

    def piece(
        self, base: fx.Node, following: fx.Node | None, later: Half | None
    ) -> tuple[Half, list[fx.Node]]:
        """The half Hessian at ``base`` of everything up to ``following`` (whose half is
        ``later``), and the operations written for it."""
        starts = [base, *([following] if following is not None else [])]
        nodes = self._draft.pieces(starts)[0]
        written = _Written(self._draft.emitter)
        half = self._draft.piece(base, nodes, following, later)
        return half, written.nodes()

    def finish(self, half: Half) -> list[fx.Node]:
        """The operations that make the result of a half."""
        written = _Written(self._draft.emitter)
        self._draft.finish(half)
        return written.nodes()


class _Written:
    """What is appended to a graph from now on."""

    def __init__(self, emitter: Emitter) -> None:
        self.graph = emitter.graph
        self.last = next(iter(reversed(self.graph.nodes)), None)

    def nodes(self) -> list[fx.Node]:
        found = []
        for node in reversed(self.graph.nodes):
            if node is self.last:
                break
            found.append(node)
        return found[::-1]
