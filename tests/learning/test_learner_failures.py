"""The learner thread when it is stopped, dies, or finds what is not its own: answers go on, and nothing is lost or learned by half."""

from __future__ import annotations

import gc
import shutil
import threading
import weakref
from pathlib import Path
from typing import Any, Iterator, List, Sequence

import pytest

from latentd.errors import ConfigError, LearnerError
from latentd.learning import learner as learner_module
from latentd.learning.trainer import Trainer
from latentd.replay.journal import Journal
from latentd.replay.records import Entry
from latentd.replay.store import Store
from lessons import WAIT_S, running_journal, teach
from pupils import Broken, Gated, answers, made, make_learner, make_trainer, running_learner, saved_versions, taught

pytestmark = pytest.mark.usefixtures("quick_restarts")
FIRST = [[("cat", number), ("dog", number)] for number in range(25)]


# --- stopping ---


def test_stopping_in_a_long_backlog_is_prompt_and_goes_on_where_it_was(journal: Journal, tmp_path: Path) -> None:
    for request in FIRST:
        teach(journal, *request)
    gate, entered = threading.Event(), threading.Event()
    learner = make_learner(journal, tmp_path, make=made(Gated, gate=gate, entered=entered))
    waiter = learner.learned(50)
    learner.start(WAIT_S)
    assert entered.wait(WAIT_S)
    stopper = threading.Thread(target=learner.stop, args=(WAIT_S,))
    stopper.start()
    assert learner._stop.wait(WAIT_S)
    gate.set()
    stopper.join(WAIT_S)
    assert learner.status().state == "stopped"
    assert saved_versions(tmp_path) == [2], "the request in hand was learned to its end"
    for future in (waiter, learner.learned(50)):
        with pytest.raises(LearnerError, match="stopping"):
            future.result(WAIT_S)
    assert learner.learned(2).exception(WAIT_S) is not None
    with running_learner(journal, tmp_path) as after:
        after.learned(50).result(WAIT_S)
        assert after.snapshot.version == 25


def test_stopping_in_a_request_that_takes_too_long_saves_nothing_half_learned(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_learner(journal, tmp_path) as learner:
        taught(learner, journal, *FIRST[:3])
    teach(journal, *FIRST[3])
    monkeypatch.setattr(learner_module, "FINISH_S", 0.0)
    gate, entered = threading.Event(), threading.Event()
    learner = make_learner(journal, tmp_path, make=made(Gated, gate=gate, entered=entered, steps=10**6))
    learner.start(WAIT_S)
    assert entered.wait(WAIT_S)
    stopper = threading.Thread(target=learner.stop, args=(WAIT_S,))
    stopper.start()
    assert learner._stop.wait(WAIT_S)
    gate.set()
    stopper.join(WAIT_S)
    assert learner.status().state == "stopped"
    assert saved_versions(tmp_path) == [6]
    with running_learner(journal, tmp_path) as after:
        after.learned(8).result(WAIT_S)
        assert after.snapshot.version == 4


# --- dying ---


def test_a_death_costs_nothing_but_time_and_answers_never_go_back(journal: Journal, tmp_path: Path) -> None:
    versions, deaths = [0], [0]
    learner = make_learner(journal, tmp_path, make=made(Broken, deaths=deaths, at_seq=21))
    learner._observer.published = lambda cause: versions.append(learner.snapshot.version)  # type: ignore[method-assign]
    learner.start(WAIT_S)
    taught(learner, journal, *FIRST[:10])
    deaths[0] = 1
    taught(learner, journal, *FIRST[10:])
    assert learner.status().deaths == 1
    assert versions == sorted(versions)
    assert (learner.snapshot.version, learner.accuracy().prequential.count) == (25, 50)
    learner.stop(WAIT_S)
    with running_journal(tmp_path / "other") as other, running_learner(other, tmp_path / "other") as calm:
        taught(calm, other, *FIRST)
        assert calm.snapshot.analytic.weight.tobytes() == learner.snapshot.analytic.weight.tobytes()
        assert calm.accuracy().prequential.count == learner.accuracy().prequential.count


def test_after_three_deaths_it_stays_down_and_the_last_snapshot_serves(journal: Journal, tmp_path: Path) -> None:
    with running_learner(journal, tmp_path, make=made(Broken, deaths=[10**9], at_seq=11)) as learner:
        taught(learner, journal, *FIRST[:5])
        before = learner.snapshot
        waiter = learner.learned(teach(journal, *FIRST[5])[-1].seq)
        with pytest.raises(LearnerError, match="died 3 times"):
            waiter.result(WAIT_S)
        with pytest.raises(LearnerError, match="died 3 times"):
            learner.learned(1).result(0)
        status = learner.status()
        assert (status.state, status.deaths, status.watermark_seq, status.lag_samples) == ("failed", 3, 10, 2)
        assert "died 3 times" in str(status.reason)
        assert learner.snapshot is before
        assert answers(learner, "cat", [77]) == ["cat"]
    assert learner.status().state == "failed"


def test_a_learner_that_cannot_begin_lets_the_daemon_start(journal: Journal, tmp_path: Path) -> None:
    def broken() -> Trainer:
        raise ZeroDivisionError("injected")

    learner = make_learner(journal, tmp_path, make=broken)
    learner.start(WAIT_S)
    assert (learner.status().state, learner.snapshot.version) == ("failed", 0)
    learner.stop(WAIT_S)


def test_a_configuration_that_cannot_work_is_told_at_the_start(journal: Journal, tmp_path: Path) -> None:
    learner = make_learner(journal, tmp_path, make=lambda: make_trainer(slots=0))
    with pytest.raises(ConfigError, match="holds no latent"):
        learner.start(WAIT_S)
    assert learner.status().state == "failed"
    learner.stop(WAIT_S)


def test_a_caller_that_gives_up_waiting_harms_nobody(journal: Journal, tmp_path: Path) -> None:
    gate, entered = threading.Event(), threading.Event()
    with running_learner(journal, tmp_path, make=made(Gated, gate=gate, entered=entered)) as learner:
        teach(journal, *FIRST[0])
        assert entered.wait(WAIT_S)
        assert learner.learned(2).cancel()
        gate.set()
        taught(learner, journal, FIRST[1])
        assert learner.status().deaths == 0


# --- another journal ---


def test_versions_of_another_journal_are_not_taken_for_its_own(tmp_path: Path) -> None:
    with running_journal(tmp_path) as journal, running_learner(journal, tmp_path) as learner:
        taught(learner, journal, *FIRST)
    for path in tmp_path.glob("journal.sqlite*"):
        path.unlink()
    with running_journal(tmp_path) as journal, running_learner(journal, tmp_path) as learner:
        assert learner.snapshot.labels == ()
        taught(learner, journal, [("owl", 0)])
        assert answers(learner, "cat", [0]) == ["owl"]
        shutil.rmtree(tmp_path / "versions", ignore_errors=True)


# --- a damaged row ---


@pytest.mark.parametrize("learned_before", [False, True])
@pytest.mark.parametrize("seq", [3, 6])
def test_the_rest_of_a_log_with_a_damaged_row_is_learned(tmp_path: Path, learned_before: bool, seq: int) -> None:
    with running_journal(tmp_path) as journal:
        for request in FIRST[:3]:
            teach(journal, *request)
        if learned_before:
            with running_learner(journal, tmp_path) as learner:
                learner.learned(6).result(WAIT_S)
    store = Store(tmp_path / "journal.sqlite")
    store.put({f"e/{seq:012d}": b'S{"batch'})
    store.commit()
    store.close()
    with running_journal(tmp_path) as journal, running_learner(journal, tmp_path) as learner:
        learner.learned(6).result(WAIT_S)
        assert (journal.status().set_aside, learner.status().deaths, learner.status().lag_samples) == (1, 0, 0)
        assert answers(learner, "cat", [77]) + answers(learner, "dog", [77]) == ["cat", "dog"]
        assert sum(learner.memory().classes.values()) == 5
        journal.relabel(f"s{seq:08d}", "cat" if seq == 3 else "dog").result(WAIT_S)
        learner.learned(7).result(WAIT_S)
        assert learner.memory().classes == {0: 3, 1: 3}


# --- memory ---


class Starved(Trainer):
    """Finds no memory for a certain request, as often as `shortages` says."""

    shortages: List[int]
    error: Exception = MemoryError()

    def take(self, batch: Sequence[Entry]) -> Iterator[int]:
        if self.shortages[0] > 0:
            self.shortages[0] -= 1
            raise type(self.error)(*self.error.args)  # a new one: one that is kept would keep, with its traceback, what the step held
        yield from super().take(batch)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA error: out of memory")])
def test_a_device_without_memory_is_no_death_and_loses_no_sample(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(learner_module, "STARVED_S", 0.01)
    shortages = [2 * learner_module.MAX_DEATHS]
    with running_learner(journal, tmp_path, make=made(Starved, shortages=shortages, error=error)) as learner:
        taught(learner, journal, *FIRST)
        assert (shortages, learner.status().deaths, learner.status().reason) == ([0], 0, None)
        assert learner.accuracy().prequential.count == 2 * len(FIRST)


def test_while_it_waits_for_memory_nothing_keeps_what_the_failed_step_held(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: List[weakref.ref[Trainer]] = []

    class Held(Trainer):
        def take(self, batch: Sequence[Entry]) -> Iterator[int]:
            held.append(weakref.ref(self))
            raise MemoryError

    monkeypatch.setattr(learner_module, "STARVED_S", WAIT_S)
    with running_learner(journal, tmp_path, make=made(Held)) as learner:
        teach(journal, *FIRST[0])
        while learner.status().state != "waiting":
            assert learner.status().deaths == 0
        gc.collect()
        assert held[0]() is None


class Unread(Trainer):
    """Finds no memory for the last checkpoint, as often as `shortages` says."""

    shortages: List[int]

    def restore(self, *found: Any) -> None:
        if self.shortages[0] > 0:
            self.shortages[0] -= 1
            raise MemoryError
        super().restore(*found)


def test_serving_waits_a_little_for_memory_to_read_what_was_learned(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learner_module, "STARVED_FIRST_S", 0.001)
    with running_learner(journal, tmp_path) as learner:
        taught(learner, journal, *FIRST[:5])
    with running_learner(journal, tmp_path, make=made(Unread, shortages=[3])) as learner:
        assert (learner.snapshot.version, learner.status().deaths, learner.status().reason) == (5, 0, None)


def test_serving_begins_without_what_was_learned_when_memory_stays_out_and_has_it_later(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learner_module, "STARVED_FIRST_S", 0.001)
    monkeypatch.setattr(learner_module, "STARVED_S", 0.01)
    with running_learner(journal, tmp_path) as learner:
        taught(learner, journal, *FIRST[:5])
    shortages = [10**9]
    learner = make_learner(journal, tmp_path, make=made(Unread, shortages=shortages))
    learner.start(0.05)
    while learner.status().state != "waiting":
        assert learner.status().deaths == 0
    assert (learner.snapshot.labels, learner.status().reason) == (
        (),
        "memory was out while the last checkpoint was read; it is tried again",
    )
    shortages[0] = 0
    learner.learned(10).result(WAIT_S)
    assert learner.snapshot.version == 5
    learner.stop(WAIT_S)


# --- versions of another make ---


@pytest.mark.parametrize("broken", [1, 9], ids=["the newest", "all"])
def test_a_version_that_can_not_be_gone_on_from_is_set_aside_and_what_it_knew_is_learned_again(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: int
) -> None:
    for requests in (FIRST[:5], FIRST[5:10]):
        with running_learner(journal, tmp_path) as learner:
            taught(learner, journal, *requests)
    before, versions = learner.memory().classes, saved_versions(tmp_path)
    restore, tried = Trainer.restore, []

    def strange(trainer: Trainer, arrays: Any, facts: Any, entries: Any) -> None:
        tried.append(facts["seq"])
        if facts["seq"] in versions[-broken:]:
            raise KeyError("a fact of another make")
        restore(trainer, arrays, facts, entries)

    monkeypatch.setattr(Trainer, "restore", strange)
    with running_learner(journal, tmp_path) as after:
        after.learned(20).result(WAIT_S)
        assert after.status().deaths == 0
        assert after.memory().classes == before
        assert answers(after, "cat", [100, 101]) == ["cat", "cat"]
    assert tried == versions[::-1][: broken + 1]
    assert len(list((tmp_path / "versions").glob("*.aside"))) == min(broken, len(versions))


def test_running_out_of_memory_while_a_version_is_read_is_no_fault_of_the_version(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_learner(journal, tmp_path) as learner:
        taught(learner, journal, *FIRST[:5])
    restore, failures = Trainer.restore, [RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")]

    def short(trainer: Trainer, *arguments: Any) -> None:
        if failures:
            raise failures.pop()
        restore(trainer, *arguments)

    monkeypatch.setattr(Trainer, "restore", short)
    monkeypatch.setattr(learner_module, "STARVED_FIRST_S", 0.01)
    with running_learner(journal, tmp_path) as after:
        assert answers(after, "cat", [100]) == ["cat"]
    assert not list((tmp_path / "versions").glob("*.aside"))
