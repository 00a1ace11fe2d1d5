"""The runtime's half of the stand-in: unpacks a "plan" and runs its graph in ONNX Runtime, between addresses, as execute_async_v3 does."""

from __future__ import annotations

import ctypes
import json
import threading
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
import onnxruntime

from standin.building import MAGIC, fault, gpu, require_logger

ALIGNMENT = 256
VERSION_MISMATCH = (
    "Error Code 1: Serialization (Serialization assertion stdVersionRead == serializationVersion failed.Version tag does not match. "
    "Note: Current Version: {}, Serialized Engine Version: {})"
)


class Runtime:
    _trt: Any = None

    def __init__(self, logger: Any) -> None:
        self._logger = require_logger(logger)
        if fault() == "no gpu":
            raise TypeError("pybind11::init(): factory function returned nullptr")

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> Any:
        if fault() == "no memory to load":
            return self._refuse("1: [defaultAllocator.cpp::allocate::20] Error Code 1: Cuda Runtime (out of memory)")
        if not serialized_engine.startswith(MAGIC):
            return self._refuse("1: [stdArchiveReader.cpp] Serialization assertion magicTagRead == kMAGIC_TAG failed.")
        line, graph = serialized_engine[len(MAGIC) :].split(b"\n", 1)
        head = json.loads(line)
        if head["version"] != self._trt.__version__:
            return self._refuse(VERSION_MISMATCH.format(self._trt.__version__, head["version"]))
        if head["gpu"] != gpu() or fault() == "refuses":
            return self._refuse("6: The engine plan file is generated on an incompatible device")
        return self._trt.ICudaEngine(head, graph, self._logger)

    def _refuse(self, why: str) -> None:
        self._logger.log(self._trt.ILogger.ERROR, why)


class ICudaEngine:
    _trt: Any = None

    def __init__(self, head: Dict[str, Any], graph: bytes, logger: Any) -> None:
        self._head, self._logger = head, logger
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self._inputs = {value.name: value for value in self._session.get_inputs()}
        self._tensors = {**self._inputs, **{value.name: value for value in self._session.get_outputs()}}

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    def get_tensor_name(self, index: int) -> str:
        return str(list(self._tensors)[index])

    def get_tensor_mode(self, name: str) -> Any:
        return self._trt.TensorIOMode.INPUT if name in self._inputs else self._trt.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return {"tensor(float)": self._trt.float32}.get(self._tensors[name].type, self._trt.float16)

    def get_tensor_shape(self, name: str) -> List[int]:
        return [side if isinstance(side, int) else -1 for side in self._tensors[name].shape]

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> List[List[int]]:
        assert profile_index == 0
        return [list(shape) for shape in self._head["profile"][name]]

    def create_execution_context(self) -> Any:
        return None if fault() == "no context" else self._trt.IExecutionContext(self)


class IExecutionContext:
    _trt: Any = None

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._shape: Optional[Tuple[int, ...]] = None
        self._addresses: Dict[str, int] = {}
        self._busy = threading.Lock()

    def set_input_shape(self, name: str, shape: Any) -> bool:
        if any(type(side) is not int for side in shape):
            raise TypeError("set_input_shape(): incompatible function arguments")
        low, _, high = self._engine._head["profile"].get(name, ((), (), ()))
        fits = len(shape) == len(low) and all(a <= side <= b for a, side, b in zip(low, shape, high))
        if not fits or fault() == "no shape":
            return self._refuse(f"3: [executionContext.cpp::setInputShape] {tuple(shape)} is not in the profile of {name}")
        self._shape = tuple(shape)
        return True

    def get_tensor_shape(self, name: str) -> List[int]:
        batch = self._shape[0] if self._shape else -1
        return [batch, *self._engine.get_tensor_shape(name)[1:]]

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self._engine._tensors or memory == 0 or memory % ALIGNMENT:
            return self._refuse(f"3: [executionContext.cpp::setTensorAddress] {memory:#x} is no aligned address for {name}")
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        """Stricter than the real one in this: the default stream, which it only warns of, is refused."""
        if self._shape is None or set(self._addresses) != set(self._engine._tensors) or stream_handle == 0:
            return self._refuse("3: [executionContext.cpp::enqueueV3] an address, a shape or the stream is missing")
        if fault() == "execute" or not self._busy.acquire(blocking=False):
            return self._refuse("1: [genericReformat.cuh] Cuda Runtime (an illegal memory access was encountered)")
        try:
            self._execute(self._shape)
        finally:
            self._busy.release()
        return True

    def _execute(self, shape: Tuple[int, ...]) -> None:
        outputs = [name for name in self._engine._tensors if name not in self._engine._inputs]
        found = self._engine._session.run(outputs, {"pixels": _floats(self._addresses["pixels"], shape).copy()})
        for name, values in zip(outputs, found):
            target = _floats(self._addresses[name], values.shape)
            target[...] = np.inf if self._engine._head["overflow"] else values

    def _refuse(self, why: str) -> bool:
        self._engine._logger.log(self._trt.ILogger.ERROR, why)
        return False


def _floats(address: int, shape: Tuple[int, ...]) -> Any:
    """The memory at an address as a float32 array."""
    cells: Any = (ctypes.c_float * int(np.prod(shape))).from_address(address)
    return np.frombuffer(cells, dtype=np.float32).reshape(shape)
