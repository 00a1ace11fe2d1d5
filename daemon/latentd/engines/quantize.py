"""The frozen stage's graph with the linear layers of its blocks in INT8: what every spelling shares, and TensorRT's. Needs onnx only.

Weights: symmetric, one scale an output channel. Activations: one scale a tensor, measured in every run or calibrated beforehand. Attention,
norms, GELU and softmax stay float: together a tenth of the multiplications. Every graph is smoothed first: a channel with large activations
hands a part of their size to its weights, through the norm before the layer (Xiao et al. 2023, "SmoothQuant", migration strength 0.5). A
layer's scale after it (LayerScale) is multiplied into its weights. Pure functions; a second of work.
"""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, NamedTuple

import numpy as np

from latentd.engines.reading import Floats, Linear, Reading

QUANTIZER_VERSION = 3
"""Part of the cache key: change it whenever a quantized graph would come out different."""
MARGIN = 1.2  # calibrated ranges are widened by this: the images to come are more varied than those of the calibration
LEAST = 1e-5


class Tap(NamedTuple):
    """What enters or leaves one linear layer: the least and the largest value of each channel, (K,) each."""

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
"""By layer, such as "/blocks.0/qkv", what enters it; and by `Linear.leaving` what queries, keys and values are."""


def sources(graph: bytes) -> Dict[str, str]:
    """What a calibration has to look at: the value that enters each layer, and the one that leaves qkv, by their names in `Taps`."""
    linears = Reading(graph).linears.values()
    entering = {linear.layer: linear.source for linear in linears}
    return {**entering, **{linear.leaving: linear.result for linear in linears if linear.part == "qkv"}}


def tapped(graph: bytes) -> bytes:
    """The same graph, which also gives what a calibration has to look at."""
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
