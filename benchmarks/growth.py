"""How time and memory grow: a tanh net, one size varied at a time (``--growth``)."""

from functools import partial

from benchmarks import models
from benchmarks.workloads import Workload

__all__ = ["AXES", "BASE", "GROWTH", "size_of"]

BATCH, INPUTS, DEPTH, WIDTH = 256, 16, 3, 64

BASE = f"a tanh net with {DEPTH} hidden layers of {WIDTH}, x of {BATCH}×{INPUTS}"

AXES = {
    "batch": "samples B",
    "inputs": "inputs d",
    "depth": "hidden layers",
    "width": "width of a layer",
}


def growing(axis: str, size: int) -> Workload:
    """The net with one size of its own."""
    sizes = {"batch": BATCH, "inputs": INPUTS, "depth": DEPTH, "width": WIDTH, axis: size}
    batch, d, depth, width = sizes.values()
    widths = (d, *[width] * depth, 1)
    return Workload(
        f"{axis}={size}",
        f"tanh net {d}-{'-'.join([str(width)] * depth)}-1",
        partial(models.tanh_net, *widths),
        (batch, d),
        quick=size <= 64,
    )


GROWTH = [
    *(growing("batch", n) for n in (1, 8, 64, 512, 4096, 32768)),
    *(growing("inputs", n) for n in (2, 8, 32, 128, 512)),
    *(growing("depth", n) for n in (1, 2, 4, 8, 16)),
    *(growing("width", n) for n in (16, 64, 256, 1024)),
]


def size_of(name: str) -> tuple[str, int]:
    """The axis and size that a workload's name tells."""
    axis, size = name.split("=")
    return axis, int(size)
