"""A GPU that is really full: every engine and the learner recognise it and outlive it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from device.gpu import CUDA, LARGE, SPLIT, Model, large_memory, leave_free, needs_onnxruntime
from latentd.engines.artefacts import Artefacts
from latentd.engines.eager import EagerStage
from latentd.engines.enduring import EnduringStage
from latentd.engines.onnx import OnnxStage
from latentd.errors import EngineError
from latentd.learning.adapted import Adapted
from latentd.learning.blocks import UpperBlocks
from latentd.learning.place import Place
from latentd.learning.sleep import SleepSettings
from latentd.trouble import Trouble, trouble_of
from sleepers import run
from support import environment

pytestmark = pytest.mark.device
MIB = 1 << 20


def test_torchs_refusal_is_recognised() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
    assert trouble_of(refused.value) is Trouble.MEMORY


def test_a_batch_that_does_not_fit_is_answered_in_halves(model: Model) -> None:
    pixels = model.pixels(64)
    inner = EagerStage(model.spec, model.vit, "cuda")
    expected = inner.encode(pixels).features
    stage = EnduringStage(inner)
    leave_free(96 * MIB)
    found = stage.encode(pixels).features
    assert stage.name == "eager-cuda"
    assert stage.shortage.count > 0, "the test left too much memory"
    assert "out of memory" in str(stage.shortage.reason)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_where_one_image_does_not_fit_the_cpu_takes_over(model: Model) -> None:
    pixels = model.pixels(2)
    host = EagerStage(model.spec, model.vit)
    stage = EnduringStage(EagerStage(model.spec, model.vit, "cuda"), lambda: host)
    leave_free(0)
    found = stage.encode(pixels).features
    assert (stage.name, stage.shortage.moved_from) == ("eager-cpu", "eager-cuda")
    expected = host.encode(pixels).features  # of both at once, where the stage computed one after the other
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_onnx_runtimes_bounded_arena_is_outlived(model: Model, tmp_path: Path) -> None:
    graph = Artefacts(model.backbone, model.spec, tmp_path).graph()
    needs_onnxruntime(model, graph)
    host = EagerStage(model.spec, model.vit)
    try:
        inner = OnnxStage(model.spec, graph, CUDA, cuda_memory_bytes=160 * MIB)  # the weights take 85
    except EngineError as refused:
        if trouble_of(refused) is not Trouble.MEMORY:
            raise
        pytest.skip(f"this version needs more to load the graph: {refused}")
    pixels = model.pixels(64)
    with pytest.raises(EngineError) as refused_run:
        inner.encode(pixels)
    assert trouble_of(refused_run.value) is Trouble.MEMORY
    stage = EnduringStage(inner, lambda: host)
    found, expected = stage.encode(pixels).features, host.encode(pixels).features
    assert stage.shortage.count > 0
    cosine = (found * expected).sum(axis=1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
    assert cosine.min() > 0.999


@pytest.mark.parametrize(("free_mib", "place_after"), [(160, "cuda"), (0, "cpu")])
def test_the_learner_takes_smaller_steps_and_then_the_cpu(model: Model, free_mib: int, place_after: str) -> None:
    place = Place.of("cuda")
    adapted = Adapted(UpperBlocks.load(model.backbone, SPLIT), LARGE, SleepSettings(128, 0.5, 0.5, 128, 128, 16, 1e-3, 0.1, 0), place)
    memory = large_memory()
    leave_free(free_mib * MIB)
    run(adapted.sleep(memory, {}, 256))
    if place_after == "cpu":
        assert (adapted.sleeps, adapted.serving) == (0, None)
        run(adapted.sleep(memory, {}, 256))
    else:
        assert adapted.microbatch < 128, "the test left too much memory"
    assert (place.name, adapted.sleeps) == (place_after, 1)


LOSE_THE_CONTEXT = """
import json, torch
from latentd.trouble import trouble_of
from latentd.learning.place import Place
try:
    torch.zeros(4, device="cuda")[torch.tensor([1 << 20], device="cuda")].cpu()
except RuntimeError as error:
    print(json.dumps([trouble_of(error).name, Place.of("auto").name]))
"""


def test_a_lost_context_is_told_from_a_shortage_and_the_learner_leaves_the_gpu() -> None:
    command = [sys.executable, "-c", LOSE_THE_CONTEXT]
    child = subprocess.run(command, env=environment(), capture_output=True, check=False)
    lines = child.stdout.decode().splitlines()
    assert lines, child.stderr.decode()
    assert json.loads(lines[-1]) == ["CONTEXT", "cpu"]
