"""The TensorRT engine as seen from the daemon: its plan in the cache, or a process that builds one.

`open` loads a plan (a second) on whoever asks; `build` belongs to the thread that upgrades the engine and blocks for minutes. Nothing of
TensorRT or CUDA is loaded while no plan was ever built: the first answer after a first start does not wait for it.
"""

from __future__ import annotations

import json
import os
import selectors
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Callable, Deque, Iterator, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from numpy.typing import NDArray

from latentd.config import Config
from latentd.engines.artefacts import Artefacts
from latentd.engines.device import DeviceMemory
from latentd.engines.plans import TRIES, NotBuilt, PlanCache, PlanKey
from latentd.engines.recent import ENOUGH
from latentd.engines.stage import FrozenStage
from latentd.engines.tensorrt import PlanRefused, TensorRtStage
from latentd.engines.tensorrt_build import BuildOrder
from latentd.errors import EngineError
from latentd.files import file_sha256
from latentd.trouble import Trouble, trouble_of
from latentd.vision.probe import probe_images

POLL_S = 0.5
_ROOM = 3  # times the graph's size that must be free: the plan, its temporary file, and the timing cache


class Progress(NamedTuple):
    """phase: what the builder does now. ratio: how much of that is done, 0 to 1; None where the TensorRT does not tell."""

    phase: str
    ratio: Optional[float]


Report = Callable[[Progress], None]


class Stopped(EngineError):
    """The daemon ends, and the build with it."""


class PlanEngine:
    """One precision of TensorRT for one frozen stage. device: makes the memory, EngineError where there is no GPU. images: what INT8 is
    calibrated on besides the probe images, asked for when the plan is built, (n, S, S, 3).
    """

    def __init__(
        self,
        config: Config,
        artefacts: Artefacts,
        precision: str,
        device: Callable[[], DeviceMemory],
        images: Callable[[], Sequence[NDArray[np.uint8]]] = tuple,
    ) -> None:
        self.name = f"tensorrt-{precision}"
        self._config, self._artefacts, self._precision, self._device = config.engine, artefacts, precision, device
        self._images = images
        self._cache = PlanCache(Path(config.cache_dir) / "tensorrt")
        self._known: Optional[Tuple[DeviceMemory, PlanKey]] = None

    def open(self) -> FrozenStage:
        """The stage from the cached plan, after a first run. Raises NotBuilt where none fits, EngineError where it can't run."""
        if not self._cache.has_any():
            raise NotBuilt("no plan is built yet")
        memory, key = self._identified()
        plan = self._cache.load(key)
        if plan is None:
            raise NotBuilt("no plan in the cache fits this TensorRT, GPU, graph and configuration")
        self._require_tries_left(key)
        self._begin(key, "its first run ended latentd, or was cut off")
        try:
            stage = self._first_run(plan, memory)
        except PlanRefused as refused:
            self._cache.failed(key, refused.detail)
            self._cache.discard(key)
            raise NotBuilt(refused.detail) from refused
        except EngineError as failed:
            if trouble_of(failed) is Trouble.CONTEXT:  # nothing runs on that GPU any more in this process: the plan may have done that
                self._cache.failed(key, failed.detail)
            else:  # no memory, perhaps: not the plan's fault
                self._cache.give_back(key)
            raise
        self._cache.forget_tries(key)
        return stage

    def lacks(self) -> Optional[str]:
        """What it should not be built without and does not have yet, or None."""
        have = len(self._images())
        if self._precision != "int8" or have >= ENOUGH:
            return None
        try:
            self._require_tries_left(self._identified()[1])
        except EngineError:  # there is nothing to wait for: `build` says why
            return None
        return f"INT8 is calibrated on taught images: {have} of {ENOUGH} were taught since the start"

    def judge(self, cosine: float) -> None:
        """How near to PyTorch the plan came on photographs: kept with it."""
        self._cache.judge(self._identified()[1], cosine)

    @property
    def judgement(self) -> Optional[float]:
        """What `judge` was told of the plan in the cache; None where it was not asked."""
        return self._cache.judgement(self._identified()[1])

    def build(self, report: Report, stopping: threading.Event) -> None:
        """Puts a plan into the cache. Raises EngineError with the reason where there is none in the end, Stopped when told to stop."""
        _, key = self._identified()
        if self._cache.load(key) is not None:
            return
        self._require_tries_left(key)
        graph = self._graph()
        self._require_room(graph)
        order = BuildOrder(key, str(graph), str(self._cache.folder), fresh=self._cache.tries(key).bad > 0)
        self._begin(key, "the build was cut off", must=True)
        try:
            with self._calibration() as images:
                order = replace(order, images=images)
                _Child(order, self._config.build_timeout_s).wait(report, stopping)
        except (Stopped, DiskFull, NotStarted):
            self._cache.give_back(key)
            raise
        except EngineError as failed:
            self._cache.failed(key, failed.detail)
            raise
        self._cache.give_back(key)

    def _graph(self) -> Path:
        path = self._artefacts.graph(whole=self._precision == "int8")  # a calibration looks at what layers get
        self._artefacts.release()  # it may have been exported, and this object waits
        return path

    def _identified(self) -> Tuple[DeviceMemory, PlanKey]:
        """The device and the key of its plan; loads TensorRT and CUDA."""
        if self._known is None:
            memory = self._device()
            try:
                import tensorrt
            except (ImportError, OSError) as cause:  # OSError: one of its libraries is missing
                raise EngineError(f"tensorrt can't be loaded: {cause}") from cause
            key = PlanKey(
                graph_sha256=file_sha256(self._graph()),
                tensorrt=str(tensorrt.__version__),
                gpu=memory.device,
                precision=self._precision,
                image_size=self._artefacts.spec.image_size,
                max_batch=self._config.max_batch,
                workspace_bytes=self._config.tensorrt_workspace_bytes,
            )
            self._known = memory, key
        return self._known

    def _first_run(self, plan: bytes, memory: DeviceMemory) -> FrozenStage:
        stage = TensorRtStage(self._artefacts.spec, self.name, plan, self._config.max_batch, memory)
        pixels = probe_images(self._artefacts.spec.image_size)
        try:
            for count in (1, self._config.max_batch):  # what could end the process does so while it is counted
                stage.encode(np.resize(pixels, (count, *pixels.shape[1:])))
        except EngineError:
            stage.close()
            raise
        return stage

    def _require_tries_left(self, key: PlanKey) -> None:
        tries = self._cache.tries(key)
        if tries.bad >= TRIES:
            raise EngineError(
                f"given up after {tries.bad} tries, the last: {tries.reason}; "
                f"to let it try again delete {self._cache.folder / (key.stem + '.tries.json')}"
            )

    @contextmanager
    def _calibration(self) -> Iterator[int]:
        """A file with the images that INT8 is calibrated on; -1 where none are wanted. It has no name: nothing of it outlives the build."""
        if self._precision != "int8":
            yield -1
            return
        images = np.stack([*probe_images(self._artefacts.spec.image_size), *self._images()])
        try:
            with tempfile.TemporaryFile() as stream:
                np.save(stream, images)
                stream.flush()
                stream.seek(0)
                yield stream.fileno()
        except OSError as cause:
            raise DiskFull(f"no room for the images to calibrate on: {cause.strerror or cause}") from cause

    def _require_room(self, graph: Path) -> None:
        try:
            self._cache.folder.mkdir(parents=True, exist_ok=True)
            needed, free = _ROOM * graph.stat().st_size, shutil.disk_usage(self._cache.folder).free
        except OSError as cause:
            raise EngineError(f"{self._cache.folder} can't be made: {cause.strerror or cause}") from cause
        if free < needed:
            raise EngineError(f"{self._cache.folder} has {free >> 20} MiB free, building a plan needs {needed >> 20}")

    def _begin(self, key: PlanKey, if_cut_off: str, must: bool = False) -> None:
        try:
            self._cache.begin(key, if_cut_off)
        except OSError as cause:  # a plan can be run from a folder that can't be written, but none built into it
            if must:
                raise EngineError(f"{self._cache.folder} can't be written: {cause.strerror or cause}") from cause


class DiskFull(EngineError):
    """The plan was built and could not be stored."""


class NotStarted(EngineError):
    """There was no process to build in."""


class _Child:
    """The building process and what it says."""

    def __init__(self, order: BuildOrder, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._tail: Deque[str] = deque(maxlen=5)  # its last words, should it die without an error line
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "latentd.engines.tensorrt_build", order.to_json()],
                stdin=subprocess.PIPE,  # never written: its end tells the child that we are gone
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the daemon
                pass_fds=() if order.images < 0 else (order.images,),
            )
        except OSError as cause:  # no memory for one, perhaps
            raise NotStarted(f"the building process can't be started: {cause.strerror or cause}") from cause

    def wait(self, report: Report, stopping: threading.Event) -> None:
        """Blocks until it ends; kills it when told to stop and when its time is over. Raises EngineError unless it built the plan."""
        try:
            self._follow(report, stopping)
            status = self._process.wait()
        finally:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe is not None
                pipe.close()
        if status:
            words = "; ".join(self._tail) or "it said nothing"
            how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
            raise EngineError(f"the building process {how}: {words}")

    def _follow(self, report: Report, stopping: threading.Event) -> None:
        now = Progress("starting", None)
        for line in self._lines(stopping):
            if line is not None:
                now = self._heard(line) or now
            report(now)

    def _lines(self, stopping: threading.Event) -> Iterator[Optional[str]]:
        """Its lines as they come, and None when it was silent for a moment; ends with its output."""
        assert self._process.stdout is not None
        source, began, rest = self._process.stdout.fileno(), time.monotonic(), b""
        with selectors.DefaultSelector() as ready:
            ready.register(source, selectors.EVENT_READ)
            while True:
                self._require_time(began, stopping)
                if not ready.select(POLL_S):
                    yield None
                    continue
                part = os.read(source, 1 << 16)
                if not part:
                    return
                *whole, rest = (rest + part).split(b"\n")
                yield from (line.decode("utf-8", "replace") for line in whole)

    def _require_time(self, began: float, stopping: threading.Event) -> None:
        if stopping.is_set():
            raise Stopped("latentd was stopped while the plan was built; the next start begins again")
        if self._timeout_s and time.monotonic() - began > self._timeout_s:
            raise EngineError(f"the plan was not built within {self._timeout_s:g} s (engine.build_timeout_s)")

    def _heard(self, line: str) -> Optional[Progress]:
        try:
            said = json.loads(line) if line.startswith("{") else {}
        except ValueError:
            said = {}
        if "error" in said:
            raise (DiskFull if said.get("disk") else EngineError)(str(said["error"]))
        if "phase" in said:
            return Progress(str(said["phase"]), said.get("ratio"))
        if line.strip():
            self._tail.append(line.strip())
        return None
