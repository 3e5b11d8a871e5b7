"""How fast this machine is: a small table of rates for each device and type of numbers.

Built-in rates are those of two cores of a server CPU and of one data-centre GPU;
:func:`fxhess.calibrate` measures those of this machine, which then go first, in this process and
in later ones.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fxhess import store

Curve = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Rates:
    """How fast a device is, for numbers of one type.

    ``flat``, ``batched``: operations a second (multiply-adds times two) of a matrix product with
    one matrix for all rows, and of many small ones, by size (see ``fxhess.cost.side``);
    ``convolution``, ``transposed``: the same of a small convolution, and of the adjoint of one
    with strides; ``stream``, ``scattered``: bytes a second of
    a pointwise pass over what lies in the cache, in the order of memory and in another;
    ``loops``: inner loops a second that a pass takes where what it reads and writes lies in
    different orders; ``gather``: entries a second read by index; ``special``: values of tanh a
    second; ``memory``: bytes a second to and from main memory; ``launch``: seconds an operation
    costs whatever its size.
    """

    flat: Curve
    batched: Curve
    convolution: float
    transposed: float
    stream: float
    scattered: float
    loops: float
    gather: float
    special: float
    memory: float
    launch: float


# Two cores of an AMD EPYC and the published figures of an NVIDIA A100, in round numbers.
_CPU_32 = Rates(
    flat=((2, 4e9), (8, 2.8e10), (16, 1.2e11), (32, 1.7e11), (64, 2.1e11), (256, 2.3e11)),
    batched=((2, 2e9), (8, 2e10), (16, 8e10), (32, 1.2e11), (256, 1.8e11)),
    convolution=1.2e11, transposed=3e10, stream=1.5e11, scattered=4.5e10, loops=4e8, gather=3e9,
    special=9e8, memory=3e10, launch=2e-6,
)  # fmt: skip
_CPU_64 = Rates(
    flat=((2, 5e9), (8, 1.5e10), (16, 2.7e10), (64, 6e10), (256, 9.5e10)),
    batched=((2, 1.5e9), (8, 1.1e10), (16, 2.5e10), (32, 3.5e10), (256, 8e10)),
    convolution=5e10, transposed=2e10, stream=1.5e11, scattered=9e10, loops=4e8, gather=6e8,
    special=5e8, memory=3e10, launch=2e-6,
)  # fmt: skip
_GPU_32 = Rates(
    flat=((8, 1e12), (64, 1e13), (256, 1.5e13)), batched=((8, 5e11), (64, 8e12), (256, 1.3e13)),
    convolution=8e12, transposed=4e12, stream=1.5e12, scattered=6e11, loops=1e12, gather=1e11,
    special=5e11, memory=1.5e12, launch=6e-6,
)  # fmt: skip
_GPU_64 = Rates(
    flat=((8, 5e11), (64, 6e12), (256, 1.2e13)), batched=((8, 3e11), (64, 4e12), (256, 9e12)),
    convolution=4e12, transposed=2e12, stream=1.5e12, scattered=6e11, loops=1e12, gather=1e11,
    special=1e11, memory=1.5e12, launch=6e-6,
)  # fmt: skip
BUILT_IN = {
    ("cpu", 4): _CPU_32,
    ("cpu", 8): _CPU_64,
    ("cuda", 4): _GPU_32,
    ("cuda", 8): _GPU_64,
}
# What calibration found, by machine; None where it was looked for and not found.
MEASURED: dict[str, Rates | None] = {}
_FORMAT = 2  # of the kept file


def rates_for(device: torch.device, dtype: torch.dtype) -> Rates:
    """The rates of a device for numbers as wide as ``dtype``: those measured, if there are any,
    else the built-in ones of its kind."""
    facts = machine(device, dtype)
    key = _key(facts)
    if key not in MEASURED:
        MEASURED[key] = _read(facts)
    width = facts["width"]
    kind = device.type if (device.type, width) in BUILT_IN else "cpu"
    return MEASURED[key] or BUILT_IN[kind, width]


def keep(device: torch.device, dtype: torch.dtype, rates: Rates) -> Path | None:
    """Use these rates from now on, and keep them for later processes; returns their file."""
    facts = machine(device, dtype)
    MEASURED[_key(facts)] = rates
    document = {"format": _FORMAT, "machine": facts, "rates": dataclasses.asdict(rates)}
    return store.write(_file(facts), document)


def machine(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What rates depend on, and are kept by."""
    return {
        "kind": device.type,
        "name": _name(device.type, device.index),
        "threads": torch.get_num_threads() if device.type == "cpu" else 0,
        "capability": torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else "",
        "width": 8 if dtype.itemsize == 8 else 4,
        "torch": torch.__version__,
    }


@functools.cache
def _name(kind: str, index: int | None) -> str:
    if kind == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name(index)
    info = Path("/proc/cpuinfo")
    if kind == "cpu" and info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _key(facts: Mapping[str, Any]) -> str:
    return json.dumps(facts, sort_keys=True)


def _file(facts: Mapping[str, Any]) -> str:
    return f"rates-{hashlib.sha256(_key(facts).encode()).hexdigest()[:16]}.json"


def _read(facts: Mapping[str, Any]) -> Rates | None:
    """Kept rates of this machine; None where there are none, or they are of another format or
    machine, or no rates at all."""
    document = store.read(_file(facts))
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        return None
    found = document.get("rates")
    names = {field.name for field in dataclasses.fields(Rates)}
    if document.get("machine") != facts or not isinstance(found, dict) or set(found) != names:
        return None
    values: dict[str, Any] = {
        name: _curve(v) if name in _CURVES else v for name, v in found.items()
    }
    sound = all(v if name in _CURVES else _is_rate(v) for name, v in values.items())
    return Rates(**values) if sound else None


_CURVES = ("flat", "batched")


def _curve(value: Any) -> Curve | None:
    """Pairs of rising sizes and their rates; None for anything else."""
    if not isinstance(value, list) or not value:
        return None
    if not all(isinstance(p, list) and len(p) == 2 and all(map(_is_rate, p)) for p in value):
        return None
    sizes = [size for size, _ in value]
    rising = all(a < b for a, b in itertools.pairwise(sizes))
    return tuple((size, rate) for size, rate in value) if rising else None


def _is_rate(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > 0
