"""A stage replaced by a better one while the batcher serves: between two runs, without losing an image, each closed by who has it."""

from __future__ import annotations

from typing import Callable, Iterator, List

import pytest

from latentd.energy.ledger import EnergyLedger
from latentd.errors import EngineError
from latentd.service.batcher import Batcher
from latentd.service.metrics import Metrics
from service.fakes import WAIT_S, FakeStage
from service.test_batcher import held_up, put, results

Make = Callable[[], Batcher]


@pytest.fixture
def stage() -> FakeStage:
    return FakeStage()


@pytest.fixture
def make(stage: FakeStage) -> Iterator[Make]:
    made: List[Batcher] = []

    def batcher() -> Batcher:
        made.append(Batcher(stage, EnergyLedger(), Metrics(), max_batch=4, capacity=16, on_death=lambda death: None))
        made[-1].start()
        return made[-1]

    yield batcher
    stage.gate.set()
    for batcher_ in made:
        assert batcher_.stop(WAIT_S)


def test_another_stage_takes_over_and_the_one_before_comes_back_open(make: Make, stage: FakeStage) -> None:
    batcher, other = make(), FakeStage()
    results(put(batcher, 1))
    assert batcher.replace(other).result(WAIT_S) is stage
    results(put(batcher, 2))
    assert (sum(stage.batches), sum(other.batches)) == (1, 2)
    assert not stage.closed
    assert batcher.stop(WAIT_S)
    assert (stage.closed, other.closed) == (False, True)


def test_a_stage_is_replaced_between_two_runs_and_no_image_is_lost(make: Make, stage: FakeStage) -> None:
    batcher, other = make(), FakeStage()
    running = held_up(batcher, stage)
    retired = batcher.replace(other)
    waiting = put(batcher, 3)
    assert not retired.done()
    stage.gate.set()
    assert retired.result(WAIT_S) is stage
    results([running, *waiting])
    assert (sum(stage.batches), sum(other.batches)) == (1, 3)


def test_steady_traffic_on_several_lanes_does_not_keep_a_replacement_out(make: Make, stage: FakeStage) -> None:
    stage.lanes = 3
    batcher, other = make(), FakeStage()
    stage.gate.clear()
    running = put(batcher, 6)
    assert stage.entered.wait(WAIT_S)
    retired = batcher.replace(other)
    stage.gate.set()
    assert retired.result(WAIT_S) is stage
    results([*running, *put(batcher, 6)])
    assert other.batches
    assert not any(other.shared), "the new stage has one lane, and is never shared"


def test_a_stage_with_fewer_lanes_runs_one_batch_at_a_time(make: Make, stage: FakeStage) -> None:
    stage.lanes = 3
    batcher, other = make(), FakeStage()
    batcher.replace(other).result(WAIT_S)
    first = held_up(batcher, other)
    later = put(batcher, 3)
    assert other.batches == [1]
    other.gate.set()
    results([first, *later])
    assert other.batches == [1, 3]


def test_a_replacement_that_comes_after_the_end_goes_back_to_the_caller(make: Make, stage: FakeStage) -> None:
    batcher, other = make(), FakeStage()
    assert batcher.stop(WAIT_S)
    assert batcher.replace(other).result(WAIT_S) is other
    assert (stage.closed, other.closed) == (True, False)


def test_a_replacement_that_waits_when_the_end_comes_goes_back_to_the_caller(make: Make, stage: FakeStage) -> None:
    batcher, other = make(), FakeStage()
    held_up(batcher, stage)
    retired = batcher.replace(other)
    assert not batcher.stop(0.0)
    assert retired.result(WAIT_S) is other
    stage.gate.set()
    assert batcher.stop(WAIT_S)
    assert (stage.closed, other.closed) == (True, False)


def test_failures_of_the_stage_before_do_not_count_for_the_next(make: Make, stage: FakeStage) -> None:
    batcher, other = make(), FakeStage()
    stage.error = EngineError("worn out")
    for _ in range(2):
        with pytest.raises(EngineError):
            results(put(batcher, 1))
    batcher.replace(other).result(WAIT_S)
    other.error = EngineError("a bad start")
    with pytest.raises(EngineError):
        results(put(batcher, 1))
    other.error = None
    assert len(results(put(batcher, 1))) == 1
