"""Labels that look wrong: found by heads that never saw them, left out of what is learned, and cleared by whoever knows better."""

from __future__ import annotations

import logging
from typing import Any, Dict, List, Sequence, Set

import numpy as np
import pytest

from latentd.learning import doubt, floor
from latentd.learning.analytic import RidgeSums
from latentd.learning.trainer import Trainer
from latentd.replay.journal import Journal
from latentd.replay.memory import DOUBTED, VOUCHED
from lessons import FEATURES, WAIT_S, sample
from pupils import assert_same_predictions, learn, log, make_trainer, names, predictions

LABELS = ("cat", "dog", "owl")
WRONG = {("cat", 7): "dog", ("dog", 30): "owl", ("owl", 31): "cat", ("cat", 45): "owl"}


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floor, "LOOK_APART", 20)


def told(label: str, number: int) -> str:
    return WRONG.get((label, number), label)


def teach_all(journal: Journal, each: int = 80, labels: Sequence[str] = LABELS) -> Dict[str, str]:
    """Requests of some pictures of each label, some of them called something else; sample id -> what it shows."""
    shown: Dict[str, str] = {}
    for start in range(0, each, 5):
        pictures = [(label, number) for number in range(start, start + 5) for label in labels]
        batch = [sample(told(label, number), number, shows=label) for label, number in pictures]
        for record, (label, _) in zip(journal.admit(batch).result(WAIT_S), pictures):
            shown[record.sample_id] = label
    return shown


def wrong_ids(journal: Journal, shown: Dict[str, str]) -> Set[str]:
    name = names(journal)
    return {entry.sample_id for entry in log(journal) if entry.class_id is not None and name[entry.class_id] != shown[entry.sample_id]}


def doubting(slots: int = 1000, nats: float = 20.0) -> Trainer:
    return make_trainer(slots, doubt_nats=nats)


def test_wrong_labels_are_doubted_and_right_ones_are_not(journal: Journal, caplog: pytest.LogCaptureFixture) -> None:
    shown = teach_all(journal)
    with caplog.at_level(logging.INFO):
        trainer = learn(doubting(), log(journal))
    assert set(trainer.memory.ids_of(DOUBTED)) == wrong_ids(journal, shown)
    assert "4 taught samples look wrongly labelled" in caplog.text


def test_what_is_doubted_is_in_no_answer(journal: Journal) -> None:
    shown = teach_all(journal)
    trainer = learn(doubting(), log(journal))
    wrong = wrong_ids(journal, shown)
    sure = RidgeSums(FEATURES)
    for entry in log(journal):
        if entry.sample_id not in wrong and entry.code is not None and entry.class_id is not None:
            sure.add(trainer.features([entry.code]), [entry.class_id])
    assert trainer.sums.count == 240 - len(wrong)
    np.testing.assert_allclose(trainer.sums.solve().weight, sure.solve().weight, rtol=1e-4, atol=1e-6)


def test_zero_nats_doubt_nothing(journal: Journal) -> None:
    teach_all(journal)
    trainer = learn(doubting(nats=0.0), log(journal))
    assert (trainer.memory.ids_of(DOUBTED), trainer.sums.count) == ((), 240)


@pytest.mark.parametrize(("known", "some"), [(doubt.KNOWN, False), (0, True)])
def test_a_class_of_few_is_not_doubted(journal: Journal, monkeypatch: pytest.MonkeyPatch, known: int, some: bool) -> None:
    """Of ten pictures of one class one looks like a cat: too few to be sure what the class looks like."""
    monkeypatch.setattr(doubt, "KNOWN", known)
    teach_all(journal)
    batch = [sample("kitten", 500 + number, shows="kitten" if number else "cat") for number in range(10)]
    ids = {record.sample_id for record in journal.admit(batch).result(WAIT_S)}
    journal.admit([sample(label, 600 + number) for number in range(30) for label in LABELS]).result(WAIT_S)
    trainer = learn(doubting(), log(journal))
    assert bool(ids & set(trainer.memory.ids_of(DOUBTED))) == some


def test_a_class_with_many_wrong_labels_stays_judged_when_they_are_left_out(journal: Journal) -> None:
    """Without them a half knows it too little; they must not come back for that, and go again, and come back."""
    teach_all(journal, labels=("dog", "owl"))
    batch = [sample("cat", number, shows="cat" if number % 4 else "owl") for number in range(46)]
    journal.admit(batch).result(WAIT_S)
    trainer, doubted = learn(doubting(nats=8.0), log(journal)), []
    for _ in range(4):
        for _ in trainer._floor.look():
            pass
        doubted.append(len(trainer.memory.ids_of(DOUBTED)))
    assert doubted[0] >= 10
    assert len(set(doubted)) == 1


def test_the_same_log_doubts_the_same_after_a_restart_in_the_middle(journal: Journal) -> None:
    teach_all(journal)
    entries = log(journal)
    whole = learn(doubting(), entries)
    half = learn(doubting(), entries[:180])
    arrays, facts = half.state()
    again = doubting()
    again.restore(arrays, facts, entries[:180])
    learn(again, entries[180:])
    assert half.memory.ids_of(DOUBTED), "the first half has wrong labels of its own"
    assert again.memory.ids_of(DOUBTED) == whole.memory.ids_of(DOUBTED)
    assert_same_predictions(predictions(again, journal), predictions(whole, journal))


def test_a_doubted_sample_that_gets_its_right_name_is_learned(journal: Journal) -> None:
    shown = teach_all(journal)
    wrong = sorted(wrong_ids(journal, shown))
    trainer = learn(doubting(), log(journal))
    for sample_id in wrong:
        journal.relabel(sample_id, shown[sample_id]).result(WAIT_S)
    learn(trainer, log(journal, after=240))
    assert trainer.memory.ids_of(DOUBTED) == ()
    assert trainer.memory.ids_of(VOUCHED) == tuple(wrong)
    assert [trainer.sums.count_of(class_id) for class_id in sorted(names(journal))] == [80, 80, 80]


def test_the_same_name_said_again_vouches_for_it_for_ever(journal: Journal) -> None:
    shown = teach_all(journal)
    trainer = learn(doubting(), log(journal))
    (first, *others) = sorted(wrong_ids(journal, shown))
    record = journal.sample(first).result(WAIT_S)
    assert record.label is not None
    journal.relabel(first, record.label, again=True).result(WAIT_S)
    teach_later = [sample(label, 900 + number) for label in LABELS for number in range(60)]
    journal.admit(teach_later).result(WAIT_S)
    learn(trainer, log(journal, after=240))
    assert trainer.memory.standing(first) == VOUCHED
    assert trainer.memory.ids_of(DOUBTED) == tuple(others), "another look was due, and found the rest again"


@pytest.mark.parametrize("wish", ["sample", "class"])
def test_forgetting_what_is_doubted_takes_nothing_else_away(journal: Journal, wish: str) -> None:
    shown = teach_all(journal)
    trainer = learn(doubting(), log(journal))
    wrong = wrong_ids(journal, shown)
    if wish == "sample":
        for sample_id in sorted(wrong):
            journal.forget(sample_id).result(WAIT_S)
    else:
        journal.forget_class("cat").result(WAIT_S)
    kept: List[str] = [sample_id for sample_id in shown if journal.sample(sample_id).result(WAIT_S).state != "forgotten"]
    learn(trainer, log(journal, after=240))
    sure = [sample_id for sample_id in kept if sample_id not in wrong]
    assert trainer.sums.count == len(sure)
    expected = RidgeSums(FEATURES)
    for chunk in trainer.memory.all():
        chosen = [row for row, sample_id in enumerate(chunk.ids) if sample_id in sure]
        expected.add(trainer.features([chunk.codes[row].tobytes() for row in chosen]), chunk.class_ids[chosen].tolist())
    np.testing.assert_allclose(trainer.sums.solve().weight, expected.solve().weight, rtol=1e-4, atol=1e-5)


def test_doubted_samples_that_are_given_up_leave_the_sums_as_they_are(journal: Journal) -> None:
    teach_all(journal)
    trainer = learn(doubting(slots=210), log(journal))
    gone = set(trainer.evicted)
    assert len(gone) == 30
    doubted = trainer.memory.ids_of(DOUBTED)
    assert trainer.sums.count == 240 - len(doubted) - sum(trainer.memory.standing(sample_id) == DOUBTED for sample_id in gone)


def test_the_sums_become_what_is_left_of_a_larger_whole() -> None:
    rng = np.random.default_rng(0)
    rows, ids = rng.standard_normal((200, FEATURES)).astype(np.float32), rng.integers(0, 4, 200).tolist()
    whole, part, rest = RidgeSums(FEATURES), RidgeSums(FEATURES), RidgeSums(FEATURES)
    whole.add(rows, ids)
    part.add(rows[:90], ids[:90])
    rest.add(rows[90:], ids[90:])
    part.become_rest_of(whole)
    assert [part.count_of(class_id) for class_id in range(4)] == [rest.count_of(class_id) for class_id in range(4)]
    found, expected = part.solve(), rest.solve()
    order = [found.class_ids.index(class_id) for class_id in expected.class_ids]
    np.testing.assert_allclose(found.weight[:, order], expected.weight, rtol=1e-4, atol=1e-6)


def restarted(journal: Journal, **changes: Any) -> Trainer:
    """What comes back from a version of one that doubted, with another configuration."""
    entries, trainer = log(journal), doubting(**changes)
    trainer.restore(*learn(doubting(), entries).state(), entries)
    return trainer


def test_a_restart_with_less_room_keeps_in_mind_what_was_doubted(journal: Journal) -> None:
    teach_all(journal)
    doubted = learn(doubting(), log(journal)).memory.ids_of(DOUBTED)
    small = restarted(journal, slots=60)
    gone = [sample_id for sample_id in doubted if sample_id not in small.memory]
    assert gone, "some of them did not fit"
    before = small.sums.count
    journal.forget(gone[0]).result(WAIT_S)
    learn(small, log(journal, after=240))
    assert small.sums.count == before, "it was in no sum, and nothing was taken out for it"


def test_a_restart_without_doubt_learns_what_was_doubted(journal: Journal) -> None:
    teach_all(journal)
    trusting = restarted(journal, nats=0.0)
    assert (trusting.memory.ids_of(DOUBTED), trusting.sums.count) == ((), 240)
    assert_same_predictions(predictions(trusting, journal), predictions(learn(doubting(nats=0.0), log(journal)), journal))


def test_a_restart_with_another_measure_looks_again_soon(journal: Journal) -> None:
    teach_all(journal)
    for nats, looks in ((20.0, False), (25.0, True)):
        trainer = restarted(journal, nats=nats)
        trainer._floor._looked_at = trainer._floor._looked_at and trainer.sums.count  # as if the last look was just now
        assert trainer._floor.wants_look() == looks


def test_what_comes_after_much_was_forgotten_is_looked_at(journal: Journal) -> None:
    teach_all(journal)
    trainer = learn(doubting(), log(journal))
    for label in ("cat", "dog"):
        journal.forget_class(label).result(WAIT_S)
    after = log(journal)[-1].seq
    learn(trainer, log(journal, after=240))
    journal.admit([sample("cat", 300 + number, shows="owl" if number == 5 else "cat") for number in range(60)]).result(WAIT_S)
    learn(trainer, log(journal, after=after))
    assert trainer.memory.doubted(max(names(journal))) == 1
