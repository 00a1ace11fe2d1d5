"""Every engine on the GPU gives what eager PyTorch gives on the CPU."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import List

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import tiny
from device.gpu import CUDA, Model, needs_onnxruntime
from latentd import config
from latentd.engines.artefacts import Artefacts
from latentd.engines.choose import choose
from latentd.engines.eager import EagerStage
from latentd.engines.onnx import OnnxStage
from latentd.engines.stage import Encoded, FrozenStage, stage_spec
from latentd.vision import checkpoints

pytestmark = pytest.mark.device
LEAST_COSINE = 0.9999  # of any token; ONNX Runtime computes in TF32 where the GPU has it
WAIT_S = 60.0


def least_cosine(one: Encoded, other: Encoded, width: int) -> float:
    assert one.tokens is not None and other.tokens is not None
    worst = 1.0
    for found, expected in ((one.features, other.features), (one.tokens, other.tokens)):
        a, b = found.reshape(-1, width).astype(np.float64), expected.reshape(-1, width).astype(np.float64)
        worst = min(worst, float(((a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min()))
    return worst


def assert_agrees(stage: FrozenStage, model: Model) -> None:
    reference = EagerStage(model.spec, model.vit)
    for count in (1, 2, 3, 8, 1):
        pixels = model.pixels(count)
        found = stage.encode(pixels, tokens=True)
        assert least_cosine(found, reference.encode(pixels, tokens=True), model.spec.width) > LEAST_COSINE


@pytest.fixture
def graph(model: Model, tmp_path: Path) -> Path:
    return Artefacts(model.backbone, model.spec, tmp_path).graph()


def test_eager_pytorch_agrees_with_the_cpu(model: Model) -> None:
    stage = EagerStage(model.spec, model.vit, "cuda")
    assert stage.name == "eager-cuda"
    assert_agrees(stage, model)
    held = torch.cuda.memory_allocated()
    stage.close()
    assert torch.cuda.memory_allocated() < held


def test_onnx_runtime_agrees_with_the_cpu(model: Model, graph: Path) -> None:
    needs_onnxruntime(model, graph)
    stage = OnnxStage(model.spec, graph, CUDA)
    assert stage.name == "onnxruntime-cuda"
    options = stage._session.get_provider_options()[CUDA]
    assert (options["gpu_mem_limit"], options["arena_extend_strategy"]) == (str(1 << 30), "kSameAsRequested")
    assert_agrees(stage, model)


def test_both_at_once_on_their_streams_disturb_neither(model: Model, graph: Path) -> None:
    needs_onnxruntime(model, graph)
    pixels = model.pixels(4)
    stages: List[FrozenStage] = [OnnxStage(model.spec, graph, CUDA), EagerStage(model.spec, model.vit, "cuda")]
    alone = [stage.encode(pixels).features for stage in stages]
    together = threading.Barrier(len(stages))

    def encode(stage: FrozenStage) -> List[NDArray[np.float32]]:
        together.wait(WAIT_S)
        return [stage.encode(pixels).features for _ in range(50)]

    with ThreadPoolExecutor(len(stages)) as threads:
        for found, expected in zip(threads.map(encode, stages), alone):
            for each in found:
                np.testing.assert_allclose(each, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("order", ["onnxruntime", "eager"])
def test_the_gate_lets_the_engine_on_the_gpu_serve(tmp_path: Path, order: str, model: Model, graph: Path) -> None:
    if order == "onnxruntime":
        needs_onnxruntime(model, graph)
    choice = choose(tiny.settings(tmp_path, engine__order=order), tiny.backbone(tmp_path))
    assert choice.stage.name == f"{order}-cuda", choice.attempts


def test_the_real_backbone_agrees(backbone: checkpoints.Backbone, cache_dir: Path) -> None:
    settings = config.load({}, {"state.cache_dir": str(cache_dir), "engine.order": "eager"})
    choice = choose(settings, backbone)
    assert choice.stage.name == "eager-cuda"
    assert choice.attempts[0].cosine is not None and choice.attempts[0].cosine > LEAST_COSINE
    assert choice.stage.spec == stage_spec(settings, backbone)
