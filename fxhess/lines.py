"""The user's own lines, which messages point at."""

from __future__ import annotations

import inspect
import linecache
import os

import torch

_HERE = os.path.dirname(__file__)
_ROOT = os.path.dirname(_HERE)  # in a checkout, rules and passes stand beside this package
# Code that no message points at: PyTorch's and our own.
INTERNAL = (
    *(
        os.path.join(folder, "")
        for folder in (
            os.path.dirname(torch.__file__),
            _HERE,
            os.path.join(_ROOT, "rules"),
            os.path.join(_ROOT, "passes"),
        )
    ),
    "<string>",
)


def calling_line() -> str:
    """The innermost line outside of PyTorch and fxhess that led here from a capture, as
    ``file:line: code``."""
    frame = inspect.currentframe()
    while frame is not None:
        name, number = frame.f_code.co_filename, frame.f_lineno
        if frame.f_code.co_name in ("capture", "sketch") and name.startswith(_HERE):
            break
        if not name.startswith(INTERNAL):
            return f"{name}:{number}: {linecache.getline(name, number).strip()}"
        frame = frame.f_back
    return ""


def user_line(stack: str) -> str:
    """The innermost frame outside of PyTorch and fxhess, as ``file:line: code``."""
    best = ""
    lines = stack.splitlines()
    for i, text in enumerate(lines):
        text = text.strip()
        if text.startswith('File "'):
            name, _, rest = text[6:].partition('", line ')
            if not name.startswith(INTERNAL):
                code = lines[i + 1].strip() if i + 1 < len(lines) else ""
                best = f"{name}:{rest.split(',')[0]}: {code}"
    return best
