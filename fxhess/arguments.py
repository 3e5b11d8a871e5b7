"""A call's arguments as a program takes them: one differentiated tensor x, and constants.

Each tensor among (possibly nested) arguments is *differentiated*, a *batched* constant, one for
each sample, or a *shared* one; other values are a part of the program.  All of that is a
:class:`~fxhess.form.Form`, plain data by which programs are found.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fxhess import trees
from fxhess.errors import InputError
from fxhess.form import Call, Form
from fxhess.outputs import Given
from fxhess.packing import Packing
from fxhess.trees import TENSOR, Flat, Path
from fxhess.wrt import Names, Parameters, Wrt, parameters_of, parse_wrt

REDUCTIONS = ("sum", "mean")
AUTO = "auto"  # nothing is said of a tensor's batch axis


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
        self.names.check(wrt)
        only = all(isinstance(c, Parameters) for c in wrt.choices)
        if reduce is not None and not only:
            raise InputError(
                f"reduce={reduce!r} sums over samples, each of which has its own {_named(wrt)}",
                hint="reduce goes with wrt=fxhess.parameters(..), which all samples share",
            )
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
        by_name = dict(zip([self.names.at(i) for i in range(len(args))], positional, strict=True))
        by_name.update(zip(kwargs, named, strict=True))
        chosen, parameters, result = self._chosen(model, flat, by_name)
        axes = self._axes(flat, len(args), by_name)
        return self._put(flat, spec, chosen, parameters, result, axes)

    # --- what is differentiated -----------------------------------------------------------------

    def _chosen(
        self, model: nn.Module, flat: Flat, by_name: dict[str, Any]
    ) -> tuple[list[int], dict[tuple[str, ...], torch.Tensor], Any]:
        """Positions of differentiated tensors among the leaves, parameters, and the structure of
        both as ``wrt`` has it."""
        chosen: list[int] = []
        found: dict[tuple[str, ...], torch.Tensor] = {}
        specs = []
        for choice in self.wrt.choices:
            if isinstance(choice, Parameters):
                named = parameters_of(model, choice)
                for name, tensor in named.items():
                    tied = [
                        n
                        for n, t in model.named_parameters(remove_duplicate=False)
                        if t is tensor and n != name
                    ]
                    found[(name, *tied)] = tensor
                one = choice.names == tuple(named) and len(named) == 1
                specs.append(TENSOR if one else (dict, tuple(named), (TENSOR,) * len(named)))
                continue
            path = self.names.path(choice)
            spec = trees.at(by_name[path[0]], path[1:]) if path[0] in by_name else None
            own = [i for i, p in enumerate(flat.paths) if p[: len(path)] == path]
            where = ".".join(path)
            if spec is None:
                raise InputError(
                    f"wrt names {where!r}, which this call does not have",
                    hint="it has " + (", ".join(".".join(p) for p in flat.paths) or "no tensors"),
                )
            if not own:
                kind = (spec[1] if spec[0] == trees.STATIC else spec[0]).__name__
                raise InputError(f"{where!r} must be a tensor or hold some, and is a {kind}")
            for i in own:
                _check_differentiable(flat.tensors[i], ".".join(flat.paths[i]))
            if set(own) & set(chosen):
                raise InputError(f"wrt names {where!r} twice")
            chosen += own
            specs.append(trees.only_tensors(spec))
        if len({names[0] for names in found}) < len(found):
            raise InputError("wrt names a parameter twice")
        return chosen, found, _grafted(self.wrt.spec, iter(specs))

    # --- batch axes -----------------------------------------------------------------------------

    def _axes(self, flat: Flat, positions: int, by_name: dict[str, Any]) -> list[Any]:
        """What ``in_dims`` says of each tensor: an axis, None, or ``AUTO``."""
        axes: list[Any] = [AUTO] * len(flat.tensors)
        if self.in_dims is None:
            return axes

        def spread(given: Any, path: Path) -> None:
            if given is None or (isinstance(given, int) and not isinstance(given, bool)):
                for i, p in enumerate(flat.paths):
                    if p[: len(path)] == path:
                        axes[i] = given
            elif isinstance(given, Mapping):
                for key, value in given.items():
                    spread(value, (*path, str(key)))
            elif isinstance(given, (tuple, list)):
                for key, value in enumerate(given):
                    spread(value, (*path, str(key)))
            else:
                raise InputError(
                    f"cannot read in_dims={self.in_dims!r}",
                    hint="an axis or None for each argument, in a tuple or a dictionary by name",
                )

        given = self.in_dims
        if isinstance(given, (tuple, list)):
            if len(given) > positions:
                raise InputError(
                    f"in_dims has {len(given)} entries, the call {positions} arguments"
                )
            given = {self.names.at(i): value for i, value in enumerate(given)}
        if isinstance(given, Mapping):
            for key, value in given.items():
                path = self.names.path((str(key),))
                if path[0] not in by_name:
                    raise InputError(f"in_dims names argument {key!r}, which this call lacks")
                spread(value, path)
        else:
            spread(given, ())
        return axes

    def _put(
        self,
        flat: Flat,
        spec: Any,
        chosen: list[int],
        parameters: dict[tuple[str, ...], torch.Tensor],
        result: Any,
        said: list[Any],
    ) -> Call:
        """Split the leaves into x and constants."""
        axes, guessed, batch = self._batched(flat, chosen, said)
        nb = len(batch)
        parts = [(_leading(flat.tensors[i], axes[i]), axes[i]) for i in chosen]
        parts += [(tensor, None) for tensor in parameters.values()]
        others = [i for i in range(len(axes)) if i not in chosen]
        given = [_leading(flat.tensors[i], axes[i]) for i in others]
        leaves = [
            chosen.index(i) if i in chosen else -1 - others.index(i) for i in range(len(axes))
        ]
        described = [
            Given(
                "_".join(flat.paths[i]), (), axes[i] is not None,
                tuple(tensor.shape[nb if axes[i] is not None else 0 :]), tensor.dtype, True,
            )
            for i, tensor in zip(others, given, strict=True)
        ]  # fmt: skip
        _check_alike([tensor for tensor, _ in parts])
        packing = Packing(tuple(tuple(t.shape[nb if a is not None else 0 :]) for t, a in parts))
        form = Form(
            spec,
            tuple(flat.statics),
            tuple(leaves),
            tuple(axis for _, axis in parts),
            tuple(axes[i] for i in others),
            tuple((names, len(chosen) + k) for k, names in enumerate(parameters)),
            packing,
            result,
            nb,
            self.reduce,
            tuple(others.index(i) for i in guessed),
        )
        x = packing.pack([t if a is not None else t.expand(*batch, *t.shape) for t, a in parts])
        return self._corrected(Call(form, x, given, tuple(described)))

    def _batched(
        self, flat: Flat, chosen: list[int], said: list[Any]
    ) -> tuple[list[int | None], list[int], torch.Size]:
        """The batch axis of each tensor (None: shared), which of them were guessed from shapes, and
        the batch sizes."""
        axes: list[int | None] = [None] * len(said)
        guessed: list[int] = []
        if self.reduce is not None:
            return axes, guessed, torch.Size()
        leader = next((i for i in chosen if said[i] is not None), None)
        nb = 1  # where all samples share what is differentiated
        if leader is not None:
            nb = flat.tensors[leader].ndim - self.event_ndim
            if nb < 0:
                raise InputError(
                    f"{_name(flat, leader)} has {flat.tensors[leader].ndim} axes, a sample"
                    f" {self.event_ndim}",
                    hint="event_ndim= counts the axes of one sample of what is differentiated",
                )
        batch: torch.Size | None = None
        for i in sorted(range(len(said)), key=lambda i: (i != leader, i)):
            tensor, axis = flat.tensors[i], said[i]
            if axis == AUTO and i not in chosen:
                lead = tensor.shape[:nb]
                if not nb or tensor.ndim < nb or (batch is not None and lead != batch):
                    continue
                guessed.append(i)
            if axis is None or not nb:
                continue
            axis = axes[i] = _checked_axis(0 if axis == AUTO else axis, tensor, nb, _name(flat, i))
            lead = _leading(tensor, axis).shape[:nb]
            if batch is not None and lead != batch:
                raise InputError(
                    f"arguments disagree on the batch: {_name(flat, i)} has {list(lead)}, others"
                    f" have {list(batch)}",
                    hint="in_dims= says which have a batch axis, and where",
                )
            batch = lead
        return axes, guessed, batch if batch is not None else torch.Size()

    # --- guesses that turned out wrong ----------------------------------------------------------

    def _corrected(self, call: Call) -> Call:
        """The call in the form that calls like it turned out to have."""
        form = self.instead.get(call.form)
        return call if form is None else _in_form(call, form)

    def without_guesses(self, call: Call) -> Call:
        """The same call with constants shared that were taken for batched by their shape alone."""
        shared = tuple(
            None if j in call.form.guessed else axis for j, axis in enumerate(call.form.constants)
        )
        return _in_form(call, replace(call.form, constants=shared, guessed=()))

    def learn(self, guess: Call, right: Call) -> None:
        """Remember that calls like ``guess`` are like ``right``."""
        self.instead[guess.form] = right.form


def _in_form(call: Call, form: Form) -> Call:
    described = tuple(
        g if axis is not None or not g.batched
        else replace(g, batched=False, event=tuple(tensor.shape))
        for g, axis, tensor in zip(call.described, form.constants, call.constants, strict=False)
    )  # fmt: skip
    return Call(form, call.x, call.given, (*described, *call.described[len(described) :]))


def _leading(tensor: torch.Tensor, axis: int | None) -> torch.Tensor:
    return tensor.movedim(axis, 0) if axis else tensor


def _checked_axis(axis: int, tensor: torch.Tensor, nb: int, name: str) -> int:
    if axis != 0 and nb != 1:
        raise InputError(
            f"in_dims gives axis {axis} for {name}, but there are {nb} batch axes",
            hint="other axes than the leading ones can be the batch where there is one of it:"
            " event_ndim= counts the axes of a sample",
        )
    if not -tensor.ndim <= axis < tensor.ndim or tensor.ndim < nb:
        raise InputError(f"in_dims gives axis {axis} for {name}, which has {tensor.ndim} axes")
    return axis % tensor.ndim


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


def _name(flat: Flat, i: int) -> str:
    return f"argument '{'.'.join(flat.paths[i])}'"


def _named(wrt: Wrt) -> str:
    return ", ".join(repr(".".join(c)) for c in wrt.choices if not isinstance(c, Parameters))
