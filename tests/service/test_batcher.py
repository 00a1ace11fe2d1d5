from __future__ import annotations

import queue
import threading
from typing import Any, Callable, Iterator, List

import numpy as np
import pytest

from latentd.energy.ledger import EnergyLedger
from latentd.errors import EngineError, NotReady, OutOfMemory, Overloaded
from latentd.service.batcher import STARVED_S, Batcher, EncodedImage, Priority, Ticket
from latentd.service.metrics import Metrics
from service.fakes import SIZE, SPEC, WAIT_S, FakeStage

Make = Callable[..., Batcher]


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def stage() -> FakeStage:
    return FakeStage()


@pytest.fixture
def ledger() -> EnergyLedger:
    return EnergyLedger()


@pytest.fixture
def make(stage: FakeStage, ledger: EnergyLedger) -> Iterator[Make]:
    made: List[Batcher] = []

    def batcher(start: bool = True, **options: Any) -> Batcher:
        settings = {"max_batch": 4, "capacity": 16, "on_death": lambda death: None, **options}
        made.append(Batcher(stage, ledger, Metrics(), **settings))
        if start:
            made[-1].start()
        return made[-1]

    yield batcher
    stage.gate.set()
    for batcher_ in made:
        if any(thread.is_alive() for thread in batcher_._threads):
            batcher_.stop(WAIT_S)


def pixels(value: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.full((SIZE, SIZE, 3), value, np.uint8)


def put(batcher: Batcher, count: int, priority: Priority = Priority.CLASSIFY, tokens: bool = False) -> List[Ticket]:
    tickets = batcher.reserve(count, priority, tokens)
    for ticket in tickets:
        batcher.enqueue(ticket, pixels())
    return tickets


def held_up(batcher: Batcher, stage: FakeStage) -> Ticket:
    """One image that is in the stage and stays there until the gate opens."""
    stage.gate.clear()
    stage.entered.clear()
    ticket = put(batcher, 1)[0]
    assert stage.entered.wait(WAIT_S)
    return ticket


def noting(finished: List[str], name: str) -> Callable[[Any], None]:
    return lambda _: finished.append(name)


def results(tickets: List[Ticket]) -> List[EncodedImage]:
    return [ticket.future.result(WAIT_S) for ticket in tickets]


def test_what_waits_when_the_stage_becomes_free_is_one_batch_up_to_the_largest(make: Make, stage: FakeStage) -> None:
    batcher = make(max_batch=4)
    first = held_up(batcher, stage)
    later = put(batcher, 6)
    stage.gate.set()
    assert len(results([first, *later])) == 7
    assert stage.batches == [1, 4, 2]


def test_classify_goes_before_learn_and_is_never_mixed_with_it(make: Make, stage: FakeStage) -> None:
    batcher = make(max_batch=4)
    first = held_up(batcher, stage)
    finished: List[str] = []
    learn = put(batcher, 2, Priority.LEARN)
    classify = put(batcher, 2, Priority.CLASSIFY)
    for name, tickets in (("learn", learn), ("classify", classify)):
        for ticket in tickets:
            ticket.future.add_done_callback(noting(finished, name))
    stage.gate.set()
    results([first, *learn, *classify])
    assert finished == ["classify", "classify", "learn", "learn"]
    assert stage.batches == [1, 2, 2]


def test_a_learn_image_that_waited_long_goes_first(make: Make, stage: FakeStage) -> None:
    clock = Clock()
    batcher = make(clock=clock)
    first = held_up(batcher, stage)
    finished: List[str] = []
    (learn,) = put(batcher, 1, Priority.LEARN)
    clock.now_s += STARVED_S + 0.1
    (classify,) = put(batcher, 1, Priority.CLASSIFY)
    learn.future.add_done_callback(noting(finished, "learn"))
    classify.future.add_done_callback(noting(finished, "classify"))
    stage.gate.set()
    results([first, learn, classify])
    assert finished == ["learn", "classify"]


def test_only_the_inference_thread_touches_the_stage(make: Make, stage: FakeStage) -> None:
    results(put(make(), 3))
    assert set(stage.thread_names) == {"inference"}


def test_a_full_queue_refuses_the_whole_request_and_holds_nothing(make: Make) -> None:
    batcher = make(start=False, capacity=4)
    batcher.reserve(3, Priority.CLASSIFY)
    with pytest.raises(Overloaded) as refused:
        batcher.reserve(2, Priority.CLASSIFY)
    assert refused.value.retry_after_s == 1
    assert batcher.depth == 3
    batcher.reserve(1, Priority.CLASSIFY)


def test_learning_never_takes_the_last_places_from_classify(make: Make) -> None:
    batcher = make(start=False, capacity=8)
    batcher.reserve(4, Priority.LEARN)
    with pytest.raises(Overloaded):
        batcher.reserve(1, Priority.LEARN)
    batcher.reserve(4, Priority.CLASSIFY)


def test_places_are_free_again_when_images_were_answered(make: Make) -> None:
    batcher = make(capacity=4)
    for _ in range(5):
        results(put(batcher, 4))
    assert batcher.depth == 0


def test_images_of_a_cancelled_request_are_skipped(make: Make, stage: FakeStage) -> None:
    batcher = make()
    first = held_up(batcher, stage)
    gone, kept = put(batcher, 3), put(batcher, 1)
    for ticket in gone:
        assert ticket.future.cancel()
    stage.gate.set()
    results([first, *kept])
    assert stage.batches == [1, 1]
    assert batcher.depth == 0


def test_a_queue_of_cancelled_images_does_not_hide_the_other_queue(make: Make, stage: FakeStage) -> None:
    batcher = make()
    first = held_up(batcher, stage)
    gone, kept = put(batcher, 3, Priority.CLASSIFY), put(batcher, 1, Priority.LEARN)
    for ticket in gone:
        ticket.future.cancel()
    stage.gate.set()
    results([first, *kept])


def test_tokens_are_given_only_to_those_who_asked(make: Make, stage: FakeStage) -> None:
    batcher = make()
    first = held_up(batcher, stage)
    (with_tokens,), (without,) = put(batcher, 1, tokens=True), put(batcher, 1)
    stage.gate.set()
    tokens = with_tokens.future.result(WAIT_S).tokens
    assert tokens is not None and tokens.shape == (SPEC.tokens, SPEC.width)
    assert without.future.result(WAIT_S).tokens is None
    assert first.future.result(WAIT_S).features.shape == (SPEC.features_width,)


def test_the_time_of_waiting_counts_the_time_in_the_queue(make: Make, stage: FakeStage) -> None:
    clock = Clock()
    batcher = make(clock=clock)
    first = held_up(batcher, stage)
    (waiting,) = put(batcher, 1)
    clock.now_s += 2.5
    stage.gate.set()
    assert waiting.future.result(WAIT_S).queue_s == pytest.approx(2.5)
    assert first.future.result(WAIT_S).frozen_s == pytest.approx(2.5)


def test_a_failed_run_fails_its_images_and_the_next_run_serves(make: Make, stage: FakeStage) -> None:
    deaths: List[BaseException] = []
    batcher = make(on_death=deaths.append)
    stage.error = RuntimeError("out of memory")
    with pytest.raises(EngineError, match="out of memory"):
        results(put(batcher, 1))
    stage.error = None
    results(put(batcher, 1))
    assert deaths == []


def test_three_failed_runs_in_a_row_kill_the_thread_and_close_the_stage(make: Make, stage: FakeStage) -> None:
    deaths: queue.Queue[BaseException] = queue.Queue()
    batcher = make(on_death=deaths.put)
    stage.error = RuntimeError("sticky")
    for _ in range(3):
        with pytest.raises(EngineError):
            results(put(batcher, 1))
    assert isinstance(deaths.get(timeout=WAIT_S), EngineError)
    batcher.stop(WAIT_S)
    assert stage.closed
    with pytest.raises(EngineError):
        batcher.reserve(1, Priority.CLASSIFY)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA error: out of memory")])
def test_a_device_without_memory_is_told_as_such_and_never_kills_the_thread(make: Make, stage: FakeStage, error: Exception) -> None:
    deaths: List[BaseException] = []
    batcher = make(on_death=deaths.append)
    stage.error = error
    for _ in range(5):
        with pytest.raises(OutOfMemory) as refused:
            results(put(batcher, 2))
        assert (refused.value.http_status, refused.value.retry_after_s) == (503, 5)
    stage.error = None
    results(put(batcher, 2))
    assert deaths == []


def test_a_lost_device_context_kills_the_thread_at_once(make: Make, stage: FakeStage) -> None:
    deaths: queue.Queue[BaseException] = queue.Queue()
    batcher = make(on_death=deaths.put)
    stage.error = EngineError("eager-cuda failed on 1 images: CUDA error: an illegal memory access was encountered")
    with pytest.raises(EngineError, match="illegal memory access"):
        results(put(batcher, 1))
    assert "lost its device" in str(deaths.get(timeout=WAIT_S))
    assert stage.batches == [1]


def test_when_the_thread_dies_nobody_waits_for_ever(make: Make, stage: FakeStage) -> None:
    died = threading.Event()
    batcher = make(max_batch=1, on_death=lambda death: died.set())
    running = held_up(batcher, stage)
    waiting = put(batcher, 2)
    stage.error = SystemExit()  # worse than an Exception
    stage.gate.set()
    assert died.wait(WAIT_S)
    for ticket in [running, *waiting]:
        assert isinstance(ticket.future.exception(WAIT_S), EngineError)


def test_stopping_finishes_the_running_batch_and_refuses_what_waits(make: Make, stage: FakeStage) -> None:
    batcher = make(max_batch=1)
    running = held_up(batcher, stage)
    (waiting,) = put(batcher, 1)
    thread = threading.Thread(target=batcher.stop, args=(WAIT_S,))
    thread.start()
    assert isinstance(waiting.future.exception(WAIT_S), NotReady)
    stage.gate.set()
    thread.join(WAIT_S)
    assert running.future.result(WAIT_S).features is not None
    assert stage.closed


def test_an_image_decoded_after_the_end_is_told_so(make: Make) -> None:
    batcher = make()
    (ticket,) = batcher.reserve(1, Priority.CLASSIFY)
    batcher.stop(WAIT_S)
    batcher.enqueue(ticket, pixels())
    assert isinstance(ticket.future.exception(WAIT_S), NotReady)


def test_busy_is_true_from_the_reservation_of_a_classify_image_to_its_answer(make: Make, stage: FakeStage) -> None:
    batcher = make()
    assert not batcher.working()
    batcher.reserve(1, Priority.LEARN)
    assert not batcher.busy()
    assert batcher.working(), "a sleep lets those go first too"
    (ticket,) = batcher.reserve(1, Priority.CLASSIFY)
    assert batcher.busy()
    stage.gate.clear()
    stage.entered.clear()
    batcher.enqueue(ticket, pixels())
    assert stage.entered.wait(WAIT_S)
    assert batcher.busy()
    stage.gate.set()
    results([ticket])
    results(put(batcher, 1, Priority.LEARN))  # the thread has moved on
    assert not batcher.busy()


def test_each_lane_takes_an_image_of_its_own_while_others_run(ledger: EnergyLedger) -> None:
    stage = FakeStage(lanes=2)
    batcher = Batcher(stage, ledger, Metrics(), max_batch=4, capacity=16, on_death=lambda death: None)
    tickets = put(batcher, 5)  # before the threads start: all five wait
    batcher.start()
    results(tickets)
    assert batcher.stop(WAIT_S)
    assert stage.batches == [1, 1, 1, 1, 1]
    assert stage.shared[:4] == [True, True, True, True]
    assert stage.closed


def test_an_image_that_comes_alone_gets_every_lane_and_the_next_waits_for_it(ledger: EnergyLedger) -> None:
    stage = FakeStage(lanes=2)
    batcher = Batcher(stage, ledger, Metrics(), max_batch=4, capacity=16, on_death=lambda death: None)
    batcher.start()
    first = held_up(batcher, stage)
    stage.entered.clear()
    later = put(batcher, 2)
    assert stage.batches == [1]
    stage.gate.set()
    results([first, *later])
    assert batcher.stop(WAIT_S)
    assert stage.shared[0] is False
    assert len(stage.batches) == 3


def test_an_image_whose_companions_still_decode_leaves_the_other_lane_to_them(ledger: EnergyLedger) -> None:
    stage = FakeStage(lanes=2)
    batcher = Batcher(stage, ledger, Metrics(), max_batch=4, capacity=16, on_death=lambda death: None)
    batcher.start()
    first, second = batcher.reserve(2, Priority.LEARN)
    batcher.enqueue(first, pixels())
    results([first])
    batcher.enqueue(second, pixels())
    results([second])
    assert batcher.stop(WAIT_S)
    assert stage.shared == [True, False]


def test_lanes_die_together_and_say_so_once(ledger: EnergyLedger) -> None:
    stage = FakeStage(lanes=3)
    deaths: queue.Queue[BaseException] = queue.Queue()
    batcher = Batcher(stage, ledger, Metrics(), max_batch=4, capacity=16, on_death=deaths.put)
    stage.error = SystemExit()
    tickets = put(batcher, 6)
    batcher.start()
    for ticket in tickets:
        assert isinstance(ticket.future.exception(WAIT_S), EngineError)
    assert batcher.stop(WAIT_S)
    assert stage.closed
    assert deaths.qsize() == 1


def test_a_run_of_finite_numbers_is_the_proof_of_life(make: Make, stage: FakeStage) -> None:
    clock = Clock()
    batcher = make(clock=clock)
    stage.poison = 0
    with pytest.raises(Exception, match="NaN"):
        results(put(batcher, 1))
    assert batcher.last_success_at is None
    stage.poison = None
    results(put(batcher, 1))
    assert batcher.last_success_at == clock.now_s


@pytest.mark.parametrize(
    ("priority", "is_probe", "images"), [(Priority.CLASSIFY, False, 2), (Priority.CLASSIFY, True, 0), (Priority.LEARN, False, 0)]
)
def test_the_ledger_counts_classified_images_but_no_probes_and_no_learn_images(
    make: Make, ledger: EnergyLedger, priority: Priority, is_probe: bool, images: int
) -> None:
    batcher = make()
    tickets = batcher.reserve(2, priority)
    for ticket in tickets:
        ticket.is_probe = is_probe
        batcher.enqueue(ticket, pixels())
    results(tickets)
    batcher.stop(WAIT_S)
    ledger.unavailable("closes the interval, so that the marks are counted")
    activities = ledger.report().activities
    assert (activities["classify"].count, activities["learn"].count) == (images, 0)
