"""One sample a lane: a program as one function in C++ that runs a few samples at once.

*Needs* a lowered graph whose stand-ins carry nominal batch sizes.  *Gives* source code in which
every value is an array of vectors with one sample in each lane, so that

- views are other ways to count (``permute``, ``unsqueeze`` or ``expand`` move nothing),
- pointwise operations are loops over vectors, fused into the loop that needs them,
- a product with a weight broadcasts the weight's entries, a product sample by sample needs no
  batched kernel: both keep their sums in registers,

and all that a few samples need stays in the caches nearest to the core.  What samples share
(weights) is computed once a call, before the loop over samples::

    v = x @ W; y = tanh(v)    ==>    for (k..) sum = fma(x[k], W[k][n], sum);  y[n] = tanh(sum)

What an operation means here is data (:mod:`fxhess.lane_operations`); a program with any other has
no such form (:class:`NoLanesError`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence, Set
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from fxhess.cost import flops, name_of
from fxhess.emit import VAL
from fxhess.lane_code import Code
from fxhess.lane_graph import constants, several, uses
from fxhess.lane_products import Products
from fxhess.lane_results import SYMMETRIC_ROWS, Results
from fxhess.lane_values import (
    NOMINAL,
    Axis,
    Index,
    Indices,
    NoLanesError,
    Strided,
    Value,
    broadcast,
    dense,
    in_memory,
    narrowed,
    number,
    plus,
    view,
    widened,
)

__all__ = ["Lanes", "Operation"]

_LONG = 4000  # lines
_SMALL = 300_000  # operations of a call that one thread does faster alone
_TYPES = {torch.int64: "int64_t", torch.int32: "int32_t", torch.bool: "bool"}
_KINDS = {torch.float32: "float", torch.float64: "double"}

Operation = Callable[..., Value]


class Lanes:
    """Writes a program; see the module's docstring.

    ``inputs``: tensors like those that it will take: x first, whose first axis is the batch, and
    last the ``written`` that it writes its results into.  Without these, it takes as many fresh
    tensors as it has ``results`` (their axes, the batch apart) after its inputs.  ``operations``:
    what each does, by name; those that are ``moving`` compute nothing, and take indices as well;
    ``writing``: how those do it that write a result piece by piece.  ``kept``: which inputs are
    often the same as at the last call; ``packs_kept``: whether matrices of these are packed.
    """

    def __init__(
        self,
        graph: fx.Graph,
        inputs: Sequence[torch.Tensor],
        written: int,
        operations: Mapping[str, Operation],
        moving: Container[str] = (),
        writing: Mapping[str, Callable[..., None]] = MappingProxyType({}),
        kept: Container[int] = (),
    ) -> None:
        self.dtype = inputs[0].dtype
        self.code = Code()
        self.constants: list[torch.Tensor] = []
        self.work = sum(map(flops, graph.nodes)) // NOMINAL
        self._operations = operations
        self._moving = moving
        self._writing = writing
        self._products = Products(self.code, {f"in{i}" for i in range(len(inputs)) if i in kept})
        self.results = Results(self.code, self._products)
        self._values: dict[fx.Node, Any] = {}
        self._inputs = len(inputs)
        placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        if len(placeholders) != len(inputs):
            raise NoLanesError("other inputs")
        self._targets = placeholders[len(placeholders) - written :] if written else []
        self._constant = constants(graph)
        self._uses = uses(graph)
        self._ending: frozenset[str] = frozenset()
        self._left = {node: len(node.users) for node in graph.nodes}
        for i, (node, tensor) in enumerate(zip(placeholders, inputs, strict=True)):
            if node not in self._targets:
                self._keep(node, self._given(f"in{i}", f"p[{i}]", tensor) if i else self._x(tensor))
        for node in graph.nodes:
            if node.op in ("call_function", "call_method"):
                self._write(node)
            elif node.op == "output" and not written:
                for value in several(node.args[0]):
                    number = self._inputs + len(self.results.sizes)
                    self.results.write(self._values[value], number)
            self._release(node)
            if len(self.code.block.lines) > _LONG:
                raise NoLanesError("too long for a compiler")

    # --- inputs ---------------------------------------------------------------------------------

    def _x(self, x: torch.Tensor) -> Value:
        if x.ndim == 0:
            raise NoLanesError("no batch")
        value = self.code.array((None, *map(int, x.shape[1:])), True)
        (name,) = value.arrays
        self.code.block.lines.append(
            f"load<U>((const T*)p[0], {value.count}, first, samples, {name});"
        )
        return value

    def _given(self, name: str, pointer: str, tensor: torch.Tensor) -> Value:
        """What all samples share."""
        kind = "T" if tensor.dtype == self.dtype else _TYPES.get(tensor.dtype)
        if kind is None:
            raise NoLanesError(f"a tensor of {tensor.dtype}")
        self.code.declare(f"const {kind}* const {name} = (const {kind}*){pointer};")
        steps = [s if n != 1 else 0 for n, s in zip(tensor.shape, tensor.stride(), strict=True)]
        strided = Strided(name, 0, tuple(steps))
        return in_memory(name, tuple(tensor.shape), strided, False, kind == "bool")

    def constant(self, tensor: torch.Tensor) -> Value:
        """A tensor that the program keeps."""
        if tensor.is_floating_point():
            tensor = tensor.to(self.dtype)
        i = len(self.constants)
        self.constants.append(tensor.contiguous())
        return self._given(f"constant{i}", f"k[{i}]", self.constants[i])

    # --- nodes ----------------------------------------------------------------------------------

    def _write(self, node: fx.Node) -> None:
        name = str(node.target) if node.op == "call_method" else name_of(node)
        if node in self._constant:
            made = self._constant[node]
            self._keep(node, self.constant(made) if isinstance(made, torch.Tensor) else made)
            return
        if name == "size":
            self._keep(node, NOMINAL)
            return
        if name == "copy_":
            target, source = node.args
            self.results.write(self._values[source], self._number_of(target))  # type: ignore[index]
            return
        stand_in = node.meta.get(VAL)
        known = self._values.__getitem__
        args: Any = fx.node.map_arg(node.args, known)
        kwargs: Any = fx.node.map_arg({k: v for k, v in node.kwargs.items() if k != "out"}, known)
        if not isinstance(stand_in, torch.Tensor):  # sizes
            self._keep(node, node.target(*args, **kwargs))  # type: ignore[operator]
            return
        computed = stand_in.dtype in (self.dtype, torch.bool) or name in self._moving
        if name not in self._operations or not computed:
            raise NoLanesError(f"{name}, {stand_in.dtype}")
        self._ending = self._arrays_ending_with(node)
        into = node.kwargs.get("out")
        if into is not None and not node.users and name in self._writing:
            self._writing[name](self, self._number_of(into), *args, **kwargs)
            return
        value = self._operations[name](self, *args, **kwargs)
        if not value.fits(stand_in):
            raise NoLanesError(f"{name}: other axes")
        if value.work and (self._uses[node] > 1 or (into and node.users)):
            value = self.stored(value, self._ending)
        self._keep(node, value)
        if into is not None:
            self.results.write(value, self._number_of(into))

    def _number_of(self, target: Any) -> int:
        if target not in self._targets:
            raise NoLanesError("writes into what is no result")
        return self._inputs - len(self._targets) + self._targets.index(target)

    def _keep(self, node: fx.Node, value: Any) -> None:
        self._values[node] = value
        if isinstance(value, Value):
            self.code.read(value.arrays)

    def _arrays_ending_with(self, node: fx.Node) -> frozenset[str]:
        """The arrays that only this node reads from now on."""
        last = [self._values.get(n) for n in node.all_input_nodes if self._left[n] == 1]
        read = Counter(name for v in last if isinstance(v, Value) for name in v.arrays)
        return frozenset(name for name, n in read.items() if self.code.readers(name) == n)

    def _release(self, node: fx.Node) -> None:
        """Give back the arrays that nothing after this node reads."""
        done = [node] if not node.users else []
        for operand in node.all_input_nodes:
            self._left[operand] -= 1
            if self._left[operand] == 0:
                done.append(operand)
        for n in done:
            value = self._values.get(n)
            if isinstance(value, Value):
                self.code.unread(value.arrays)
        self.code.give_back()

    # --- what operations are made of ------------------------------------------------------------

    def pointwise(self, text: str, *operands: Any) -> Value:
        """An expression of operands ``{0}``, ``{1}``.. that are broadcast against each other."""
        values = [o for o in operands if isinstance(o, Value)]
        axes = broadcast([v.axes for v in values])
        lanes = any(v.lanes for v in values)
        count = widened(values[0], axes).count

        def ready(o: Any) -> Any:
            """In memory, where it would be computed more than once for each entry."""
            again = isinstance(o, Value) and o.work and (o.count < count or o.lanes is not lanes)
            return self.stored(o) if again else o

        own = [ready(o) for o in operands]

        def entry(o: Any, index: Indices) -> str:
            found = o.at(narrowed(index, o.axes)) if isinstance(o, Value) else number(o)
            wide = isinstance(o, Value) and o.lanes
            return f"all({found})" if lanes and not wide else found

        def at(index: Indices) -> str:
            return text.format(*(entry(o, index) for o in own))

        read = frozenset[str]().union(*(o.arrays for o in own if isinstance(o, Value)))
        return Value(axes, at, lanes, None, True, read)

    def reduction(
        self, value: Value, dims: Sequence[int], keep: bool, start: str, text: str
    ) -> Value:
        """Along some axes, ``text`` of what was found so far, ``{0}``, and an entry, ``{1}``."""
        inner = [d % len(value.axes) for d in dims]
        if any(not isinstance(value.axes[d], int) for d in inner):
            raise NoLanesError("a sum over the batch")
        whole = [1 if d in inner else n for d, n in enumerate(value.axes)]
        result = self.code.array(whole, value.lanes)
        part = self.code.part(value.lanes)
        index = self.code.open(part, result.sizes)
        zero, kind = ("all((T)0)", "V") if value.lanes else ("(T)0", "T")
        part.lines.append(f"{part.each}{{ {kind} sum = {start.format(zero)};")
        names = {d: self.code.name("r") for d in inner}
        for d, name in names.items():
            part.lines.append(f"for (long {name} = 0; {name} < {value.axes[d]}; {name}++)")
        entry = value.at(tuple(names.get(d, i) for d, i in enumerate(index)))
        part.lines.append(f"sum = {text.format('sum', entry)};")
        part.lines.append(f"{result.at(index)} = sum; }}")
        self.code.close(part, result.sizes)
        kept = [d for d in range(len(whole)) if d not in inner or keep]
        return view(
            result, [whole[d] for d in kept],
            lambda i: [i[kept.index(d)] if d in kept else 0 for d in range(len(whole))],
        )  # fmt: skip

    def product(self, a: Value, b: Value) -> Value:
        """``torch.matmul`` of operands with at least two axes each."""
        return self._products.write(*self.factors(a, b))

    def factors(self, a: Value, b: Value) -> tuple[Value, Value]:
        """Both in memory, for a node that reads them once more."""
        ending = self._ending
        return self.in_memory(a, ending - b.arrays), self.in_memory(b, ending - a.arrays)

    def in_memory(self, value: Value, over: Set[str] = frozenset()) -> Value:
        """The value, stored where its entries do not lie in an array."""
        return value if value.strided is not None and not value.work else self.stored(value, over)

    def stored(self, value: Value, over: Set[str] = frozenset()) -> Value:
        """The value with its entries in memory: in one of the arrays ``over``, which nothing else
        reads any more, where each entry is made of the one in its place alone."""
        name = next((n for n in sorted(value.arrays & over) if self._by_place(value, n)), None)
        if name is None:
            result = self.code.array(value.axes, value.lanes)
        else:
            result = in_memory(name, value.axes, Strided(name, 0, dense(value.sizes)), True)
        self._fill(result, value)
        return result

    def _by_place(self, value: Value, name: str) -> bool:
        """Whether entry i of the array is read for entry i of the value alone."""
        index = tuple(f"i{d}" if n != 1 else 0 for d, n in enumerate(value.sizes))
        own = in_memory(name, value.axes, Strided(name, 0, dense(value.sizes)), True).at(index)
        text = value.at(index)
        return value.lanes and text.count(f"{name}[") == text.count(own) > 0

    def joined(self, values: Sequence[Value], dim: int) -> Value:
        """Values one behind the other along an axis."""
        others = broadcast([(*v.axes[:dim], 1, *v.axes[dim + 1 :]) for v in values])
        ends = [0]
        for value in values:
            n = value.axes[dim]
            if not isinstance(n, int):
                raise NoLanesError("batches joined")
            ends.append(ends[-1] + n)
        axes: tuple[Axis, ...] = (*others[:dim], ends[-1], *others[dim + 1 :])
        result = self.code.array(axes, any(v.lanes for v in values))
        for value, start in zip(values, ends, strict=False):
            own = (*others[:dim], value.axes[dim], *others[dim + 1 :])

            def way(index: Indices, start: int = start) -> Sequence[Index]:
                return [plus(i, start) if d == dim else i for d, i in enumerate(index)]

            self._fill(view(result, own, way), widened(value, own))
        return result

    def check(self, index: Value, n: int) -> None:
        """Have a call fail where an entry of the index is none of n."""
        part = self.code.shared
        entry = index.at(self.code.open(part, index.sizes))
        part.lines.append(f"if ({entry} < 0 || {entry} >= {n}) return OUTSIDE;")
        self.code.close(part, index.sizes)

    def filled(self, axes: Sequence[Axis], value: Any) -> Value:
        """The same number everywhere."""
        text = number(value)
        return Value(tuple(axes), lambda index: text, False, None, True)

    def _fill(self, result: Value, value: Value) -> None:
        part = self.code.part(result.lanes)
        index = self.code.open(part, result.sizes)
        entry = value.at(index) if value.lanes is result.lanes else f"all({value.at(index)})"
        part.lines.append(f"{part.each}{result.at(index)} = {entry};")
        self.code.close(part, result.sizes)

    # --- the whole ------------------------------------------------------------------------------

    @property
    def packs_kept(self) -> bool:
        return self._products.packs_kept

    def source(self, header: str) -> str:
        """The program in C++: ``run(pointers, constants, samples, threads, kept, known)``, with
        pointers to inputs and results, room for ``packed_bytes()`` that are kept from call to call
        (or none) and whether these are of the same inputs; gives 0, 1 where there is no room, 2
        where an index is out of range."""
        code = self.code
        arrays, room = code.places()
        shared, block = ("\n  ".join(part.lines) for part in (code.shared, code.block))
        places = "\n  ".join(arrays)
        return f"""typedef {_KINDS[self.dtype]} T;
constexpr long SYMMETRIC_ROWS = {SYMMETRIC_ROWS};
{header}
template <int U>
static void block(void* const* p, void* const* k, T* shared, T* packed, V* own, long first,
                  long samples) {{
  {places}
  {block}
}}

static int once(void* const* p, void* const* k, T* shared, T* packed, int threads, int known) {{
  {shared}
  return 0;
}}

static size_t packs() {{ return {code.panels}; }}

extern "C" long packed_bytes() {{ return packs() * sizeof(T); }}

extern "C" int run(void* const* p, void* const* k, long samples, int threads, void* kept,
                   int known) {{
  return in_blocks(p, k, samples, samples * {max(1, self.work)}.0 < {_SMALL} ? 1 : threads,
                   {code.shared_room}, (T*)kept, packs(), known, {room}, once, block<1>,
                   block<WIDTH>);
}}
"""
