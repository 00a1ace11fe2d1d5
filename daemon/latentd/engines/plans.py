"""TensorRT plans in the cache folder: each under a key of everything it depends on, whole or absent, with the tries that went wrong.

Used by the thread that opens or builds the engine and by the building process. Files of one key: STEM.plan, STEM.json (its checksum and
the key in plain words, written last) and, while something is wrong, STEM.tries.json.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Dict, NamedTuple, Optional

from latentd.errors import EngineError
from latentd.files import replacing

log = logging.getLogger(__name__)

BUILD_RULES = 3
"""Part of the key: change it whenever the same graph would be built otherwise, also where it would be quantized otherwise."""
TRIES = 3  # builds or first runs of one plan that may end badly; afterwards it is left alone until something of its key changes
_KEPT = 6  # plans: three precisions before and after an upgrade


class NotBuilt(EngineError):
    """No plan in the cache fits, but one can be built."""


@dataclass(frozen=True)
class PlanKey:
    """All that a plan depends on. gpu: name, compute capability and the software under it. rules: how precisions are assigned."""

    graph_sha256: str
    tensorrt: str
    gpu: str
    precision: str
    image_size: int
    max_batch: int
    workspace_bytes: int
    rules: int = BUILD_RULES

    @property
    def stem(self) -> str:
        """The name of its files, without a suffix."""
        return f"{self.precision}-{hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]}"


class Tries(NamedTuple):
    """How many tries with one key ended badly, or did not end, and why the last one did."""

    bad: int
    reason: str


class PlanCache:
    """The folder. What is not whole counts as absent; reading never raises."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has_any(self) -> bool:
        """Whether looking for a plan can be worth loading TensorRT."""
        return any(self.folder.glob("*.plan"))

    def load(self, key: PlanKey) -> Optional[bytes]:
        """The plan, if it is whole and was built for exactly this key."""
        about = _read_json(self._path(key, ".json"))
        if about.get("key") != asdict(key):
            return None
        try:
            plan = self._path(key, ".plan").read_bytes()
        except OSError:
            return None
        return plan if hashlib.sha256(plan).hexdigest() == about.get("sha256") else None

    def store(self, key: PlanKey, plan: bytes) -> None:
        """The plan, then its checksum: what has no checksum was interrupted. The oldest plans make room. Raises OSError."""
        for stale in self.folder.glob("calibration-*.cache"):  # ranges of taught images that an earlier version kept
            stale.unlink()
        newest_first = sorted(self.folder.glob("*.plan"), key=lambda path: path.stat().st_mtime, reverse=True)
        for old in newest_first[_KEPT - 1 :]:
            old.unlink()
            old.with_suffix(".json").unlink(missing_ok=True)
        with replacing(self._path(key, ".plan")) as temporary:
            temporary.write_bytes(plan)
        _write_json(self._path(key, ".json"), {"key": asdict(key), "sha256": hashlib.sha256(plan).hexdigest()})

    def judge(self, key: PlanKey, cosine: float) -> None:
        """Keeps how near to PyTorch the plan came on photographs, which nobody has at the next start."""
        try:
            _write_json(self._path(key, ".json"), {**_read_json(self._path(key, ".json")), "photographs_cosine": cosine})
        except OSError as cause:
            log.warning("what photographs say of the plan can't be stored: %s", cause)

    def judgement(self, key: PlanKey) -> Optional[float]:
        """What `judge` has kept of this plan."""
        found = _read_json(self._path(key, ".json")).get("photographs_cosine")
        return found if isinstance(found, float) else None

    def discard(self, key: PlanKey) -> None:
        """Removes the plan: it is whole, but TensorRT refuses it."""
        for suffix in (".json", ".plan"):
            try:
                self._path(key, suffix).unlink(missing_ok=True)
            except OSError as cause:
                log.warning("%s can't be removed: %s", self._path(key, suffix), cause)

    def timing_cache(self, key: PlanKey) -> Path:
        """Measurements of kernels, shared by all plans of one TensorRT on one GPU."""
        identity = hashlib.sha256(f"{key.tensorrt} {key.gpu}".encode()).hexdigest()[:16]
        return self.folder / f"timing-{identity}.cache"

    def tries(self, key: PlanKey) -> Tries:
        found = _read_json(self._path(key, ".tries.json"))
        bad = found.get("bad")
        return Tries(bad if isinstance(bad, int) else 0, str(found.get("reason", "")))

    def begin(self, key: PlanKey, if_cut_off: str) -> None:
        """Counts a try before it is made, so that one that takes the process or the power with it is counted too. Raises OSError."""
        _write_json(self._path(key, ".tries.json"), Tries(self.tries(key).bad + 1, if_cut_off)._asdict())

    def failed(self, key: PlanKey, reason: str) -> None:
        """Says why the try that was begun went wrong."""
        self._note(key, Tries(self.tries(key).bad, reason))

    def give_back(self, key: PlanKey) -> None:
        """The try that was begun is not to be counted."""
        before = self.tries(key)
        self._note(key, Tries(before.bad - 1, before.reason))

    def forget_tries(self, key: PlanKey) -> None:
        """All is well: the plan has run."""
        self._note(key, Tries(0, ""))

    def _note(self, key: PlanKey, tries: Tries) -> None:
        path = self._path(key, ".tries.json")
        try:
            if tries.bad > 0:
                _write_json(path, tries._asdict())
            else:
                path.unlink(missing_ok=True)
        except OSError as cause:
            log.warning("%s can't be written: %s", path, cause)

    def _path(self, key: PlanKey, suffix: str) -> Path:
        return self.folder / (key.stem + suffix)


def _read_json(path: Path) -> Dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_json(path: Path, content: Dict[str, Any]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, sort_keys=True), encoding="ascii")
