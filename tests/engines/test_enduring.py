"""A stage whose device runs out of memory: fewer images at once, then the CPU, and no image lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, List, Optional

import numpy as np
import pytest
from numpy.typing import NDArray

import tiny
from latentd.engines import enduring as enduring_module
from latentd.engines.choose import Choice, Pending, choose
from latentd.engines.enduring import GROW_AFTER_S, PATIENCE_S, EnduringStage, Shortage, enduring, open_on_host
from latentd.engines.stage import Encoded, StageSpec
from latentd.errors import EngineError, OutOfMemory

SPEC = StageSpec("fake", "f" * 64, image_size=4, split=2, class_tokens=1, width=2, tokens=3)
FULL = "eager-cuda failed on {} images: CUDA out of memory. Tried to allocate 20.00 MiB"


class Cramped:
    """Takes `most` images at once; features are the first pixel's values."""

    lanes = 1
    spec = SPEC

    def __init__(self, most: int, name: str = "eager-cuda") -> None:
        self.most, self.name = most, name
        self.runs: List[int] = []
        self.error: Optional[Exception] = None
        self.is_open = True

    def encode(self, pixels: NDArray[np.uint8], tokens: bool = False, shared: bool = False) -> Encoded:
        self.runs.append(len(pixels))
        if self.error is not None:
            raise self.error
        if len(pixels) > self.most:
            raise EngineError(FULL.format(len(pixels)))
        features = pixels[:, 0, 0, :2].astype(np.float32)
        return Encoded(features, np.repeat(features[:, None], 3, axis=1) if tokens else None)

    def close(self) -> None:
        self.is_open = False


class Clock:
    now_s = 10.0

    def __call__(self) -> float:
        return self.now_s


def images(count: int) -> NDArray[np.uint8]:
    return np.arange(count * 48, dtype=np.uint8).reshape(count, 4, 4, 3)


def stage(inner: Cramped, host: Optional[Callable[[], Any]] = None, clock: Optional[Clock] = None, **more: Any) -> EnduringStage:
    return EnduringStage(inner, host, clock=clock or Clock(), **{"pause": lambda seconds: None, **more})


@pytest.mark.parametrize("most", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("tokens", [True, False])
def test_every_image_of_a_batch_that_is_too_large_is_answered_in_its_place(most: int, tokens: bool) -> None:
    answer = stage(Cramped(most)).encode(images(7), tokens)
    np.testing.assert_array_equal(answer.features, images(7)[:, 0, 0, :2])
    assert (answer.tokens is not None) is tokens
    if answer.tokens is not None:
        np.testing.assert_array_equal(answer.tokens[:, 2], answer.features)


def test_the_next_batches_are_as_small_as_what_succeeded_and_grow_back_with_time() -> None:
    inner, clock = Cramped(4), Clock()
    enduring_stage = stage(inner, clock=clock)
    enduring_stage.encode(images(8))
    assert inner.runs == [8, 4, 4]
    assert enduring_stage.shortage == Shortage(1, 4, FULL.format(8))
    enduring_stage.encode(images(8))
    assert inner.runs[3:] == [4, 4]
    clock.now_s += GROW_AFTER_S
    inner.most = 8
    enduring_stage.encode(images(8))
    assert inner.runs[5:] == [8]
    assert enduring_stage.shortage == Shortage(1, None, FULL.format(8))


def test_a_device_that_is_still_full_when_batches_grow_back_costs_one_run_a_minute() -> None:
    inner, clock = Cramped(2), Clock()
    enduring_stage = stage(inner, clock=clock)
    enduring_stage.encode(images(4))
    clock.now_s += GROW_AFTER_S
    enduring_stage.encode(images(4)), enduring_stage.encode(images(4))
    assert inner.runs == [4, 2, 2, 4, 2, 2, 2, 2]


def test_one_image_is_tried_again_while_a_learning_step_lets_go_of_its_memory() -> None:
    inner, waits = Cramped(0), []

    def pause(seconds: float) -> None:
        waits.append(seconds)
        inner.most = len(waits) - 1  # the second wait helps

    answer = stage(inner, host=lambda: pytest.fail("no reason to leave the device"), pause=pause).encode(images(1))
    assert answer.features.shape == (1, 2)
    assert waits == list(PATIENCE_S)


def test_a_device_without_memory_for_one_image_hands_over_to_the_cpu_and_says_so() -> None:
    device, host = Cramped(0), Cramped(8, "onnxruntime-cpu")
    closed_before_opening: List[bool] = []

    def open_host() -> Cramped:
        closed_before_opening.append(not device.is_open)
        return host

    serving = stage(device, open_host)
    np.testing.assert_array_equal(serving.encode(images(5)).features, images(5)[:, 0, 0, :2])
    assert closed_before_opening == [True]
    assert serving.name == "onnxruntime-cpu"
    assert (serving.shortage.moved_from, serving.shortage.largest_batch) == ("eager-cuda", None)
    assert "out of memory" in str(serving.shortage.reason)
    serving.encode(images(8))
    assert host.runs[-1] == 8
    serving.close()
    assert not host.is_open


def test_where_the_cpu_has_no_memory_either_the_image_is_refused_and_the_next_one_tried() -> None:
    host = Cramped(0, "onnxruntime-cpu")
    serving = stage(Cramped(0), lambda: host)
    with pytest.raises(OutOfMemory, match="no memory for one image") as refused:
        serving.encode(images(1))
    assert (refused.value.http_status, refused.value.retry_after_s) == (503, 5)
    host.most = 1
    assert serving.encode(images(2)).features.shape == (2, 2)


def test_a_cpu_that_cannot_take_over_is_an_engine_error_at_once_and_ever_after() -> None:
    def broken() -> Cramped:
        raise EngineError("no engine can serve on the CPU")

    serving = stage(Cramped(0), broken)
    for match in ("no engine can serve", "could not take over"):
        with pytest.raises(EngineError, match=match):
            serving.encode(images(1))
    serving.close()


def test_other_failures_are_passed_on_and_change_nothing() -> None:
    inner = Cramped(8)
    inner.error = EngineError("CUDA error: an illegal memory access was encountered")
    serving = stage(inner, lambda: pytest.fail("no reason to leave the device"))
    with pytest.raises(EngineError, match="illegal"):
        serving.encode(images(4))
    assert inner.runs == [4]
    assert serving.shortage == Shortage()


def test_the_cpu_takes_over_with_an_engine_that_passed_the_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny.backbone(tmp_path)
    settings = tiny.settings(tmp_path, engine__order="eager", engine__providers="CPUExecutionProvider")
    eager = choose(settings, backbone).stage
    on_host = open_on_host(settings, backbone)
    assert on_host.name == "onnxruntime-cpu"
    pixels = tiny.pixels(3)
    np.testing.assert_allclose(on_host.encode(pixels).features, eager.encode(pixels).features, atol=2e-4)
    monkeypatch.setattr(enduring_module, "agreement", lambda *_: 0.5)
    with pytest.raises(EngineError, match=r"onnxruntime-cpu: cosine with eager PyTorch 0.500000; eager-cpu: cosine"):
        open_on_host(settings, backbone)


def test_engines_that_are_built_later_endure_too(tmp_path: Path) -> None:
    backbone, settings = tiny.backbone(tmp_path), tiny.settings(tmp_path, engine__order="eager")
    choice = choose(settings, backbone)
    plan = Cramped(0, "tensorrt-fp16")
    built = Pending("tensorrt-fp16", lambda report, stop: None, lambda: (plan, choice.attempts[0]))
    failed = Pending("tensorrt-fp32", lambda report, stop: None, lambda: (None, choice.attempts[0]))
    lasting = enduring(Choice(choice.stage, choice.attempts, (built, failed)), settings, backbone)
    assert lasting.stage.name == "eager-cpu"
    stage_made, attempt = lasting.pending[0].attempt()
    assert stage_made is not None and attempt is choice.attempts[0]
    assert stage_made.name == "tensorrt-fp16"
    assert lasting.pending[1].attempt()[0] is None


def test_a_plan_without_memory_for_one_image_hands_over_to_the_real_engine_on_the_cpu(tmp_path: Path) -> None:
    backbone, settings = tiny.backbone(tmp_path), tiny.settings(tmp_path, engine__order="eager")
    choice = choose(settings, backbone)
    plan = Cramped(0, "tensorrt-fp16")
    plan.spec = choice.stage.spec
    serving = enduring(choice._replace(stage=plan), settings, backbone).stage
    pixels = tiny.pixels(2)
    np.testing.assert_allclose(serving.encode(pixels).features, choice.stage.encode(pixels).features, atol=2e-4)
    assert serving.name == "onnxruntime-cpu"
