"""Two queues on one device, and the eager stage and ONNX Runtime's session on theirs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Dict, List, Optional

import numpy as np
import onnxruntime
import pytest
import torch

import tiny
from fake_cuda import FakeCuda, FakeStream, watched
from latentd.engines import device, eager, onnx, torch_queue
from latentd.engines.artefacts import Artefacts
from latentd.engines.eager import EagerStage
from latentd.engines.onnx import OnnxStage
from latentd.engines.stage import StageSpec, stage_spec
from latentd.engines.torch_queue import ANSWERING, LEARNING, TorchQueue
from latentd.errors import EngineError


@pytest.fixture
def artefacts(tmp_path: Path) -> Artefacts:
    config, backbone = tiny.settings(tmp_path), tiny.backbone(tmp_path)
    return Artefacts(backbone, stage_spec(config, backbone), config.cache_dir)


def test_what_answers_goes_before_what_learns(fake_cuda: FakeCuda) -> None:
    fake_cuda.queue(priority=LEARNING), fake_cuda.queue(priority=ANSWERING)
    learning, answering = fake_cuda.streams
    assert answering.priority < learning.priority == 0, "torch: lower goes first, and 0 is the lowest"
    assert [event.blocking for event in fake_cuda.events] == [True, False]


def test_the_end_of_work_waits_for_all_that_was_queued(fake_cuda: FakeCuda) -> None:
    queue = fake_cuda.queue()
    with queue.work():
        inside = fake_cuda.current, fake_cuda.streams[0].unfinished
    assert inside == (fake_cuda.streams[0], 1)
    assert (fake_cuda.current, fake_cuda.streams[0].unfinished, fake_cuda.waits) == (None, 0, 1)


def test_a_failure_in_work_is_told_as_it_is_and_leaves_the_stream(fake_cuda: FakeCuda) -> None:
    queue = fake_cuda.queue()
    with pytest.raises(RuntimeError, match="out of memory"), queue.work():
        raise RuntimeError("CUDA error: out of memory")
    assert (fake_cuda.current, fake_cuda.waits) == (None, 0)


def test_arrays_reach_the_device_through_pinned_memory(fake_cuda: FakeCuda) -> None:
    queue, values = fake_cuda.queue(), np.arange(6, dtype=np.float32).reshape(2, 3)
    with queue.work():
        np.testing.assert_array_equal(queue.download(queue.upload(values) * 2), values * 2)
    assert fake_cuda.pinned == 1
    queue.free()
    assert fake_cuda.freed == 1


def test_on_the_cpu_nothing_is_copied_and_no_stream_is_made(fake_cuda: FakeCuda) -> None:
    queue, values = fake_cuda.queue("cpu"), np.ones(3, np.float32)
    with queue.work():
        assert np.shares_memory(queue.download(queue.upload(values)), values)
    queue.free()
    assert (fake_cuda.streams, fake_cuda.pinned, fake_cuda.freed, queue.is_cuda) == ([], 0, 0, False)


def test_a_broken_driver_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> bool:
        raise RuntimeError("NvRmMemInitNvmap failed with Permission denied")

    monkeypatch.setattr(torch.version, "cuda", "11.4")
    monkeypatch.setattr(torch.cuda, "is_available", broken)
    assert torch_queue.has_gpu() is False
    assert device.answering_stream() is None
    assert eager.best_device() == "cpu"


# --- the stages ---


def test_the_eager_stage_on_a_gpu_answers_as_on_the_cpu_from_a_stream_of_its_own(
    artefacts: Artefacts, fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
    pixels = tiny.pixels(3)
    expected = EagerStage(artefacts.spec, artefacts.vit()).encode(pixels, tokens=True)
    monkeypatch.setattr(eager, "TorchQueue", fake_cuda.queue)
    stage = EagerStage(artefacts.spec, artefacts.vit(), "cuda")
    assert stage.name == "eager-cuda"
    assert stage._vit is not None and stage._vit is not artefacts.vit(), "the module given stays where it is"
    watched(stage._vit.blocks[0], fake_cuda, ANSWERING)
    found = stage.encode(pixels, tokens=True)
    np.testing.assert_array_equal(found.features, expected.features)
    assert found.tokens is not None and expected.tokens is not None
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    assert stage.encode(pixels).tokens is None
    stage.close()
    assert fake_cuda.freed == 1


def test_a_gpu_without_room_for_the_weights_is_an_engine_that_does_not_load(artefacts: Artefacts, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> TorchQueue:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(eager, "TorchQueue", full)
    with pytest.raises(EngineError, match="eager-cuda could not be loaded: CUDA error: out of memory"):
        EagerStage(artefacts.spec, artefacts.vit(), "cuda")


class FakeSession:
    """An InferenceSession that writes down how it was opened and run; `errors` are raised one after the other."""

    opened: ClassVar[List[Any]] = []
    runs: ClassVar[List[Optional[Any]]] = []
    errors: ClassVar[List[Exception]] = []

    def __init__(self, path: str, options: Any, providers: Any) -> None:
        self.opened.append(providers)

    def get_providers(self) -> List[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def get_inputs(self) -> List[Any]:
        return [SimpleNamespace(type="tensor(float)")]

    def run(self, outputs: List[str], feed: Dict[str, Any], options: Optional[Any] = None) -> List[Any]:
        self.runs.append(options)
        if self.errors:
            raise self.errors.pop()
        return [np.zeros((len(feed["pixels"]), 2), np.float32) for _ in outputs]


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> FakeSession:
    for name in ("opened", "runs", "errors"):
        monkeypatch.setattr(FakeSession, name, [])
    monkeypatch.setattr(onnxruntime, "InferenceSession", FakeSession)
    monkeypatch.setattr(onnx, "answering_stream", lambda: FakeStream(ANSWERING))
    return FakeSession  # type: ignore[return-value]


SPEC = StageSpec("fake", "f" * 64, image_size=4, split=2, class_tokens=1, width=2, tokens=3)


def test_onnx_runtimes_memory_on_cuda_is_bounded_and_its_stream_goes_before_the_learners(session: FakeSession) -> None:
    stage = OnnxStage(SPEC, Path("graph.onnx"), "CUDAExecutionProvider", cuda_memory_bytes=123456789)
    (cuda, own), cpu = session.opened[0]
    assert (cuda, cpu, stage.lanes) == ("CUDAExecutionProvider", "CPUExecutionProvider", 1)
    assert own == {
        "gpu_mem_limit": "123456789",
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",
        "user_compute_stream": str(0x5EED + ANSWERING),
    }


def test_without_torch_on_the_gpu_onnx_runtime_makes_a_stream_itself(session: FakeSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx, "answering_stream", lambda: None)
    OnnxStage(SPEC, Path("graph.onnx"), "CUDAExecutionProvider")
    assert "user_compute_stream" not in session.opened[0][0][1]


def test_after_a_run_without_memory_one_run_gives_back_what_the_arena_holds(session: FakeSession) -> None:
    stage = OnnxStage(SPEC, Path("graph.onnx"), "CUDAExecutionProvider")
    session.errors.append(RuntimeError("bfc_arena.cc:376 Failed to allocate memory for requested buffer of size 8388608000"))
    pixels = np.zeros((2, 4, 4, 3), np.uint8)
    with pytest.raises(EngineError, match="failed on 2 images"):
        stage.encode(pixels)
    stage.encode(pixels), stage.encode(pixels)
    first, second, third = session.runs
    assert (first, third) == (None, None)
    assert second is not None
    assert second.get_run_config_entry("memory.enable_memory_arena_shrinkage") == "gpu:0"
