"""Adapter: settings of PyTorch while a model is captured, which decide how layers are traced.

Each is read first and written inside of ``try``: an interrupt may come after any call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


def is_exporting() -> bool:
    """Whether ``torch.export`` traces.  (Dynamo of PyTorch 2.11 takes the public function for true
    in ``torch.compile`` also.)"""
    flag = getattr(torch.compiler, "_is_exporting_flag", None)
    return torch.compiler.is_exporting() if flag is None else bool(flag)


@contextlib.contextmanager
def exporting() -> Iterator[None]:
    """Inside, ``torch.compiler.is_exporting()`` is true: code that then avoids branches on values
    (as that of Hugging Face's models) does so.  Nor do distributions look at the values of their
    arguments, unless told to one by one."""
    checked = torch.distributions.Distribution._validate_args
    names = [n for n in ("_is_compiling_flag", "_is_exporting_flag") if hasattr(torch.compiler, n)]
    before = [getattr(torch.compiler, n) for n in names]
    try:
        torch.distributions.Distribution.set_default_validate_args(False)
        for name in names:
            setattr(torch.compiler, name, True)
        yield
    finally:
        torch.distributions.Distribution.set_default_validate_args(checked)
        for name, flag in zip(names, before, strict=True):
            setattr(torch.compiler, name, flag)


@contextlib.contextmanager
def plain_layers() -> Iterator[None]:
    """Inside, recurrent layers in float32 are traced as they are composed, not as one operation of
    oneDNN's.  (The public context manager writes other settings too, and warns of them.)"""
    enabled = torch._C._get_mkldnn_enabled()
    try:
        torch._C._set_mkldnn_enabled(False)
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)


@contextlib.contextmanager
def plain_attention() -> Any:
    """Inside, attention is traced in its mathematical form, which has second derivatives; and a
    mask is used as it is: transformer stacks look at its values to see whether it is causal, which
    only chooses among kernels."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    stacks = torch.nn.modules.transformer
    detect = getattr(stacks, "_detect_is_causal_mask", None)
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        if detect is not None:
            stacks._detect_is_causal_mask = lambda mask, is_causal=None, size=None: (
                is_causal is True
            )
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        if detect is not None:
            stacks._detect_is_causal_mask = detect
