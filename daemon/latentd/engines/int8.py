"""The frozen stage in INT8 on ONNX Runtime's CPU provider: calibrated, measured, and opened in the spelling that wins on this machine.

Used by whoever starts the daemon. The first start of a machine blocks for some seconds while it calibrates on the probe images and times
what it made against the float graph; what it measured is kept in the cache under all that it depends on. Nothing that is taught takes part:
the graph follows from the weights alone, so it can be made again at any time, and there is nothing in it to forget.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import platform
import statistics
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence

import numpy as np
from numpy.typing import NDArray

from latentd.engines.artefacts import Artefacts
from latentd.engines.onnx import CPU, OnnxStage, runtime_errors, usable_cores
from latentd.engines.quantize import QUANTIZER_VERSION, Tap, sources, tapped
from latentd.engines.quantize_cpu import dynamic, scored, static
from latentd.engines.stage import Encoded, FrozenStage, planar
from latentd.errors import EngineError
from latentd.files import replacing
from latentd.vision.probe import probe_images

log = logging.getLogger(__name__)

SPELLINGS: Mapping[str, Callable[[bytes, Mapping[str, Tap], bool], bytes]] = {"dynamic": dynamic, "static": static, "scored": scored}
FLOAT = "float"
GAIN = 1.1  # an INT8 stage that is not this much faster than the float one is not worth its error
_ROUNDS = 5


class Timings(NamedTuple):
    """Seconds an image, by spelling and FLOAT: the median of interleaved rounds."""

    seconds: Mapping[str, float]

    def gain(self, spelling: str) -> float:
        return self.seconds[FLOAT] / max(self.seconds[spelling], 1e-9)

    def fastest_first(self) -> List[str]:
        """The spellings that are worth it."""
        worth = [spelling for spelling in SPELLINGS if self.gain(spelling) >= GAIN]
        return sorted(worth, key=lambda spelling: self.seconds[spelling])


def open_int8(artefacts: Artefacts, threads: int, fits: Callable[[FrozenStage], Optional[str]]) -> FrozenStage:
    """The fastest INT8 stage that fits. fits: None, or why the stage may not serve.

    Raises EngineError with every reason where none does.
    """
    timings = _timings(artefacts, threads)
    reasons = [
        f"{spelling}: {timings.gain(spelling):.2f} times as fast as float on this machine, {GAIN:g} are needed"
        if math.isfinite(timings.seconds[spelling])
        else f"{spelling}: it can't be opened: see the log"
        for spelling in SPELLINGS
        if spelling not in timings.fastest_first()
    ]
    for spelling in timings.fastest_first():
        stage = open_spelling(artefacts, spelling, threads)
        reason = fits(stage)
        if reason is None:
            log.info("INT8 %s: %.2f times as fast as float here", spelling, timings.gain(spelling))
            return stage
        stage.close()
        reasons.append(f"{spelling}: {reason}")
    raise EngineError("; ".join(reasons))


class Int8Stage:
    """FrozenStage over the graph that computes of its last block what features need, and over a second one, opened by whoever first asks
    for tokens of that block. Raises EngineError where the first can't be made or opened, `encode` where the second can't."""

    def __init__(self, artefacts: Artefacts, spelling: str, threads: int) -> None:
        self._open = functools.partial(_open_graph, artefacts, spelling, threads)
        self._features = self._open(tokens=False)
        self._whole: Optional[OnnxStage] = None if artefacts.spec.split == artefacts.backbone.shape.depth else self._features
        self._opening = threading.Lock()
        self.spec, self.name, self.lanes = self._features.spec, self._features.name, self._features.lanes

    def encode(self, pixels: NDArray[np.uint8], tokens: bool = False, shared: bool = False) -> Encoded:
        stage = self._giving_tokens() if tokens else self._features
        return stage.encode(pixels, tokens, shared)

    def close(self) -> None:
        self._features.close()
        if self._whole is not None:
            self._whole.close()

    def _giving_tokens(self) -> OnnxStage:
        with self._opening:
            if self._whole is None:
                self._whole = self._open(tokens=True)
            return self._whole


def open_spelling(artefacts: Artefacts, spelling: str, threads: int) -> Int8Stage:
    """One spelling, whatever it is worth."""
    return Int8Stage(artefacts, spelling, threads)


def _open_graph(artefacts: Artefacts, spelling: str, threads: int, tokens: bool) -> OnnxStage:
    kind = f"int8-{spelling}-tokens" if tokens else f"int8-{spelling}"
    graph = artefacts.derived(f"{kind}-{QUANTIZER_VERSION}", lambda content: _quantized(artefacts, content, spelling, tokens))
    return OnnxStage(artefacts.spec, graph, CPU, threads, kind=f"-int8-{spelling}", alone=True)


def calibrated(graph: bytes, pixels: NDArray[np.uint8]) -> Dict[str, Tap]:
    """What enters each linear layer when these images (n, S, S, 3) pass the graph. EngineError where ONNX Runtime can't run it."""
    layers = sources(graph)
    names = list(dict.fromkeys(layers.values()))
    taps: Dict[str, Tap] = {}
    session = _session(tapped(graph))
    try:
        for start in range(len(pixels)):  # one at a time: what enters fifty layers takes thirty megabytes an image
            found = dict(zip(names, session.run(names, {"pixels": planar(pixels[start : start + 1])})))
            for layer, source in layers.items():
                tap = Tap.of(found[source])
                taps[layer] = taps[layer].joined(tap) if layer in taps else tap
    except runtime_errors() as cause:
        raise EngineError(f"the graph can't be calibrated: {cause}") from cause
    return taps


def _quantized(artefacts: Artefacts, graph: bytes, spelling: str, tokens: bool) -> bytes:
    log.info("quantizing %s to INT8, %s", artefacts.backbone.name, spelling)
    return SPELLINGS[spelling](graph, calibrated(graph, probe_images(artefacts.spec.image_size)), tokens)


def _session(graph: bytes) -> Any:
    try:
        import onnxruntime
    except ImportError as cause:
        raise EngineError("calibrating needs the onnxruntime package", hint="python -m pip install onnxruntime") from cause
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(graph, options, providers=[CPU])
    except runtime_errors() as cause:
        raise EngineError(f"ONNX Runtime does not take the graph: {cause}") from cause


def _timings(artefacts: Artefacts, threads: int) -> Timings:
    """As measured on this machine before, or now."""
    identity = _identity(threads)
    path = artefacts.note(f"int8-{QUANTIZER_VERSION}")
    kept = _kept(path, identity)
    if kept is None:
        kept = _measured(artefacts, threads)
        if not all(math.isfinite(taken) for taken in kept.seconds.values()):
            return kept  # what failed is tried again at the next start
        try:
            with replacing(path) as temporary:
                temporary.write_text(json.dumps({"machine": identity, "seconds": dict(kept.seconds)}), encoding="utf-8")
        except OSError as cause:  # the next start measures again
            log.warning("%s can't be written: %s", path, cause)
    return kept


def _measured(artefacts: Artefacts, threads: int) -> Timings:
    stages: Dict[str, FrozenStage] = {FLOAT: OnnxStage(artefacts.spec, artefacts.graph(), CPU, threads)}
    try:
        failed = {}
        for spelling in SPELLINGS:
            try:
                stages[spelling] = open_spelling(artefacts, spelling, threads)
            except EngineError as cause:  # an older ONNX Runtime may lack an operator of one alone
                failed[spelling] = cause.detail
                log.warning("INT8 %s: %s", spelling, cause.detail)
        if len(failed) == len(SPELLINGS):
            raise EngineError("; ".join(f"{spelling}: {detail}" for spelling, detail in failed.items()))
        seconds = interleaved(list(stages.values()), probe_images(artefacts.spec.image_size)[:1], _ROUNDS)
    finally:
        for stage in stages.values():
            stage.close()
    found = {name: statistics.median(each) for name, each in zip(stages, seconds)}
    return Timings({**dict.fromkeys(failed, math.inf), **found})


def interleaved(stages: Sequence[FrozenStage], pixels: NDArray[np.uint8], rounds: int) -> List[List[float]]:
    """Seconds that each stage took for these images in each round, after one that does not count. A stage's turns are spread over the whole
    time, so that what else the machine does falls on all alike."""
    seconds: List[List[float]] = [[] for _ in stages]
    for turn in range(rounds + 1):
        for stage, times in zip(stages, seconds):
            began = time.perf_counter()
            stage.encode(pixels)
            if turn:
                times.append(time.perf_counter() - began)
    return seconds


def _identity(threads: int) -> Dict[str, Any]:
    """What the timings depend on besides the graphs."""
    import onnxruntime

    return {"onnxruntime": onnxruntime.__version__, "processor": _processor(), "cores": threads or usable_cores()}


def _processor() -> str:
    """Its name and what it can do: a name alone is that of a virtual machine, perhaps."""
    wanted = ("model name", "flags", "CPU implementer", "CPU part", "Features")
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.machine()
    found = {line.split(":")[0].strip(): line.split(":", 1)[1].strip() for line in lines if ":" in line}
    return "; ".join(found[key] for key in wanted if key in found) or platform.machine()


def _kept(path: Path, identity: Dict[str, Any]) -> Optional[Timings]:
    try:
        found = json.loads(path.read_bytes())
        seconds = {name: float(found["seconds"][name]) for name in (FLOAT, *SPELLINGS)}
        return Timings(seconds) if found["machine"] == identity else None
    except (OSError, ValueError, TypeError, KeyError):
        return None
