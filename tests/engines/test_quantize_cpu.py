"""The INT8 graphs of ONNX Runtime: they say nearly what the float graph says, for every shape, with and without the last block's tokens."""

from __future__ import annotations

import functools
from typing import Any, Callable, Dict, List, Tuple

import numpy as np
import onnx
import onnxruntime
import pytest

import tiny
from engines.test_export import SHAPES, exported
from engines.test_half import answers, least_cosine
from latentd.engines import quantize_cpu
from latentd.engines.int8 import calibrated
from latentd.engines.quantize import Taps, kept
from latentd.engines.quantize_cpu import dynamic, scored, static
from latentd.engines.stage import planar
from latentd.errors import EngineError
from standin.strict import operators

SPELLINGS: Dict[str, Callable[..., bytes]] = {"dynamic": dynamic, "static": static, "scored": scored}
DEPTH = len(tiny.DINOV2.heads)
LEAST = {"features": 0.98, "tokens": 0.95}
PIXELS = tiny.pixels(3, seed=5)


WAYS = [(2, True), (DEPTH, True), (DEPTH, False)]  # split, and whether tokens are wanted
Graphs = Callable[..., Tuple[bytes, Taps]]


@pytest.fixture(scope="module")
def graph_and_taps(tmp_path_factory: pytest.TempPathFactory) -> Graphs:
    """Of a kind and a split; each is made once."""

    @functools.lru_cache(maxsize=None)
    def made(kind: str = "DINOv2", split: int = 2) -> Tuple[bytes, Taps]:
        graph = exported(tmp_path_factory.mktemp("graph"), SHAPES[kind], whole=True, split=split).read_bytes()
        return graph, calibrated(graph, tiny.pixels(4))

    return made


def said(graph: bytes) -> Dict[str, Any]:
    """What the graph gives for PIXELS, which it takes one by one, as bytes."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    found = [session.run(names, {"pixels": PIXELS[index : index + 1]}) for index in range(len(PIXELS))]
    return {name: np.concatenate(each) for name, each in zip(names, zip(*found))}


def expected(graph: bytes) -> Dict[str, Any]:
    return dict(zip(("features", "tokens"), answers(graph, planar(PIXELS))))


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(("split", "tokens"), WAYS)
def test_it_says_nearly_what_the_whole_graph_says(graph_and_taps: Graphs, kind: str, spelling: str, split: int, tokens: bool) -> None:
    graph, taps = graph_and_taps(kind, split)
    whole, found = expected(graph), said(SPELLINGS[spelling](graph, taps, tokens))
    assert set(found) == ({"features"} if split == DEPTH and not tokens else {"features", "tokens"})
    for name, value in found.items():
        assert value.dtype == np.float32
        assert value.shape == whole[name].shape
        assert LEAST[name] < least_cosine(value, whole[name], tiny.DINOV2.width) < 0.9999999  # it did lose something: it is quantized


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize(("split", "tokens"), WAYS)
def test_what_it_rewrites_besides_changes_no_answer(
    graph_and_taps: Graphs, monkeypatch: pytest.MonkeyPatch, kind: str, split: int, tokens: bool
) -> None:
    """With layers that are not quantized, all that is left are attention, embedding, norms and the last block's class token."""
    monkeypatch.setattr(quantize_cpu, "_dynamic_layers", float_layers)
    monkeypatch.setattr(quantize_cpu, "_embedded", float_embedding(quantize_cpu._embedded))
    graph, taps = graph_and_taps(kind, split)
    whole = expected(graph)
    for name, value in said(dynamic(graph, taps, tokens)).items():
        np.testing.assert_allclose(value, whole[name], atol=5e-4)


def float_layers(constants: Dict[str, Any], layer: str, group: List[Any]) -> List[Any]:
    nodes = []
    for linear in group:
        constants[f"{linear.layer}/weight"], constants[f"{linear.layer}/bias"] = linear.weight, linear.bias
        product = f"{linear.layer}/product"
        nodes.append(onnx.helper.make_node("MatMul", [linear.source, f"{linear.layer}/weight"], [product], name=f"{linear.layer}/MatMul"))
        nodes.append(onnx.helper.make_node("Add", [product, f"{linear.layer}/bias"], [linear.result], name=f"{linear.layer}/Add"))
    return nodes


def float_embedding(quantized: Callable[..., List[Any]]) -> Callable[..., List[Any]]:
    """The embedding with the weights as they were before they became int8."""

    def nodes(constants: Dict[str, Any], embedding: Any, is_centred: bool) -> List[Any]:
        seen: List[Any] = []

        def watched(found: Dict[str, Any], linear: Any) -> Dict[str, str]:
            seen.append(linear)
            return kept(found, linear)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(quantize_cpu, "kept", watched)
            made = quantized(constants, embedding, is_centred)
        (linear,) = seen
        *before, product, added = made
        constants["embedding/exact"] = linear.weight
        constants["embedding/shift"] = constants["embedding/zero"].astype(np.float32)
        return [
            *before,
            onnx.helper.make_node("Cast", ["embedding/quantized"], ["embedding/cast"], name="embedding/Cast", to=onnx.TensorProto.FLOAT),
            onnx.helper.make_node("Sub", ["embedding/cast", "embedding/shift"], ["embedding/even"], name="embedding/Sub"),
            onnx.helper.make_node("MatMul", ["embedding/even", "embedding/exact"], [product.output[0]], name="embedding/MatMul"),
            added,
        ]

    return nodes


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_linear_layer_is_int8_and_the_graph_a_good_deal_smaller(graph_and_taps: Graphs, spelling: str) -> None:
    graph, taps = graph_and_taps()
    made = SPELLINGS[spelling](graph, taps)
    model = onnx.load_from_string(made)
    weights = [onnx.numpy_helper.to_array(each) for each in model.graph.initializer if each.name.endswith("/weight")]
    assert len(weights) == 6 * DEPTH + 1  # query, key, value, proj, fc1, fc2; the patches
    assert {value.dtype for value in weights} == {np.dtype(np.int8)}
    assert all(np.abs(value).max() == 127 for value in weights)
    assert len(made) < 0.5 * len(graph)
    assert not {node.op_type for node in model.graph.node} & {"MatMul", "Conv", "Split"}


def test_queries_meet_keys_in_int8_where_scores_are_quantized(graph_and_taps: Graphs) -> None:
    def kinds(spelling: str) -> List[str]:
        nodes = onnx.load_from_string(SPELLINGS[spelling](*graph_and_taps())).graph.node
        return [node.op_type for node in nodes if node.name.endswith("/attention/Scores")]

    assert kinds("static") == ["FusedMatMul"] * DEPTH
    assert kinds("scored") == ["MatMulIntegerToFloat"] * DEPTH


@pytest.mark.parametrize("kind", SHAPES)
def test_evening_out_queries_and_keys_changes_no_answer(graph_and_taps: Graphs, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """With layers and scores that are not quantized, all that is left besides what every spelling rewrites is the evening out."""

    def in_float(even: Taps, constants: Dict[str, Any], attention: Any) -> List[Any]:
        seen.update(even)
        return quantize_cpu._float_scores(constants, attention)

    seen: Dict[str, Any] = {}
    monkeypatch.setattr(quantize_cpu, "_quantized_scores", in_float)
    monkeypatch.setattr(quantize_cpu, "_dynamic_layers", float_layers)
    monkeypatch.setattr(quantize_cpu, "_embedded", float_embedding(quantize_cpu._embedded))
    graph, taps = graph_and_taps(kind)
    whole = expected(graph)
    for name, value in said(scored(graph, taps)).items():
        np.testing.assert_allclose(value, whole[name], atol=5e-4)
    assert len(seen) == 2 * DEPTH
    for block in range(DEPTH):
        query, key = (seen[f"/blocks.{block}/attention/{part}"] for part in ("query", "key"))
        np.testing.assert_allclose(query.peaks, key.peaks, rtol=1e-4)
        np.testing.assert_allclose(-key.lows, key.highs, atol=1e-5)


def test_the_last_block_computes_less_only_where_its_tokens_are_not_given(graph_and_taps: Graphs) -> None:
    def slices(split: int, tokens: bool) -> List[str]:
        nodes = onnx.load_from_string(dynamic(*graph_and_taps(split=split), tokens)).graph.node
        return [node.name for node in nodes if node.op_type == "Slice" and node.name.startswith("/blocks.")]

    assert slices(DEPTH, tokens=True) == []
    for split, tokens in ((DEPTH, False), (2, True), (2, False)):
        assert slices(split, tokens) == [f"/blocks.{DEPTH - 1}/qkv/first/Slice", f"/blocks.{DEPTH - 1}/proj/first/Slice"]


def test_norms_look_for_no_mean_only_where_no_tokens_leave_the_graph(graph_and_taps: Graphs) -> None:
    def kinds(split: int, tokens: bool) -> List[str]:
        return [node.op_type for node in onnx.load_from_string(static(*graph_and_taps(split=split), tokens)).graph.node]

    assert kinds(DEPTH, False).count("SimplifiedLayerNormalization") == 2 * DEPTH
    for split, tokens in ((DEPTH, True), (2, True), (2, False)):
        assert "SimplifiedLayerNormalization" not in kinds(split, tokens)


def test_these_graphs_are_not_for_tensorrt(graph_and_taps: Graphs) -> None:
    kinds = {node.op_type for node in onnx.load_from_string(dynamic(*graph_and_taps())).graph.node}
    assert kinds - operators("10.1-GA") >= {"DynamicQuantizeMatMul", "MatMulIntegerToFloat", "FusedMatMul"}


def test_a_graph_whose_attention_is_another_is_refused(graph_and_taps: Graphs) -> None:
    graph, taps = graph_and_taps()
    model = onnx.load_from_string(graph)
    for node in model.graph.node:
        if node.op_type == "Reshape":
            node.op_type = "Identity"
    with pytest.raises(EngineError, match="does not cut its heads apart"):
        dynamic(model.SerializeToString(), taps)


def test_the_taps_that_are_given_stay_as_they_are(graph_and_taps: Graphs) -> None:
    graph, taps = graph_and_taps(split=DEPTH)
    before: Taps = {layer: tap._replace(lows=tap.lows.copy(), highs=tap.highs.copy()) for layer, tap in taps.items()}
    static(graph, taps, tokens=False)
    for layer, tap in taps.items():
        np.testing.assert_array_equal(tap.lows, before[layer].lows)
        np.testing.assert_array_equal(tap.highs, before[layer].highs)
