"""The builder's half of the stand-in: takes a network and a configuration, and packs both into a "plan".

STANDIN_FAULT in the environment makes it go wrong as the real one does, by None and False with a line in the log, or by dying.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
import threading
from typing import Any, Dict, List, Optional, Set, Tuple

import numpy as np
import onnx

MAGIC = b"standin plan\n"
KINDS = {
    **dict.fromkeys(("Reshape", "Transpose"), "SHUFFLE"),
    **dict.fromkeys(("Slice", "Split"), "SLICE"),
    **dict.fromkeys(("Erf", "Sqrt"), "UNARY"),
    "Constant": "CONSTANT",
    "Softmax": "SOFTMAX",
    "ReduceMean": "REDUCE",
    "MatMul": "MATRIX_MULTIPLY",
    "Conv": "CONVOLUTION",
    "Concat": "CONCATENATION",
    "Shape": "SHAPE",
    "Gather": "GATHER",
    "Cast": "IDENTITY",
    "Sigmoid": "ACTIVATION",
}
OVERFLOWS = {"ReduceMean", "Pow", "Softmax"}


def fault() -> str:
    return os.environ.get("STANDIN_FAULT", "")


def gpu() -> str:
    return os.environ.get("STANDIN_GPU", "Imitated sm_72")


class ILogger:
    """Subclassed by the user, who must call this constructor by name, as pybind11 demands."""

    _ready = False

    def __init__(self) -> None:
        self._ready = True


class IProgressMonitor:
    _ready = False

    def __init__(self) -> None:
        self._ready = True


class IInt8EntropyCalibrator2:
    _ready = False

    def __init__(self) -> None:
        self._ready = True


def require_logger(logger: Any) -> Any:
    if not getattr(logger, "_ready", False):
        raise TypeError("__init__(): incompatible constructor arguments: the logger's own __init__() was never called")
    return logger


class Builder:
    _version = ""
    _trt: Any = None

    def __init__(self, logger: Any) -> None:
        self._logger = require_logger(logger)
        self._calibrations = 0
        if fault() == "no gpu":
            why = "createInferBuilder: Error Code 6: API Usage Error (CUDA initialization failure with error: 999)"
            logger.log(self._trt.ILogger.ERROR, why)
            raise TypeError("pybind11::init(): factory function returned nullptr")

    @property
    def platform_has_fast_fp16(self) -> bool:
        return fault() != "slow fp16"

    @property
    def platform_has_fast_int8(self) -> bool:
        return fault() != "slow int8"

    def create_network(self, flags: int = 0) -> Any:
        return None if fault() == "no network" else self._trt.INetworkDefinition(flags)

    def create_builder_config(self) -> Any:
        return None if fault() == "no config" else self._trt.IBuilderConfig()

    def create_optimization_profile(self) -> Any:
        return self._trt.IOptimizationProfile()

    def build_serialized_network(self, network: Any, config: Any) -> Optional[bytes]:
        obeys = self._has(config, "OBEY_PRECISION_CONSTRAINTS")
        self._go_wrong()
        refusal = self._refusal(network, config)
        if fault() == "build none" or (fault() == "can't obey" and obeys) or refusal:
            return self._refuse(refusal or "4: [imitation] no implementation of a node fits the constraints")
        if not self._monitored(config):
            return None
        graph, calibration = bytes(network._graph), None
        if self._has(config, "INT8") and b"QuantizeLinear" not in graph:
            calibration = self._calibrated(config, graph)
            if calibration is None:
                return self._refuse("4: [standardEngineBuilder.cpp] Int8 calibration failed: no ranges")
            if fault() == "can't obey after calibrating" and obeys:
                return self._refuse("4: [imitation] no implementation of a node fits the constraints")
            graph = quantized(graph, calibration)
        head = {
            "version": self._trt.__version__,
            "gpu": gpu(),
            "profile": config._profiles[0]._shapes,
            "overflow": self._overflows(network, config),
            "fp16": self._has(config, "FP16"),
            "int8": self._has(config, "INT8"),
            **self._shown(config, calibration),
            "pinned": sum(layer._precision is self._trt.float32 for layer in network._layers),
            "free_for_int8": [] if calibration is None else [layer.name for layer in network._layers if layer._may_be_int8()],
            "workspace": config._pools.get("WORKSPACE"),
            "timings": config._timings._content.decode() if config._timings else None,
        }
        if config._timings:
            config._timings._content = f"{self._trt.__version__} {gpu()} measured".encode()
        return MAGIC + json.dumps(head).encode() + b"\n" + graph

    def _refuse(self, why: str) -> Optional[bytes]:
        self._logger.log(self._trt.ILogger.ERROR, why)
        return None

    def _shown(self, config: Any, calibration: Optional[bytes]) -> Dict[str, Any]:
        if calibration is None:
            return {}
        size = 4 * int(np.prod(config._calibration_shape()))
        last = hashlib.sha256(calibration[-size:]).hexdigest()
        return {"calibrated_on": len(calibration) // size, "last_shown": last, "calibrations": self._calibrations}

    def _calibrated(self, config: Any, graph: bytes) -> Optional[bytes]:
        """What the calibrator showed, which stands for the ranges found with it; from its cache where that is of this version."""
        calibrator, tag = config._members.get("int8_calibrator"), f"TRT-{self._trt.__version__}-EntropyCalibration2\n".encode()
        if calibrator is None or config._calibration_profile is None:
            return None
        kept = calibrator.read_calibration_cache()
        if kept is not None and bytes(kept).startswith(tag):
            return bytes(kept)[len(tag) :]
        self._calibrations += 1
        shape, shown = config._calibration_shape(), b""
        assert calibrator.get_batch_size() == shape[0]
        for addresses in iter(lambda: calibrator.get_batch(["pixels"]), None):
            (address,) = addresses
            if type(address) is not int or address % 256:
                return None
            shown += ctypes.string_at(address, 4 * int(np.prod(shape)))
        calibrator.write_calibration_cache(memoryview(tag + shown))
        return shown or None

    def _go_wrong(self) -> None:
        if fault() == "crash with a word":
            self._logger.log(self._trt.ILogger.ERROR, "2: [defaultAllocator.cpp] requested size was 1073741824")
        if fault().startswith("crash"):
            os.kill(os.getpid(), signal.SIGSEGV)
        if fault() == "hang":
            threading.Event().wait()

    def _has(self, config: Any, flag: str) -> bool:
        return hasattr(self._trt.BuilderFlag, flag) and getattr(self._trt.BuilderFlag, flag) in config._flags

    def _refusal(self, network: Any, config: Any) -> str:
        if not network._graph:
            return "4: [network.cpp::validate] Network must have at least one output"
        if not config._profiles or "pixels" not in config._profiles[0]._shapes:
            return "4: [network.cpp] Network has dynamic or shape inputs, but no optimization profile has been defined."
        return ""

    def _overflows(self, network: Any, config: Any) -> bool:
        """FP16 by flag, and something that FP16 does not hold was not pinned to FP32, in every layer and for every output."""
        binding = self._has(config, "OBEY_PRECISION_CONSTRAINTS") or self._has(config, "PREFER_PRECISION_CONSTRAINTS")
        loose = [layer for layer in network._layers if layer._op in OVERFLOWS and not (binding and layer._is_fp32(self._trt.float32))]
        return self._has(config, "FP16") and bool(loose)

    def _monitored(self, config: Any) -> bool:
        """Tells the progress monitor, where there is one; False where it asks to end."""
        monitor = config._members.get("progress_monitor")
        if monitor is None:
            return True
        monitor.phase_start("Building Engine", None, 4)
        monitor.phase_start("Tactics", "Building Engine", 7)
        goes_on = all(monitor.step_complete("Building Engine", step) for step in range(4))
        monitor.phase_finish("Tactics")
        monitor.phase_finish("Building Engine")
        return goes_on


def quantized(graph: bytes, shown: bytes) -> bytes:
    """The graph in INT8, with the ranges that its values have on the images that were shown."""
    from latentd.engines.int8 import calibrated
    from latentd.engines.quantize import with_casts

    (pixels,) = onnx.load_from_string(graph).graph.input
    sides = [axis.dim_value for axis in pixels.type.tensor_type.shape.dim[1:]]
    images = np.frombuffer(shown, np.float32).reshape(-1, *sides).transpose(0, 2, 3, 1).astype(np.uint8)
    return with_casts(graph, calibrated(graph, images))


class INetworkDefinition:
    _trt: Any = None

    def __init__(self, flags: int) -> None:
        self._flags = flags
        self._graph = b""
        self._layers: List[Any] = []

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def get_layer(self, index: int) -> Any:
        return self._layers[index]


class ILayer:
    _trt: Any = None

    def __init__(self, node: Any, outputs: List[Any]) -> None:
        self._op, self._name, self._outputs = node.op_type, node.name, outputs
        self._precision: Any = None
        self._output_types: Dict[int, Any] = {}

    @property
    def name(self) -> str:
        return str(self._name)

    @property
    def type(self) -> Any:
        return getattr(self._trt.LayerType, KINDS.get(self._op, "ELEMENTWISE"))

    @property
    def num_outputs(self) -> int:
        return len(self._outputs)

    def get_output(self, index: int) -> Any:
        return self._outputs[index]

    @property
    def precision(self) -> Any:
        return self._precision

    @precision.setter
    def precision(self, kind: Any) -> None:
        self._precision = kind

    def set_output_type(self, index: int, kind: Any) -> None:
        assert index < len(self._outputs)
        self._output_types[index] = kind

    def _may_be_int8(self) -> bool:
        """With a range for every value the real builder takes INT8 wherever nobody forbids it and it computes something."""
        computes = self.type not in (self._trt.LayerType.CONSTANT, self._trt.LayerType.SHAPE, self._trt.LayerType.SHUFFLE)
        return computes and self._precision is None and all(output.dtype is self._trt.float32 for output in self._outputs)

    def _is_fp32(self, fp32: Any) -> bool:
        return self._precision is fp32 and all(self._output_types.get(index) is fp32 for index in range(len(self._outputs)))


class ITensor:
    def __init__(self, name: str, dtype: Any) -> None:
        self._name, self._dtype = name, dtype

    @property
    def name(self) -> str:
        return self._name

    @property
    def dtype(self) -> Any:
        return self._dtype


class IBuilderConfig:
    _trt: Any = None

    def __init__(self) -> None:
        self._flags: Set[Any] = set()
        self._pools: Dict[str, int] = {}
        self._profiles: List[Any] = []
        self._timings: Any = None
        self._members: Dict[str, Any] = {}
        self._calibration_profile: Any = None

    def set_calibration_profile(self, profile: Any) -> bool:
        if fault() == "no calibration profile":
            return False
        self._calibration_profile = profile
        return True

    def _calibration_shape(self) -> Tuple[int, ...]:
        """The batch that the calibrator must give: the one that the profile is tuned for."""
        return tuple(self._calibration_profile._shapes["pixels"][1])

    @property
    def int8_calibrator(self) -> Any:
        return self._members.get("int8_calibrator")

    @int8_calibrator.setter
    def int8_calibrator(self, calibrator: Any) -> None:
        if not calibrator._ready:
            raise TypeError("__init__() must be called when overriding __init__")
        self._members["int8_calibrator"] = calibrator

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        self._pools[pool.name] = pool_size

    def set_flag(self, flag: Any) -> None:
        self._flags.add(flag)

    def clear_flag(self, flag: Any) -> None:
        self._flags.discard(flag)

    def get_flag(self, flag: Any) -> bool:
        return flag in self._flags

    def add_optimization_profile(self, profile: Any) -> int:
        if fault() == "no profile":
            return -1
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> Any:
        known = serialized_timing_cache in (b"", f"{self._trt.__version__} {gpu()} measured".encode())
        return self._trt.ITimingCache(bytes(serialized_timing_cache)) if known else None

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        if fault() == "timings refused" and cache._content:
            return False
        self._timings = cache
        return True

    @property
    def progress_monitor(self) -> Any:
        return self._members.get("progress_monitor")

    @progress_monitor.setter
    def progress_monitor(self, monitor: Any) -> None:
        if not monitor._ready:
            raise TypeError("__init__() must be called when overriding __init__")
        self._members["progress_monitor"] = monitor


class ITimingCache:
    def __init__(self, content: bytes) -> None:
        self._content = content

    def serialize(self) -> bytes:
        return self._content


class IOptimizationProfile:
    def __init__(self) -> None:
        self._shapes: Dict[str, Tuple[Any, Any, Any]] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        for shape in (min, opt, max):
            if any(type(side) is not int for side in shape):
                raise TypeError("set_shape(): incompatible function arguments")
        if not all(low <= middle <= high for low, middle, high in zip(min, opt, max)):
            raise RuntimeError("Shape provided for opt is inconsistent with other shapes.")
        self._shapes[input] = (min, opt, max)
