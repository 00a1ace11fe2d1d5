"""The learner thread: learns what the journal has, answers at once, and saves no more than it must."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, Iterator, List, Mapping, Optional, Sequence, Tuple

import numpy as np
import pytest
from numpy.typing import NDArray

from latentd.errors import JournalError, LearnerError, Overloaded
from latentd.learning import checkpoint, gate, keeper, pacing
from latentd.learning import learner as learning
from latentd.learning.accuracy import AccuracyReport
from latentd.learning.learner import Learner
from latentd.learning.snapshot import Snapshot
from latentd.learning.trainer import Trainer
from latentd.replay.journal import Journal
from latentd.replay.records import Entry
from lessons import WAIT_S, running_journal, teach
from pupils import Gated, Witness, answers, made, make_learner, make_trainer, running_learner, saved_versions, taught

pytestmark = pytest.mark.usefixtures("quick_restarts")
FIRST = [[("cat", number), ("dog", number)] for number in range(25)]


# --- learning ---


def test_a_new_class_is_answered_from_the_moment_its_learning_is_told(journal: Journal, tmp_path: Path) -> None:
    with running_learner(journal, tmp_path) as learner:
        assert learner.snapshot.labels == ()
        taught(learner, journal, *FIRST)
        for label in ("owl", "fox", "hen"):
            taught(learner, journal, [(label, 0)])
            assert answers(learner, label, [0]) == [label]
        assert answers(learner, "cat", range(100, 110)) == ["cat"] * 10
        assert journal.sample("s00000050").result(WAIT_S).state == "learned"
        assert learner.snapshot.version == 28


def test_waiting_for_what_is_learned_already_takes_no_time(journal: Journal, tmp_path: Path) -> None:
    with running_learner(journal, tmp_path) as learner:
        taught(learner, journal, [("cat", 0)], [("cat", 1)])
        assert learner.learned(1).done()
        assert learner.learned(0).done()
        assert not learner.learned(99).done()


def test_what_was_taught_while_nobody_learned_is_learned_at_the_start(journal: Journal, tmp_path: Path) -> None:
    for request in FIRST:
        teach(journal, *request)
    with running_learner(journal, tmp_path) as learner:
        learner.learned(50).result(WAIT_S)
        assert learner.snapshot.version == 25


def test_an_entry_that_comes_between_reading_the_log_and_falling_asleep_is_not_slept_over(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries, late = journal.entries, [("cat", 1), ("cat", 2), ("cat", 3)]

    def read(after_seq: int, limit: int) -> Future[List[Entry]]:
        page = entries(after_seq, limit)
        if not page.result(WAIT_S) and late:
            teach(journal, late.pop())
        return page

    monkeypatch.setattr(journal, "entries", read)
    with running_learner(journal, tmp_path) as learner:
        teach(journal, ("cat", 0))
        learner.learned(4).result(WAIT_S)
        assert late == []


def test_duplicates_and_unlabelled_images_move_the_watermark_and_make_no_version(journal: Journal, tmp_path: Path) -> None:
    witness = Witness()
    with running_learner(journal, tmp_path, observer=witness) as learner:
        taught(learner, journal, [("cat", 0)])
        seq = [teach(journal, ("cat", 0)), teach(journal, (None, 1))][-1][-1].seq
        learner.learned(seq).result(WAIT_S)
        assert (learner.snapshot.version, learner.status().watermark_seq, learner.status().lag_samples) == (1, 3, 0)
        assert witness.causes == ["restored", "learned"]


def test_a_new_name_is_answered_with_and_changes_nothing_else(journal: Journal, tmp_path: Path) -> None:
    with running_learner(journal, tmp_path) as learner:
        taught(learner, journal, *FIRST)
        before = learner.snapshot
        journal.put_class("cat", "lynx").result(WAIT_S)
        learner.learned(51).result(WAIT_S)
        assert learner.snapshot.labels == ("lynx", "dog")
        assert learner.snapshot.analytic.weight.tobytes() == before.analytic.weight.tobytes()
        assert answers(learner, "cat", [200]) == ["lynx"]


def test_prequential_accuracy_asks_before_it_teaches(journal: Journal, tmp_path: Path) -> None:
    with running_learner(journal, tmp_path) as learner:
        taught(learner, journal, [("cat", 0)], [("dog", 0)], *FIRST[1:])
        report = learner.accuracy()
        assert report.prequential.count == 50
        assert report.prequential.correct == 48, "the first of each class could not be known"
        assert [(one.name, one.prequential.count) for one in report.per_class] == [("cat", 25), ("dog", 25)]


def test_the_hold_out_is_reported_and_the_gate_says_what_it_did(tmp_path: Path) -> None:
    with running_journal(tmp_path, holdout_every=3) as journal, running_learner(journal, tmp_path) as learner:
        taught(learner, journal, [pair for request in FIRST for pair in request], [("cat", 99)])
        assert learner.accuracy().holdout.count == 16
        assert learner.memory().used == 35
        assert learner.memory().holdout_bytes > 0
        assert learner.status().gate["holdout"] == 16
        assert "too few" in learner.status().gate["reason"]


def test_a_candidate_that_flips_too_many_right_answers_is_not_published_and_the_status_has_the_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trained head was taught every label wrong, and would answer alone: the floor goes on answering."""

    class Misled(Trainer):
        def _train_step(self, new: NDArray[np.float32], new_ids: Sequence[int], new_each: int, rng: np.random.Generator) -> None:
            codes, class_ids = self.memory.draw(16, rng)
            assert self.head is not None
            self.head.train_step(self._codec.decode_features(codes), [1 - int(class_id) for class_id in class_ids], rng)

    monkeypatch.setattr(gate, "_WEIGHTS", (1.0,))
    witness, lessons = Witness(), [[(label, 4 * number + i) for label in ("cat", "dog") for i in range(4)] for number in range(20)]
    with running_journal(tmp_path, holdout_every=3) as journal, running_learner(
        journal, tmp_path, make=made(Misled), observer=witness
    ) as learner:
        taught(learner, journal, *lessons)
        status = learner.status()
        assert learner.snapshot.trained is None
        assert answers(learner, "cat", range(500, 520)).count("cat") >= 19
    found = status.gate
    assert found["reason"] == status.last_publish_rejected
    assert found["reason"].startswith(f"kept out: hold-out {found['candidate_correct']} against {found['floor_correct']} right of")
    assert found["candidate_correct"] == found["floor_correct"] - found["negative_flips"] + found["positive_flips"]
    assert found["negative_flips"] > found["negative_flips_allowed"] == int(0.02 * found["holdout"])
    assert (found["trained_weight"], "holdout" in witness.reasons) == (0.0, True)


@pytest.mark.parametrize(
    ("reason", "weight", "refused"),
    [
        ("blocks kept out: hold-out 1; head kept out: hold-out 2", 0.0, True),
        ("blocks kept out: hold-out 1; head takes part: hold-out 2", 0.5, False),
        ("blocks 0 hold-out samples are too few to judge (30 needed); head nothing trained yet", 0.0, False),
    ],
)
def test_what_is_kept_out_is_counted_unless_another_part_is_let_in(tmp_path: Path, reason: str, weight: float, refused: bool) -> None:
    class Judged(Trainer):
        def candidate(self, names: Mapping[int, str], published_at: float) -> Tuple[Snapshot, AccuracyReport]:
            made = super().candidate(names, published_at)
            assert self.last_verdict is not None
            self.last_verdict = replace(self.last_verdict, reason=reason, weight=weight)
            return made

    witness = Witness()
    with running_journal(tmp_path) as journal, running_learner(journal, tmp_path, make=made(Judged), observer=witness) as learner:
        taught(learner, journal, [("cat", 1)])
        assert learner.status().last_publish_rejected == (reason if refused else None)
    assert ("holdout" in witness.reasons) is refused


# --- behaving ---


def test_a_sleep_that_a_late_snapshot_makes_due_begins_though_nothing_more_comes(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The snapshot comes once everything is on the disk: then nothing but itself could wake the learner."""
    witness, slept = Witness(), threading.Event()

    class Tired(Trainer):
        def wants_sleep(self) -> bool:
            return "learned" in witness.causes and not slept.is_set()

        def sleep(self) -> Iterator[int]:
            slept.set()
            return iter(())

    monkeypatch.setattr(learning, "PUBLISH_SHARE", 1e-9)
    with running_learner(journal, tmp_path, make=made(Tired), observer=witness, checkpoint_s=0.0) as learner:
        due = learner._keeper.due_in_s

        def durable(trainer: Trainer) -> Optional[float]:
            found = due(trainer)
            if found is None and trainer.seq:
                learner._next_publish_at = 0.0  # from the next turn on
            return found

        monkeypatch.setattr(learner._keeper, "due_in_s", durable)
        teach(journal, ("cat", 0))
        assert slept.wait(WAIT_S)


def test_classify_goes_first_but_not_for_ever(journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pacing, "YIELD_S", 0.02)
    states: List[str] = []
    started: List[Learner] = []

    def busy() -> bool:
        states.append(started[0].status().state)
        return True

    started.append(make_learner(journal, tmp_path, busy=busy))
    started[0].start(WAIT_S)
    taught(started[0], journal, [pair for request in FIRST for pair in request])
    started[0].stop(WAIT_S)
    assert "yielding" in states
    assert started[0].snapshot.version == 1


def test_it_does_not_wait_when_nobody_classifies(journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pacing, "YIELD_S", WAIT_S * 100)
    with running_learner(journal, tmp_path) as learner:
        taught(learner, journal, [pair for request in FIRST for pair in request])
        assert learner.status().steps > 1
        assert learner.status().last_step_s is not None


def test_the_status_says_how_far_behind_it_is(journal: Journal, tmp_path: Path) -> None:
    gate, entered = threading.Event(), threading.Event()
    times = [100.0]
    for request in FIRST[:4]:
        teach(journal, *request)
    gated = made(Gated, gate=gate, entered=entered)
    with running_learner(journal, tmp_path, make=gated, monotonic=lambda: times[0]) as learner:
        assert entered.wait(WAIT_S)
        times[0] += 12.5
        status = learner.status()
        assert (status.state, status.lag_samples, status.watermark_seq) == ("learning", 8, 0)
        assert status.lag_s == pytest.approx(12.5)
        gate.set()
        learner.learned(8).result(WAIT_S)
        status = learner.status()
        assert (status.lag_samples, status.lag_s, status.watermark_seq) == (0, 0.0, 8)


def test_what_the_memory_gives_up_leaves_the_disk_only_with_the_next_version(journal: Journal, tmp_path: Path) -> None:
    witness = Witness()
    with running_learner(journal, tmp_path, make=lambda: make_trainer(slots=10), observer=witness) as learner:
        taught(learner, journal, *FIRST[:10])
        assert (witness.evictions, learner.memory().evictions, learner.memory().used) == (10, 10, 10)
        assert {record.state for record in journal.samples(None, 99).result(WAIT_S)[0]} == {"learned"}
    states = [record.state for record in journal.samples(None, 99).result(WAIT_S)[0]]
    assert (states.count("evicted"), states.count("learned")) == (10, 10)
    assert saved_versions(tmp_path) == [20]


def test_until_a_snapshot_that_nobody_waits_for_it_waits_and_says_why(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It took no step then, for 20 times as long as making the last snapshot took: a watchdog would have called it stuck."""
    monkeypatch.setattr(learning, "PUBLISH_SHARE", 1e-9)  # by itself it would not publish again today
    with running_learner(journal, tmp_path) as learner:
        seq = teach(journal, ("cat", 0))[-1].seq
        while learner.status().state != "waiting":
            threading.Event().wait(0.001)
        assert (learner.status().reason, learner.status().lag_samples) == (learning.UNHURRIED, 1)
        learner.learned(seq).result(WAIT_S)
        while learner.status().state != "idle":
            threading.Event().wait(0.001)
        assert (learner.status().reason, learner.status().lag_samples) == (None, 0)


# --- saving ---


def test_it_saves_after_a_while_and_not_after_every_request(journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = threading.Event()
    write = checkpoint.write

    def noted(*arguments: Any) -> Path:
        path = write(*arguments)
        saved.set()
        return path

    monkeypatch.setattr(checkpoint, "write", noted)
    with running_learner(journal, tmp_path, checkpoint_s=3600.0) as learner:
        taught(learner, journal, *FIRST[:5])
        assert not saved.is_set()
    assert saved_versions(tmp_path) == [10]
    saved.clear()
    with running_learner(journal, tmp_path, checkpoint_s=0.05) as learner:
        taught(learner, journal, *FIRST[5:7])
        assert saved.wait(WAIT_S), "nothing more came, and yet it saves"


def test_a_full_disk_is_told_and_tried_again_while_learning_goes_on(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries, full, again = [0], [True], threading.Event()
    write = checkpoint.write

    def refusing(*arguments: Any) -> Path:
        tries[0] += 1
        if full[0]:
            raise LearnerError("no room for version")
        path = write(*arguments)
        again.set()
        return path

    monkeypatch.setattr(checkpoint, "write", refusing)
    monkeypatch.setattr(keeper, "RETRY_S", 3600.0)
    with running_learner(journal, tmp_path, checkpoint_s=0.0) as learner:
        taught(learner, journal, *FIRST[:8])
        assert learner.status().reason == "no room for version"
        assert tries[0] == 1, "not tried in a hot loop"
        assert learner.snapshot.version == 8
        assert learner.status().deaths == 0
        full[0] = False
        monkeypatch.setattr(keeper, "RETRY_S", 0.0)
    assert saved_versions(tmp_path) == [16]
    full[0] = True
    again.clear()
    with running_learner(journal, tmp_path, checkpoint_s=0.0) as learner:
        taught(learner, journal, FIRST[8])
        full[0] = False
        assert again.wait(WAIT_S), "it is saved though nothing more is taught"
    assert saved_versions(tmp_path)[-1] == 18


def test_a_journal_that_cannot_be_read_for_a_while_is_waited_for(journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries, failures, reasons = journal.entries, [JournalError("no disk"), Overloaded("queue full"), JournalError("no disk")], []

    def read(after_seq: int, limit: int) -> Future[List[Entry]]:
        if not failures:
            return entries(after_seq, limit)
        future: Future[List[Entry]] = Future()
        future.set_exception(failures.pop())
        reasons.append(learner.status().reason)
        return future

    learner = make_learner(journal, tmp_path)
    monkeypatch.setattr(journal, "entries", read)
    learner.start(WAIT_S)
    taught(learner, journal, *FIRST[:2])
    assert reasons == [None, "no disk", "queue full"]
    assert (learner.status().reason, learner.status().deaths) == (None, 0)
    learner.stop(WAIT_S)
