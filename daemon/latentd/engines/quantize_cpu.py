"""The INT8 graphs of ONNX Runtime's CPU provider, dynamic, static and scored: its own operators, for one image. Needs the onnx package.

Linear layers take uint8 with a zero point and int8 weights, which is what its kernels are fastest with (int8 twice is forty times slower on
x86). Query, key and value are three layers with one quantized input, and attention reads its heads where they lie in what these give: the
float graph copies them, to cut them apart and to turn them. That is why there is one image only: the operator strides over tokens or over
images. Queries and keys that meet in INT8 are turned as single bytes. The last block computes its class token alone, unless all its tokens
are wanted: a fourteenth of the work is saved. Pure functions; a second of work.
"""

from __future__ import annotations

import functools
from typing import Any, Callable, Dict, List, Tuple

import numpy as np
from numpy.typing import NDArray

from latentd.engines.quantize import LEAST, MARGIN, Tap, Taps, kept, smooth
from latentd.engines.reading import Attention, Embedding, Linear, Norm, Reading

_CONTRIB = "com.microsoft"
_PARTS = ("query", "key", "value")
_EMBEDDING = "embedding"

_Quantize = Callable[[Dict[str, Any], str, List[Linear]], List[Any]]
_Score = Callable[[Dict[str, Any], Attention], List[Any]]


def _float_scores(constants: Dict[str, Any], attention: Attention) -> List[Any]:
    from onnx.helper import make_node

    stem = attention.name
    strided: Dict[str, Any] = {"transBatchA": 1, "transBatchB": 1, "transB": 1, "alpha": float(attention.head_width**-0.5)}
    inputs = [f"{stem}/query", f"{stem}/key"]
    return [make_node("FusedMatMul", inputs, [f"{stem}/scores"], name=f"{stem}/Scores", domain=_CONTRIB, **strided)]


def dynamic(graph: bytes, taps: Taps, tokens: bool = True) -> bytes:
    """The range of a layer's input is taken from each image. tokens: whether the graph gives tokens where they are the last block's."""
    reading, _ = _prepared(graph, taps, tokens)
    return _written(reading, _dynamic_layers)


def static(graph: bytes, taps: Taps, tokens: bool = True) -> bytes:
    """The ranges are those of the calibration, widened. tokens: as above."""
    reading, taps = _prepared(graph, taps, tokens)
    return _written(reading, functools.partial(_static_layers, taps))


def scored(graph: bytes, taps: Taps, tokens: bool = True) -> bytes:
    """As dynamic, and the scores of attention are products in INT8 as well, in ranges of the calibration. tokens: as above."""
    reading, taps = _prepared(graph, taps, tokens)
    return _written(reading, _dynamic_layers, functools.partial(_quantized_scores, _even(reading, taps)))


def _prepared(graph: bytes, taps: Taps, tokens: bool) -> Tuple[Reading, Taps]:
    """The graph smoothed, and what enters its layers then."""
    reading = Reading(graph)
    taps = smooth(reading, taps)
    if not tokens and reading.gives_tokens_of(reading.last):
        reading.drop_output("tokens")
        return reading, _centred(reading, taps)
    return reading, taps


def _written(reading: Reading, quantize: _Quantize, score: _Score = _float_scores) -> bytes:
    nodes: Dict[str, List[Any]] = {}
    constants: Dict[str, Any] = {}
    for layer, linear in reading.linears.items():
        nodes[layer] = quantize(constants, layer, _thirds(linear) if linear.part == "qkv" else [linear])
    for attention in reading.attentions():
        reading.replace(attention.nodes, attention.name)
        nodes[attention.name] = _attention(constants, attention, score)
        if attention.block == reading.last and not reading.gives_tokens_of(reading.last):
            _class_token_alone(reading, nodes, constants, attention)
    for norm in reading.norms() if reading.is_centred else ():
        reading.replace(norm.nodes, norm.name)
        nodes[norm.name] = [_root_mean_square(constants, norm)]
    embedding = reading.embedding()
    reading.replace(embedding.nodes, _EMBEDDING)
    nodes[_EMBEDDING] = _embedded(constants, embedding, reading.is_centred)
    reading.take_bytes()
    return reading.written(nodes, constants, (_CONTRIB,))


def _centred(reading: Reading, taps: Taps) -> Taps:
    """Takes the mean out of all that is added to a token, since every norm takes it out of their sum, and nothing but norms reads that.
    So a norm has no mean to look for; what it adds is added by the layer behind it. Returns the taps of the changed graph."""
    after = dict(taps)
    for norm in reading.norms():
        linear = reading.linears[norm.layer]
        linear.bias = linear.bias + norm.shift @ linear.weight
        after[norm.layer] = Tap(taps[norm.layer].lows - norm.shift, taps[norm.layer].highs - norm.shift)
    for linear in reading.linears.values():
        if linear.part in ("proj", "fc2"):
            linear.weight = linear.weight - linear.weight.mean(axis=1, keepdims=True)
            linear.bias = linear.bias - linear.bias.mean()
    reading.is_centred = True
    return after


def _root_mean_square(constants: Dict[str, Any], norm: Norm) -> Any:
    from onnx.helper import make_node

    constants[f"{norm.name}/stretch"] = norm.stretch
    inputs = [norm.source, f"{norm.name}/stretch"]
    return make_node("SimplifiedLayerNormalization", inputs, [norm.result], name=norm.name, axis=-1, epsilon=norm.epsilon)


def _embedded(constants: Dict[str, Any], embedding: Embedding, is_centred: bool) -> List[Any]:
    """uint8 (1, S, S, 3) -> (1, N, D): pixels are uint8 as they come, so that nothing but the weights is rounded. The class token and the
    registers are rows of zeros among the patches, to which their own values are added."""
    from onnx.helper import make_node

    side, patch, name = embedding.side, embedding.patch, _EMBEDDING
    mean, std = (np.tile(each, patch * patch) for each in (embedding.mean, embedding.std))  # (p*p*3,), in the order of the pixels
    weight = embedding.weight.transpose(2, 3, 1, 0).reshape(len(std), -1) / std[:, None]  # (p*p*3, D)
    zero = np.uint8(np.clip(np.rint(embedding.mean.mean()), 0, 255))
    table = np.concatenate([embedding.lead, embedding.position + embedding.bias + (zero - mean) @ weight]).astype(np.float32)  # (N, D)
    if is_centred:
        weight, table = weight - weight.mean(axis=1, keepdims=True), table - table.mean(axis=1, keepdims=True)
    linear = Linear(-1, name, name, "", weight, np.zeros(0, np.float32), f"{name}/product")
    names = kept(constants, linear)
    constants.update(
        {
            f"{name}/cut": np.array([side, patch, side, patch * 3], np.int64),
            f"{name}/rows": np.array([1, side * side, patch * patch * 3], np.int64),
            f"{name}/lead": np.full((1, len(embedding.lead), patch * patch * 3), zero, np.uint8),
            f"{name}/table": table,
            f"{name}/step": np.array(1, np.float32),
            f"{name}/zero": np.array(zero, np.uint8),
        }
    )
    inputs = [f"{name}/quantized", names["weight"], f"{name}/step", names["scale"], f"{name}/zero"]
    return [
        make_node("Reshape", ["pixels", f"{name}/cut"], [f"{name}/cut_up"], name=f"{name}/Cut"),
        make_node("Transpose", [f"{name}/cut_up"], [f"{name}/patches"], name=f"{name}/Transpose", perm=[0, 2, 1, 3]),
        make_node("Reshape", [f"{name}/patches", f"{name}/rows"], [f"{name}/flat"], name=f"{name}/Reshape"),
        make_node("Concat", [f"{name}/lead", f"{name}/flat"], [f"{name}/quantized"], name=f"{name}/Concat", axis=1),
        make_node("MatMulIntegerToFloat", inputs, [linear.result], name=f"{name}/MatMul", domain=_CONTRIB),
        make_node("Add", [linear.result, f"{name}/table"], [embedding.result], name=f"{name}/Add"),
    ]


def _thirds(linear: Linear) -> List[Linear]:
    """One layer for the queries, one for the keys, one for the values."""
    weights, biases = np.split(linear.weight, 3, axis=1), np.split(linear.bias, 3)
    return [
        Linear(linear.block, linear.part, f"{linear.layer}/{part}", linear.source, weight, bias, _third(linear.result, part))
        for part, weight, bias in zip(_PARTS, weights, biases)
    ]


def _third(result: str, part: str) -> str:
    return f"{result}/{part}"


def _dynamic_layers(constants: Dict[str, Any], layer: str, group: List[Linear]) -> List[Any]:
    from onnx.helper import make_node

    if len(group) > 1:
        ranged = make_node(
            "DynamicQuantizeLinear",
            [group[0].source],
            [f"{layer}/quantized", f"{layer}/step", f"{layer}/zero"],
            name=f"{layer}/Quantize",
        )
        return [ranged, *(_product(constants, layer, linear) for linear in group)]
    names = kept(constants, group[0])
    inputs = [group[0].source, names["weight"], names["scale"], "", names["bias"]]
    return [make_node("DynamicQuantizeMatMul", inputs, [group[0].result], name=f"{layer}/MatMul", domain=_CONTRIB)]


def _static_layers(taps: Taps, constants: Dict[str, Any], layer: str, group: List[Linear]) -> List[Any]:
    from onnx.helper import make_node

    constants[f"{layer}/step"], constants[f"{layer}/zero"] = _affine(taps[layer])
    inputs = [group[0].source, f"{layer}/step", f"{layer}/zero"]
    entering = make_node("QuantizeLinear", inputs, [f"{layer}/quantized"], name=f"{layer}/Quantize")
    return [entering, *(_product(constants, layer, linear) for linear in group)]


def _product(constants: Dict[str, Any], entering: str, linear: Linear) -> Any:
    """What `entering` quantized, through one layer."""
    from onnx.helper import make_node

    names = kept(constants, linear)
    inputs = [f"{entering}/quantized", names["weight"], f"{entering}/step", names["scale"], f"{entering}/zero", "", names["bias"]]
    return make_node("MatMulIntegerToFloat", inputs, [linear.result], name=f"{linear.layer}/MatMul", domain=_CONTRIB)


def _attention(constants: Dict[str, Any], attention: Attention, score: _Score) -> List[Any]:
    """(1, N, H*E) three times -> (1, N, H*E). Inside, heads are a batch axis over which the products stride: (N, H, E) as it lies."""
    from onnx.helper import make_node

    stem = attention.name
    for part in _PARTS:
        constants[f"{stem}/{part}/apart"] = np.array([attention.tokens, attention.heads, attention.head_width], np.int64)
    constants[f"{stem}/together"] = np.array([1, attention.tokens, attention.heads * attention.head_width], np.int64)
    return [
        *(
            make_node(
                "Reshape", [_third(attention.source, part), f"{stem}/{part}/apart"], [f"{stem}/{part}"], name=f"{stem}/{part}/Reshape"
            )
            for part in _PARTS
        ),
        *score(constants, attention),  # (H, N, N)
        make_node("Softmax", [f"{stem}/scores"], [f"{stem}/weights"], name=f"{stem}/Softmax", axis=-1),
        make_node(
            "FusedMatMul", [f"{stem}/weights", f"{stem}/value"], [f"{stem}/mixed"], name=f"{stem}/Mix", domain=_CONTRIB, transBatchB=1
        ),
        make_node("Transpose", [f"{stem}/mixed"], [f"{stem}/turned"], name=f"{stem}/Transpose", perm=[1, 0, 2]),  # (H, N, E) -> (N, H, E)
        make_node("Reshape", [f"{stem}/turned", f"{stem}/together"], [attention.result], name=f"{stem}/Reshape"),
    ]


def _quantized_scores(even: Taps, constants: Dict[str, Any], attention: Attention) -> List[Any]:
    from onnx.helper import make_node

    stem = attention.name
    query, key = (f"{stem}/{part}" for part in _PARTS[:2])
    constants[f"{query}/step"], constants[f"{query}/zero"] = _affine(even[query])
    step = np.float32(MARGIN * even[key].peaks.max() / 127)
    constants.update(
        {
            f"{key}/step": step,
            f"{key}/zero": np.zeros((), np.int8),
            f"{key}/scale": np.float32(step * attention.head_width**-0.5),
        }
    )
    nodes = []
    for each, turn in ((query, [1, 0, 2]), (key, [1, 2, 0])):  # (N, H, E) -> (H, N, E) and (H, E, N)
        nodes.append(make_node("QuantizeLinear", [each, f"{each}/step", f"{each}/zero"], [f"{each}/quantized"], name=f"{each}/Quantize"))
        nodes.append(make_node("Transpose", [f"{each}/quantized"], [f"{each}/turned"], name=f"{each}/Transpose", perm=turn))
    inputs = [f"{query}/turned", f"{key}/turned", f"{query}/step", f"{key}/scale", f"{query}/zero", f"{key}/zero"]
    return [*nodes, make_node("MatMulIntegerToFloat", inputs, [f"{stem}/scores"], name=f"{stem}/Scores", domain=_CONTRIB)]


def _even(reading: Reading, taps: Taps) -> Dict[str, Tap]:
    """Queries and keys whose channels all reach equally far, so that one step fits all: what a channel of the ones gives up, its partner in
    the others gets. Keys lose the middle of their range, too: what all keys have alike is the same in every score of a query, and softmax
    takes no notice. Returns what each is then, by the name that attention gives it."""
    even: Dict[str, Tap] = {}
    for linear in reading.linears.values():
        if linear.part != "qkv":
            continue
        (query_lows, key_lows, _), (query_highs, key_highs, _) = (np.split(each, 3) for each in taps[linear.leaving])
        middle = np.float32(0.5) * (key_lows + key_highs)
        query, key = Tap(query_lows, query_highs), Tap(key_lows - middle, key_highs - middle)
        share = np.sqrt(key.peaks / query.peaks)
        rest = np.zeros_like(middle)
        factor = np.concatenate([share, 1 / share, rest + 1])
        linear.weight = linear.weight * factor
        linear.bias = (linear.bias - np.concatenate([rest, middle, rest])) * factor
        stem = f"/blocks.{linear.block}/attention"
        even[f"{stem}/query"] = Tap(query.lows * share, query.highs * share)
        even[f"{stem}/key"] = Tap(key.lows / share, key.highs / share)
    return even


def _class_token_alone(reading: Reading, nodes: Dict[str, List[Any]], constants: Dict[str, Any], last: Attention) -> None:
    """In the last block only the first token asks, is added to and goes through the MLP; keys and values are those of all."""
    from onnx.helper import make_node

    stem, qkv, proj = last.name, f"/blocks.{last.block}/qkv", f"/blocks.{last.block}/proj"
    for name, value in (("start", 0), ("end", 1), ("axis", 1)):
        constants[f"{stem}/{name}"] = np.array([value], np.int64)

    def first(source: str, result: str) -> Any:
        inputs = [source, f"{stem}/start", f"{stem}/end", f"{stem}/axis"]
        return make_node("Slice", inputs, [result], name=f"{result}/Slice")

    query = next(node for node in nodes[qkv] if node.name == f"{qkv}/{_PARTS[0]}/MatMul")
    nodes[qkv].insert(nodes[qkv].index(query), first(query.input[0], f"{qkv}/first"))
    query.input[0] = f"{qkv}/first"
    added = reading.added_to(reading.linears[proj].result)
    nodes[proj].append(first(added, f"{proj}/first"))
    reading.rewire(reading.linears[proj].result, added, f"{proj}/first")
    constants[f"{stem}/{_PARTS[0]}/apart"] = np.array([1, last.heads, last.head_width], np.int64)
    constants[f"{stem}/together"] = np.array([1, 1, last.heads * last.head_width], np.int64)


def _affine(tap: Tap) -> Tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Step and zero point of uint8 for a range that holds zero."""
    low, high = MARGIN * min(float(tap.lows.min()), 0.0), MARGIN * max(float(tap.highs.max()), 0.0)
    step = max(high - low, LEAST) / 255
    return np.array(step, np.float32), np.array(min(255, max(0, round(-low / step))), np.uint8)
