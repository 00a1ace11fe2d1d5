"""A better engine is built beside the one that serves: it takes over after the gate, and whatever goes wrong leaves the other serving."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import Future
from typing import Any, Callable, List, Optional, Tuple, cast

import pytest

from latentd.engines import upgrade
from latentd.engines.choose import Attempt, Choice, Pending
from latentd.engines.compiling import Progress, Report, Stopped
from latentd.engines.stage import FrozenStage
from latentd.engines.upgrade import Upgrade
from latentd.errors import EngineError

WAIT_S = 20.0


class Stage:
    lanes = 1
    spec = None

    def __init__(self, name: str) -> None:
        self.name = name
        self.closed = False

    def close(self) -> None:
        self.closed = True


Build = Callable[[Report, threading.Event], None]


def done(report: Report, stopping: threading.Event) -> None:
    report(Progress("building", 0.5))


def broken(report: Report, stopping: threading.Event) -> None:
    raise EngineError("TensorRT builds no plan")


def astray(report: Report, stopping: threading.Event) -> None:
    raise ZeroDivisionError


class World:
    """An upgrade around stages that hold nothing. `shown` is every choice that was published."""

    def __init__(
        self,
        *waiting: Tuple[str, Build, str],
        ends_first: bool = False,
        obstacle: Callable[[], Optional[str]] = lambda: None,
        lacks: Callable[[], Optional[str]] = lambda: None,
    ) -> None:
        """lacks: what the first of those that wait does not have yet."""
        self.old = Stage("old")
        self.serving = cast(FrozenStage, self.old)
        self.made: List[Stage] = []
        self.shown: List[Choice] = []
        self.answered = threading.Event()
        self.answered.set()
        self._ends_first = ends_first
        pending = [Pending(name, build, self.opener(name, state)) for name, build, state in waiting]
        pending[:1] = [first._replace(lacks=lacks) for first in pending[:1]]
        attempts = [Attempt(name, "waiting", "no plan is built yet") for name, _, _ in waiting]
        choice = Choice(cast(FrozenStage, self.old), (*attempts, Attempt("old", "serving", "it agrees", 1.0)), tuple(pending))
        self.upgrade = Upgrade(choice, self.swap, self.shown.append, self.answered.is_set, obstacle)

    def opener(self, name: str, state: str) -> Callable[[], Tuple[Optional[FrozenStage], Attempt]]:
        def attempt() -> Tuple[Optional[FrozenStage], Attempt]:
            if state != "serving":
                return None, Attempt(name, state, f"{name} {state}")
            self.made.append(Stage(name))
            return cast(FrozenStage, self.made[-1]), Attempt(name, state, "cosine 1", 1.0)

        return attempt

    def swap(self, stage: FrozenStage) -> Future[FrozenStage]:
        retired: Future[FrozenStage] = Future()
        retired.set_result(stage if self._ends_first else self.serving)
        self.serving = stage
        return retired

    def run(self) -> Any:
        self.upgrade.start()
        self.upgrade._thread.join(WAIT_S)
        assert not self.upgrade._thread.is_alive()
        return [(attempt.engine, attempt.state, attempt.reason) for attempt in self.shown[-1].attempts] if self.shown else None


def test_the_first_that_can_be_built_takes_over_and_the_others_are_left() -> None:
    world = World(("fp16", done, "serving"), ("fp32", broken, "serving"))
    assert world.run() == [
        ("fp16", "serving", "cosine 1"),
        ("fp32", "not tried", "fp16 comes before it and serves"),
        ("old", "replaced", "fp16 serves since"),
    ]
    assert world.shown[-1].stage is cast(FrozenStage, world.made[0])
    assert world.old.closed
    assert not world.made[0].closed


def test_the_build_is_shown_while_it_runs() -> None:
    world = World(("fp16", done, "serving"))
    world.run()
    building = world.shown[0].attempts[0]
    assert (building.state, building.reason, building.progress) == ("building", "building 50%", 0.5)
    assert world.shown[0].stage is cast(FrozenStage, world.old)


@pytest.mark.parametrize(
    ("build", "state", "shown"),
    [
        (broken, "serving", ("fp16", "unavailable", "TensorRT builds no plan")),
        (done, "passed over", ("fp16", "passed over", "fp16 passed over")),
        (done, "unavailable", ("fp16", "unavailable", "fp16 unavailable")),
        (done, "waiting", ("fp16", "unavailable", "fp16 waiting")),
    ],
)
def test_where_one_fails_its_reason_stays_and_the_next_one_is_built(build: Build, state: str, shown: Any) -> None:
    world = World(("fp16", build, state), ("fp32", done, "serving"))
    assert world.run() == [shown, ("fp32", "serving", "cosine 1"), ("old", "replaced", "fp32 serves since")]


def test_where_all_fail_the_old_engine_goes_on() -> None:
    world = World(("fp16", broken, "serving"), ("fp32", done, "passed over"))
    assert [state for _, state, _ in world.run()] == ["unavailable", "passed over", "serving"]
    assert not world.old.closed


def test_a_bug_in_a_builder_is_logged_and_ends_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    world = World(("fp16", astray, "serving"))
    with caplog.at_level(logging.ERROR):
        assert world.run()[0] == ("fp16", "unavailable", "a bug ended the upgrade: see the log")
    assert "ZeroDivisionError" in caplog.text
    assert not world.old.closed


def test_a_stage_that_comes_too_late_is_closed() -> None:
    world = World(("fp16", done, "serving"), ends_first=True)
    world.run()
    assert world.made[0].closed
    assert not world.old.closed


def test_nothing_is_built_before_the_first_answer() -> None:
    begun = threading.Event()

    def build(report: Report, stopping: threading.Event) -> None:
        begun.set()

    world = World(("fp16", build, "serving"))
    world.answered.clear()
    world.upgrade.start()
    assert not begun.wait(0.3)
    world.answered.set()
    assert begun.wait(WAIT_S)
    assert world.upgrade.stop(WAIT_S)


def test_stopping_ends_a_build_and_nothing_takes_over() -> None:
    begun = threading.Event()

    def build(report: Report, stopping: threading.Event) -> None:
        begun.set()
        assert stopping.wait(WAIT_S)
        raise Stopped("stopped")

    world = World(("fp16", build, "serving"), ("fp32", done, "serving"))
    world.upgrade.start()
    assert begun.wait(WAIT_S)
    assert world.upgrade.stop(WAIT_S)
    assert world.made == []
    assert not world.old.closed


def test_where_nothing_waits_nothing_is_started() -> None:
    world = World()
    world.upgrade.start()
    assert world.upgrade._thread.ident is None
    assert world.upgrade.stop(WAIT_S)


def test_a_build_waits_for_room_and_shows_for_what(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(upgrade, "ROOM_S", 0.001)
    reasons = ["1 MiB available", "1 MiB available", "2 MiB available"]
    seen: List[Optional[str]] = []

    def build(report: Report, stopping: threading.Event) -> None:
        seen.append(world.upgrade.building)

    world = World(("fp16", build, "serving"), obstacle=lambda: reasons.pop(0) if reasons else None)
    with caplog.at_level(logging.WARNING):
        assert world.run()[0] == ("fp16", "serving", "cosine 1")
    assert [(choice.attempts[0].state, choice.attempts[0].reason) for choice in world.shown[:2]] == [
        ("waiting", "1 MiB available"),
        ("waiting", "2 MiB available"),
    ]
    assert [record.message for record in caplog.records] == ["engine fp16: its build is put off: 1 MiB available"]
    assert (seen, world.upgrade.building) == (["fp16"], None)


@pytest.mark.parametrize("what", ["obstacle", "lacks"])
def test_stopping_ends_the_wait_for_what_a_build_needs(what: str) -> None:
    asked = threading.Event()

    def never() -> str:
        asked.set()
        return "not yet"

    waits: Any = {what: never}
    world = World(("fp16", astray, "serving"), **waits)
    world.upgrade.start()
    assert asked.wait(WAIT_S)
    assert world.upgrade.stop(WAIT_S)
    assert world.shown[-1].attempts[0] == Attempt("fp16", "waiting", "not yet")
    assert not world.old.closed


def test_the_next_one_serves_while_the_best_still_lacks_something(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upgrade, "ROOM_S", 0.001)
    lacking = ["3 of 32", "3 of 32", "9 of 32"]

    def lacks() -> Optional[str]:
        return lacking[0] if len(world.made) == 0 else (lacking.pop(0) if lacking else None)

    world = World(("int8", done, "serving"), ("fp16", done, "serving"), ("fp32", broken, "serving"), lacks=lacks)
    assert world.run() == [
        ("int8", "serving", "cosine 1"),
        ("fp16", "replaced", "int8 serves since"),
        ("fp32", "not tried", "fp16 comes before it and serves"),
        ("old", "replaced", "fp16 serves since"),
    ]
    assert [stage.name for stage in world.made] == ["fp16", "int8"]
    assert [stage.closed for stage in (world.old, *world.made)] == [True, True, False]
    waited = [choice.attempts[0].reason for choice in world.shown if choice.attempts[0].state == "waiting"]
    assert list(dict.fromkeys(waited)) == ["3 of 32", "9 of 32"]
