"""The stand-in's module object for one version."""

from __future__ import annotations

from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Dict

from standin import building, parsing, running
from standin.strict import VERSIONS, Value, enumeration, names, strict

ENUMERATIONS = ("BuilderFlag", "DataType", "LayerType", "MemoryPoolType", "NetworkDefinitionCreationFlag", "TensorIOMode")
IMPLEMENTED = (
    *(building.Builder, building.INetworkDefinition, building.ILayer, building.ITensor, building.IBuilderConfig, building.ITimingCache),
    *(building.IOptimizationProfile, parsing.OnnxParser, running.Runtime, running.ICudaEngine, running.IExecutionContext),
)
SEVERITIES = ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")


class StandIn(ModuleType):
    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"module 'tensorrt' has no attribute '{name}' in this version")


def make(version: str) -> ModuleType:
    """`import tensorrt` of version 8.5, 8.6, 10 or 11: AttributeError for every name that it lacks."""
    module = StandIn("tensorrt")
    has = names(version)
    found: Dict[str, Any] = {"__version__": VERSIONS[version]}
    found.update({kind: enumeration(kind, version) for kind in ENUMERATIONS})
    data = found["DataType"]
    found.update({"float32": data.FLOAT, "float16": data.HALF, "int32": data.INT32, "int8": data.INT8, "bool": data.BOOL})
    severities = {name: Value("Severity", name, number) for number, name in enumerate(SEVERITIES)}
    found["ILogger"] = type("ILogger", (building.ILogger,), severities)
    found["IInt8EntropyCalibrator2"] = type("IInt8EntropyCalibrator2", (building.IInt8EntropyCalibrator2,), {})
    found["IProgressMonitor"] = type("IProgressMonitor", (building.IProgressMonitor,), {})
    for implementation in IMPLEMENTED:
        made = strict(implementation, version)
        type.__setattr__(made, "_trt", module)
        found[implementation.__name__] = made
    module.__spec__ = ModuleSpec("tensorrt", None)
    vars(module).update({name: value for name, value in found.items() if name in has})
    return module
