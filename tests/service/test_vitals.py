"""When the watchdog is fed: while an idle or busy daemon gets on, and not while a thread of it is stuck."""

from __future__ import annotations

import asyncio
import threading
from typing import List, cast

import pytest

from latentd.learning.learner import Learner
from latentd.learning.status import LearnerStatus
from latentd.service.notify import Notifier
from latentd.service.vitals import LEARNER_BUDGET_S, TURNS, Vitals
from service.fakes import World, picture
from service.test_readiness import Clock, with_clock

WATCHDOG_S = 30.0


class Told(Notifier):
    """Remembers instead of sending."""

    def __init__(self) -> None:
        super().__init__(watchdog_s=WATCHDOG_S)
        self.sent: List[str] = []

    def send(self, *assignments: str) -> None:
        self.sent += assignments

    @property
    def fed(self) -> int:
        return self.sent.count("WATCHDOG=1")


class Ward:
    """A daemon without a model whose vitals are taken in fake time."""

    def __init__(self, world: World) -> None:
        self.world, self.told = world, Told()
        self.clock = with_clock(world)
        self.vitals = Vitals(world.parts, self.told, self.clock)

    def turns(self, count: int = 1) -> int:
        """How often the watchdog was fed in so many turns."""
        before = self.told.fed
        for _ in range(count):
            self.clock.now_s += WATCHDOG_S / TURNS
            asyncio.run(self.vitals.turn())
        return self.told.fed - before


@pytest.fixture
def ward(world: World) -> Ward:
    return Ward(world)


def test_an_idle_daemon_proves_itself_with_a_probe_each_turn(ward: Ward) -> None:
    assert ward.turns(5) == 5
    assert ward.world.stage.batches == [1] * 5


def test_traffic_is_proof_enough(ward: Ward) -> None:
    for seed in range(3):
        ward.clock.now_s += WATCHDOG_S / TURNS
        ward.world.classify(picture(seed))
        asyncio.run(ward.vitals.turn())
    assert ward.told.fed == 3
    assert len(ward.world.stage.batches) == 3


def test_a_stuck_inference_thread_stops_the_feeding(ward: Ward, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("latentd.service.readiness.FRESH_S", 0.01)  # the probe is given up soon
    assert ward.turns() == 1
    ward.world.stage.gate.clear()
    assert ward.turns(2) == 0
    assert "no sign of life" in caplog.text
    assert any("no image came out" in line for line in ward.told.sent)
    ward.world.stage.gate.set()
    ward.clock.now_s += 1
    ward.world.classify(picture())
    assert ward.turns() == 1, "it got on again"


def test_one_stuck_lane_beside_a_working_one_stops_the_feeding(ward: Ward) -> None:
    ward.world.stage.gate.clear()
    asking = threading.Thread(target=ward.world.classify, args=(picture(),))
    asking.start()
    assert ward.world.stage.entered.wait(5)
    ward.world.parts.batcher.last_success_at = ward.clock.now_s
    ward.clock.now_s += WATCHDOG_S + 1
    assert "in one run for 31 s" in (ward.vitals.stuck() or "")
    ward.world.stage.gate.set()
    asking.join()
    ward.world.parts.batcher.stop(5)
    assert ward.world.parts.batcher.longest_run_s == 0.0, "no run is under way"


def test_an_engine_that_gives_no_numbers_is_no_sign_of_life(ward: Ward) -> None:
    assert ward.turns() == 1
    ward.world.stage.poison = int(ward.world.parts.readiness._pixels[0, 0, 0])
    assert ward.turns(2) == 0


class Pupil:
    """A learner in one state."""

    def __init__(self, state: str) -> None:
        self.state, self.steps = state, 0
        self.snapshot = type("Snapshot", (), {"version": 1, "labels": ("cat",)})()

    def status(self) -> LearnerStatus:
        return LearnerStatus(self.state, None, 4, 2, 0.5, self.steps, 0.01, 0, None, {})


@pytest.mark.parametrize("state", ["idle", "failed", "stopped", "paused"])
def test_a_learner_that_does_not_work_is_not_waited_for(ward: Ward, state: str) -> None:
    ward.world.parts.learner = cast(Learner, Pupil(state))
    assert ward.turns(100) == 100


@pytest.mark.parametrize("state", ["learning", "yielding", "sleeping"])
def test_a_learner_stuck_in_a_step_stops_the_feeding_after_its_budget(ward: Ward, state: str) -> None:
    pupil = Pupil(state)
    ward.world.parts.learner = cast(Learner, pupil)
    within = int(LEARNER_BUDGET_S / (WATCHDOG_S / TURNS))
    assert ward.turns(within) == within
    pupil.steps += 1
    assert ward.turns(within) == within, "a step is progress"
    assert ward.turns(3) < 3
    pupil.steps += 1
    assert ward.turns() == 1


def test_ready_is_told_only_after_a_first_answer_of_a_daemon_that_listens(ward: Ward) -> None:
    listening = [False]

    async def live() -> None:
        task = asyncio.ensure_future(ward.vitals.watch_for_ever(lambda: listening[0]))
        await asyncio.sleep(0.12)
        assert ward.told.sent == []
        await ward.world.parts.readiness.probe()
        await asyncio.sleep(0.12)
        assert ward.told.sent == []
        listening[0] = True
        while not ward.told.fed:  # noqa: ASYNC110 - there is no event in the code under test
            await asyncio.sleep(0.001)
        task.cancel()

    asyncio.run(live())
    assert ward.told.sent[0] == "READY=1"
    assert ward.told.sent[1] == "STATUS=fake answers; version 7, 3 classes; learner idle"


def test_the_summary_says_what_waits_for_a_restart(ward: Ward) -> None:
    ward.world.parts.needs_restart = ("http.bind", "engine.order")
    assert ward.vitals.summary().endswith("restart needed for http.bind, engine.order")
    assert ward.vitals.summary().startswith("not ready: No image")


def test_without_a_watchdog_nothing_is_probed_for_it(world: World) -> None:
    told = Told()
    told.watchdog_s = None
    asyncio.run(Vitals(world.parts, told, Clock()).turn())
    assert world.stage.batches == []
