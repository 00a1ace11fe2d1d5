"""The FP16 graph for TensorRT 11: what stays in FP32, that it says the same, and that TensorRT's parser knows its operators."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict

import numpy as np
import onnx
import onnxruntime
import pytest

import tiny
from engines.test_export import SHAPES, exported
from latentd.config import Config, load
from latentd.engines.artefacts import Artefacts
from latentd.engines.half import half, stays_fp32
from latentd.engines.stage import planar, stage_spec
from latentd.errors import EngineError
from latentd.vision.checkpoints import Backbone
from latentd.vision.probe import probe_images
from standin.strict import operators


def answers(graph: bytes, pixels: Any) -> Any:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # it would take casts out again
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return session.run(["features", "tokens"], {"pixels": pixels})


def least_cosine(found: Any, expected: Any, width: int) -> float:
    a, b = (each.reshape(-1, width).astype(np.float64) for each in (found, expected))
    return float(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())


def types(model: Any) -> Dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    return {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input, *graph.output)}


@pytest.mark.parametrize("kind", SHAPES)
def test_it_gives_what_the_whole_graph_gives(tmp_path: Path, kind: str) -> None:
    graph = exported(tmp_path, SHAPES[kind]).read_bytes()
    pixels = planar(tiny.pixels(3))
    for found, expected in zip(answers(half(graph), pixels), answers(graph, pixels)):
        assert found.dtype == np.float32
        assert least_cosine(found, expected, tiny.DINOV2.width) > 0.9999


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("table", ["8.5-GA", "8.6-GA", "10.1-GA", "main"])
def test_plain_and_half_graphs_hold_only_operators_that_every_parser_imports(tmp_path: Path, kind: str, table: str) -> None:
    graph = exported(tmp_path, SHAPES[kind]).read_bytes()
    for each in (graph, half(graph)):
        model = onnx.load_from_string(each)
        assert {node.op_type for node in model.graph.node} <= operators(table)
        assert all(node.domain == "" for node in model.graph.node)


def test_an_operator_that_8_5_does_not_import_would_be_found() -> None:
    assert not {"LayerNormalization", "Gelu", "DynamicQuantizeLinear", "MatMulInteger"} & operators("8.5-GA")
    assert {"MatMul", "Softmax", "Erf", "Cast"} <= operators("8.5-GA")


def test_norms_softmax_and_the_pixels_stay_in_fp32_and_the_rest_is_fp16(tmp_path: Path) -> None:
    model = onnx.load_from_string(half(exported(tmp_path).read_bytes()))
    kinds = types(model)
    fp32, fp16 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
    made = {node.name: kinds[node.output[0]] for node in model.graph.node if node.op_type != "Cast"}
    assert made["/blocks.0/norm1/ReduceMean_1"] == made["/norm/Div"] == made["/blocks.2/Softmax"] == made["/Sub"] == fp32
    assert made["/blocks.0/qkv/MatMul"] == made["/blocks.1/fc1/MatMul"] == made["/blocks.0/Add"] == made["/patch/Conv"] == fp16
    assert all((kind == fp32) == stays_fp32(name) for name, kind in made.items() if kind in (fp32, fp16))
    assert [kinds[name] for name in ("pixels", "features", "tokens")] == [fp32] * 3


def test_the_weights_take_half_the_space(tmp_path: Path) -> None:
    graph = exported(tmp_path).read_bytes()
    assert len(half(graph)) < 0.6 * len(graph)


def test_a_weight_that_fp16_does_not_hold_is_an_engine_error(tmp_path: Path) -> None:
    model = onnx.load(str(exported(tmp_path)))
    (weight,) = (each for each in model.graph.initializer if each.name == "vit.patch.weight")
    weight.CopyFrom(onnx.numpy_helper.from_array(1e6 * onnx.numpy_helper.to_array(weight), weight.name))
    with pytest.raises(EngineError, match=r"vit\.patch\.weight does not fit FP16"):
        half(model.SerializeToString())


@pytest.mark.parametrize(
    ("name", "stays"),
    [
        ("/blocks.0/norm1/ReduceMean", True),
        ("/blocks.11/norm2/Add_1", True),
        ("/norm/Sqrt", True),
        ("/blocks.3/Softmax", True),
        ("/Softmax_1", True),
        ("/Sub", True),
        ("/Div", True),
        ("/blocks.0/fc1/MatMul", False),
        ("/blocks.0/Div", False),
        ("/blocks.0/Add", False),
        ("/patch/Conv", False),
        ("", False),
    ],
)
def test_a_name_says_whether_it_stays(name: str, stays: bool) -> None:
    assert stays_fp32(name) == stays


def test_the_real_backbone_passes_the_gate_in_fp16(backbone: Backbone, cache_dir: Path) -> None:
    config: Config = load({}, {"state.cache_dir": str(cache_dir)}, is_service=False)
    artefacts = Artefacts(backbone, stage_spec(config, backbone), cache_dir)
    found = answers(half(artefacts.graph().read_bytes()), planar(probe_images(artefacts.spec.image_size)))
    for each, expected in zip(found, artefacts.reference()):
        assert least_cosine(each, expected, artefacts.spec.width) > config.engine.min_cosine
