"""What is kept from one process to the next: small JSON files in the user's cache folder.

``FXHESS_CACHE_DIR`` names another folder, ``FXHESS_CACHE=0`` keeps and reads nothing.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import tempfile
import warnings
from pathlib import Path
from typing import Any

import platformdirs


def folder() -> Path | None:
    """The folder (which need not exist yet), or None where nothing is to be kept: it was turned
    off, others could write into it (with a warning), or the user has none: without HOME, a user
    whom the system does not know would get a folder of the name ``~`` where it stands."""
    if os.environ.get("FXHESS_CACHE") == "0":
        return None
    named = os.path.expanduser(os.environ.get("FXHESS_CACHE_DIR", ""))
    try:
        path = Path(named or platformdirs.user_cache_path("fxhess"))
    except RuntimeError:  # later versions say so themselves
        return None
    return None if str(path).startswith("~") else checked(path)


def checked(path: Path) -> Path | None:
    """The folder (which need not exist yet), or None where others could write into it (with a
    warning)."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return path
    except OSError as error:
        warnings.warn(f"fxhess does not use its cache folder: {error}", stacklevel=2)
        return None
    problem = _problem(found)
    if problem:
        warnings.warn(f"fxhess does not use its cache folder {path}: {problem}", stacklevel=2)
        return None
    return path


def _problem(found: os.stat_result) -> str | None:
    if not stat.S_ISDIR(found.st_mode):
        return "it is not a folder"
    if os.name != "posix":
        return None
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "others can write into it (chmod 700 makes it yours alone)"
    if found.st_uid not in (os.getuid(), 0):
        return "it belongs to another user"
    return None


def content(path: Path) -> bytes:
    """The bytes of a file; of a plain one, since a pipe would be waited for.

    Raises:
        OSError: it cannot be read.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "it is no plain file", str(path))
        with open(handle, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(handle)


def read(name: str) -> Any:
    """What a file holds; None where there is none or it is not JSON."""
    path = folder()
    if path is None:
        return None
    try:
        return json.loads(content(path / name))
    except (OSError, ValueError):
        return None


def write(name: str, document: Any) -> Path | None:
    """Keep a document; others see the old file or the whole new one.  Returns the file's path,
    None where nothing is kept (with a warning, unless that was asked for)."""
    path = folder()
    if path is None:
        return None
    temporary = None
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path, prefix=f".{name}.")
        with open(handle, "w", encoding="utf-8") as file:
            json.dump(document, file, indent=1)
        os.replace(temporary, path / name)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        warnings.warn(f"fxhess cannot keep {name}: {error}", stacklevel=2)
        return None
    return path / name
