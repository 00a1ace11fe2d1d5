"""The parser's half of the stand-in: reads ONNX, and refuses what the real importer of each version refuses."""

from __future__ import annotations

from typing import Any, Dict, List, Optional

import onnx

from standin.building import fault, require_logger
from standin.strict import operators

TABLES = {"8.5": "8.5-GA", "8.6": "8.6-GA", "10": "10.1-GA", "11": "main"}


class OnnxParser:
    _version = ""
    _trt: Any = None

    def __init__(self, network: Any, logger: Any) -> None:
        self._network, self._logger = network, require_logger(logger)
        self._errors: List[str] = []

    def parse(self, model: bytes, path: Optional[str] = None) -> bool:
        try:
            graph = onnx.load_from_string(model)
            types = _element_types(graph)
        except Exception as cause:  # noqa: BLE001 - the real one raises for no bytes whatever
            self._errors.append(f"In node -1 (parse): UNSUPPORTED_GRAPH: {cause}")
            return False
        if self._version.startswith("8") and not self._network._flags & 1:
            self._errors.append("In node -1 (importModel): INVALID_VALUE: Assertion failed: !networkHasImplicitBatch")
        self._errors += _asymmetric(graph)
        known = operators(TABLES[self._version])
        for index, node in enumerate(graph.graph.node):
            if node.op_type not in known:
                self._errors.append(f"In node {index} (importFallbackPluginImporter): UNSUPPORTED_NODE: no importer for {node.op_type}")
            tensors = [self._trt.ITensor(name, self._trt_type(types.get(name))) for name in node.output]
            self._network._layers.append(self._trt.ILayer(node, tensors))
        self._network._graph = bytes(model)
        return not self._errors and fault() != "parse"

    def _trt_type(self, element: Optional[int]) -> Any:
        floats: Dict[Any, Any] = {onnx.TensorProto.FLOAT: self._trt.float32, onnx.TensorProto.FLOAT16: self._trt.float16}
        return floats.get(element, self._trt.int32)

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> str:
        return self._errors[index]


def _asymmetric(model: Any) -> List[str]:
    """What the importer of quantized layers asserts: scales above zero, zero points that are zero."""
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    return [
        f"In node -1 ({node.name}): UNSUPPORTED_NODE: Assertion failed: scale > 0 and zero point == 0"
        for node in nodes
        if not (values[node.input[1]] > 0).all() or values[node.input[2]].any()
    ]


def _element_types(model: Any) -> Dict[str, int]:
    onnx.checker.check_model(model)
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    return {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)}
