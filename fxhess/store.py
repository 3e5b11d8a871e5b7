"""What is kept from one process to the next: small JSON files in the user's cache folder.

``FXHESS_CACHE_DIR`` names another folder, ``FXHESS_CACHE=0`` keeps and reads nothing.
"""

from __future__ import annotations

import contextlib
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
    off, or others could write into it (with a warning)."""
    if os.environ.get("FXHESS_CACHE") == "0":
        return None
    return checked(
        Path(os.environ.get("FXHESS_CACHE_DIR") or platformdirs.user_cache_path("fxhess"))
    )


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


def read(name: str) -> Any:
    """What a file holds; None where there is none or it is not JSON."""
    path = folder()
    if path is None:
        return None
    try:
        return json.loads((path / name).read_text(encoding="utf-8"))
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
