"""The program of a model without capturing it, where an earlier process kept it.

A sketch of the model (a tenth of a capture's time) is looked up on disk; its entry names the
program and says which of the model's tensors it takes.  Only sketches that were the same before and
after a capture are kept, and only of models whose program holds for all batch sizes and values.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn

from fxhess._sketch import Sketch, sketch
from fxhess.binding import Binding, bind, rebind
from fxhess.cache import environment, lasting_key, own_rules, programs
from fxhess.capture import Captured, capture
from fxhess.form import Call
from fxhess.pipeline import Options, key_of
from fxhess.rates import rates_for
from fxhess.serial import NotPlainError
from fxhess.sources import Source


def bound(model: nn.Module, call: Call, options: Options) -> Binding:
    """The program for calls like this, found on disk or made."""
    x, nb = call.x, call.x.ndim - options.event_ndim
    constants = [g for g in call.described if g.constant]

    def seen() -> Sketch | None:
        return sketch(model, x, nb, call.form, call.constants, constants)

    before = seen() if _usable() else None
    if before is not None:
        binding = _recalled(model, x, options, before)
        if binding is not None:
            return binding
    captured = capture(model, x, nb, 0, call.form, call.constants, constants)
    binding = bind(model, captured, x, options)
    if before is not None and seen() == before:
        _remember(captured, x, options, before)
    return binding


def _usable() -> bool:
    try:
        return programs.disk.usable and not own_rules() and bool(environment())
    except NotPlainError:
        return False


def _name(x: torch.Tensor, options: Options, seen: Sketch) -> str:
    facts = (
        environment(), seen.digest, tuple(x.shape[x.ndim - options.event_ndim :]), x.dtype,
        str(x.device), options, rates_for(x.device, x.dtype),
    )  # fmt: skip
    return f"sketch-{hashlib.sha256(repr(facts).encode()).hexdigest()}"


def _remember(captured: Captured, x: torch.Tensor, options: Options, seen: Sketch) -> None:
    """Keep what the sketch led to, unless it holds for some batch sizes or values only."""
    numbers = seen.index(captured.sources)
    if numbers is None or captured.guards or captured.structure is not None:
        return
    if captured.sizes != captured.symbols:
        return
    key = key_of(captured, x, options)
    try:
        entry = [key, lasting_key(captured, key), captured.converts, numbers]
    except NotPlainError:
        return
    programs.disk.put(_name(x, options, seen), json.dumps(entry))


def _recalled(model: nn.Module, x: torch.Tensor, options: Options, seen: Sketch) -> Binding | None:
    name = _name(x, options, seen)
    text = programs.disk.get(name)
    if text is None:
        return None
    try:
        key, program_name, converts, numbers = json.loads(text)
        if not _is_plain(key, program_name, converts, numbers):
            raise ValueError
        sources = [Source(seen.places[i]) for i in numbers]
    except (ValueError, TypeError, LookupError, RecursionError):
        programs.disk.drop(name)
        return None
    program = programs.stored(key, program_name)
    if program is None or len(program.graph_module.graph.find_nodes(op="placeholder")) != (
        1 + len(options.given) + len(sources)
    ):
        return None
    return rebind(model, program, sources, converts, x)


def _is_plain(key: Any, name: Any, converts: Any, numbers: Any) -> bool:
    return (
        isinstance(key, str)
        and isinstance(name, str)
        and isinstance(converts, bool)
        and isinstance(numbers, list)
        and all(type(i) is int and i >= 0 for i in numbers)
    )
