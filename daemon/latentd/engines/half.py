"""Where a ViT may compute in FP16, and its graph with that written into it by casts. Needs the onnx package only; a second of work.

Norms sum squares of activations that reach hundreds, which FP16 does not hold; softmax and the normalisation of pixels lose digits in it.
These stay in FP32. TensorRT up to 10 is told so layer by layer; 11 takes the types from the graph alone.
"""

from __future__ import annotations

import re
from typing import Any, Dict, List, Tuple

import numpy as np
from numpy.typing import NDArray

from latentd.errors import EngineError

_LINEAR = re.compile(r"^/blocks\.\d+/(qkv|proj|fc1|fc2)/")
_FP32 = re.compile(r"(^|/)(norm\d?/|Softmax(_\d+)?$)|^/(Sub|Div)(_\d+)?$")


def stays_fp32(name: str) -> bool:
    """Whether the node or layer of this name belongs to a norm, a softmax, or the normalisation of the pixels."""
    return _FP32.search(name) is not None


def is_linear(name: str) -> bool:
    """Whether the node or layer of this name belongs to a linear layer of a block: what INT8 is for."""
    return _LINEAR.search(name) is not None


def half(graph: bytes) -> bytes:
    """The same graph in FP16 but for what stays in FP32; inputs and outputs stay float32. EngineError where a weight is too large.

    Layers that are quantized already keep FP32 around their INT8: QuantizeLinear takes nothing else before opset 19.
    """
    import onnx

    model = onnx.load_from_string(graph)
    rewritten = _Halving(model)
    del model.graph.node[:], model.graph.initializer[:], model.graph.value_info[:]
    model.graph.node.extend(rewritten.nodes)
    model.graph.initializer.extend(rewritten.initializers)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


class _Halving:
    """The nodes and initializers of the new graph, made in one pass in the order of the old one."""

    def __init__(self, model: Any) -> None:
        import onnx

        self._onnx = onnx
        self._is_int8 = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
        self._fp32, self._fp16 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
        self.nodes: List[Any] = []
        self.initializers: List[Any] = []
        self._outputs = {output.name for output in model.graph.output}
        self._floats = self._float_values(model)
        self._constants: Dict[str, NDArray[Any]] = {}  # float32 weights, each written where its first user needs it
        self._types = {value.name: self._fp32 for value in model.graph.input}  # of the float values that were made
        self._ready: Dict[Tuple[str, int], str] = {}  # (value, type) -> what it is called in that type
        for tensor in model.graph.initializer:
            self._keep(tensor.name, tensor)
        for node in model.graph.node:
            self._rewrite(node)

    def _float_values(self, model: Any) -> Any:
        inferred = self._onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
        return {value.name for value in (*inferred.value_info, *inferred.output) if value.type.tensor_type.elem_type == self._fp32}

    def _keep(self, name: str, tensor: Any) -> None:
        if tensor.data_type == self._fp32:
            self._constants[name] = self._onnx.numpy_helper.to_array(tensor)
        else:
            self.initializers.append(self._onnx.numpy_helper.from_array(self._onnx.numpy_helper.to_array(tensor), name))

    def _rewrite(self, node: Any) -> None:
        if node.op_type == "Constant":
            self._keep(node.output[0], next(each.t for each in node.attribute if each.name == "value"))
            return
        stays = stays_fp32(node.name) or node.op_type == "Cast" or (self._is_int8 and is_linear(node.name))
        wanted = self._fp32 if stays else self._fp16
        copy = self._onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = [self._as(name, wanted) for name in node.input]
        casts = []
        for index, name in enumerate(node.output):
            if name not in self._floats:
                continue
            self._types[name] = wanted
            if name in self._outputs and wanted == self._fp16:
                copy.output[index] = self._ready[name, self._fp16] = f"{name}/half"
                self._types[name] = self._fp32
                casts.append(self._cast(f"{name}/half", name, self._fp32))
        self.nodes += [copy, *casts]

    def _as(self, name: str, wanted: int) -> str:
        """The name under which a value can be had in this type; integers and the absent ("") stay what they are."""
        if (name, wanted) not in self._ready:
            self._ready[name, wanted] = self._made(name, wanted)
        return self._ready[name, wanted]

    def _made(self, name: str, wanted: int) -> str:
        typed = name if wanted == self._fp32 else f"{name}/half"
        if name in self._constants:
            array = self._constants[name]
            if wanted == self._fp16:
                array = _halved(name, array)
            self.initializers.append(self._onnx.numpy_helper.from_array(array, typed))
            return typed
        if self._types.get(name, wanted) == wanted:
            return name
        typed = f"{name}/{'float' if wanted == self._fp32 else 'half'}"
        self.nodes.append(self._cast(name, typed, wanted))
        return typed

    def _cast(self, source: str, target: str, kind: int) -> Any:
        return self._onnx.helper.make_node("Cast", [source], [target], name=f"{target}/Cast", to=kind)


def _halved(name: str, array: NDArray[Any]) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):
        small = array.astype(np.float16)
    if not np.isfinite(small).all():
        raise EngineError(f"the weight {name} does not fit FP16: its largest value is {np.abs(array).max():g}")
    return small
