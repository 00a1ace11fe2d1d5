"""The exported graph: readable by TensorRT 8.5 and old ONNX Runtimes, any batch, and equal to eager PyTorch."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import tiny
from latentd.engines.artefacts import Reference
from latentd.engines.eager import EagerStage
from latentd.engines.export import export
from latentd.engines.stage import StageSpec, planar
from latentd.errors import EngineError
from latentd.vision.shape import VitShape
from standin.strict import operators

SHAPES = {
    "DINOv2": tiny.DINOV2,
    "timm": tiny.TIMM,
    "registers": dataclasses.replace(tiny.DINOV2, registers=4),
    "gated": dataclasses.replace(tiny.DINOV2, swiglu=True),
    "pruned": dataclasses.replace(tiny.DINOV2, heads=(2, 1, 2), mlp_width=(96, 40, 64)),
    "one patch": dataclasses.replace(tiny.DINOV2, patch=24, grid=1, registers=4),
}


def spec_of(shape: VitShape, split: int = 2, class_tokens: int = 2, size: int = tiny.SIZE) -> StageSpec:
    return StageSpec("tiny", "0" * 64, size, split, class_tokens, shape.width, shape.tokens(size))


def exported(tmp_path: Path, shape: VitShape = tiny.DINOV2, whole: bool = False, **spec: int) -> Path:
    path = tmp_path / "graph.onnx"
    export(tiny.vit(shape), spec_of(shape, **spec), path, whole)
    return path


def run(path: Path, count: int, *outputs: str) -> Any:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(list(outputs), {"pixels": planar(tiny.pixels(count))})


def eager_answer(shape: VitShape, count: int, split: int = 2) -> Reference:
    answer = EagerStage(spec_of(shape, split), tiny.vit(shape)).encode(tiny.pixels(count), tokens=True)
    assert answer.tokens is not None
    return Reference(answer.features, answer.tokens)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("count", [1, 3])
def test_the_graph_gives_what_eager_pytorch_gives_for_any_batch(tmp_path: Path, kind: str, count: int) -> None:
    shape = SHAPES[kind]
    features, tokens = run(exported(tmp_path, shape), count, "features", "tokens")
    eager = eager_answer(shape, count)
    np.testing.assert_allclose(features, eager.features, atol=2e-4)
    np.testing.assert_allclose(tokens, eager.tokens, atol=2e-4)
    assert features.shape == (count, 2 * shape.width)
    assert tokens.shape == (count, shape.tokens(tiny.SIZE), shape.width)


@pytest.mark.parametrize("split", [1, 2, 3])
def test_the_tokens_are_those_after_the_split_and_the_features_do_not_change_with_it(tmp_path: Path, split: int) -> None:
    features, tokens = run(exported(tmp_path, split=split), 2, "features", "tokens")
    np.testing.assert_allclose(tokens, eager_answer(tiny.DINOV2, 2, split).tokens, atol=2e-4)
    np.testing.assert_allclose(features, eager_answer(tiny.DINOV2, 2).features, atol=2e-4)


@pytest.mark.parametrize(("split", "whole", "tokens"), [(2, False, 1), (2, True, 37), (3, False, 37), (3, True, 37)])
def test_the_last_block_gives_its_class_token_alone_where_nobody_takes_the_others(
    tmp_path: Path, split: int, whole: bool, tokens: int
) -> None:
    path = exported(tmp_path, split=split, whole=whole)
    model = onnx.load(str(path))
    (last,) = (node.output[0] for node in model.graph.node if node.name == "/blocks.2/fc2/MatMul")
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(last))
    onnx.save(model, str(path))
    features, mlp = run(path, 2, "features", last)
    assert mlp.shape == (2, tokens, tiny.DINOV2.width)
    np.testing.assert_allclose(features, eager_answer(tiny.DINOV2, 2).features, atol=2e-4)


@pytest.mark.parametrize("kind", SHAPES)
def test_the_graph_holds_only_operators_that_tensorrt_8_5_imports(tmp_path: Path, kind: str) -> None:
    model = onnx.load(str(exported(tmp_path, SHAPES[kind])))
    assert {node.op_type for node in model.graph.node} <= operators("8.5-GA")
    assert all(node.domain == "" for node in model.graph.node)


def test_the_graph_is_opset_16_at_ir_8_with_a_float_input_and_only_the_batch_dynamic(tmp_path: Path) -> None:
    model = onnx.load(str(exported(tmp_path)))
    assert model.ir_version == 8
    assert [(item.domain, item.version) for item in model.opset_import] == [("", 16)]
    sizes = {}
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
        sizes[value.name] = [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
    assert sizes == {"pixels": ["batch", 3, 24, 24], "features": ["batch", 256], "tokens": ["batch", 37, 128]}


def test_sizes_are_constants_of_the_graph(tmp_path: Path) -> None:
    """No shape arithmetic and no Resize at run time: the position grid was resized when the module was made."""
    kinds = {node.op_type for node in onnx.load(str(exported(tmp_path))).graph.node}
    assert not kinds & {"Shape", "Gather", "Expand", "Resize", "Where", "If", "Loop"}


def test_nodes_are_named_after_their_blocks(tmp_path: Path) -> None:
    names = {node.name for node in onnx.load(str(exported(tmp_path))).graph.node}
    assert {"/blocks.0/norm1/ReduceMean", "/blocks.1/Softmax", "/blocks.2/fc2/MatMul"} <= names


def test_the_exporters_warnings_stay_inside_and_the_callers_filters_stay_as_they_were(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as escaped:
        warnings.simplefilter("always")
        before = list(warnings.filters)
        exported(tmp_path)
        assert warnings.filters == before
    assert [str(item.message) for item in escaped] == []


def test_without_the_onnx_package_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(EngineError, match="needs the onnx package") as refused:
        exported(tmp_path)
    assert "pip install onnx" in refused.value.hint
