"""A learned sample whose row in the journal was damaged: what nobody can take out of the sums any more is not left in them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Tuple

import numpy as np
import pytest
from numpy.typing import NDArray

from latentd.learning.trainer import Trainer
from latentd.replay.journal import Journal
from latentd.replay.memory import DOUBTED
from latentd.replay.store import Store
from lessons import WAIT_S, running_journal, teach
from pupils import learn, log, make_trainer

TAUGHT = [(label, number) for number in range(20) for label in ("cat", "dog")]
LOST = "s00000007"  # ("cat", 3)
State = Tuple[Dict[str, NDArray[Any]], Mapping[str, Any]]


def damage(folder: Path) -> None:
    """Half of a row is all that is left of LOST."""
    store = Store(folder / "journal.sqlite")
    store.put({"e/000000000007": b'S{"batch":1,"first_cl'})
    store.commit()
    store.close()


def restored(state: State, journal: Journal, slots: int = 1000) -> Trainer:
    trainer = make_trainer(slots, epochs=0)
    trainer.restore(*state, [entry for entry in log(journal) if entry.seq <= state[1]["seq"]])
    return trainer


def assert_same_sums(one: Trainer, other: Trainer) -> None:
    heads = [trainer.sums.solve() for trainer in (one, other)]
    assert {head.class_ids for head in heads} == {(0, 1)}
    assert [one.sums.count_of(class_id) for class_id in (0, 1)] == [other.sums.count_of(class_id) for class_id in (0, 1)]
    np.testing.assert_allclose(heads[0].weight, heads[1].weight, atol=1e-5)
    np.testing.assert_allclose(heads[0].bias, heads[1].bias, atol=1e-5)


def fresh(folder: Path, lost_is: Optional[str]) -> Trainer:
    """A learner that was taught everything, LOST last and under this label, or never."""
    folder.mkdir()
    with running_journal(folder) as journal:
        teach(journal, *[picture for picture in TAUGHT if picture != ("cat", 3)])
        if lost_is is not None:
            teach(journal, ("cat", 3))
            journal.relabel("s00000040", lost_is).result(WAIT_S)
        return learn(make_trainer(epochs=0), log(journal))


def told(caplog: pytest.LogCaptureFixture) -> List[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def learned(folder: Path, corrected: bool, *, slots: int = 1000) -> State:
    """What a learner saved that was taught everything."""
    with running_journal(folder) as journal:
        teach(journal, *TAUGHT)
        if corrected:
            journal.relabel(LOST, "dog").result(WAIT_S)
        return learn(make_trainer(slots, epochs=0), log(journal)).state()


@pytest.mark.parametrize("corrected", [False, True])
def test_a_sample_whose_row_was_damaged_can_be_forgotten(tmp_path: Path, caplog: pytest.LogCaptureFixture, corrected: bool) -> None:
    state = learned(tmp_path, corrected)
    damage(tmp_path)
    with running_journal(tmp_path) as journal:
        trainer = restored(state, journal)
        assert LOST not in trainer.memory
        journal.forget(LOST).result(WAIT_S)
        learn(trainer, log(journal, trainer.seq))
    assert_same_sums(trainer, fresh(tmp_path / "fresh", None))
    (warning,) = told(caplog)
    assert "1 learned samples lost their label" in warning and LOST in warning


def test_what_was_trained_on_a_sample_that_lost_its_label_is_not_kept(tmp_path: Path) -> None:
    with running_journal(tmp_path) as journal:
        teach(journal, *TAUGHT)
        trainer = learn(make_trainer(), log(journal))
        assert trainer.head is not None
        state = trainer.state()
    damage(tmp_path)
    with running_journal(tmp_path) as journal:
        assert restored(state, journal).head is None


@pytest.mark.parametrize("corrected", [False, True])
def test_a_sample_whose_row_was_damaged_is_learned_once_under_its_new_label(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, corrected: bool
) -> None:
    state = learned(tmp_path, corrected)
    damage(tmp_path)
    expected = fresh(tmp_path / "fresh", "dog")
    with running_journal(tmp_path) as journal:
        trainer = restored(state, journal)
        journal.relabel(LOST, "dog").result(WAIT_S)
        learn(trainer, log(journal, trainer.seq))
        assert_same_sums(trainer, expected)
        caplog.clear()
        again = restored(trainer.state(), journal)
        assert (told(caplog), LOST in again.memory) == ([], True)
        assert_same_sums(again, expected)
        earlier = restored(state, journal)  # the newest version may be damaged too
        learn(earlier, log(journal, earlier.seq))
        assert_same_sums(earlier, expected)


def test_a_damaged_sample_that_was_doubted_is_in_no_sums_to_be_taken_out_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with running_journal(tmp_path) as journal:
        teach(journal, *TAUGHT)
        trainer = learn(make_trainer(epochs=0, doubt_nats=30.0), log(journal))
        trainer.sums.remove(trainer.features([bytes(trainer.memory.get([LOST])[0])]), [0])
        trainer.memory.judge(LOST, DOUBTED)
        state = trainer.state()
    damage(tmp_path)
    with running_journal(tmp_path) as journal:
        assert_same_sums(restored(state, journal), fresh(tmp_path / "fresh", None))
    assert told(caplog) == []


@pytest.mark.parametrize("wiped", [False, True])
def test_what_was_forgotten_or_given_up_since_the_version_is_not_taken_for_damaged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, wiped: bool
) -> None:
    """wiped: the journal has dropped what a later version could do without, and that version is lost."""
    with running_journal(tmp_path) as journal:
        teach(journal, *TAUGHT)
        teach(journal, (None, 0))
        journal.relabel("s00000041", "dog").result(WAIT_S)
        trainer = learn(make_trainer(30, epochs=0), log(journal))
        state = trainer.state()
        stored = [name for name in trainer.memory.ids() if name != "s00000041"]
        before, count = trainer.sums.solve(), trainer.sums.count
        journal.forget(stored[0]).result(WAIT_S)
        if wiped:
            journal.settle(43, [*trainer.evicted, stored[1], "s00000041"]).result(WAIT_S)
        after = restored(state, journal, slots=30)
        assert (told(caplog), after.sums.count, len(trainer.evicted)) == ([], count, 11)
        np.testing.assert_array_equal(after.sums.solve().weight, before.weight)
