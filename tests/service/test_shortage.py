"""A device without memory, seen from outside: fewer images at once, the CPU, 503 with Retry-After; never 500."""

from __future__ import annotations

from typing import Any, Callable, List

import numpy as np
import pytest
from numpy.typing import NDArray

from latentd.engines.choose import Attempt
from latentd.engines.enduring import EnduringStage
from latentd.engines.stage import Encoded
from latentd.errors import EngineError
from latentd.service.batcher import Priority
from latentd.service.schemas import Status
from service.fakes import WAIT_S, FakeStage, World, assert_problem, picture


class CrampedStage(FakeStage):
    """Has memory for so many images."""

    name = "eager-cuda"
    most = 2

    def encode(self, pixels: NDArray[np.uint8], tokens: bool = False, shared: bool = False) -> Encoded:
        if len(pixels) > self.most:
            raise EngineError("eager-cuda failed: CUDA out of memory. Tried to allocate 20.00 MiB")
        return super().encode(pixels, tokens, shared)


class HostStage(FakeStage):
    name = "onnxruntime-cpu"


Cramp = Callable[[int], CrampedStage]


@pytest.fixture
def cramp(world: World) -> Cramp:
    """cramp(most) -> the stage that serves since, which has memory for so many images."""

    def cramped(most: int) -> CrampedStage:
        stage = CrampedStage()
        stage.most = most
        serving = EnduringStage(stage, HostStage, pause=lambda seconds: None)
        world.parts.batcher.replace(serving).result(WAIT_S)
        attempts = (Attempt("eager", "serving", "cosine"), Attempt("onnxruntime-cpu", "not tried", "eager-cuda comes before it"))
        world.parts.choice = world.parts.choice._replace(stage=serving, attempts=attempts)
        return stage

    return cramped


def labels(answer: Any) -> List[str]:
    assert answer.status_code == 200, answer.text
    return [result["decision"] for result in answer.json()["results"]]


def held_together(world: World, count: int) -> List[Any]:
    """So many images that the stage gets as one batch."""
    tickets = world.parts.batcher.reserve(count, Priority.CLASSIFY)
    stage = world.parts.batcher.stage
    inner: Any = stage._stage  # type: ignore[attr-defined]
    inner.gate.clear()
    inner.entered.clear()
    first, *others = tickets
    world.parts.batcher.enqueue(first, np.zeros((16, 16, 3), np.uint8))
    assert inner.entered.wait(WAIT_S)
    for ticket in others:
        world.parts.batcher.enqueue(ticket, np.zeros((16, 16, 3), np.uint8))
    inner.gate.set()
    return [ticket.future.result(WAIT_S) for ticket in tickets]


def test_a_batch_that_is_too_large_is_answered_in_parts_and_the_status_says_so(world: World, cramp: Cramp) -> None:
    cramp(2)
    assert len(held_together(world, 6)) == 6
    status = Status.model_validate(world.call("GET", "/v1/status").json())
    assert status.engine.name == "eager-cuda"
    assert (status.engine.shortage.count, status.engine.shortage.largest_batch) == (1, 2)  # five were too many, and went in twos
    assert "out of memory" in str(status.engine.shortage.reason)


def test_the_cpu_answers_in_the_place_of_a_device_without_memory(world: World, cramp: Cramp) -> None:
    device = cramp(0)
    assert labels(world.classify(picture(1), picture(2))) == ["cat", "cat"]
    assert device.closed
    status = Status.model_validate(world.call("GET", "/v1/status").json())
    assert (status.engine.name, status.engine.shortage.moved_from) == ("onnxruntime-cpu", "eager-cuda")
    assert [(attempt.engine, attempt.state) for attempt in status.engine.attempts] == [
        ("eager", "replaced"),
        ("onnxruntime-cpu", "serving"),
    ]
    assert "no memory for one image" in status.engine.attempts[0].reason
    assert world.classify(picture(3)).json()["engine"] == "onnxruntime-cpu"


def test_what_is_taught_on_a_device_without_memory_is_stored(world: World, cramp: Cramp) -> None:
    cramp(0)
    answer = world.learn((picture(1), "cat"), (picture(2), "dog"), headers={"Prefer": "wait=5"})
    assert (answer.status_code, [result["state"] for result in answer.json()["results"]]) == (200, ["learned", "learned"])


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")])
def test_where_nothing_has_memory_the_answer_is_503_and_says_when_to_come_again(world: World, error: Exception) -> None:
    world.stage.error = error
    for answer in (world.classify(picture()), world.learn((picture(), "cat"))):
        assert_problem(answer, 503, "out-of-memory")
        assert answer.headers["retry-after"] == "5"
    world.stage.error = None
    assert labels(world.classify(picture())) == ["cat"]
    assert world.deaths == []


def test_an_image_that_there_is_no_memory_to_decode_fails_alone_with_503(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, large = world.parts.pipeline._decode, picture(2)

    def hungry(data: bytes) -> Any:
        if data == large:
            raise MemoryError
        return decode(data)

    monkeypatch.setattr(world.parts.pipeline, "_decode", hungry)
    found = world.classify(picture(1), large).json()["results"]
    assert found[0]["decision"] == "cat"
    assert (found[1]["problem"]["code"], found[1]["problem"]["status"]) == ("out-of-memory", 503)


def test_memory_that_runs_out_anywhere_in_a_request_is_no_bug(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def hungry(*_: Any) -> Any:
        raise MemoryError("Unable to allocate 1.00 GiB for an array")

    monkeypatch.setattr(type(world.learner.snapshot), "predict", hungry)
    assert_problem(world.classify(picture()), 503, "out-of-memory")
