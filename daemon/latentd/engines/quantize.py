"""The frozen stage's graph with the linear layers of its blocks in INT8: what every spelling shares, and TensorRT's. Needs onnx only.

Weights: symmetric, one scale an output channel. Activations: one scale a tensor, measured in every run or calibrated beforehand. Attention,
norms, GELU and softmax stay float: together a tenth of the multiplications. Every graph is smoothed first: a channel with large activations
hands a part of their size to its weights, through the norm before the layer (Xiao et al. 2023, "SmoothQuant", migration strength 0.5). A
layer's scale after it (LayerScale) is multiplied into its weights. Pure functions; a second of work.
"""

from __future__ import annotations

import re
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from numpy.typing import NDArray

from latentd.errors import EngineError

QUANTIZER_VERSION = 2
"""Part of the cache key: change it whenever a quantized graph would come out different."""
MARGIN = 1.2  # calibrated ranges are widened by this: the images to come are more varied than those of the calibration
_LINEAR = re.compile(r"^(?P<layer>/blocks\.(?P<block>\d+)/(?P<part>qkv|proj|fc1|fc2))/MatMul$")
LEAST = 1e-5

Floats = NDArray[np.float32]


class Tap(NamedTuple):
    """What enters one linear layer: the least and the largest value of each channel, (K,) each."""

    lows: Floats
    highs: Floats

    @property
    def peaks(self) -> Floats:
        """The largest size of each channel, (K,), never zero."""
        return np.maximum(np.maximum(-self.lows, self.highs), np.float32(LEAST))

    def joined(self, other: Tap) -> Tap:
        return Tap(np.minimum(self.lows, other.lows), np.maximum(self.highs, other.highs))

    @staticmethod
    def of(values: Floats) -> Tap:
        """values: (..., K)."""
        rows = values.reshape(-1, values.shape[-1])
        return Tap(rows.min(axis=0), rows.max(axis=0))


Taps = Mapping[str, Tap]
"""By layer, such as "/blocks.0/qkv"."""


class Linear:
    """One linear layer of the graph. weight: (K, N), bias: (N,), with the scale after it multiplied in; result: what it writes."""

    def __init__(self, block: int, part: str, layer: str, source: str, weight: Floats, bias: Floats, result: str) -> None:
        self.block, self.part, self.layer, self.source, self.result = block, part, layer, source, result
        self.weight, self.bias = weight, bias


class Attention(NamedTuple):
    """Attention of one block, from what qkv writes (source) to what proj reads (result). nodes: by name, in the order of the graph."""

    block: int
    name: str
    source: str
    result: str
    nodes: List[str]
    tokens: int
    heads: int
    head_width: int


class Norm(NamedTuple):
    """The norm before a layer. stretch, shift: (D,). nodes: by name, in the order of the graph."""

    layer: str
    name: str
    source: str
    result: str
    stretch: Floats
    shift: Floats
    epsilon: float
    nodes: List[str]


class Embedding(NamedTuple):
    """What comes before the blocks. weight: (D, 3, p, p), for pixels less their mean over their std, (3,) in 0..255; lead: what stands
    before the patches, (1+R, D); position: (P, D). nodes: by name, in the order of the graph; result: what they give."""

    weight: Floats
    bias: Floats
    mean: Floats
    std: Floats
    lead: Floats
    position: Floats
    nodes: List[str]
    result: str

    @property
    def patch(self) -> int:
        return int(self.weight.shape[-1])

    @property
    def side(self) -> int:
        """In patches."""
        return int(round(len(self.position) ** 0.5))


class Reading:
    """A model taken apart: its constants, its linear layers and the nodes that these replace."""

    def __init__(self, graph: bytes) -> None:
        import onnx

        self.model = onnx.load_from_string(graph)
        self.to_array = onnx.numpy_helper.to_array
        nodes = self.model.graph.node
        self.constants: Dict[str, Any] = {tensor.name: self.to_array(tensor) for tensor in self.model.graph.initializer}
        self.users: Dict[str, List[Any]] = {}
        for node in nodes:
            for name in node.input:
                self.users.setdefault(name, []).append(node)
        self.maker = {name: node for node in nodes for name in node.output}
        self.replaced: Dict[str, Optional[str]] = {}  # node -> the layer that stands in its place; None: nothing does
        self.linears: Dict[str, Linear] = {linear.layer: linear for linear in self._linears()}
        self.is_centred = False  # whether no token has a mean over its channels
        if not self.linears:
            raise EngineError("the graph has no linear layers that could be quantized")

    def _linears(self) -> Iterator[Linear]:
        for node in self.model.graph.node:
            found = _LINEAR.match(node.name)
            if node.op_type != "MatMul" or found is None or node.input[1] not in self.constants:
                continue
            layer, weight = found["layer"], self.constants[node.input[1]]
            self.replaced[node.name] = layer
            (added,) = self.users[node.output[0]]
            bias, result = self._other(added, node.output[0]), added.output[0]
            self.replaced[added.name] = None
            after = self.users.get(result, [])
            if len(after) == 1 and after[0].op_type == "Mul" and self._has_constant(after[0], result):
                scale = self._other(after[0], result)
                weight, bias, result = weight * scale, bias * scale, after[0].output[0]
                self.replaced[after[0].name] = None
            yield Linear(int(found["block"]), found["part"], layer, node.input[0], weight, bias, result)

    def attentions(self) -> Iterator[Attention]:
        """One a block; EngineError where a block has another than the exporter writes."""
        for linear in self.linears.values():
            proj = self.linears.get(f"/blocks.{linear.block}/proj")
            if linear.part == "qkv" and proj is not None:
                nodes = self._between(linear.result, proj.source)
                apart = next((self.maker[node.input[1]] for node in nodes if node.op_type == "Reshape"), None)
                if apart is None or apart.op_type != "Constant":
                    raise EngineError(f"block {linear.block} of the graph does not cut its heads apart where that is looked for")
                _, tokens, heads, width = (int(size) for size in self.to_array(apart.attribute[0].t))
                names = [node.name for node in nodes]
                yield Attention(linear.block, f"/blocks.{linear.block}/attention", linear.result, proj.source, names, tokens, heads, width)

    @property
    def last(self) -> int:
        """The last block."""
        return max(linear.block for linear in self.linears.values())

    def norms(self) -> Iterator[Norm]:
        """Two a block."""
        for linear in self.linears.values():
            if linear.part in ("qkv", "fc1"):
                shift = self.maker[linear.source]
                name = shift.name.rsplit("/", 1)[0]
                nodes = [node for node in self.model.graph.node if node.name.startswith(f"{name}/")]
                inside = {each for node in nodes for each in node.output}
                entering = next(each for node in nodes for each in node.input if each not in inside)
                stretch = next(node for node in nodes if node.op_type == "Mul")
                epsilon = float(self._constant(next(node for node in nodes if node.op_type == "Add")))
                values, names = (self._constant(stretch), self._constant(shift)), [node.name for node in nodes]
                yield Norm(linear.layer, name, entering, linear.source, *values, epsilon, names)

    def embedding(self) -> Embedding:
        by_kind = {node.op_type: node for node in reversed(self.model.graph.node)}  # the first of each
        conv, joined = by_kind["Conv"], by_kind["Concat"]
        std = self.maker[conv.input[0]]
        mean = self.maker[std.input[0]]
        lead, position = (self._constant(self.maker[name]) for name in joined.input)
        nodes = [node.name for node in self._between("pixels", joined.output[0])]
        weight, bias = (self.constants[name] for name in conv.input[1:])
        return Embedding(weight, bias, self._constant(mean).ravel(), self._constant(std).ravel(), lead, position, nodes, joined.output[0])

    def _constant(self, node: Any) -> Any:
        """The one input of a node that is the same for every image."""
        for name in node.input:
            if name in self.constants:
                return self.constants[name]
            if name in self.maker and self.maker[name].op_type == "Constant":
                return self.to_array(self.maker[name].attribute[0].t)
        raise EngineError(f"{node.name} of the graph has no constant where one is looked for")

    def _between(self, first: str, last: str) -> List[Any]:
        """The nodes through which a value becomes another, in the order of the graph."""
        reached = {first}
        found = []
        for node in self.model.graph.node:
            if last not in reached and reached.intersection(node.input):
                found.append(node)
                reached.update(node.output)
        return found

    def replace(self, nodes: Sequence[str], name: str) -> None:
        """What `written` is given under this name stands where the first of the nodes stood; the others go."""
        self.replaced.update({**dict.fromkeys(nodes), nodes[0]: name})

    def gives_tokens_of(self, block: int) -> bool:
        """Whether the tokens that the graph gives are those of this block."""
        are_given = any(value.name == "tokens" for value in self.model.graph.output)
        return are_given and bool(self.maker["tokens"].name.startswith(f"/blocks.{block}/"))

    def drop_output(self, name: str) -> None:
        kept = [value for value in self.model.graph.output if value.name != name]
        del self.model.graph.output[:]
        self.model.graph.output.extend(kept)

    def added_to(self, update: str) -> str:
        """The other summand, where this value is added to what came before."""
        (node,) = self.users[update]
        return str(next(name for name in node.input if name != update))

    def rewire(self, update: str, old: str, new: str) -> None:
        """Where `update` is added to `old`, it is added to `new`."""
        (node,) = self.users[update]
        node.input[list(node.input).index(old)] = new

    def take_bytes(self) -> None:
        """One image at a time, uint8 (1, S, S, 3), goes in."""
        import onnx

        (entering,) = self.model.graph.input
        size = entering.type.tensor_type.shape.dim[-1].dim_value
        entering.CopyFrom(onnx.helper.make_tensor_value_info(entering.name, onnx.TensorProto.UINT8, (1, size, size, 3)))
        for value in self.model.graph.output:
            value.type.tensor_type.shape.dim[0].dim_value = 1

    def _has_constant(self, node: Any, known: str) -> bool:
        return any(name in self.constants for name in node.input if name != known)

    def _other(self, node: Any, known: str) -> Any:
        """The constant that a node combines with a value."""
        (name,) = (name for name in node.input if name != known)
        return self.constants[name]

    def written(self, layers: Mapping[str, List[Any]], constants: Mapping[str, Any], domains: Tuple[str, ...] = ()) -> bytes:
        """The model with these nodes in the place of each layer, and these constants besides its own."""
        import onnx

        nodes: List[Any] = []
        for node in self.model.graph.node:
            if node.name not in self.replaced:
                nodes.append(node)
                continue
            layer = self.replaced[node.name]
            nodes += layers[layer] if layer is not None else []
        used = {name for node in nodes for name in node.input}
        nodes = [node for node in nodes if node.op_type != "Constant" or used.intersection(node.output)]
        made = onnx.ModelProto()
        made.CopyFrom(self.model)
        del made.graph.node[:], made.graph.initializer[:], made.graph.value_info[:]
        made.graph.node.extend(nodes)
        made.graph.initializer.extend(
            onnx.numpy_helper.from_array(np.asarray(value, order="C"), name)
            for name, value in {**self.constants, **constants}.items()
            if name in used
        )
        made.opset_import.extend(onnx.helper.make_opsetid(domain, 1) for domain in domains)
        return bytes(made.SerializeToString())


def sources(graph: bytes) -> Dict[str, str]:
    """layer -> the value that enters it: what a calibration has to look at."""
    return {linear.layer: linear.source for linear in Reading(graph).linears.values()}


def tapped(graph: bytes) -> bytes:
    """The same graph, which also gives what enters each linear layer."""
    import onnx

    model = onnx.load_from_string(graph)
    for name in dict.fromkeys(sources(graph).values()):
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    return bytes(model.SerializeToString())


def smoothed(graph: bytes, taps: Taps) -> bytes:
    """For TensorRT's own calibrator: still float, but with every layer's input as even as it can be had."""
    reading = Reading(graph)
    smooth(reading, taps)
    layers: Dict[str, List[Any]] = {}
    constants: Dict[str, Any] = {}
    for layer, linear in reading.linears.items():
        constants[f"{layer}/weight"], constants[f"{layer}/bias"] = linear.weight, linear.bias
        layers[layer] = _float_layer(linear, linear.source, f"{layer}/weight")
    return reading.written(layers, constants)


def with_casts(graph: bytes, taps: Taps) -> bytes:
    """For TensorRT from 10 on: QuantizeLinear and DequantizeLinear around each layer, symmetric, standard operators only."""
    from onnx.helper import make_node

    reading = Reading(graph)
    taps = smooth(reading, taps)
    layers: Dict[str, List[Any]] = {}
    constants: Dict[str, Any] = {"int8/zero": np.zeros((), np.int8)}
    for layer, linear in reading.linears.items():
        names = kept(constants, linear)
        constants[f"{layer}/step"] = np.float32(MARGIN * taps[layer].peaks.max() / 127)
        constants[f"{layer}/zeros"] = np.zeros(linear.weight.shape[1], np.int8)
        by_channel = [names["weight"], names["scale"], f"{layer}/zeros"]
        layers[layer] = [
            make_node("QuantizeLinear", [linear.source, f"{layer}/step", "int8/zero"], [f"{layer}/q"], name=f"{layer}/Quantize"),
            make_node("DequantizeLinear", [f"{layer}/q", f"{layer}/step", "int8/zero"], [f"{layer}/x"], name=f"{layer}/Dequantize"),
            make_node("DequantizeLinear", by_channel, [f"{layer}/w"], name=f"{layer}/weight/Dequantize", axis=1),
            *_float_layer(linear, f"{layer}/x", f"{layer}/w"),
        ]
    return reading.written(layers, constants)


def _float_layer(linear: Linear, source: str, weight: str) -> List[Any]:
    from onnx.helper import make_node

    layer = linear.layer
    return [
        make_node("MatMul", [source, weight], [f"{layer}/product"], name=f"{layer}/MatMul"),
        make_node("Add", [f"{layer}/product", f"{layer}/bias"], [linear.result], name=f"{layer}/Add"),
    ]


def kept(constants: Dict[str, Any], linear: Linear) -> Dict[str, str]:
    """Adds the layer's INT8 weight, its scales and its bias to the constants; what they are called."""
    names = {part: f"{linear.layer}/{part}" for part in ("weight", "scale", "bias")}
    scale = np.maximum(np.abs(linear.weight).max(axis=0), np.finfo(np.float32).tiny) / np.float32(127)  # (N,)
    constants[names["weight"]] = np.clip(np.rint(linear.weight / scale), -127, 127).astype(np.int8)
    constants[names["scale"]], constants[names["bias"]] = scale.astype(np.float32), linear.bias
    return names


def smooth(reading: Reading, taps: Taps) -> Dict[str, Tap]:
    """Divides the channels that enter a layer, in the norm or the values before it, and multiplies its weights by as much. Returns the
    taps of the changed graph."""
    after = dict(taps)
    for layer, linear in reading.linears.items():
        before = taps[layer]
        share = np.sqrt(before.peaks / np.maximum(np.abs(linear.weight).max(axis=1), LEAST))  # (K,)
        share = (share / np.exp(np.log(share).mean())).astype(np.float32)
        if not _hand_back(reading, linear, share):
            continue
        linear.weight = linear.weight * share[:, None]
        after[layer] = Tap(before.lows / share, before.highs / share)
    return after


def _hand_back(reading: Reading, linear: Linear, share: Floats) -> bool:
    """Divides the channels of what enters the layer where it is made; False where it can't be, as behind a GELU."""
    if linear.part == "proj":  # its input is a weighted mean of values: their channels are the last of qkv's
        qkv = reading.linears.get(f"/blocks.{linear.block}/qkv")
        if qkv is None:
            return False
        factor = np.ones(qkv.weight.shape[1], np.float32)
        factor[-len(share) :] = 1 / share
        qkv.weight, qkv.bias = qkv.weight * factor, qkv.bias * factor
        return True
    shift = reading.maker.get(linear.source)
    if linear.part == "fc2" or shift is None or len(reading.users[linear.source]) != 1:
        return False
    stretch = next((reading.maker[name] for name in shift.input if name in reading.maker), None)
    if stretch is None or (shift.op_type, stretch.op_type) != ("Add", "Mul"):
        return False
    for node in (stretch, shift):
        index = next(index for index, name in enumerate(node.input) if name in reading.constants)
        smoothed_name = f"{node.name}/smoothed"
        reading.constants[smoothed_name] = reading.constants[node.input[index]] / share
        node.input[index] = smoothed_name
    return True
