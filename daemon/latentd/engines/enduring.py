"""A frozen stage that outlives a device without memory: smaller batches first, then the CPU.

Belongs to the thread that encodes, as every stage does; `shortage` may be read by any thread. Going over to the CPU blocks that thread for
the second that the other engine takes to load: what waits in the queue is answered after it.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from typing import Callable, List, Optional, Tuple

import numpy as np
from numpy.typing import NDArray

from latentd.config import Config
from latentd.engines.artefacts import Artefacts
from latentd.engines.choose import Attempt, Choice, Pending, agreement
from latentd.engines.stage import Encoded, FrozenStage, StageSpec, stage_spec
from latentd.errors import EngineError, OutOfMemory
from latentd.trouble import FAILURES, free_cached, is_shortage
from latentd.vision.checkpoints import Backbone
from latentd.vision.probe import probe_images

log = logging.getLogger(__name__)

GROW_AFTER_S = 60.0  # without a shortage: then batches may be twice as large again
PATIENCE_S = (0.0, 0.1)  # waits before one image is tried again: a learning step that holds the memory ends meanwhile


@dataclass(frozen=True)
class Shortage:
    """count: runs that memory did not suffice for. largest_batch: images that a run may take since; None: as many as configured.

    moved_from: the engine that gave up, where the CPU serves in its place; reason: what it said last.
    """

    count: int = 0
    largest_batch: Optional[int] = None
    reason: Optional[str] = None
    moved_from: Optional[str] = None


class EnduringStage:
    """FrozenStage around another one. open_on_host: the stage on the CPU that takes its place when even one image is too much, and stays
    until the next start; None where it is on the CPU already. Raises OutOfMemory where that has no memory either.
    """

    def __init__(
        self,
        stage: FrozenStage,
        open_on_host: Optional[Callable[[], FrozenStage]] = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self.lanes = stage.lanes
        self.shortage = Shortage()
        self._stage: Optional[FrozenStage] = stage
        self._spec, self._name = stage.spec, stage.name
        self._open_on_host = open_on_host
        self._clock, self._pause = clock, pause
        self._changed_at = clock()

    @property
    def name(self) -> str:
        return self._name

    @property
    def spec(self) -> StageSpec:
        return self._spec

    def encode(self, pixels: NDArray[np.uint8], tokens: bool = False, shared: bool = False) -> Encoded:
        parts: List[Encoded] = []
        start = 0
        while start < len(pixels):
            chunk = pixels[start : start + self._most(len(pixels))]
            found = self._tried(chunk, tokens, shared)
            if found is None and len(chunk) == 1:
                found = self._one(chunk, tokens, shared)
            if found is not None:
                parts.append(found)
                start += len(chunk)
        return parts[0] if len(parts) == 1 else _joined(parts)

    def close(self) -> None:
        if self._stage is not None:
            self._stage.close()

    def _tried(self, pixels: NDArray[np.uint8], tokens: bool, shared: bool) -> Optional[Encoded]:
        """None: it was too much at once."""
        if self._stage is None:
            raise EngineError("the CPU could not take over from an engine without memory")
        try:
            return self._stage.encode(pixels, tokens, shared)
        except FAILURES as error:
            if not is_shortage(error):
                raise
            self._note(len(pixels), str(error))
        free_cached()  # here, not above: an exception that is being handled keeps every tensor of the failed run
        return None

    def _one(self, pixels: NDArray[np.uint8], tokens: bool, shared: bool) -> Encoded:
        """One image that memory did not suffice for: again after others have let go of some, then on the CPU."""
        for wait_s in PATIENCE_S:
            self._pause(wait_s)
            found = self._tried(pixels, tokens, shared)
            if found is not None:
                return found
        if self._open_on_host is not None:
            self._move(self._open_on_host)
            found = self._tried(pixels, tokens, shared)
            if found is not None:
                return found
        raise OutOfMemory(f"{self._name} has no memory for one image: {self.shortage.reason}")

    def _move(self, open_on_host: Callable[[], FrozenStage]) -> None:
        """Goes over to the CPU. The engine that gave up is closed first: on a shared memory the other one needs what it holds."""
        failing, self._stage, self._open_on_host = self._stage, None, None
        assert failing is not None, "it has just been tried"
        log.error("%s has no memory for one image; the CPU takes over until the next start", failing.name)
        failing.close()
        free_cached()
        self._stage = open_on_host()
        self._name = self._stage.name
        self.shortage = replace(self.shortage, moved_from=failing.name, largest_batch=None)

    def _note(self, images: int, said: str) -> None:
        largest = max(1, images // 2)
        log.warning("%s: no memory for %d images, %d at once from now on: %s", self._name, images, largest, said)
        self._changed_at = self._clock()
        self.shortage = replace(self.shortage, count=self.shortage.count + 1, largest_batch=largest, reason=said)

    def _most(self, images: int) -> int:
        """How many of these images one run takes now. Grows back with time, for what took the memory may be gone."""
        largest, now = self.shortage.largest_batch, self._clock()
        if largest is None:
            return images
        if now - self._changed_at >= GROW_AFTER_S and images > largest:
            self._changed_at = now
            largest *= 2
            self.shortage = replace(self.shortage, largest_batch=largest if largest < images else None)
        return largest


def enduring(choice: Choice, config: Config, backbone: Backbone) -> Choice:
    """The same choice, every stage of which, also one that is built later, outlives a device without memory."""

    def endured(stage: FrozenStage) -> EnduringStage:
        return EnduringStage(stage, None if _is_on_host(stage) else lambda: open_on_host(config, backbone))

    def later(pending: Pending) -> Pending:
        def attempt() -> Tuple[Optional[FrozenStage], Attempt]:
            stage, made = pending.attempt()
            return (None if stage is None else endured(stage)), made

        return pending._replace(attempt=attempt)

    return choice._replace(stage=endured(choice.stage), pending=tuple(map(later, choice.pending)))


def open_on_host(config: Config, backbone: Backbone) -> FrozenStage:
    """The best engine on the CPU that passes the gate. Raises EngineError where there is none."""
    artefacts = Artefacts(backbone, stage_spec(config, backbone), config.cache_dir)
    said: List[str] = []
    for open_one in (_open_onnx, _open_eager):
        try:
            stage = open_one(config, artefacts)
            probes = probe_images(stage.spec.image_size)
            cosine = agreement(stage, probes, artefacts.reference(), config.engine.max_batch)
        except (EngineError, ImportError) as cause:
            said.append(str(cause))
            continue
        if cosine >= config.engine.min_cosine:
            return stage
        stage.close()
        said.append(f"{stage.name}: cosine with eager PyTorch {cosine:.6f}")
    raise EngineError(f"no engine can serve on the CPU: {'; '.join(said)}")


def _open_onnx(config: Config, artefacts: Artefacts) -> FrozenStage:
    from latentd.engines.onnx import OnnxStage

    return OnnxStage(artefacts.spec, artefacts.graph(), "CPUExecutionProvider", config.engine.threads)


def _open_eager(config: Config, artefacts: Artefacts) -> FrozenStage:
    from latentd.engines.eager import EagerStage

    return EagerStage(artefacts.spec, artefacts.vit(), "cpu", config.engine.threads)


def _is_on_host(stage: FrozenStage) -> bool:
    """onnxruntime-cpu, eager-cpu: engines say in their names where they compute."""
    return "cpu" in stage.name.split("-")


def _joined(parts: List[Encoded]) -> Encoded:
    tokens = [part.tokens for part in parts if part.tokens is not None]
    return Encoded(np.concatenate([part.features for part in parts]), np.concatenate(tokens) if tokens else None)
