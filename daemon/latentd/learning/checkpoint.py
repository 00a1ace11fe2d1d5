"""Durable versions of the learner: one safetensors file each, written whole or not at all.

A file is complete when its name is there: temporary file, fsync, rename, fsync of the folder. Its checksum lies in its own header; a file
that does not match is passed over for the one before. Called by the learner thread; blocks on the disk.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Tuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from latentd.errors import LearnerError

logger = logging.getLogger(__name__)
Arrays = Dict[str, NDArray[Any]]


def write(folder: Path, arrays: Arrays, facts: Mapping[str, Any], keep: int) -> Path:
    """Saves a version as folder/version-NNNNNNNN.safetensors and deletes all but the newest `keep`.

    Raises LearnerError when the disk refuses.
    """
    path = folder / f"version-{facts['version']:08d}.safetensors"
    header = {"facts": json.dumps(facts), "sha256": _digest(arrays, json.dumps(facts))}
    temporary = path.with_suffix(".tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, header))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(folder)
        for old in versions(folder)[:-keep]:
            old.unlink()
    except OSError as cause:
        temporary.unlink() if temporary.exists() else None
        raise LearnerError(
            f"version {facts['version']} can't be saved in {folder}: {cause}", hint="Free some disk space; learning goes on."
        ) from cause
    return path


def newest(folder: Path) -> Optional[Tuple[Arrays, Dict[str, Any]]]:
    """The newest whole version: arrays and facts; None when there is none. Broken files are logged and passed over."""
    for path in reversed(versions(folder)):
        try:
            return _read(path)
        except (SafetensorError, OSError, ValueError, KeyError) as cause:
            logger.error("%s is broken and passed over for the version before: %s", path, cause)
    return None


def versions(folder: Path) -> List[Path]:
    """The version files, oldest first; by time of writing, because forgetting and rolling back may write an older number later."""
    return sorted(folder.glob("version-*.safetensors"), key=lambda path: (path.stat().st_mtime_ns, path.name))


def _read(path: Path) -> Tuple[Arrays, Dict[str, Any]]:
    with safe_open(str(path), framework="numpy") as file:
        header = file.metadata() or {}
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a safetensors handle, not a dict
    if header["sha256"] != _digest(arrays, header["facts"]):
        raise ValueError("the checksum does not match")
    facts: Dict[str, Any] = json.loads(header["facts"])
    return arrays, facts


def _digest(arrays: Arrays, facts: str) -> str:
    digest = hashlib.sha256(facts.encode())
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
