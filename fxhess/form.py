"""The form of a call: how a model's arguments are made of one differentiated tensor x and
constants, and how derivatives by x are taken apart again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fxhess import trees
from fxhess.errors import InputError
from fxhess.outputs import Given
from fxhess.packing import Packing
from fxhess.trees import TENSOR


@dataclass(frozen=True)
class Form:
    """How the arguments of a call are put together again from x and constants.

    ``spec``: the structure of ``(args, kwargs)``, ``statics`` its values of Python; ``leaves``: for
    each tensor in it, the number of the part of x, or (negative, from -1 down) of the constant that
    it is; ``parts``, ``constants``: where each has its batch axes, None where it is shared;
    ``parameters``: names, and the part of x that stands for them; ``result``: the structure of
    what is differentiated by, with a leaf for each part.
    """

    spec: Any
    statics: tuple[Any, ...] = field(compare=False)
    leaves: tuple[int, ...]
    parts: tuple[int | None, ...]
    constants: tuple[int | None, ...]
    parameters: tuple[tuple[tuple[str, ...], int], ...]
    packing: Packing
    result: Any
    batch_ndim: int
    reduce: str | None = None
    guessed: tuple[int, ...] = ()  # constants that are batched since their shape says so

    @property
    def alone(self) -> bool:
        """Whether samples have to be captured one by one, since all share a part of x."""
        return self.batch_ndim > 0 and None in self.parts

    @property
    def plain(self) -> bool:
        """Whether derivatives are single tensors."""
        return self.result == TENSOR

    def arguments(
        self, x: torch.Tensor, constants: Sequence[torch.Tensor], alone: int = 0
    ) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, torch.Tensor]]:
        """Positional and named arguments, and parameters by name.  With ``alone``, x and batched
        constants are those of one sample, and get this many batch axes of size 1."""
        return self._put(self.packing.split(x), constants, alone)

    def whole(
        self, x: torch.Tensor, constants: Sequence[torch.Tensor]
    ) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, torch.Tensor]]:
        """As :meth:`arguments`, of a batch whose x holds what is shared once for each sample."""
        first = (0,) * self.batch_ndim
        parts = zip(self.packing.split(x), self.parts, strict=True)
        return self._put([p[first] if axis is None else p for p, axis in parts], constants, 0)

    def _put(
        self, parts: Sequence[torch.Tensor], constants: Sequence[torch.Tensor], alone: int
    ) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, torch.Tensor]]:
        own = [_placed(p, axis, alone) for p, axis in zip(parts, self.parts, strict=True)]
        others = [_placed(*pair, alone) for pair in zip(constants, self.constants, strict=True)]
        tensors = (own[k] if k >= 0 else others[-1 - k] for k in self.leaves)
        args, kwargs = trees.build(self.spec, tensors, iter(self.statics))
        return args, kwargs, {name: own[k] for names, k in self.parameters for name in names}

    def reduced(self, result: torch.Tensor) -> torch.Tensor:
        """The model's result, summed over the batch where that is wanted."""
        if self.reduce is None or result.ndim == 0:
            return result
        return result.sum(0) if self.reduce == "sum" else result.mean(0)

    # --- derivatives, as their user wants them --------------------------------------------------

    def unpacked(self, name: str, derivative: torch.Tensor) -> Any:
        """An output of a program, for each part of x."""
        if self.plain:
            return derivative
        match name:
            case "gradient" | "jacobian" | "diagonal" | "hvp":
                return self._mapped(lambda k: self.packing.part(derivative, k))
            case "hessian":
                return self._mapped(
                    lambda a: self._mapped(lambda b: self.packing.block(derivative, a, b))
                )
        return derivative

    def _mapped(self, function: Callable[[int], Any]) -> Any:
        return trees.map_leaves(function, self.result)

    def packed_vector(self, vector: Any, x: torch.Tensor) -> Any:
        """``vector``, given for each part, as one for x."""
        if self.plain or vector is None:
            return vector
        batch, shapes = x.shape[: self.batch_ndim], self.packing.shapes
        parts = [
            p.expand(*batch, *shape) if p.shape == shape else p
            for p, shape in zip(_leaves(self.result, vector, "vector"), shapes, strict=True)
        ]
        # Compared one by one: while PyTorch exports, sizes of the batch have no hash.
        leads = [tuple(p.shape[: p.ndim - len(s)]) for p, s in zip(parts, shapes, strict=True)]
        fits = all(p.shape[p.ndim - len(s) :] == s for p, s in zip(parts, shapes, strict=True))
        if not fits or any(lead != leads[0] for lead in leads):
            listed = ", ".join(str(list(p.shape)) for p in parts)
            raise InputError(
                f"vectors of the shapes {listed} do not fit inputs of {list(map(list, shapes))}",
                hint=f"each has the shape of its input, {list(batch)} in front, or all the same"
                " leading axis besides",
            )
        return self.packing.pack(parts)

    def packed_metric(self, metric: Any, x: torch.Tensor) -> Any:
        """``metric``, given for each pair of parts, as one for x."""
        if self.plain or metric is None:
            return metric
        batch, shapes = x.shape[: self.batch_ndim], self.packing.shapes
        rows = _leaves(self.result, metric, "metric", tensors=False)
        blocks = [_leaves(self.result, row, "metric") for row in rows]
        for a, row in zip(shapes, blocks, strict=True):
            for b, block in zip(shapes, row, strict=True):
                if block.shape not in ((*a, *b), (*batch, *a, *b)):
                    raise InputError(
                        f"a block of the metric is {list(block.shape)}; it has to be"
                        f" {[*a, *b]} for all samples or {[*batch, *a, *b]} for each"
                    )
        each = any(block.ndim > len(a) + len(b) for a, row in zip(shapes, blocks, strict=True)
                   for b, block in zip(shapes, row, strict=True))  # fmt: skip
        lead = batch if each else ()
        return self.packing.pack_matrix(
            lambda a, b: blocks[a][b].expand(*lead, *shapes[a], *shapes[b])
        )


def _leaves(spec: Any, value: Any, name: str, tensors: bool = True) -> list[Any]:
    """The leaves of a value that has the structure of what is differentiated by."""
    if spec == TENSOR:
        if tensors and not isinstance(value, torch.Tensor):
            raise InputError(f"{name} must be made of tensors, not {type(value).__name__}")
        return [value]
    _, keys, specs = spec
    items: list[Any] = []
    if isinstance(value, Mapping) and set(value) <= set(keys):
        items = [value[key] for key in keys if key in value]
    elif isinstance(value, (tuple, list)):
        items = list(value)
    elif dataclasses.is_dataclass(value):
        items = [getattr(value, str(key)) for key in keys if hasattr(value, str(key))]
    if len(items) != len(keys):
        listed = ", ".join(map(str, keys))
        raise InputError(
            f"{name} has to be given for each of the inputs: {listed}",
            hint="and for no others, in the structure that wrt has",
        )
    return [
        leaf
        for s, item in zip(specs, items, strict=True)
        for leaf in _leaves(s, item, name, tensors)
    ]


def _placed(tensor: torch.Tensor, axis: int | None, alone: int) -> torch.Tensor:
    """A tensor with its batch axis where the model has it."""
    if axis is None:
        return tensor
    if alone:
        tensor = tensor[(None,) * alone]
    return tensor if axis == 0 else tensor.movedim(0, axis)


PLAIN = Form(
    (tuple, (0, 1), ((tuple, (0,), (TENSOR,)), (dict, (), ()))),
    (), (0,), (0,), (), (), Packing(((),)), TENSOR, 0,
)  # fmt: skip


@dataclass
class Call:
    """One call: its form, x, and what is given besides (constants first), batch axes first."""

    form: Form
    x: torch.Tensor
    given: list[torch.Tensor] = field(default_factory=list)
    described: tuple[Given, ...] = ()

    @property
    def constants(self) -> list[torch.Tensor]:
        """What the model takes besides x."""
        return self.given[: len(self.form.constants)]

    def told(self) -> str:
        """Which constants are taken for what."""
        own = [g for g in self.described if g.constant]
        each = ", ".join(g.name for g in own if g.batched) or "none"
        every = ", ".join(g.name for g in own if not g.batched) or "none"
        return (
            f"constants given for each sample: {each}; for all of them: {every}"
            " (in_dims= says otherwise)"
        )

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """What the model takes."""
        return (self.x, *self.constants)
