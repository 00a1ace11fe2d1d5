"""Safetensors files, read without trusting them and written so that a power cut leaves the old file or the new one.

Any thread; reading maps the file and blocks on disk, writing blocks until it is on disk.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import mmap
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO, Dict, Mapping, NamedTuple, Tuple

import numpy as np
from numpy.typing import NDArray

from latentd.errors import CheckpointError
from latentd.files import replacing

_FLOATS: Dict[str, str] = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_WIDTHS = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2}
_WIDTHS.update({"U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8})
_MAX_HEADER_BYTES = 100 << 20
_AGAIN = "The file is cut short or damaged: fetch or copy it again."


class Slot(NamedTuple):
    """Where one tensor lies, in bytes after the header."""

    dtype: str
    shape: Tuple[int, ...]
    start: int
    end: int


class Header(NamedTuple):
    """The table of contents of a safetensors file, checked against the file's length."""

    tensors: Dict[str, Slot]
    metadata: Dict[str, str]
    data_start: int


def read_header(path: Path) -> Header:
    """The checked header; CheckpointError where the file can't be opened, is not safetensors, or is not whole."""
    with opened(path) as stream:
        size_bytes = os.fstat(stream.fileno()).st_size
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= _MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{path} is not a safetensors file", hint="Weights come as safetensors files: `latentd backbone import FILE`."
            )
        if 8 + length > size_bytes:
            raise CheckpointError(f"{path} is cut short inside its header, at {size_bytes:,} bytes", hint=_AGAIN)
        raw = stream.read(length)
    header = _parsed(raw, path, 8 + length)
    expected_bytes = header.data_start + max((slot.end for slot in header.tensors.values()), default=0)
    if size_bytes != expected_bytes:
        raise CheckpointError(f"{path} has {size_bytes:,} bytes, its header promises {expected_bytes:,}", hint=_AGAIN)
    return header


def opened(path: Path) -> BinaryIO:
    """The file, open for reading; CheckpointError with the reason where it can't be."""
    try:
        return path.open("rb")
    except OSError as cause:
        raise CheckpointError(f"{path} can't be read: {cause.strerror}", hint="Check the path and its permissions.") from cause


def _parsed(raw: bytes, path: Path, data_start: int) -> Header:
    try:
        table = json.loads(raw)
        metadata = {str(key): str(value) for key, value in (table.pop("__metadata__", None) or {}).items()}
        slots = {name: _slot(entry) for name, entry in table.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as cause:
        raise CheckpointError(f"{path} is not a safetensors file: its header can't be read", hint=_AGAIN) from cause
    return Header(slots, metadata, data_start)


def _slot(entry: Dict[str, Any]) -> Slot:
    shape = tuple(int(side) for side in entry["shape"])
    start, end = (int(offset) for offset in entry["data_offsets"])
    count = int(np.prod(shape, dtype=object)) if shape else 1
    width = _WIDTHS[entry["dtype"]]
    if min((start, *shape), default=0) < 0 or end - start != count * width:
        raise ValueError("a tensor's bytes do not match its shape")
    return Slot(entry["dtype"], shape, start, end)


def read_tensors(path: Path) -> Tuple[Dict[str, NDArray[Any]], Header, str]:
    """Every floating-point tensor of the file, its header, and the sha256 of the whole file, from one mapping of it.

    Arrays are read-only views of the mapping where the file holds float32, converted copies otherwise. Integer tensors (counters) are left
    out.
    """
    header = read_header(path)
    with opened(path) as stream:
        content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    sha256 = hashlib.sha256(content).hexdigest()
    arrays = {}
    for name, slot in header.tensors.items():
        if slot.dtype in _FLOATS:
            arrays[name] = _array(content, slot, header.data_start)
        elif slot.dtype.startswith("F"):
            raise CheckpointError(f"{path}: {name} is stored as {slot.dtype}", hint="Save the weights as float32, float16 or bfloat16.")
    return arrays, header, sha256


def _array(content: mmap.mmap, slot: Slot, data_start: int) -> NDArray[np.float32]:
    count = (slot.end - slot.start) // _WIDTHS[slot.dtype]
    flat = np.frombuffer(content, dtype=_FLOATS[slot.dtype], count=count, offset=data_start + slot.start)
    if slot.dtype == "BF16":  # the upper half of a float32
        flat = (flat.astype(np.uint32) << 16).view(np.float32)
    return flat.astype(np.float32, copy=False).reshape(slot.shape)


def write_tensors(path: Path, tensors: Mapping[str, NDArray[np.float32]], metadata: Mapping[str, str]) -> str:
    """Write float32 tensors, atomically and durably; returns the file's sha256.

    The same tensors and metadata give the same bytes on every machine (the safetensors package does not promise that for metadata), because
    the hash names the backbone wherever its latents go.
    """
    table: Dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in sorted(tensors):
        start, end = end, end + 4 * tensors[name].size
        table[name] = {"dtype": "F32", "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    header = json.dumps(table, sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    digest = hashlib.sha256()
    with replacing(path) as temporary, temporary.open("wb") as stream:
        parts = (np.ascontiguousarray(tensors[name], dtype="<f4").tobytes() for name in sorted(tensors))
        for part in itertools.chain([struct.pack("<Q", len(header)) + header], parts):
            digest.update(part)
            stream.write(part)
    return digest.hexdigest()
