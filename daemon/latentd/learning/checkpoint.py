"""Durable versions of the learner: one safetensors file each, written whole or not at all.

A file is complete when its name is there: temporary file, fsync, rename, fsync of the folder. Its name says up to where in the log it has
learned, and that orders the files: the clock of a device without a battery jumps. Its checksum lies in its own header; a file that does
not match is set aside for the one before. Called by the learner thread; blocks on the disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Tuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from latentd.errors import LearnerError
from latentd.files import fsync

logger = logging.getLogger(__name__)
Arrays = Dict[str, NDArray[Any]]
_NAME = re.compile(r"version-(\d{8,})-(\d{12})\.safetensors")


def write(folder: Path, arrays: Arrays, facts: Mapping[str, Any], keep: int) -> Path:
    """Saves a version as folder/version-NNNNNNNN.safetensors and deletes all but the newest `keep`.

    Raises LearnerError when the disk refuses.
    """
    path = folder / f"version-{facts['version']:08d}-{facts['seq']:012d}.safetensors"
    header = {"facts": json.dumps(facts), "sha256": _digest(arrays, json.dumps(facts))}
    temporary = folder / "version.tmp"  # one name for all: what a power cut leaves is written over
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, header))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync(folder)
        for old in versions(folder)[:-keep]:
            if old != path:
                old.unlink()
    except OSError as cause:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise LearnerError(
            f"version {facts['version']} can't be saved in {folder}: {cause}", hint="Free some disk space; learning goes on."
        ) from cause
    return path


def newest(folder: Path, head_seq: int) -> Optional[Tuple[Arrays, Dict[str, Any]]]:
    """The newest whole version that learned nothing beyond `head_seq`, the end of the log: arrays and facts; None when there is none.

    A version that knows more than the log belongs to another log: what it calls sample 7 is not what will be. Such and broken ones are
    logged and set aside under another name.
    """
    for path in reversed(versions(folder)):
        if seq_of(path) > head_seq:
            _set_aside(path, f"it has learned up to {seq_of(path)}, and the journal ends at {head_seq}")
            continue
        try:
            return _read(path)
        except OSError as cause:
            logger.error("%s can't be read and is passed over for the version before: %s", path, cause)
        except (SafetensorError, ValueError, KeyError) as cause:
            _set_aside(path, str(cause))
    return None


def set_newest_aside(folder: Path, reason: str) -> None:
    """Puts the version that was just read out of the way: whole, but nothing that this program can go on from."""
    _set_aside(versions(folder)[-1], reason)


def versions(folder: Path) -> List[Path]:
    """The version files, oldest first: by how much of the log they have learned, then by version (sleep adds nothing to the log)."""
    return sorted((path for path in folder.glob("version-*") if _NAME.fullmatch(path.name)), key=lambda path: (seq_of(path), path.name))


def seq_of(path: Path) -> int:
    """How far in the log the version in this file has learned."""
    found = _NAME.fullmatch(path.name)
    assert found is not None, "only version files are asked"
    return int(found.group(2))


def _read(path: Path) -> Tuple[Arrays, Dict[str, Any]]:
    with safe_open(str(path), framework="numpy") as file:
        header = file.metadata() or {}
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a safetensors handle, not a dict
    if header["sha256"] != _digest(arrays, header["facts"]):
        raise ValueError("the checksum does not match")
    facts: Dict[str, Any] = json.loads(header["facts"])
    return arrays, facts


def _set_aside(path: Path, reason: str) -> None:
    logger.error("%s is set aside: %s", path, reason)
    with contextlib.suppress(OSError):
        path.rename(path.with_suffix(".aside"))


def _digest(arrays: Arrays, facts: str) -> str:
    digest = hashlib.sha256(facts.encode())
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()
