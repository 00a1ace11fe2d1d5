"""What a frozen stage needs besides its weights, kept in the cache folder: the ONNX graph and eager PyTorch's answers to the probe images.

Used by whoever starts the daemon. A warm start reads both in a fraction of a second and never imports torch; making them takes seconds.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, NamedTuple, Optional, cast

import numpy as np
from numpy.typing import NDArray

from latentd.engines.export import EXPORTER_VERSION, export
from latentd.engines.stage import StageSpec
from latentd.errors import EngineError
from latentd.files import file_sha256, replacing
from latentd.vision.checkpoints import Backbone
from latentd.vision.probe import PROBE_VERSION, probe_images

if TYPE_CHECKING:
    from latentd.vision.vit import Vit

log = logging.getLogger(__name__)

_KEPT = 18  # files: graph, whole graph, its three INT8 spellings and probe answers of three settings of split, class tokens and image size


class Reference(NamedTuple):
    """What eager PyTorch gives for some images, in float32 on the CPU: features (P, m*D), tokens (P, N, D)."""

    features: NDArray[np.float32]
    tokens: NDArray[np.float32]


class Artefacts:
    """Graph, reference and eager module of one frozen stage; each is made when first asked for, or read from the cache.

    A cached file counts only with its sha256 beside it: one that is cut short, replaced, or from another exporter is made again. The
    folder keeps the newest few.
    """

    def __init__(self, backbone: Backbone, spec: StageSpec, cache_dir: Path) -> None:
        self.backbone, self.spec = backbone, spec
        self._folder = Path(cache_dir) / "onnx"
        identity = {**asdict(spec), "exporter": EXPORTER_VERSION, "probe": PROBE_VERSION}
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        self._stem = f"{spec.backbone_name}-{key}"
        self._vit: Optional[Vit] = None
        self._reference: Optional[Reference] = None

    def vit(self) -> Vit:
        """The eager module on the CPU; imports torch."""
        if self._vit is None:
            from latentd.vision.vit import Vit

            self._vit = Vit.load(self.backbone, self.spec.image_size)
        return self._vit

    def graph(self, whole: bool = False) -> Path:
        """The ONNX file; EngineError where it can't be exported or stored. whole: with all tokens of the last block, for whoever looks at
        what its layers get: of the class token alone a few images say little.
        """
        whole = whole and self.spec.split < self.backbone.shape.depth  # else it is so anyway
        path = self._folder / (f"{self._stem}.whole.onnx" if whole else f"{self._stem}.onnx")
        if not _is_intact(path):
            log.info("exporting %s to ONNX", self.backbone.name)
            try:
                self._store(path, lambda temporary: export(self.vit(), self.spec, temporary, whole))
            except OSError as cause:
                raise EngineError(f"the ONNX graph can't be stored in {self._folder}: {cause.strerror or cause}", hint=_SPACE) from cause
        return path

    def derived(self, kind: str, make: Callable[[bytes], bytes]) -> Path:
        """A graph made from the whole exported one, kept beside it. kind: names all that `make` depends on besides that graph. EngineError
        where it can't be made or stored.
        """
        path = self._folder / f"{self._stem}.{kind}.onnx"
        if not _is_intact(path):
            content = make(self.graph(whole=True).read_bytes())
            try:
                self._store(path, lambda temporary: _fill(temporary, content))
            except OSError as cause:
                raise EngineError(f"the {kind} graph can't be stored in {self._folder}: {cause.strerror or cause}", hint=_SPACE) from cause
        return path

    def note(self, kind: str) -> Path:
        """Where a measurement of this stage is kept; it may be missing, and counts for nothing when it can't be read."""
        return self._folder / f"{self._stem}.{kind}.json"

    def reference(self) -> Reference:
        """Eager PyTorch's answers to the probe images; computed where they can't be read, and kept in memory where they can't be stored."""
        if self._reference is None:
            path = self._folder / f"{self._stem}.probe.npz"
            self._reference = _read(path) if _is_intact(path) else self._computed(path)
        return self._reference

    def eager(self, pixels: NDArray[np.uint8]) -> Reference:
        """Eager PyTorch's answers to these images (B, S, S, 3), on the CPU."""
        from latentd.engines.eager import EagerStage

        answer = EagerStage(self.spec, self.vit()).encode(pixels, tokens=True)
        assert answer.tokens is not None, "tokens were asked for"
        return Reference(answer.features, answer.tokens)

    def release(self) -> None:
        """Lets go of the eager module, which is made again when it is asked for: 84 MB, and what waits to be built holds this object."""
        self._vit = None

    def _computed(self, path: Path) -> Reference:
        reference = self.eager(probe_images(self.spec.image_size))
        try:
            self._store(path, lambda temporary: _write(temporary, reference))
        except OSError as cause:  # the next start computes them again
            log.warning("the probe answers can't be stored in %s: %s", self._folder, cause)
        return reference

    def _store(self, path: Path, write: Callable[[Path], None]) -> None:
        """The file, then its checksum: what has no checksum was interrupted."""
        self._folder.mkdir(parents=True, exist_ok=True)
        newest_first = sorted(self._folder.glob("*.sha256"), key=lambda checksum: checksum.stat().st_mtime, reverse=True)
        for old in newest_first[_KEPT - 1 :]:
            old.unlink()
            old.with_suffix("").unlink(missing_ok=True)
        with replacing(path) as temporary:
            write(temporary)
            sha256 = file_sha256(temporary)
        with replacing(_checksum(path)) as temporary:
            temporary.write_text(f"{sha256}  {path.name}\n", encoding="ascii")


_SPACE = "Check the free space and the permissions of the cache folder (state.cache_dir)."


def _read(path: Path) -> Reference:
    with np.load(path, allow_pickle=False) as stored:
        return Reference(stored["features"], stored["tokens"])


def _fill(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _write(path: Path, reference: Reference) -> None:
    with path.open("wb") as stream:
        np.savez(stream, **cast(Any, reference._asdict()))


def _checksum(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _is_intact(path: Path) -> bool:
    try:
        recorded = _checksum(path).read_text(encoding="ascii", errors="replace").split(" ")[0]
        return file_sha256(path) == recorded
    except OSError:
        return False
