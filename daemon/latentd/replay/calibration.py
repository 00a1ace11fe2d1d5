"""What a codec must be told about latents before it stores the first: measured once, kept beside the journal, never changed.

The per-tensor kind needs the range of the values, read off the latents of probe images, and the scattered kind their mean, from drawn
images: it must be there before the first image is taught and may hold nothing of what is taught, which could not be forgotten again. The
other kinds need no calibration. Called once at start, on the main thread; blocks on the disk and, at the first start, on the frozen stage.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any, Callable, Mapping

import numpy as np

from latentd.errors import CheckpointError, ConfigError
from latentd.replay.rotation import Floats
from latentd.vision.tensorfile import read_tensors, write_tensors

FILE = "calibration.safetensors"
_NAME = "parameters"

log = logging.getLogger(__name__)


def kept(path: Path, facts: Mapping[str, Any], taught: bool, measure: Callable[[], Floats]) -> Floats:
    """The parameters in this file; measured and written first where nothing was taught yet and it is missing, damaged or for other facts.

    facts: JSON-able; what the parameters depend on: codec, backbone, image size. taught: whether the journal holds anything, whose meaning
    other parameters would change: then such a file is a ConfigError. So is a folder that can't be written to.
    """
    wanted = json.dumps(dict(facts), sort_keys=True)
    try:
        return _read(path, wanted)
    except CheckpointError as cause:
        if taught:
            raise ConfigError(
                f"what was taught can't be read without its calibration: {cause.detail}",
                hint=f"Put {path.name} back from a backup and the configuration back to what it was, or start with an empty state folder "
                "(--state-dir) and teach again.",
            ) from cause
        if path.exists():
            log.warning("calibrating again, nothing was taught yet: %s", cause.detail)
    parameters = np.ascontiguousarray(measure(), dtype=np.float32)
    try:
        write_tensors(path, {_NAME: parameters}, {"facts": wanted, "sha256": _digest(parameters, wanted)})
    except OSError as cause:
        raise ConfigError(f"the calibration can't be written to {path}: {cause.strerror}", hint="Free some disk space.") from cause
    return parameters


def _read(path: Path, wanted: str) -> Floats:
    """Raises CheckpointError for a file that is not there, not whole, or for other facts."""
    tensors, header, _ = read_tensors(path)
    facts, digest = header.metadata.get("facts", ""), header.metadata.get("sha256")
    if list(tensors) != [_NAME] or digest != _digest(tensors[_NAME], facts):
        raise CheckpointError(f"the checksum of {path} does not match")
    if facts != wanted:
        raise CheckpointError(f"{path} was made for {facts}, not for {wanted}")
    return np.array(tensors[_NAME])


def _digest(parameters: Floats, facts: str) -> str:
    return hashlib.sha256(facts.encode() + parameters.astype("<f4").tobytes()).hexdigest()
