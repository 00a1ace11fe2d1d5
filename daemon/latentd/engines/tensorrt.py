"""The frozen stage as a TensorRT plan: loaded and run by tensor names, which 8.5, 8.6, 10 and 11 have alike. Needs no torch of its own.

Building plans is tensorrt_build's. TensorRT says "no" by None and False instead of raising: every one is checked here.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import Any, Deque, Dict, Tuple

import numpy as np
from numpy.typing import NDArray

from latentd.engines.device import DeviceMemory
from latentd.engines.stage import Encoded, StageSpec
from latentd.errors import EngineError
from latentd.trouble import is_shortage

log = logging.getLogger(__name__)

ALIGNMENT = 256  # bytes: what TensorRT asks of every tensor's address


class PlanRefused(EngineError):
    """TensorRT does not take the plan: built by another version, on another GPU, or damaged."""


class TensorRtStage:
    """FrozenStage over one engine and one execution context; one thread at a time may call `encode`.

    Buffers for max_batch images are allocated once, so their addresses never change. Raises PlanRefused, or EngineError where the plan is
    for another graph or the device has no memory left.
    """

    lanes = 1

    def __init__(self, spec: StageSpec, name: str, plan: bytes, max_batch: int, memory: DeviceMemory) -> None:
        import tensorrt as trt

        self.spec, self.name, self.max_batch = spec, name, max_batch
        self._memory = memory
        self._batch = 0  # the batch that the context's shapes are set for
        self._logger = make_logger(trt)
        try:
            self._runtime = trt.Runtime(self._logger)
        except TypeError as cause:  # pybind11's way to say that the factory gave none
            raise EngineError(f"TensorRT {trt.__version__} can't use the GPU: {self._said()}") from cause
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise _refusal(f"TensorRT {trt.__version__} does not load the plan: {self._said()}")
        self._require_interface(trt)
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise EngineError(f"no memory for {name}'s execution context: {self._said()}")
        self._buffers = self._allocate()

    def encode(self, pixels: NDArray[np.uint8], tokens: bool = False, shared: bool = False) -> Encoded:
        try:
            return self._run(pixels, tokens)
        except RuntimeError as cause:  # torch reports every device failure as one
            self._batch = 0
            raise EngineError(f"{self.name} failed on {len(pixels)} images: {cause}") from cause

    def close(self) -> None:
        self._context = None  # before its engine, and that before its runtime
        self._engine = None
        self._runtime = None
        self._buffers = {}

    def _run(self, pixels: NDArray[np.uint8], tokens: bool) -> Encoded:
        B = len(pixels)
        if self._batch != B:
            self._set_batch(B)
        self._memory.upload(pixels, self._buffers["pixels"])
        if not self._context.execute_async_v3(self._memory.stream):
            raise EngineError(f"{self.name} failed on {B} images: {self._said()}")
        features = self._memory.download(self._buffers["features"], B)
        return Encoded(features, self._memory.download(self._buffers["tokens"], B) if tokens else None)

    def _set_batch(self, B: int) -> None:
        self._batch = 0
        shapes = self._shapes(B)
        if not self._context.set_input_shape("pixels", shapes["pixels"]):
            raise EngineError(f"{self.name} takes no batch of {B} images: {self._said()}")
        for name, shape in shapes.items():
            found = tuple(self._context.get_tensor_shape(name))
            if found != shape:
                raise EngineError(f"{self.name} gives {name} the shape {found}, {shape} was expected")
        self._batch = B

    def _shapes(self, B: int) -> Dict[str, Tuple[int, ...]]:
        spec = self.spec
        return {
            "pixels": (B, 3, spec.image_size, spec.image_size),
            "features": (B, spec.features_width),
            "tokens": (B, spec.tokens, spec.width),
        }

    def _require_interface(self, trt: Any) -> None:
        """The plan has the graph's inputs and outputs, in float32, and room for max_batch images."""
        engine = self._engine
        shapes = self._shapes(-1)
        names = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
        if names != set(shapes):
            raise PlanRefused(f"the plan has the tensors {sorted(names)}, {sorted(shapes)} were expected")
        for name, shape in shapes.items():
            mode = trt.TensorIOMode.INPUT if name == "pixels" else trt.TensorIOMode.OUTPUT
            fits = engine.get_tensor_mode(name) == mode and engine.get_tensor_dtype(name) == trt.float32
            found = tuple(engine.get_tensor_shape(name))
            known = [side if side != -1 else wanted for side, wanted in zip(found, shape)]  # -1: it is not told before the first run
            if not fits or len(found) != len(shape) or tuple(known) != shape:
                raise PlanRefused(f"the plan's {name} has the shape {found}, {shape} in float32 was expected")
        largest, *_ = engine.get_tensor_profile_shape("pixels", 0)[2]
        if largest < self.max_batch:
            raise PlanRefused(f"the plan takes {largest} images at once, {self.max_batch} were expected")

    def _allocate(self) -> Dict[str, Any]:
        try:
            buffers = {name: self._memory.floats(*shape) for name, shape in self._shapes(self.max_batch).items()}
        except RuntimeError as cause:
            raise EngineError(f"no device memory for {self.max_batch} images: {cause}") from cause
        for name, buffer in buffers.items():
            address = buffer.data_ptr()
            if address % ALIGNMENT or not self._context.set_tensor_address(name, address):
                raise EngineError(f"TensorRT does not take address {address:#x} for {name}: {self._said()}")
        return buffers

    def _said(self) -> str:
        """Why the last call was refused, in TensorRT's words."""
        said = "; ".join(self._logger.errors)
        self._logger.errors.clear()
        return said or "it does not say why"


def _refusal(reason: str) -> EngineError:
    """TensorRT says None to a plan that is not for it, and to one for which it has no memory."""
    failed = EngineError(reason)
    return failed if is_shortage(failed) else PlanRefused(reason)


def make_logger(trt: Any) -> Any:
    """An ILogger that keeps the last errors, which say why something was None or False, and passes them and warnings on to our log: a
    process that dies has said there why."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # pybind11 wants it called by this name
            self.errors: Deque[str] = deque(maxlen=4)

        def log(self, severity: Any, msg: str) -> None:
            """On any thread of TensorRT's; must not raise."""
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(msg.strip())
                log.info("TensorRT: %s", msg.strip())
            elif severity == trt.ILogger.WARNING:
                log.debug("TensorRT: %s", msg.strip())

    return Logger()
