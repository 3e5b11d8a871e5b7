"""Programs made so far, shared by all modules of the same structure; safe from several threads.

Those in memory come first.  Most are kept on disk too, as plain data, for later processes: see
:mod:`fxhess.disk`; which are not, :func:`lasting_key` says.
"""

from __future__ import annotations

import functools
import hashlib
import platform
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from fxhess import memory, registry, serial
from fxhess.capture import Captured
from fxhess.disk import Disk, DiskInfo
from fxhess.emit import ORIGIN
from fxhess.locks import making
from fxhess.naming import LIBRARIES
from fxhess.pipeline import Program

MAXSIZE = 256
_BUILT_IN = registry.table()


class CacheInfo(NamedTuple):
    """``hits``: programs found; ``misses``: programs not in memory; ``size``: programs kept in
    memory now, of at most ``maxsize`` (the least recently used is dropped); ``disk``: those kept
    for later processes."""

    hits: int
    misses: int
    size: int
    maxsize: int
    disk: DiskInfo


class _Cache:
    def __init__(self) -> None:
        self._programs: OrderedDict[str, Program] = OrderedDict()
        self._hits = 0
        self._misses = 0
        self.generation = 0
        self.disk = Disk()

    def get(
        self, key: str, make: Callable[[], Program], lasting: Callable[[], str] | None = None
    ) -> Program:
        """The program of ``key``, made by one thread only; or found on disk, where ``lasting``
        gives it a key for all processes."""
        with making:
            program = self.known(key)
            if program is not None:
                return program
            self._misses += 1
            program = self._found(make, lasting)
            self._keep(key, program)
            return program

    def known(self, key: str) -> Program | None:
        """The program of ``key`` in memory."""
        with making:
            program = self._programs.get(key)
            if program is not None:
                self._hits += 1
                self._programs.move_to_end(key)
            return program

    def stored(self, key: str, lasting: str) -> Program | None:
        """The program of ``key``, in memory or on disk."""
        with making:
            program = self.known(key)
            if program is None:
                program = self._loaded(lasting)
                if program is not None:
                    self._misses += 1
                    self._keep(key, program)
            return program

    def _keep(self, key: str, program: Program) -> None:
        self._programs[key] = program
        while len(self._programs) > MAXSIZE:
            self._programs.popitem(last=False)

    def _found(self, make: Callable[[], Program], lasting: Callable[[], str] | None) -> Program:
        if lasting is None or not self.disk.enabled:
            return make()
        program = None
        try:
            name = lasting()
            program = self._loaded(name)
            if program is not None:
                return program
            program = make()
            self.disk.put(name, serial.dumps(program))
        except serial.NotPlainError as error:
            program = program or make()
            program.notes = (*program.notes, f"not kept on disk: {error}")
        return program

    def _loaded(self, name: str) -> Program | None:
        text = self.disk.get(name)
        if text is None:
            return None
        try:
            program = serial.loads(text)
        except serial.NotPlainError:
            self.disk.drop(name)
            return None
        _ = program.fused  # see fxhess.pipeline.compile_captured
        return program

    def info(self) -> CacheInfo:
        with making:
            return CacheInfo(
                self._hits, self._misses, len(self._programs), MAXSIZE, self.disk.info()
            )

    def clear(self, disk: bool) -> None:
        with making:
            self._programs.clear()
            self._hits = self._misses = 0
            self.generation += 1
            if disk:
                self.disk.clear()


programs = _Cache()


def cache_info() -> CacheInfo:
    """Hits, misses and number of the programs kept in memory, and on disk."""
    return programs.info()


def cache_clear(disk: bool = False) -> None:
    """Forget all programs in memory, and with ``disk`` those on disk too; modules make theirs
    anew, or read them from disk, at the next call.  Memory of earlier results that was kept for
    later ones goes back to the system."""
    programs.clear(disk)
    memory.release()


# --- keys for all processes -----------------------------------------------------------------------


@functools.cache
def environment() -> str:
    """What a kept program holds for besides its own key: a hash of this package's own sources and
    the versions of what they were run with.

    Raises:
        NotPlainError: the sources cannot be read.
    """
    packages = ("fxhess", "fxhess.rules", "fxhess.passes")
    folders = [Path(str(sys.modules[name].__file__)).parent for name in packages]
    versions = f"{torch.__version__} {platform.python_version()} {digest_of(folders)}"
    return hashlib.sha256(versions.encode()).hexdigest()


def digest_of(folders: Sequence[Path]) -> str:
    """A hash of the Python files in some folders."""
    digest = hashlib.sha256()
    for folder in folders:
        files = sorted(folder.glob("*.py"))
        if not files:
            raise serial.NotPlainError("fxhess' own sources are not on disk")
        for file in files:
            digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def own_rules() -> bool:
    """Whether rules were registered besides the built-in ones: what they do is in no key."""
    table = registry.table()
    return table.keys() != _BUILT_IN.keys() or any(table[op] is not _BUILT_IN[op] for op in table)


def lasting_key(captured: Captured, key: str) -> str:
    """The key of a captured model's program in all processes: ``key``, the lines it was written in
    (for messages) and :func:`environment`.

    Raises:
        NotPlainError: a key cannot tell what the program depends on: operators or rules that are
            neither PyTorch's nor ours.
    """
    if own_rules():
        raise serial.NotPlainError("rules were registered in this process")
    digest = hashlib.sha256(f"{environment()} {key} {torch.get_default_dtype()}".encode())
    for node in captured.graph_module.graph.nodes:
        own = isinstance(node.target, torch._ops.OpOverload)
        if own and node.target.namespace not in LIBRARIES:
            raise serial.NotPlainError(f"an operator of the model's own, {node.target}")
        digest.update(f"{node.meta.get(ORIGIN)}\n".encode())
    return f"program-{digest.hexdigest()}"
