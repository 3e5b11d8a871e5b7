"""Entries of text in the user's cache folder, for later processes: all or nothing, and replaceable.

Each entry is a file: a line that says what it is (key, length and SHA-256 of the rest), then the
rest.  What does not agree with its first line is dropped, as if it had never been there.  Writers
take turns (a lock), write beside and rename, and remove the entries unused for longest when all
take more than ``FXHESS_CACHE_SIZE`` bytes.  Nothing here raises: no folder, no room or no right to
write only mean that nothing is kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

import filelock

from fxhess import store
from fxhess.locks import making

_FOLDER = "plans"
_FORMAT = "fxhess 1"
_SIZE = 256 << 20
_KEPT = 0.8  # the share of the limit that is kept when it was passed
_PATIENCE = 5.0  # seconds to wait for other writers; after that nothing is kept
_KEY = re.compile(r"[a-z]+-[0-9a-f]{64}")


class DiskInfo(NamedTuple):
    """Plans kept on disk: the folder (None where nothing is kept), how many ``entries`` of how many
    ``bytes`` (at most ``maxbytes``), ``hits`` and ``misses`` of this process, and what went wrong
    last, if anything did."""

    path: Path | None
    entries: int
    bytes: int
    maxbytes: int
    hits: int
    misses: int
    problem: str


class Disk:
    """The entries of the folder that the environment names by now."""

    def __init__(self) -> None:
        self._hits = self._misses = 0
        self._problem = ""
        self._patience = _PATIENCE

    @property
    def enabled(self) -> bool:
        """Whether anything is kept at all."""
        return os.environ.get("FXHESS_CACHE") != "0"

    @property
    def usable(self) -> bool:
        """Whether there is a folder for it."""
        return self._folder() is not None

    def get(self, key: str) -> str | None:
        """The text of an entry; None where there is none, or none that is whole."""
        folder = self._folder()
        text = None
        if folder is not None and _KEY.fullmatch(key):
            text = self._read(folder / key, key)
        with making:
            if text is None:
                self._misses += 1
            else:
                self._hits += 1
        return text

    def put(self, key: str, text: str) -> bool:
        """Keep an entry; whether that was possible."""
        folder = self._folder()
        if folder is None or not _KEY.fullmatch(key):
            return False
        content = text.encode()
        head = {"format": _FORMAT, "key": key, "bytes": len(content), "sha256": _digest(content)}
        limit = _limit()
        if len(content) > _KEPT * limit:
            self._problem = f"an entry of {len(content)} bytes, where all may take {limit}"
            return False
        try:
            folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
            with making, filelock.FileLock(folder / ".lock", timeout=self._patience, mode=0o600):
                _write(folder / key, json.dumps(head).encode() + b"\n" + content)
                _make_room(folder, limit)
            self._patience = _PATIENCE
        except (OSError, NotImplementedError) as error:  # a timeout, or a disk without locks, too
            self._problem = f"{type(error).__name__}: {error}"
            if isinstance(error, filelock.Timeout):
                self._patience = 0.0  # who holds it that long may hold it for ever: asked once
            return False
        return True

    def drop(self, key: str) -> None:
        """Remove an entry."""
        folder = self._folder()
        if folder is not None and _KEY.fullmatch(key):
            _remove(folder / key)

    def clear(self) -> None:
        """Remove all entries."""
        folder = self._folder()
        for path in [] if folder is None else _entries(folder):
            _remove(path)
        with making:
            self._hits = self._misses = 0
            self._problem = ""

    def info(self) -> DiskInfo:
        """What is there, and how it served this process."""
        folder = self._folder()
        sizes = [] if folder is None else [_status(path).st_size for path in _entries(folder)]
        return DiskInfo(
            folder, len(sizes), sum(sizes), _limit(), self._hits, self._misses, self._problem
        )

    def _folder(self) -> Path | None:
        above = store.folder() if self.enabled else None
        return None if above is None else store.checked(above / _FOLDER)

    def _read(self, path: Path, key: str) -> str | None:
        try:
            head, _, content = store.content(path).partition(b"\n")
        except FileNotFoundError:
            return None
        except OSError as error:
            self._problem = f"{type(error).__name__}: {error}"
            return None
        text = None
        with contextlib.suppress(ValueError, RecursionError):
            want = {"format": _FORMAT, "key": key, "bytes": len(content)}
            if json.loads(head) == {**want, "sha256": _digest(content)}:
                text = content.decode()
        if text is None:
            _remove(path)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # used last now
        return text


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _write(path: Path, content: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".new-")
    try:
        with open(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        _remove(Path(temporary))
        raise


def _make_room(folder: Path, limit: int) -> None:
    """Remove what killed writers left (this one has the lock: it is nobody else's), and the entries
    that were not used for longest."""
    for path in folder.glob(".new-*"):
        _remove(path)
    found = sorted(
        ((_status(path), path) for path in _entries(folder)), key=lambda f: f[0].st_mtime
    )
    total = sum(status.st_size for status, _ in found)
    if total <= limit:
        return
    for status, path in found:
        _remove(path)
        total -= status.st_size
        if total <= _KEPT * limit:
            return


def _entries(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if _KEY.fullmatch(path.name)]
    except OSError:
        return []


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError:  # removed meanwhile
        return os.stat_result([0] * 10)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            path.rmdir()  # one with something in it is nobody's entry
        else:
            path.unlink()


_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


def _limit() -> int:
    """Bytes that all entries may take: ``FXHESS_CACHE_SIZE``, such as 64MB."""
    asked = os.environ.get("FXHESS_CACHE_SIZE", "")
    found = re.fullmatch(r"(\d+)\s*([kmg]?)i?b?", asked.strip().lower())
    if found:
        return int(found[1]) * _UNITS[found[2]]
    if asked:
        warnings.warn(
            f"FXHESS_CACHE_SIZE={asked!r} is no size; valid are 1000000, 64MB, 1GB", stacklevel=2
        )
    return _SIZE
