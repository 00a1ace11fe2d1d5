"""The TensorRT stage: batches, tokens, memory and streams, and every None and False that TensorRT answers instead of raising."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from engines.conftest import Bench
from latentd.engines import device
from latentd.engines.compiling import PlanEngine
from latentd.engines.device import CudaMemory
from latentd.engines.onnx import OnnxStage
from latentd.engines.plans import NotBuilt
from latentd.engines.stage import StageSpec
from latentd.engines.tensorrt import PlanRefused, TensorRtStage
from latentd.errors import EngineError
from standin import running
from standin.host import HostMemory

TOLERANCE = 0.05  # FP16 on 11; the stand-in of the others computes in FP32


@pytest.fixture
def engine(built: Bench) -> PlanEngine:
    """One that has built its plan, for batches of up to 8."""
    return built.engine()


def test_any_batch_up_to_the_largest_answers_as_onnx_runtime_does(engine: PlanEngine) -> None:
    stage = engine.open()
    onnx = OnnxStage(stage.spec, engine._artefacts.graph(), "CPUExecutionProvider")
    for count in (1, 8, 2, 2, 5, 1):
        pixels = tiny.pixels(count, seed=count)
        found, expected = stage.encode(pixels, tokens=True), onnx.encode(pixels, tokens=True)
        np.testing.assert_allclose(found.features, expected.features, atol=TOLERANCE)
        assert found.tokens is not None
        assert expected.tokens is not None
        np.testing.assert_allclose(found.tokens, expected.tokens, atol=TOLERANCE)


def test_tokens_are_given_only_when_asked_for(engine: PlanEngine) -> None:
    stage = engine.open()
    assert stage.encode(tiny.pixels(1)).tokens is None


def test_answers_do_not_change_with_the_next_run(engine: PlanEngine) -> None:
    stage = engine.open()
    first = stage.encode(tiny.pixels(2, seed=1)).features
    kept = first.copy()
    stage.encode(tiny.pixels(2, seed=2))
    assert np.array_equal(first, kept)


def test_more_images_than_the_plan_takes_are_an_engine_error(engine: PlanEngine) -> None:
    stage = engine.open()
    with pytest.raises(EngineError, match=r"takes no batch of 9 images.*not in the profile"):
        stage.encode(tiny.pixels(9))
    assert len(stage.encode(tiny.pixels(8)).features) == 8


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("no gpu", "can't use the GPU"),
        ("no context", "no memory for tensorrt-fp16's execution context"),
        ("no shape", "takes no batch of 1 images"),
        ("execute", "failed on 1 images.*illegal memory access"),
    ],
)
def test_a_refusal_while_opening_is_an_engine_error_and_the_plan_stays(
    engine: PlanEngine, monkeypatch: pytest.MonkeyPatch, fault: str, said: str
) -> None:
    monkeypatch.setenv("STANDIN_FAULT", fault)
    with pytest.raises(EngineError, match=said) as refused:
        engine.open()
    assert not isinstance(refused.value, NotBuilt)
    monkeypatch.delenv("STANDIN_FAULT")
    assert engine.open().name == "tensorrt-fp16"


def test_a_plan_that_is_refused_is_to_be_built_again(engine: PlanEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDIN_FAULT", "refuses")
    with pytest.raises(NotBuilt, match="incompatible device"):
        engine.open()


def test_a_run_that_fails_is_an_engine_error_and_the_next_one_may_work(engine: PlanEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = engine.open()
    monkeypatch.setenv("STANDIN_FAULT", "execute")
    with pytest.raises(EngineError, match="failed on 2 images: 1: "):
        stage.encode(tiny.pixels(2))
    monkeypatch.delenv("STANDIN_FAULT")
    assert len(stage.encode(tiny.pixels(2)).features) == 2


def test_an_address_that_tensorrt_does_not_take_is_an_engine_error(engine: PlanEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDIN_MEMORY", "unaligned")
    with pytest.raises(EngineError, match="does not take address 0x"):
        engine.open()


class Failing(HostMemory):
    def floats(self, *shape: int) -> Any:
        raise RuntimeError("CUDA error: out of memory")


class FailingLater(HostMemory):
    def upload(self, pixels: Any, buffer: Any) -> None:
        raise RuntimeError("CUDA error: out of memory")


@pytest.mark.parametrize("memory", [Failing, FailingLater])
def test_memory_that_runs_out_is_an_engine_error(engine: PlanEngine, memory: Any) -> None:
    engine._device, engine._known = memory, None
    with pytest.raises(EngineError, match="out of memory"):
        engine.open()


@pytest.mark.parametrize("change", [{"class_tokens": 3}, {"image_size": 28}, {"tokens": 36}, {"width": 64}])
def test_a_plan_of_another_graph_is_refused(engine: PlanEngine, change: Any) -> None:
    memory, key = engine._identified()
    plan = engine._cache.load(key)
    assert plan is not None
    fields = {**vars(engine._artefacts.spec), **change}
    with pytest.raises(PlanRefused, match="was expected"):
        TensorRtStage(StageSpec(**fields), "tensorrt-fp16", plan, 8, memory)


def test_a_plan_for_smaller_batches_is_refused(engine: PlanEngine) -> None:
    memory, key = engine._identified()
    plan = engine._cache.load(key)
    assert plan is not None
    with pytest.raises(PlanRefused, match="takes 8 images at once, 9 were expected"):
        TensorRtStage(engine._artefacts.spec, "tensorrt-fp16", plan, 9, memory)


def test_a_closed_stage_lets_go_of_everything(engine: PlanEngine) -> None:
    stage = engine.open()
    assert isinstance(stage, TensorRtStage)
    stage.close()
    assert (stage._context, stage._engine, stage._runtime, stage._buffers) == (None, None, None, {})


def test_without_a_gpu_in_torch_there_is_a_reason_and_a_remedy() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("torch finds a GPU here")
    with pytest.raises(EngineError, match=r"built without CUDA|finds no GPU") as refused:
        CudaMemory()
    assert refused.value.hint


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("# R35 (release), REVISION: 3.1, GCID: 32790763, BOARD: t186ref, EABI: aarch64, DATE: Wed Mar 15 07:54:12 UTC 2023", " R35 3.1"),
        ("something else", ""),
        ("", ""),
    ],
)
def test_the_boards_release_is_part_of_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, found: str) -> None:
    (tmp_path / "release").write_text(line)
    monkeypatch.setattr(device, "L4T_RELEASE", tmp_path / "release")
    assert device._l4t() == found
    monkeypatch.setattr(device, "L4T_RELEASE", tmp_path / "absent")
    assert device._l4t() == ""


def test_sizes_that_tensorrt_does_not_tell_before_the_first_run_are_checked_in_it(
    engine: PlanEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = running.ICudaEngine.get_tensor_shape
    monkeypatch.setattr(running.ICudaEngine, "get_tensor_shape", lambda self, name: [-1 for _ in told(self, name)])
    with pytest.raises(EngineError, match=r"gives pixels the shape \(1, -1, -1, -1\)"):
        engine.open()
