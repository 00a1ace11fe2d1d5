"""`python -m latentd.engines.tensorrt_build ORDER`: one TensorRT plan, built in a process of its own that can be killed.

It takes minutes, can't be cancelled before TensorRT 10, and takes the process with it when it goes wrong. ORDER is a BuildOrder as JSON.
stdout carries one JSON object a line: {"phase": …, "ratio": …} while it builds, {"error": …} at the end of a build that TensorRT refused.
It ends with its parent: stdin is a pipe from there, and its end of file is the end of this process.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

import numpy as np
from numpy.typing import NDArray

from latentd.engines.calibrating import entropy_calibrator
from latentd.engines.half import half, is_linear, stays_fp32
from latentd.engines.int8 import calibrated
from latentd.engines.plans import PlanCache, PlanKey
from latentd.engines.quantize import smoothed, with_casts
from latentd.engines.tensorrt import make_logger
from latentd.errors import EngineError
from latentd.files import replacing

log = logging.getLogger(__name__)

ORPHANED = 3  # exit status
_NICE = 10  # the engine that serves meanwhile goes first


@dataclass(frozen=True)
class BuildOrder:
    """What to build, and where it goes. fresh: do without the timing cache, because the last build ended badly. images: an open file with
    what INT8 is calibrated on, as .npy; -1 for none.
    """

    key: PlanKey
    graph: str
    folder: str
    fresh: bool
    images: int = -1

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> BuildOrder:
        fields = json.loads(text)
        return cls(**{**fields, "key": PlanKey(**fields["key"])})


def main(arguments: List[str]) -> int:
    logging.basicConfig(level="INFO", stream=sys.stderr, format="%(message)s")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # whoever ends the daemon sends it to the whole group; the daemon ends this process
    threading.Thread(target=_die_with_parent, daemon=True).start()
    os.nice(_NICE)
    _offer_itself()
    order = BuildOrder.from_json(arguments[1])
    try:
        plan = build(order)
    except EngineError as refused:
        _say(error=refused.detail)
        return 1
    except OSError as cause:
        _say(error=f"what the build needs can't be read: {cause}")
        return 1
    _say(phase="storing the plan")
    try:
        PlanCache(Path(order.folder)).store(order.key, plan)
    except OSError as cause:
        _say(error=f"the plan can't be stored in {order.folder}: {cause.strerror or cause}", disk=True)
        return 1
    return 0


def build(order: BuildOrder) -> bytes:
    """The plan's bytes. Raises EngineError with TensorRT's own words."""
    _say(phase="loading TensorRT")
    import tensorrt as trt

    logger = make_logger(trt)
    builder = _builder(trt, logger)
    images = _images(order)
    network = _read_graph(trt, builder, logger, order, images)
    config = _made(builder.create_builder_config(), "configuration", logger)
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, order.key.workspace_bytes)
    profile = _add_profile(builder, config, order.key)
    if order.key.precision != "fp32" and hasattr(trt.BuilderFlag, "FP16"):  # up to 10
        _prefer_fp16(trt, builder, network, config)
    if order.key.precision == "int8" and hasattr(trt.BuilderFlag, "INT8"):  # up to 10
        _prefer_int8(trt, builder, config)
        if not hasattr(trt, "IProgressMonitor"):  # up to 9: ranges come from its own calibrator, from 10 on from the graph
            _say(phase="calibrating")
            _keep_int8_to_linear_layers(trt, network)
            config.int8_calibrator = entropy_calibrator(trt, images)
            if not config.set_calibration_profile(profile):
                raise EngineError(f"TensorRT takes no calibration profile: {_last(logger)}")
    timings = PlanCache(Path(order.folder)).timing_cache(order.key)
    cache = _timing_cache(config, timings, order.fresh)
    if hasattr(config, "progress_monitor"):  # from 10 on
        config.progress_monitor = _make_monitor(trt)
    plan = _build(trt, builder, network, config, logger)
    _keep_timings(cache, timings)
    return plan


def _builder(trt: Any, logger: Any) -> Any:
    try:
        return trt.Builder(logger)
    except TypeError as cause:  # pybind11's way to say that the factory gave none
        raise EngineError(f"TensorRT {trt.__version__} can't use the GPU: {_last(logger)}") from cause


def _images(order: BuildOrder) -> NDArray[np.uint8]:
    """What INT8 is calibrated on, (n, S, S, 3); none for another precision."""
    if order.images < 0:
        return np.zeros((0, order.key.image_size, order.key.image_size, 3), np.uint8)
    with os.fdopen(order.images, "rb") as stream:
        found: NDArray[np.uint8] = np.load(stream, allow_pickle=False)
    return found


def _int8_graph(trt: Any, graph: bytes, images: NDArray[np.uint8]) -> bytes:
    """From 10 on with QuantizeLinear and DequantizeLinear; for the calibrator of those before as even as it can be had."""
    if hasattr(trt, "IProgressMonitor"):
        return with_casts(graph, calibrated(graph, images))
    try:
        return smoothed(graph, calibrated(graph, images))
    except EngineError as cause:  # no ONNX Runtime: it goes without, only less exactly
        log.info("the graph is not smoothed: %s", cause.detail)
        return graph


def _read_graph(trt: Any, builder: Any, logger: Any, order: BuildOrder, images: NDArray[np.uint8]) -> Any:
    _say(phase="reading the graph")
    flags = 0
    if hasattr(trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH"):  # needed up to 8.6, without effect in 10, gone in 11
        flags = 1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH)
    network = _made(builder.create_network(flags), "network", logger)
    graph = Path(order.graph).read_bytes()
    if order.key.precision == "int8":
        graph = _int8_graph(trt, graph, images)
    if order.key.precision != "fp32" and not hasattr(trt.BuilderFlag, "FP16"):  # 11 takes types from the graph alone
        graph = half(graph)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(graph):
        reasons = [str(parser.get_error(index)) for index in range(parser.num_errors)]
        raise EngineError(f"TensorRT {trt.__version__} can't read the graph: {'; '.join(reasons) or _last(logger)}")
    return network


def _build(trt: Any, builder: Any, network: Any, config: Any, logger: Any) -> bytes:
    _say(phase="building")
    plan = builder.build_serialized_network(network, config)
    if plan is None and hasattr(trt.BuilderFlag, "FP16") and config.get_flag(trt.BuilderFlag.FP16):  # up to 10
        log.info("no plan keeps every norm in FP32 (%s); trying again with that as a wish", _last(logger))
        config.clear_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
        config.set_flag(trt.BuilderFlag.PREFER_PRECISION_CONSTRAINTS)
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(f"TensorRT {trt.__version__} builds no plan: {_last(logger)}")
    return bytes(plan)


def _made(found: Any, what: str, logger: Any) -> Any:
    if found is None:
        raise EngineError(f"TensorRT makes no {what}: {_last(logger)}")
    return found


def _last(logger: Any) -> str:
    return "; ".join(logger.errors) or "it does not say why"


def _add_profile(builder: Any, config: Any, key: PlanKey) -> Any:
    """Any batch up to the largest; tuned for one image, which is what a camera sends."""
    profile = builder.create_optimization_profile()
    image = (3, key.image_size, key.image_size)
    profile.set_shape("pixels", (1, *image), (1, *image), (key.max_batch, *image))
    if config.add_optimization_profile(profile) < 0:
        raise EngineError(f"TensorRT takes no profile of 1 to {key.max_batch} images")
    return profile


def _prefer_fp16(trt: Any, builder: Any, network: Any, config: Any) -> None:
    """Up to 10: FP16 wherever it is faster, but for the layers that are pinned to FP32."""
    if not builder.platform_has_fast_fp16:
        raise EngineError("this GPU has no fast FP16")
    config.set_flag(trt.BuilderFlag.FP16)
    config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
    for layer in _computing(trt, network):
        if stays_fp32(layer.name):
            layer.precision = trt.float32
            for each in range(layer.num_outputs):
                layer.set_output_type(each, trt.float32)


def _computing(trt: Any, network: Any) -> Iterator[Any]:
    """The layers that compute floats: none that only hold, measure or move them."""
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        moves = layer.type in (trt.LayerType.CONSTANT, trt.LayerType.SHAPE, trt.LayerType.SHUFFLE)
        if not moves and all(layer.get_output(each).dtype == trt.float32 for each in range(layer.num_outputs)):
            yield layer


def _prefer_int8(trt: Any, builder: Any, config: Any) -> None:
    """Up to 10: INT8 where it is faster and a range is known, otherwise FP16 or FP32."""
    if not builder.platform_has_fast_int8:
        raise EngineError("this GPU has no fast INT8")
    config.set_flag(trt.BuilderFlag.INT8)


def _keep_int8_to_linear_layers(trt: Any, network: Any) -> None:
    """Up to 9, where a range is found for every value: without this, sums, GELU and attention would become INT8 too, which costs more of
    the features than it gains of the time."""
    for layer in _computing(trt, network):
        if not is_linear(layer.name) and not stays_fp32(layer.name):
            layer.precision = trt.float16


def _timing_cache(config: Any, path: Path, fresh: bool) -> Any:
    """What earlier builds measured, where this TensorRT takes it; otherwise an empty one."""
    try:
        kept = b"" if fresh else path.read_bytes()
    except OSError:
        kept = b""
    for content in (kept, b""):
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return cache
    return None


def _keep_timings(cache: Any, path: Path) -> None:
    if cache is None:
        return
    content = cache.serialize()
    try:
        if content is not None:
            with replacing(path) as temporary:
                temporary.write_bytes(bytes(content))
    except OSError as cause:  # the plan matters more
        log.info("the timing cache can't be stored: %s", cause)


def _make_monitor(trt: Any) -> Any:
    """Says how far the outermost phase is; the phases inside it only by name."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: Dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: Optional[str], num_steps: int) -> None:
            if not parent_phase:
                self._steps[phase_name] = num_steps
                _say(phase=phase_name, ratio=0.0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            steps = self._steps.get(phase_name)
            if steps:
                _say(phase=phase_name, ratio=min(1.0, (step + 1) / steps))
            return True  # go on

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

    return Monitor()


def _say(**line: Any) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def _offer_itself() -> None:
    """Where memory runs out, the system is to end this process and not the daemon."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("800", encoding="ascii")


def _die_with_parent() -> None:
    """In a thread: nothing ever comes through stdin, so a read ends with the parent."""
    os.read(0, 1)
    os._exit(ORPHANED)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
