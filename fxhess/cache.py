"""Programs made so far, shared by all modules of the same structure; safe from several threads."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from fxhess.pipeline import Program

MAXSIZE = 256


class CacheInfo(NamedTuple):
    """``hits``: programs found; ``misses``: programs made; ``size``: programs kept now, of at
    most ``maxsize`` (the least recently used is dropped)."""

    hits: int
    misses: int
    size: int
    maxsize: int


class _Cache:
    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._programs: OrderedDict[str, Program] = OrderedDict()
        self._hits = 0
        self._misses = 0
        self.generation = 0

    def get(self, key: str, make: Callable[[], Program]) -> Program:
        """The program of ``key``, made by one thread only."""
        with self._lock:
            program = self._programs.get(key)
            if program is not None:
                self._hits += 1
                self._programs.move_to_end(key)
                return program
            self._misses += 1
            program = self._programs[key] = make()
            while len(self._programs) > MAXSIZE:
                self._programs.popitem(last=False)
            return program

    def info(self) -> CacheInfo:
        with self._lock:
            return CacheInfo(self._hits, self._misses, len(self._programs), MAXSIZE)

    def clear(self) -> None:
        with self._lock:
            self._programs.clear()
            self._hits = self._misses = 0
            self.generation += 1


programs = _Cache()


def cache_info() -> CacheInfo:
    """Hits, misses and number of the programs kept in memory."""
    return programs.info()


def cache_clear() -> None:
    """Forget all programs; modules make theirs anew at the next call."""
    programs.clear()
