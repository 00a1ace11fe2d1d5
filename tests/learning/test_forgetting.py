"""Forgetting: as if it had never been taught, exactly, for as long as its latents are there."""

from __future__ import annotations

from typing import Callable, List, Sequence, Tuple

import numpy as np
import pytest
from numpy.typing import NDArray

from latentd.learning.adaptive import AdaptiveHead
from latentd.learning.trainer import Trainer
from latentd.replay.journal import Journal
from lessons import CODEC, FEATURES, WAIT_S, teach
from pupils import PROBE, assert_same_predictions, learn, log, make_trainer, names, predictions


@pytest.mark.parametrize("after_learning", [True, False])
def test_a_forgotten_sample_was_never_taught(new_journal: Callable[..., Journal], after_learning: bool) -> None:
    journal, pure = new_journal(), new_journal()
    batch: List[Tuple[str, int]] = [(label, number) for number in range(40) for label in ("cat", "dog")]
    teach(journal, *batch, ("cat", 500), ("owl", 501))
    teach(pure, *batch)
    trainer = make_trainer()
    if after_learning:
        learn(trainer, log(journal))
    for sample_id in ("s00000081", "s00000082"):
        journal.forget(sample_id).result(WAIT_S)
    learn(trainer, log(journal, trainer.seq))
    expected = learn(make_trainer(), log(pure))
    journal.forget_class("owl").result(WAIT_S)
    learn(trainer, log(journal, trainer.seq))
    assert trainer.memory.ids() == expected.memory.ids()
    for one in (trainer, expected):
        one.head = None  # compared below: a new one is trained, from other random numbers
    assert_same_predictions(predictions(trainer, journal), predictions(expected, pure))


def test_the_trained_head_begins_anew_without_the_forgotten(new_journal: Callable[..., Journal], monkeypatch: pytest.MonkeyPatch) -> None:
    journal = new_journal()
    teach(journal, *[(label, number) for number in range(30) for label in ("cat", "dog")])
    trainer = learn(make_trainer(), log(journal))
    before = trainer.head
    code = trainer.features([log(journal)[0].code or b""])[0].tobytes()
    seen: List[bytes] = []
    step = AdaptiveHead.train_step

    def spy(self: AdaptiveHead, some: NDArray[np.float32], ids: Sequence[int], rng: np.random.Generator) -> float:
        seen.extend(row.tobytes() for row in some)
        return step(self, some, ids, rng)

    monkeypatch.setattr(AdaptiveHead, "train_step", spy)
    journal.forget("s00000001").result(WAIT_S)
    learn(trainer, log(journal, trainer.seq))
    assert trainer.head is not None
    assert trainer.head is not before
    assert seen
    assert code not in seen


@pytest.mark.parametrize("slots", [1000, 24])
def test_a_forgotten_class_was_never_taught(new_journal: Callable[..., Journal], slots: int) -> None:
    """Exact as long as nothing of the class was evicted, whatever was of the others."""
    journal, pure = new_journal(), new_journal()
    teach(journal, *[("cat", number) for number in range(40)])
    teach(journal, *[("owl", number) for number in range(5)])
    teach(journal, *[("dog", number) for number in range(40)])
    teach(pure, *[("cat", number) for number in range(40)])
    teach(pure, *[("dog", number) for number in range(40)])
    trainer = learn(make_trainer(slots, epochs=0), log(journal))
    assert trainer.memory.counts()[1] == 5
    journal.forget_class("owl").result(WAIT_S)
    learn(trainer, log(journal, trainer.seq))
    assert_same_predictions(predictions(trainer, journal), predictions(learn(make_trainer(epochs=0), log(pure)), pure))
    assert 1 not in trainer.memory.counts()
    assert trainer.prequential.of(1).count == 0


@pytest.mark.parametrize("wish", ["sample", "class"])
def test_forgetting_what_was_evicted_learns_the_rest_again(new_journal: Callable[..., Journal], wish: str) -> None:
    journal = new_journal()
    teach(journal, *[("cat", number) for number in range(40)])
    teach(journal, *[("dog", number) for number in range(10)])
    trainer = learn(make_trainer(20, epochs=0), log(journal))
    journal.settle(50, trainer.evicted).result(WAIT_S)
    journal.forget(trainer.evicted[0]).result(WAIT_S) if wish == "sample" else journal.forget_class("cat").result(WAIT_S)
    learn(trainer, log(journal, 50))
    expected = Trainer(CODEC, FEATURES, trainer._settings)
    for chunk in trainer.memory.all():
        expected.sums.add(CODEC.decode_features(chunk.codes), chunk.class_ids.tolist())
    assert trainer.sums.count == trainer.memory.used
    assert_same_predictions(predictions(trainer, journal), predictions(expected, journal))


def test_a_forgotten_class_is_not_answered_with_before_its_turn_in_the_log(
    new_journal: Callable[..., Journal],
) -> None:
    journal = new_journal()
    teach(journal, *[(label, number) for number in range(30) for label in ("cat", "dog")])
    journal.forget_class("cat").result(WAIT_S)
    trainer = learn(make_trainer(), log(journal)[:-1])
    snapshot, report = trainer.candidate(names(journal), 0.0)
    assert snapshot.labels == ("dog",)
    np.testing.assert_array_equal(snapshot.predict(PROBE), 1.0)
    assert [one.name for one in report.per_class] == ["dog"]


def test_forgetting_everything_leaves_a_learner_that_can_be_taught(new_journal: Callable[..., Journal]) -> None:
    journal = new_journal(holdout_every=3)
    teach(journal, *[(label, number) for number in range(30) for label in ("cat", "dog")])
    trainer = learn(make_trainer(), log(journal))
    for name in ("cat", "dog"):
        journal.forget_class(name).result(WAIT_S)
    learn(trainer, log(journal, trainer.seq))
    snapshot, report = trainer.candidate(names(journal), 0.0)
    assert (snapshot.labels, report.holdout.count, trainer.memory.used, trainer.head) == ((), 0, 0, None)
    teach(journal, ("owl", 0))
    learn(trainer, log(journal, trainer.seq))
    assert trainer.candidate(names(journal), 0.0)[0].decide(PROBE[:1], np.ones((1, 1))) == ["owl"]
