"""What became of each operation of a model, as plain data: strings, numbers and tuples of them, so
that it can be kept beside a program and read without it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tangent:
    """The derivative of an operation's result along a base.

    ``base``: the step that it starts at (0: x, or what is given along x); ``structure``: identity,
    diagonal, tied (block-diagonal over some axes), dense, or vector (along given directions);
    ``shared``: the same for every sample; ``kept`` of ``full``: entries of one sample that are
    computed, of those that it has.
    """

    base: int
    structure: str
    shared: bool
    kept: int
    full: int


@dataclass(frozen=True)
class Ending:
    """How one term of the Hessian's sum ends: ``how`` is close, pull or rebase, relative to the
    step ``base``; ``structure``: diagonal, dense, or - where the term was carried back."""

    how: str
    base: int
    structure: str


@dataclass(frozen=True)
class Step:
    """One operation of the model, or several that one of them was rewritten to.

    ``number``: its position, by which others name it; x has 0.  ``kind``: input, zero, elementwise,
    multilinear, linear, smooth, opaque (no rule: its derivatives are PyTorch's own) or composite
    (rewritten to several ``parts`` of which one at least is curved).  ``shape``: of one sample of
    the result.  ``inputs``: the steps that it takes values of; ``active``: whether a derivative
    flows through.  ``lost``: sizes of axes of its tangents that became dense here.  ``nodes``:
    names of what it became in the generated program.
    """

    number: int
    op: str
    module: str
    line: str
    kind: str
    parts: tuple[str, ...]
    shape: tuple[int, ...]
    inputs: tuple[int, ...]
    active: bool
    adjoint: str = ""
    tangents: tuple[Tangent, ...] = ()
    endings: tuple[Ending, ...] = ()
    lost: tuple[int, ...] = ()
    nodes: tuple[str, ...] = ()
