"""Adapter: compiling an exported program ahead of time, through ``torch._inductor``."""

from __future__ import annotations

import os

import torch


def compile_package(program: torch.export.ExportedProgram, path: str | os.PathLike[str]) -> str:
    """Write the compiled program to ``path`` (``.pt2``); returns the path."""
    from torch._inductor import aoti_compile_and_package

    written = aoti_compile_and_package(program, package_path=os.fspath(path))
    return os.fspath(written)
