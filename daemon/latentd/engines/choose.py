"""Which engine serves: the first in the configured order that loads and agrees with eager PyTorch on the probe images.

Runs once, on whoever starts the daemon; blocks while engines load (a fraction of a second warm, seconds when a graph must be exported).
An engine that must be built first, which takes minutes, is left pending for latentd.engines.upgrade, and the next in line serves.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import logging
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Callable, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from numpy.typing import NDArray

from latentd.config import Config
from latentd.engines.artefacts import Artefacts, Reference
from latentd.engines.device import CudaMemory, DeviceMemory
from latentd.engines.onnx import CPU, engine_name
from latentd.engines.plans import NotBuilt
from latentd.engines.stage import FrozenStage, stage_spec
from latentd.errors import ConfigError, EngineError
from latentd.vision.checkpoints import Backbone
from latentd.vision.probe import probe_images

if TYPE_CHECKING:
    from latentd.engines.compiling import PlanEngine, Report

log = logging.getLogger(__name__)

ENGINES = ("tensorrt", "onnxruntime", "eager")
Build = Callable[["Report", threading.Event], None]
Images = Sequence[NDArray[np.uint8]]  # (S, S, 3) each
JUDGES = 8  # images besides the probes that an INT8 plan is asked about: seconds of eager PyTorch on a board's processor


@dataclass(frozen=True)
class Attempt:
    """What became of one engine. state: serving, passed over (it disagreed), unavailable (it did not load), not tried, waiting (it must be
    built first), building, or replaced (it served until a better one was built).

    cosine: the least agreement of any class or patch token with eager PyTorch; None where it was not measured. progress: of the build, 0 to
    1; None where it is not known.
    """

    engine: str
    state: str
    reason: str
    cosine: Optional[float] = None
    seconds: float = 0.0
    progress: Optional[float] = None


class Pending(NamedTuple):
    """An engine better than the one that serves. build: blocks for minutes, EngineError where it fails. attempt: opens and gates it. lacks:
    what it should not be built without and does not have yet, or None."""

    name: str
    build: Build
    attempt: Callable[[], Tuple[Optional[FrozenStage], Attempt]]
    lacks: Callable[[], Optional[str]] = lambda: None


class Choice(NamedTuple):
    stage: FrozenStage
    attempts: Tuple[Attempt, ...]
    pending: Tuple[Pending, ...] = ()


class Candidate(NamedTuple):
    """One engine that could serve: its name as /v1/status shows it, and how to open it: EngineError where it can't be, NotBuilt where it
    can once its plan is built. int8: another bound is for it. plan: what builds it, for one that is built first."""

    name: str
    open: Callable[[], FrozenStage]
    int8: bool = False
    plan: Optional[PlanEngine] = None


def choose(
    config: Config, backbone: Backbone, device: Callable[[], DeviceMemory] = CudaMemory, images: Callable[[], Images] = tuple
) -> Choice:
    """The serving stage, what became of every engine in the order, and what can be built. device: makes the memory that TensorRT uses.
    images: what its INT8 is calibrated on besides the probe images.

    Raises ConfigError for an unknown engine or provider, CheckpointError for damaged weights, EngineError with every reason where none can
    serve.
    """
    artefacts = Artefacts(backbone, stage_spec(config, backbone), config.cache_dir)
    serving: Optional[FrozenStage] = None
    attempts: List[Attempt] = []
    pending: List[Pending] = []
    for candidate in _candidates(config, artefacts, device, images):
        if serving is not None:
            attempts.append(Attempt(candidate.name, "not tried", f"{serving.name} comes before it and serves"))
            continue
        serving, attempt = _try(candidate, artefacts, config)
        attempts.append(attempt)
        if attempt.state == "waiting" and candidate.plan is not None:
            gate = functools.partial(_try, candidate, artefacts, config, images)
            pending.append(Pending(candidate.name, candidate.plan.build, gate, candidate.plan.lacks))
        log.info("engine %s: %s, %s (%.2f s)", attempt.engine, attempt.state, attempt.reason, attempt.seconds)
    if serving is None:
        raise EngineError(
            "no engine can serve: " + "; ".join(f"{a.engine}: {a.reason}" for a in attempts),
            hint="Put another engine behind tensorrt in engine.order: it serves while the plan is built."
            if pending
            else "See engine.order and engine.providers.",
        )
    artefacts.release()
    return Choice(serving, tuple(attempts), tuple(pending))


def _try(
    candidate: Candidate, artefacts: Artefacts, config: Config, images: Callable[[], Images] = tuple
) -> Tuple[Optional[FrozenStage], Attempt]:
    """images: photographs that an INT8 plan is asked about too, when it was just built."""
    started = time.monotonic()
    try:
        stage = candidate.open()
    except NotBuilt as cause:
        return None, Attempt(candidate.name, "waiting", cause.detail, None, time.monotonic() - started)
    except EngineError as cause:
        return None, Attempt(candidate.name, "unavailable", cause.detail, None, time.monotonic() - started)
    try:
        cosine, of = min(
            (_agreement(candidate, stage, artefacts, config), ""), _on_photographs(candidate, stage, artefacts, config, images)
        )
    except EngineError as cause:
        stage.close()
        return None, Attempt(candidate.name, "passed over", cause.detail, None, time.monotonic() - started)
    found = f"cosine with eager PyTorch {cosine:.6f}{of}"
    bound = config.engine.int8_min_cosine if candidate.int8 else config.engine.min_cosine
    if not cosine >= bound:
        stage.close()
        return None, Attempt(candidate.name, "passed over", f"{found}, below {bound:g}", cosine, time.monotonic() - started)
    return stage, Attempt(candidate.name, "serving", found, cosine, time.monotonic() - started)


def _on_photographs(
    candidate: Candidate, stage: FrozenStage, artefacts: Artefacts, config: Config, images: Callable[[], Images]
) -> Tuple[float, str]:
    """What taught images say of an INT8 plan, now or, where there are none, when it was built: the mean, as single ones of photographs turn
    further than drawn ones. 1 where nobody was ever asked."""
    if candidate.plan is None or not candidate.int8:
        return 1.0, ""
    photographs = images()[:JUDGES]
    if photographs:
        pixels = np.stack(photographs)
        cosine = likeness(stage, pixels, artefacts.eager(pixels), config.engine.max_batch)
        artefacts.release()
        candidate.plan.judge(cosine)
    else:
        kept = candidate.plan.judgement
        if kept is None:
            return 1.0, ""
        cosine = kept
    return cosine, " (mean of taught images)"


def _agreement(candidate: Candidate, stage: FrozenStage, artefacts: Artefacts, config: Config) -> float:
    """Patch tokens of INT8 count only where they are learned from, and together: it turns single ones further than the answer tells."""
    learned_from = artefacts.spec.split < artefacts.backbone.shape.depth
    tokens, singly = learned_from or not candidate.int8, not candidate.int8
    return agreement(stage, probe_images(stage.spec.image_size), artefacts.reference(), config.engine.max_batch, tokens, singly)


def likeness(stage: FrozenStage, pixels: NDArray[np.uint8], reference: Reference, max_batch: int) -> float:
    """The mean cosine of the class tokens of these images with the reference; 0 where any value is NaN or infinite."""
    parts = [stage.encode(pixels[start : start + max_batch]).features for start in range(0, len(pixels), max_batch)]
    found = np.concatenate(parts)
    return float(_cosines(found, reference.features, stage.spec.width).mean()) if np.isfinite(found).all() else 0.0


def agreement(
    stage: FrozenStage, pixels: NDArray[np.uint8], reference: Reference, max_batch: int, tokens: bool = True, singly: bool = True
) -> float:
    """The least cosine of any token of any of these images with the reference; the first image also goes alone and in a lane.

    tokens: whether patch tokens are asked for, and count: singly, or all of an image as one vector. Raises EngineError where the stage
    gives NaN, infinity or another shape.
    """
    width = stage.spec.width
    spans = [(start, min(start + max_batch, len(pixels)), False) for start in range(0, len(pixels), max_batch)]
    worst = 1.0
    for start, end, shared in [(0, 1, False), (0, 1, True), *spans]:
        answer = stage.encode(pixels[start:end], tokens=tokens, shared=shared)
        worst = min(worst, _least_cosine(stage, answer.features, reference.features[start:end], width))
        if tokens:
            assert answer.tokens is not None, "tokens were asked for"
            worst = min(worst, _least_cosine(stage, answer.tokens, reference.tokens[start:end], width if singly else -1))
    return worst


def _least_cosine(stage: FrozenStage, found: NDArray[np.float32], expected: NDArray[np.float32], width: int) -> float:
    """Of vectors of this width; -1: of one vector an image."""
    if found.shape != expected.shape:
        raise EngineError(f"{stage.name} answers with shape {found.shape}, eager PyTorch with {expected.shape}")
    if not np.isfinite(found).all():
        raise EngineError(f"{stage.name} answers with NaN or infinite values")
    return float(_cosines(found, expected, width if width > 0 else int(np.prod(found.shape[1:]))).min())


def _cosines(found: NDArray[np.float32], expected: NDArray[np.float32], width: int) -> NDArray[np.float64]:
    """Of vectors of this width, in their order."""
    a, b = found.reshape(-1, width).astype(np.float64), expected.reshape(-1, width).astype(np.float64)  # (rows, D)
    scale = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosines: NDArray[np.float64] = (a * b).sum(axis=1) / np.maximum(scale, 1e-30)
    return cosines


def _candidates(config: Config, artefacts: Artefacts, device: Callable[[], DeviceMemory], images: Callable[[], Images]) -> List[Candidate]:
    found: List[Candidate] = []
    for name in config.engine.order:
        if name == "tensorrt":
            found += _tensorrt_candidates(config, artefacts, device, images)
        elif name == "onnxruntime":
            found += _onnx_candidates(config, artefacts)
        elif name == "eager":
            found += [Candidate("eager", lambda: _open_eager(config, artefacts))]
        else:
            raise ConfigError(f"engine.order names {name}, which is no engine", hint=_nearest(name, ENGINES))
    if not found:
        raise ConfigError("engine.order names no engine", hint=f"Known: {', '.join(ENGINES)}.")
    return found


def _tensorrt_candidates(
    config: Config, artefacts: Artefacts, device: Callable[[], DeviceMemory], images: Callable[[], Images]
) -> List[Candidate]:
    """INT8 where it is asked for, the configured precision and, should that not agree with eager PyTorch, FP32."""
    if importlib.util.find_spec("tensorrt") is None:
        return [Candidate("tensorrt", _refuse("tensorrt is not installed"))]
    from latentd.engines.compiling import PlanEngine

    first = ("int8",) if config.engine.precision == "int8" else ()
    precisions = dict.fromkeys((*first, config.engine.tensorrt_precision, "fp32"))
    engines = {precision: PlanEngine(config, artefacts, precision, device, images) for precision in precisions}
    return [Candidate(engine.name, engine.open, precision == "int8", engine) for precision, engine in engines.items()]


def _open_eager(config: Config, artefacts: Artefacts) -> FrozenStage:
    if importlib.util.find_spec("torch") is None:
        raise EngineError("torch is not installed")
    artefacts.reference()  # before the module moves to another device
    from latentd.engines.eager import EagerStage, best_device

    return EagerStage(artefacts.spec, artefacts.vit(), best_device(), config.engine.threads)


def _onnx_candidates(config: Config, artefacts: Artefacts) -> List[Candidate]:
    """One candidate a provider: each is a device of its own that may be absent, or compute wrongly."""
    if importlib.util.find_spec("onnxruntime") is None:
        return [Candidate("onnxruntime", _refuse("onnxruntime is not installed"))]
    import onnxruntime

    for provider in config.engine.providers:
        if provider not in onnxruntime.get_all_providers():
            raise ConfigError(
                f"engine.providers names {provider}, which ONNX Runtime does not know",
                hint=_nearest(provider, onnxruntime.get_all_providers()),
            )
    present = onnxruntime.get_available_providers()
    found: List[Candidate] = []
    for provider in config.engine.providers:
        if config.engine.precision == "int8" and provider == CPU:
            found.append(_int8_candidate(config, artefacts))
        found.append(Candidate(engine_name(provider), _onnx_opener(provider, provider in present, config, artefacts)))
    return found


def _int8_candidate(config: Config, artefacts: Artefacts) -> Candidate:
    def opened() -> FrozenStage:
        from latentd.engines.int8 import open_int8

        return open_int8(artefacts, config.engine.threads, fits)

    def fits(stage: FrozenStage) -> Optional[str]:
        cosine, bound = _agreement(candidate, stage, artefacts, config), config.engine.int8_min_cosine
        return None if cosine >= bound else f"cosine with eager PyTorch {cosine:.6f}, below {bound:g} (engine.int8_min_cosine)"

    candidate = Candidate(f"{engine_name(CPU)}-int8", opened, int8=True)
    return candidate


def _onnx_opener(provider: str, is_present: bool, config: Config, artefacts: Artefacts) -> Callable[[], FrozenStage]:
    if not is_present:
        return _refuse(f"this build of onnxruntime has no {provider}")

    def opened() -> FrozenStage:
        from latentd.engines.onnx import OnnxStage

        return OnnxStage(
            artefacts.spec, artefacts.graph(), provider, config.engine.threads, cuda_memory_bytes=config.engine.cuda_memory_bytes
        )

    return opened


def _refuse(reason: str) -> Callable[[], FrozenStage]:
    def refused() -> FrozenStage:
        raise EngineError(reason)

    return refused


def _nearest(name: str, known: Sequence[str]) -> str:
    by_lower = {each.lower(): each for each in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return f"Did you mean {by_lower[close[0]]}?" if close else f"Known: {', '.join(known)}."
