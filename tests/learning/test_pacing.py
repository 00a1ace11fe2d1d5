"""What the learner waits for between its steps, what ends a wait, and how old what waits is."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, List, Optional

import pytest

from latentd.errors import JournalError
from latentd.learning import checkpoint, pacing
from latentd.learning import learner as learner_module
from latentd.learning.pacing import Arrivals, Pace, Urgency
from latentd.learning.restraint import LEARN, SLEEP, Reason
from latentd.learning.trainer import Trainer
from latentd.replay.journal import Journal
from latentd.replay.records import Entry
from lessons import WAIT_S, teach
from pupils import Witness, make_trainer, running_learner, taught

WARM = Reason("temperature", "CPU-therm is at 90 °C")


class Held:
    """A restraint that a test lifts; `asked` is set once it held something back."""

    def __init__(self) -> None:
        self.reason: Optional[Reason] = WARM
        self.asked = threading.Event()

    def __call__(self, work: str) -> Optional[Reason]:
        if self.reason is not None:
            self.asked.set()
        return self.reason


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pacing, "LOOK_S", 0.005)


def test_it_waits_and_says_for_what_and_learns_when_it_may(journal: Journal, tmp_path: Path) -> None:
    held, witness = Held(), Witness()
    with running_learner(journal, tmp_path, restraint=held, observer=witness) as learner:
        seq = teach(journal, ("cat", 0))[-1].seq
        assert held.asked.wait(WAIT_S)
        waiting = learner.learned(seq)
        while not witness.waits:
            threading.Event().wait(0.001)
        status = learner.status()
        assert (status.state, status.reason, status.lag_samples) == ("waiting", WARM.text, 1)
        assert not waiting.done()
        held.reason = None
        waiting.result(WAIT_S)
        while learner.status().state != "idle":
            threading.Event().wait(0.001)
        status = learner.status()
        assert (status.reason, set(witness.waits), set(status.waited_s)) == (None, {"temperature"}, {"temperature"})
        assert status.waited_s["temperature"] > 0


class Rationed(Held):
    """Lets so many requests through and holds the next."""

    allowed = 0

    def __call__(self, work: str) -> Optional[Reason]:
        if self.allowed:
            self.allowed -= 1
            return None
        return super().__call__(work)


def test_before_a_wait_all_that_was_learned_answers_and_is_kept(journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner_module, "PUBLISH_SHARE", 1e-9)  # by itself it would not publish again today
    held = Rationed()
    with running_learner(journal, tmp_path, restraint=held) as learner:
        held.allowed = 1
        taught(learner, journal, [("cat", 0)])
        teach(journal, ("dog", 0))
        teach(journal, ("owl", 0))
        held.allowed = 1
        while set(learner.snapshot.labels) != {"cat", "dog"}:
            threading.Event().wait(0.001)
        while not any(checkpoint.seq_of(version) == 2 for version in checkpoint.versions(tmp_path / "versions")):
            threading.Event().wait(0.001)
        while learner.status().state != "waiting":
            threading.Event().wait(0.001)
        assert learner.status().lag_samples == 1


def test_stopping_ends_the_wait_and_nothing_is_lost(journal: Journal, tmp_path: Path) -> None:
    held = Held()
    with running_learner(journal, tmp_path, restraint=held) as learner:
        seq = teach(journal, ("cat", 0))[-1].seq
        assert held.asked.wait(WAIT_S)
    assert learner.snapshot.version == 0, "what it must not do now it does not do at the end either"
    with running_learner(journal, tmp_path) as learner:
        learner.learned(seq).result(WAIT_S)
        assert learner.snapshot.labels == ("cat",)


def test_a_wish_to_forget_ends_the_wait_of_what_stands_before_it(journal: Journal, tmp_path: Path) -> None:
    held = Held()
    held.reason = None
    with running_learner(journal, tmp_path, restraint=held) as learner:
        taught(learner, journal, [("cat", 0), ("dog", 0)])
        held.reason = WARM
        teach(journal, ("owl", 0))
        assert held.asked.wait(WAIT_S)
        journal.forget_class("cat").result(WAIT_S)
        learner.learned(4).result(WAIT_S)
        assert set(learner.snapshot.labels) == {"dog", "owl"}


def test_entries_are_looked_through_once(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        teach(journal, ("cat", number))
    reads: List[int] = []
    entries = journal.entries

    def read(after: int, limit: int) -> Future[List[Entry]]:
        reads.append(after)
        return entries(after, limit)

    monkeypatch.setattr(journal, "entries", read)
    urgency = Urgency(journal)
    assert [urgency.after(0) for _ in range(5)] == [False] * 5
    journal.forget_class("cat").result(WAIT_S)
    assert (urgency.after(0), urgency.after(3), urgency.after(4)) == (True, True, False)
    assert reads == [0, 3]


def test_a_journal_that_can_not_be_read_makes_nothing_urgent(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(after: int, limit: int) -> None:
        raise JournalError("no disk")

    teach(journal, ("cat", 0))
    monkeypatch.setattr(journal, "entries", broken)
    assert not Urgency(journal).after(0)


class Starved(Trainer):
    """Runs out of memory in its first request, as often as told."""

    left: List[int]

    def take(self, batch: object) -> object:  # type: ignore[override]
        if self.left[0]:
            self.left[0] -= 1
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        yield from super().take(batch)  # type: ignore[arg-type]


def test_running_out_of_memory_is_no_death_however_often(journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner_module, "STARVED_S", 0.005)
    left = [5]

    def make() -> Trainer:
        usual = make_trainer()
        trainer = Starved(usual._codec, usual._width, usual._settings)
        trainer.left = left
        return trainer

    with running_learner(journal, tmp_path, make=make) as learner:
        taught(learner, journal, [("cat", 0)])
        status = learner.status()
        assert (left, status.deaths, learner.snapshot.labels) == ([0], 0, ("cat",))


# --- how far behind ---


def test_what_waits_ages_by_a_clock_that_never_jumps() -> None:
    now = [1000.0]
    arrivals = Arrivals(lambda: now[0])
    arrivals.note(5)
    now[0] += 10.0
    arrivals.note(6)
    now[0] += 5.0
    assert [arrivals.age_s(watermark) for watermark in (0, 4, 5, 6)] == [15.0, 15.0, 5.0, 0.0]


def test_a_burst_of_arrivals_takes_no_memory() -> None:
    now = [0.0]
    arrivals = Arrivals(lambda: now[0])
    for seq in range(1, 100_000):
        arrivals.note(seq)
        now[0] += 1e-4
    assert len(arrivals._marks) < 20
    assert arrivals.age_s(0) == pytest.approx(10.0, abs=0.01)


# --- giving way, by a clock of its own ---


class Ticking(threading.Event):
    """Time passes only while somebody waits for this event."""

    now = 100.0

    def wait(self, timeout: Optional[float] = None) -> bool:
        self.now += timeout or 0.0
        return self.is_set()


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> Ticking:
    made = Ticking()
    monkeypatch.setattr(pacing, "time", SimpleNamespace(monotonic=lambda: made.now))
    return made


def waited(ticking: Ticking, work: str, busy: Callable[[float], bool], urgent: Callable[[], bool] = lambda: False) -> float:
    pace = Pace(dict.fromkeys((LEARN, SLEEP), lambda: busy(ticking.now - 100.0)), lambda _: None, ticking, lambda *_: None)
    before = ticking.now
    assert pace.before_step(work, urgent)
    assert pace.interruption is None
    return ticking.now - before


def test_a_step_is_taken_at_once_where_nobody_asks(ticking: Ticking) -> None:
    assert waited(ticking, LEARN, lambda now: False) == waited(ticking, SLEEP, lambda now: False) == 0.0


def test_learning_waits_for_a_request_and_a_sleep_until_it_was_calm_for_a_while(ticking: Ticking) -> None:
    assert waited(ticking, LEARN, lambda now: now < 0.1) == pytest.approx(0.1, abs=0.01)
    ticking.now = 100.0
    assert waited(ticking, SLEEP, lambda now: now < 0.1) == pytest.approx(0.1 + pacing.CALM_S, abs=0.03)


def test_under_steady_requests_both_go_on_the_sleep_ten_times_as_seldom(ticking: Ticking) -> None:
    assert waited(ticking, LEARN, lambda now: True) == pytest.approx(pacing.YIELD_S, abs=0.01)
    ticking.now = 100.0
    gaps = waited(ticking, SLEEP, lambda now: now % 0.1 < 0.09)  # one client after another, ten milliseconds between
    assert gaps == pytest.approx(pacing.SLEEP_YIELD_S, abs=0.02)


def test_what_is_taught_wakes_a_sleep_that_gives_way(ticking: Ticking) -> None:
    assert waited(ticking, SLEEP, lambda now: True, urgent=lambda: ticking.now > 100.5) == pytest.approx(0.5, abs=0.03)
