"""A file of one JSON document and tensors: no pickles, and no part of it is taken for another.

Layout: ``FXHESS`` and a version of two bytes; the lengths of the document and of the tensors, eight
bytes each, little-endian; the SHA-256 of all that follows; the document; the tensors' bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fxhess.errors import FileError

_MAGIC = b"FXHESS"
VERSION = 1
_HEAD = struct.Struct("<6sHQQ32s")
_ALIGNED = 64
_DTYPES = {
    str(dtype): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex128,
        torch.complex64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip


def write(path: str | os.PathLike[str], document: Any, tensors: Sequence[torch.Tensor]) -> None:
    """Write a file; others see the old one or the whole new one.

    Raises:
        FileError: a tensor is not dense, or of a type that no file holds.
        OSError: the disk refuses.
    """
    specs, parts, at = [], [], 0
    for tensor in tensors:
        if str(tensor.dtype) not in _DTYPES or tensor.layout != torch.strided:
            raise FileError(f"a file cannot hold a tensor {tensor.dtype} in {tensor.layout}")
        data = _bytes(tensor)
        specs.append([str(tensor.dtype), list(tensor.shape), at])
        padding = -len(data) % _ALIGNED
        parts += [data, bytes(padding)]
        at += len(data) + padding
    text = json.dumps({"content": document, "tensors": specs}, allow_nan=False).encode()
    body = b"".join([text, *parts])
    head = _HEAD.pack(_MAGIC, VERSION, len(text), at, hashlib.sha256(body).digest())
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "wb") as file:
            file.write(head)
            file.write(body)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read(path: str | os.PathLike[str]) -> tuple[Any, list[torch.Tensor]]:
    """The document and the tensors of a file.

    Raises:
        FileError: it is another kind of file, of a newer version, truncated or changed.
        OSError: it cannot be read.
    """
    raw = Path(path).read_bytes()
    if raw[: len(_MAGIC)] != _MAGIC[: len(raw)] or not raw:
        raise FileError(f"{path} was not written by fxhess.save")
    if len(raw) < _HEAD.size:
        raise FileError(f"{path} is truncated: {len(raw)} bytes are left")
    _, version, length, size, digest = _HEAD.unpack_from(raw)
    if version > VERSION:
        raise FileError(
            f"{path} is of version {version}, and this fxhess reads up to {VERSION}",
            hint="load it with the version of fxhess that wrote it, or a newer one",
        )
    body = memoryview(raw)[_HEAD.size :]
    if version < 1 or len(body) != length + size:
        raise FileError(f"{path} is truncated or changed: {len(body)} bytes, not {length + size}")
    if hashlib.sha256(body).digest() != digest:
        raise FileError(f"{path} was changed: its content has another checksum")
    try:
        document = json.loads(bytes(body[:length]))
        data = body[length:]
        return document["content"], [_tensor(data, *spec) for spec in document["tensors"]]
    except (ValueError, LookupError, TypeError, RecursionError, RuntimeError) as error:
        raise FileError(f"{path} holds no saved module: {error}") from error


def _bytes(tensor: torch.Tensor) -> bytes:
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().tobytes()


def _tensor(data: memoryview, dtype: str, shape: list[int], at: int) -> torch.Tensor:
    kind = _DTYPES[dtype]
    if not all(type(n) is int and n >= 0 for n in [*shape, at]):
        raise ValueError("sizes count from 0")
    count = math.prod(shape)
    if at + count * kind.itemsize > len(data):
        raise ValueError("a tensor is outside of the file")
    if not count:
        return torch.empty(shape, dtype=kind)
    # A copy: the file's bytes are read-only, and need not be aligned.
    return torch.frombuffer(bytearray(data[at : at + count * kind.itemsize]), dtype=kind).reshape(
        shape
    )


def _umask() -> int:
    current = os.umask(0o022)
    os.umask(current)
    return current
