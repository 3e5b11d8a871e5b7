"""A call's arguments as a program takes them: one differentiated tensor x, and constants.

Each tensor among (possibly nested) arguments is *differentiated*, a *batched* constant, one for
each sample, or a *shared* one; other values are a part of the program.  All of that is a
:class:`~fxhess.form.Form`, plain data by which programs are found.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations
from typing import Any

import torch
from torch import nn

from fxhess import trees
from fxhess.errors import InputError
from fxhess.form import Call, Form
from fxhess.in_dims import batch_axes, leading, told
from fxhess.outputs import Given
from fxhess.packing import Packing
from fxhess.trees import TENSOR, Flat, Path
from fxhess.wrt import Names, Parameters, Wrt, meant, parameters_of, parse_wrt

REDUCTIONS = ("sum", "mean")
_MAX_READINGS = 256
_MAX_GUESSES = 5  # of which all combinations are tried


@dataclass(frozen=True)
class _Parameter:
    """A parameter to differentiate by: its place among the choices of ``wrt``, all its names."""

    place: int
    names: tuple[str, ...]
    tensor: torch.Tensor


@dataclass(frozen=True)
class _Reading:
    """What calls with tensors of some shapes are: their form, constants as ``described``, and which
    leaves are ``chosen`` to be differentiated (from -1 down: parameters) and which are not."""

    form: Form
    described: tuple[Given, ...]
    chosen: tuple[int, ...]
    others: tuple[int, ...]
    batch: torch.Size

    def call(self, leaves: Sequence[torch.Tensor], parameters: Sequence[torch.Tensor]) -> Call:
        """The call with these tensors."""
        form = self.form
        parts = [
            parameters[-1 - i].expand(*self.batch, *parameters[-1 - i].shape) if i < 0
            else leaves[i].expand(*self.batch, *leaves[i].shape) if axis is None
            else leading(leaves[i], axis)
            for i, axis in zip(self.chosen, form.parts, strict=True)
        ]  # fmt: skip
        given = [
            leading(leaves[i], axis) for i, axis in zip(self.others, form.constants, strict=True)
        ]
        return Call(form, form.packing.pack(parts), given, self.described)


class Arguments:
    """Reads calls of one model: which arguments are differentiated, which are constants."""

    def __init__(
        self, model: nn.Module, given: Any, in_dims: Any, event_ndim: int, reduce: str | None
    ) -> None:
        wrt = parse_wrt(given)
        self.given = given
        self.wrt = wrt
        self.in_dims = in_dims
        self.event_ndim = event_ndim
        self.reduce = reduce
        self.names = Names(model)
        self.names.check(model, wrt)
        only = all(isinstance(c, Parameters) for c in wrt.choices)
        if reduce is not None and not only:
            raise InputError(
                f"reduce={reduce!r} sums over samples, each of which has its own"
                f" {self._named(wrt)}",
                hint="reduce goes with wrt=fxhess.parameters(..), which all samples share",
            )
        self._readings: dict[Any, _Reading] = {}
        self.instead: dict[Form, Form] = {}  # of calls that were guessed wrong, the right form

    @property
    def plain(self) -> bool:
        """Whether a call with one tensor alone is that tensor."""
        return self.wrt.first_argument and self.in_dims is None and self.reduce is None

    def with_first(
        self, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """All arguments of a call whose first one went by the name of x: the model's first, unless
        that is given by its own name."""
        if kwargs and not args and self.names.at(0) in kwargs:
            return args, {**kwargs, "x": x}
        return (x, *args), kwargs

    def __str__(self) -> str:
        """What differs from a module of one tensor, as keyword arguments."""
        shown = {"in_dims": self.in_dims, "reduce": self.reduce}
        if not self.wrt.first_argument:
            shown = {"wrt": self.given, **shown}
        return "".join(f", {name}={v!r}" for name, v in shown.items() if v is not None)

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Read a call.

        Raises:
            InputError: what ``wrt`` names is missing or not floating, batches disagree, or
                something is no tensor, container of such or plain value.
        """
        flat = Flat()
        positional = tuple(flat.add(a, (self.names.at(i),)) for i, a in enumerate(args))
        named = tuple(flat.add(a, (name,)) for name, a in kwargs.items())
        spec = (
            tuple, (0, 1),
            ((tuple, tuple(range(len(args))), positional), (dict, tuple(kwargs), named)),
        )  # fmt: skip
        parameters = self._parameters(model)
        key: Any = (
            spec,
            tuple([(t.shape, t.dtype, t.device) for t in flat.tensors]),
            tuple([(p.names, p.tensor.shape, p.tensor.dtype) for p in parameters]),
        )
        known = not torch.compiler.is_compiling()
        reading = self._readings.get(key) if known else None
        if reading is None:
            by_name = dict(zip(map(self.names.at, range(len(args))), positional, strict=True))
            by_name.update(zip(kwargs, named, strict=True))
            chosen, result = self._chosen(model, flat, by_name, parameters)
            said = told(self.in_dims, flat, self.names, by_name)
            reading = self._corrected(self._put(flat, spec, chosen, parameters, result, said))
            if known:
                if len(self._readings) >= _MAX_READINGS:
                    self._readings.clear()
                self._readings[key] = reading
        return reading.call(flat.tensors, [p.tensor for p in parameters])

    def _named(self, wrt: Wrt) -> str:
        paths = [self.names.path(c) for c in wrt.choices if not isinstance(c, Parameters)]
        return ", ".join(repr(".".join(path)) for path in paths)

    # --- what is differentiated -----------------------------------------------------------------

    def _parameters(self, model: nn.Module) -> list[_Parameter]:
        """The parameters that are differentiated, in order, and where they stand in ``wrt``."""
        found: list[_Parameter] = []
        for place, choice in enumerate(self.wrt.choices):
            if isinstance(choice, Parameters):
                for name, tensor in parameters_of(model, choice).items():
                    every = model.named_parameters(remove_duplicate=False)
                    tied = (n for n, t in every if t is tensor and n != name)
                    found.append(_Parameter(place, (name, *tied), tensor))
        if len({id(p.tensor) for p in found}) < len(found):
            raise InputError("wrt names a parameter twice, possibly by two names that it has")
        return found

    def _chosen(
        self,
        model: nn.Module,
        flat: Flat,
        by_name: dict[str, Any],
        parameters: Sequence[_Parameter],
    ) -> tuple[list[int], Any]:
        """What is differentiated, in order: positions among the leaves, and (from -1 down) among
        the parameters; and the structure of it all as ``wrt`` has it."""
        chosen: list[int] = []
        specs: list[Any] = []
        for place, choice in enumerate(self.wrt.choices):
            if isinstance(choice, Parameters):
                own = [-1 - k for k, p in enumerate(parameters) if p.place == place]
                names = tuple(p.names[0] for p in parameters if p.place == place)
                specs.append(TENSOR if choice.names == names and len(own) == 1
                             else (dict, names, (TENSOR,) * len(own)))  # fmt: skip
            else:
                own, spec = self._leaves_at(model, flat, by_name, choice)
                specs.append(spec)
            if set(own) & set(chosen):
                raise InputError(f"wrt names {'.'.join(self.names.path(choice))!r} twice")  # type: ignore[arg-type]
            chosen += own
        return chosen, _grafted(self.wrt.spec, iter(specs))

    def _leaves_at(
        self, model: nn.Module, flat: Flat, by_name: dict[str, Any], choice: Path
    ) -> tuple[list[int], Any]:
        """The tensors that a choice of ``wrt`` names, and their structure."""
        path = self.names.path(choice)
        where = ".".join(path)
        spec = trees.at(by_name[path[0]], path[1:]) if path[0] in by_name else None
        if spec is None:
            raise InputError(
                f"{where!r} is to be differentiated by (wrt), and this call does not have it",
                hint=f"{meant(model, choice)}it has "
                + (", ".join(".".join(p) for p in flat.paths) or "no tensors"),
            )
        own = [i for i, p in enumerate(flat.paths) if p[: len(path)] == path]
        if not own:
            kind = (spec[1] if spec[0] == trees.STATIC else spec[0]).__name__
            raise InputError(f"{where!r} must be a tensor or hold some, and is a {kind}")
        for i in own:
            _check_differentiable(flat.tensors[i], ".".join(flat.paths[i]))
        return own, trees.only_tensors(spec)

    # --- all together ---------------------------------------------------------------------------

    def _put(
        self,
        flat: Flat,
        spec: Any,
        chosen: list[int],
        parameters: Sequence[_Parameter],
        result: Any,
        said: list[Any],
    ) -> _Reading:
        """Split the leaves into x and constants."""
        if self.reduce is None:
            axes, guessed, batch = batch_axes(flat, chosen, said, self.event_ndim)
        else:
            axes, guessed, batch = [None] * len(said), [], torch.Size()
        nb = len(batch)
        every = [*flat.tensors, *(p.tensor for p in reversed(parameters))]  # as `chosen` counts
        parts = [every[i] for i in chosen]
        _check_alike(parts)
        places = [axes[i] if i >= 0 else None for i in chosen]
        others = [i for i in range(len(axes)) if i not in chosen]
        form = Form(
            spec,
            tuple(flat.statics),
            tuple(
                chosen.index(i) if i in chosen else -1 - others.index(i) for i in range(len(axes))
            ),
            tuple(places),
            tuple(axes[i] for i in others),
            tuple((p.names, chosen.index(-1 - k)) for k, p in enumerate(parameters)),
            Packing.of([_event(t, axis, nb) for t, axis in zip(parts, places, strict=True)]),
            result,
            nb,
            self.reduce,
            tuple(others.index(i) for i in guessed),
        )
        described = [
            Given(
                "_".join(flat.paths[i]), (), axes[i] is not None,
                _event(flat.tensors[i], axes[i], nb), flat.tensors[i].dtype, True,
            )
            for i in others
        ]  # fmt: skip
        return _Reading(form, tuple(described), tuple(chosen), tuple(others), batch)

    # --- guesses that turned out wrong ----------------------------------------------------------

    def _corrected(self, reading: _Reading) -> _Reading:
        """The reading in the form that calls like it turned out to have."""
        form = self.instead.get(reading.form)
        if form is None:
            return reading
        return replace(
            reading, form=form, described=_described(reading.described, form, reading.batch)
        )

    def other_readings(self, call: Call) -> Iterator[Call]:
        """The same call with some of the constants shared that were taken for batched by their
        shape alone: each of them, each two, .., at last all.  Fewest first: where one is shared
        that is not, the program would be for this one batch size."""
        guessed = call.form.guessed
        batch = call.x.shape[: call.form.batch_ndim]
        sizes = range(1, len(guessed) + 1) if len(guessed) <= _MAX_GUESSES else (1, len(guessed))
        for wrong in chain.from_iterable(combinations(guessed, n) for n in sizes):
            shared = tuple(
                None if j in wrong else axis for j, axis in enumerate(call.form.constants)
            )
            form = replace(call.form, constants=shared, guessed=())
            yield Call(form, call.x, call.given, _described(call.described, form, batch))

    def corrected(self, call: Call) -> Call:
        """The call in the form that calls like it turned out to have."""
        form = self.instead.get(call.form)
        if form is None:
            return call
        batch = call.x.shape[: form.batch_ndim]
        return replace(call, form=form, described=_described(call.described, form, batch))

    def learn(self, guess: Call, right: Call) -> None:
        """Remember that calls like ``guess`` are like ``right``."""
        self.instead[guess.form] = right.form
        self._readings.clear()


def _described(given: Sequence[Given], form: Form, batch: torch.Size) -> tuple[Given, ...]:
    """The descriptions with the batch as the constant's own axes where the form has it so."""
    own = [
        replace(g, batched=False, event=(*batch, *g.event)) if g.batched and axis is None else g
        for g, axis in zip(given, form.constants, strict=False)
    ]
    return (*own, *given[len(own) :])


def _event(tensor: torch.Tensor, axis: int | None, nb: int) -> tuple[int, ...]:
    """The shape of one sample."""
    return tuple(tensor.shape) if axis is None else tuple(leading(tensor, axis).shape[nb:])


def _check_differentiable(tensor: torch.Tensor, name: str) -> None:
    if not tensor.is_floating_point():
        raise InputError(
            f"wrt names {name!r}, which is {tensor.dtype}; derivatives need real floating-point"
            " numbers",
            hint="name the floating-point parts alone: wrt='batch.pos'",
        )


def _check_alike(parts: Sequence[torch.Tensor]) -> None:
    kinds = {(t.dtype, t.device) for t in parts}
    if len(kinds) > 1:
        listed = ", ".join(f"{dtype} on {device}" for dtype, device in sorted(kinds, key=str))
        raise InputError(f"what is differentiated by differs in type or device: {listed}")


def _grafted(spec: Any, specs: Iterator[Any]) -> Any:
    """A structure with a structure in place of each leaf."""
    if spec == TENSOR:
        return next(specs)
    kind, keys, inner = spec
    return (kind, keys, tuple(_grafted(s, specs) for s in inner))
