"""The quantized graphs of TensorRT: what they say, which operators they hold, and that smoothing alone changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict

import numpy as np
import onnx
import pytest

import tiny
from engines.test_export import SHAPES, exported
from engines.test_half import answers, least_cosine
from latentd.engines.int8 import calibrated
from latentd.engines.quantize import Tap, smoothed, sources, tapped, with_casts
from latentd.engines.stage import planar
from latentd.errors import EngineError
from standin.strict import operators

WIDTH = tiny.DINOV2.width


def graph_and_taps(tmp_path: Path, kind: str = "DINOv2") -> Any:
    graph = exported(tmp_path, SHAPES[kind]).read_bytes()
    return graph, calibrated(graph, tiny.pixels(4))


def initializers(graph: bytes) -> Dict[str, Any]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load_from_string(graph).graph.initializer}


@pytest.mark.parametrize("kind", SHAPES)
def test_it_says_nearly_what_the_whole_graph_says(tmp_path: Path, kind: str) -> None:
    graph, taps = graph_and_taps(tmp_path, kind)
    pixels = planar(tiny.pixels(3, seed=5))
    for found, expected in zip(answers(with_casts(graph, taps), pixels), answers(graph, pixels)):
        assert found.dtype == np.float32
        assert found.shape == expected.shape
        assert 0.98 < least_cosine(found, expected, WIDTH) < 0.9999999  # it did lose something: it is quantized


@pytest.mark.parametrize("kind", SHAPES)
def test_smoothing_alone_changes_no_answer(tmp_path: Path, kind: str) -> None:
    graph, taps = graph_and_taps(tmp_path, kind)
    pixels = planar(tiny.pixels(3, seed=5))
    even = smoothed(graph, taps)
    for found, expected in zip(answers(even, pixels), answers(graph, pixels)):
        np.testing.assert_allclose(found, expected, atol=2e-4)
    weight = initializers(even)["/blocks.1/qkv/weight"]
    assert not np.allclose(weight, initializers(graph)[sources_weight(graph, "/blocks.1/qkv/MatMul")], rtol=1e-3)


def sources_weight(graph: bytes, node: str) -> str:
    (found,) = (each for each in onnx.load_from_string(graph).graph.node if each.name == node)
    return str(found.input[1])


def test_every_linear_layer_of_every_block_is_int8_and_the_graph_a_good_deal_smaller(tmp_path: Path) -> None:
    graph, taps = graph_and_taps(tmp_path)
    made = with_casts(graph, taps)
    assert len(taps) == (4 + 1) * 3  # what enters four layers, and what leaves the first
    weights = {name: value for name, value in initializers(made).items() if name.endswith("/weight")}
    assert len(weights) == 4 * 3
    assert {value.dtype for value in weights.values()} == {np.dtype(np.int8)}
    assert all(np.abs(value).max() == 127 for value in weights.values())
    assert len(made) < 0.5 * len(graph)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("table", ["8.5-GA", "8.6-GA", "10.1-GA", "main"])
def test_what_tensorrt_gets_holds_only_operators_that_its_parsers_import(tmp_path: Path, kind: str, table: str) -> None:
    graph, taps = graph_and_taps(tmp_path, kind)
    for made in (with_casts(graph, taps), smoothed(graph, taps)):
        model = onnx.load_from_string(made)
        onnx.checker.check_model(model)
        assert {node.op_type for node in model.graph.node} <= operators(table)
        assert all(node.domain == "" for node in model.graph.node)
    zeros = [value for name, value in initializers(with_casts(graph, taps)).items() if "/zero" in name]
    assert zeros  # TensorRT takes symmetric quantization only
    assert not any(each.any() for each in zeros)


def test_calibration_joins_what_every_image_brings(tmp_path: Path) -> None:
    graph = exported(tmp_path).read_bytes()
    both, first = calibrated(graph, tiny.pixels(2)), calibrated(graph, tiny.pixels(2)[:1])
    second = calibrated(graph, tiny.pixels(2)[1:])
    for layer, tap in both.items():
        joined = first[layer].joined(second[layer])
        np.testing.assert_array_equal(tap.lows, joined.lows)
        np.testing.assert_array_equal(tap.highs, joined.highs)


def test_a_tap_knows_the_range_of_each_channel() -> None:
    tap = Tap.of(np.array([[[1.0, -2.0, 0.0], [3.0, 1.0, 0.0]]], np.float32))
    assert tap.lows.tolist() == [1.0, -2.0, 0.0]
    assert tap.highs.tolist() == [3.0, 1.0, 0.0]
    assert tap.peaks.tolist() == pytest.approx([3.0, 2.0, 1e-5])


def test_the_calibrated_graph_gives_what_enters_each_layer(tmp_path: Path) -> None:
    graph = exported(tmp_path).read_bytes()
    outputs = [value.name for value in onnx.load_from_string(tapped(graph)).graph.output]
    assert outputs[:2] == ["features", "tokens"]
    assert set(sources(graph).values()) <= set(outputs)


def test_a_graph_without_linear_layers_is_refused() -> None:
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    other = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    model = onnx.helper.make_model(onnx.helper.make_graph([onnx.helper.make_node("Neg", ["x"], ["y"])], "g", [value], [other]))
    with pytest.raises(EngineError, match="no linear layers"):
        sources(model.SerializeToString())
