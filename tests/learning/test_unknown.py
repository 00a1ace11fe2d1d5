"""Unknown: what was taught is answered, what was not is refused, and the threshold keeps what it promises."""

from __future__ import annotations

import json
from typing import Callable, List, Tuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from latentd.learning.analytic import LinearHead, RidgeSums
from latentd.learning.foresight import Foresight
from latentd.learning.unknown import KEPT, MIN_ANSWERS, RightAnswers, auroc, likeness, refused, to_answer
from latentd.replay.journal import Journal
from lessons import features, teach
from pupils import learn, log, make_trainer, names

WIDTH, CLASSES, FAR = 48, 12, 3.0
CENTRES = np.random.default_rng(5).standard_normal((CLASSES + 4, WIDTH)) * FAR / np.sqrt(WIDTH) * 4


def pictures(class_id: int, count: int, seed: int) -> NDArray[np.float32]:
    """(count, WIDTH) of a class; those from CLASSES on are never taught."""
    noise = np.random.default_rng([class_id, seed]).standard_normal((count, WIDTH))
    found: NDArray[np.float32] = (CENTRES[class_id] + noise).astype(np.float32)
    return found


def taught(each: int = 60) -> RidgeSums:
    sums = RidgeSums(WIDTH)
    for class_id in range(CLASSES):
        sums.add(pictures(class_id, each, 0), [class_id] * each)
    return sums


def sureness(head: LinearHead, classes: range, count: int = 50) -> NDArray[np.float64]:
    return np.concatenate([to_answer(head, pictures(class_id, count, 1))[1] for class_id in classes])


# --- likeness ---


def test_likeness_is_one_at_a_class_and_nothing_at_the_mean_of_everything() -> None:
    sums = taught()
    head = sums.solve()
    means = (sums.sums / sums.counts[:, None]).astype(np.float32)
    np.testing.assert_allclose(np.diagonal(likeness(head, means)), 1.0, atol=0.05)
    np.testing.assert_allclose(likeness(head, means.mean(axis=0, keepdims=True)), 0.0, atol=1e-3)


def test_likeness_is_a_difference_of_two_mahalanobis_distances() -> None:
    sums = taught()
    head = sums.solve()
    everything = np.concatenate([pictures(class_id, 60, 0) for class_id in range(CLASSES)]).astype(np.float64)
    means, centre = sums.sums / sums.counts[:, None], everything.mean(axis=0)
    within = (everything - np.repeat(means, 60, axis=0)).T @ (everything - np.repeat(means, 60, axis=0))
    total = len(everything)
    metric = np.linalg.inv((within + 300 * np.trace(within) / total / WIDTH * np.eye(WIDTH)) / (total + 300))
    x = pictures(3, 1, 9)[0].astype(np.float64)

    def distance(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
        return float((one - other) @ metric @ (one - other))

    noise = float(np.trace(metric @ within)) / (total - CLASSES) / 60
    span = distance(centre, means[3])
    expected = ((distance(x, centre) - distance(x, means[3])) / 2 + span / 2) / (span - noise)
    assert likeness(head, x[None].astype(np.float32))[0, 3] == pytest.approx(expected, rel=1e-3)


def test_what_was_never_taught_looks_less_like_anything() -> None:
    head = taught().solve()
    known, novel = sureness(head, range(CLASSES)), sureness(head, range(CLASSES, CLASSES + 4))
    assert auroc(known, novel) > 0.97
    assert refused(head, pictures(CLASSES, 50, 1), float(np.quantile(known, 0.05))).mean() > 0.8


def test_without_a_threshold_or_another_class_nothing_is_refused() -> None:
    alone = RidgeSums(WIDTH)
    alone.add(pictures(0, 5, 0), [0] * 5)
    assert not refused(alone.solve(), pictures(CLASSES, 5, 0), 1e9).any()
    assert not refused(taught().solve(), pictures(CLASSES, 5, 0), None).any()
    assert not refused(RidgeSums(WIDTH).solve(), pictures(CLASSES, 5, 0), 1e9).any()


def test_a_class_of_one_image_is_refused_hardly_more_often_than_the_others() -> None:
    known = sureness(taught().solve(), range(CLASSES))
    below = float(np.quantile(known, 0.05))
    shares: List[float] = []
    for first in range(40):
        sums = taught()
        sums.add(pictures(CLASSES, 40, 7)[first : first + 1], [CLASSES])
        shares.append(float(refused(sums.solve(), pictures(CLASSES, 50, 1), below).mean()))
    assert np.mean(shares) < 0.10


# --- the threshold ---


def answered(count: int, *, seed: int = 0) -> RightAnswers:
    found = RightAnswers()
    for value in np.random.default_rng(seed).standard_normal(count):
        found.record(1, float(value))
    return found


@pytest.mark.parametrize(("count", "rate"), [(0, 0.05), (MIN_ANSWERS - 1, 0.05), (MIN_ANSWERS, 0.01), (98, 0.01), (400, 0.0)])
def test_too_few_answers_refuse_nothing_and_say_why(count: int, rate: float) -> None:
    below, reason = answered(count).threshold(rate)
    assert below is None
    assert reason is not None
    assert (str(count) in reason) == (rate > 0)


@pytest.mark.parametrize(("count", "rate"), [(MIN_ANSWERS, 0.05), (99, 0.01), (500, 0.05), (500, 0.2)])
def test_the_promised_share_of_right_answers_is_refused(count: int, rate: float) -> None:
    """Split conformal: over many calibrations, the mean share of new answers below the threshold is k / (n + 1) <= rate."""
    fresh = np.random.default_rng(99).standard_normal(20_000)
    shares = [float((fresh < (answered(count, seed=seed).threshold(rate)[0] or np.nan)).mean()) for seed in range(300)]
    assert np.mean(shares) == pytest.approx(int(rate * (count + 1)) / (count + 1), rel=0.15)


def test_only_the_last_answers_count_and_a_forgotten_class_takes_its_own_along() -> None:
    found = answered(KEPT)
    for _ in range(KEPT):
        found.record(2, 5.0)
    assert (len(found), found.threshold(0.05)) == (KEPT, (5.0, None))
    found.record(3, -1.0)
    found.forget_class(2)
    assert len(found) == 1


def test_answers_come_back_through_json() -> None:
    found, other = answered(77), RightAnswers()
    other.restore(json.loads(json.dumps(found.state())))
    assert other.state() == found.state()
    assert other.threshold(0.1) == found.threshold(0.1)


@settings(deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=20), st.lists(st.integers(0, 6), min_size=1, max_size=20))
def test_auroc_counts_pairs(known: List[int], novel: List[int]) -> None:
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in known for b in novel]
    assert auroc(np.array(known, float), np.array(novel, float)) == pytest.approx(np.mean(pairs))


# --- in the trainer ---


def life(journal: Journal, rate: float, lessons: int = 25) -> Tuple[int, ...]:
    for number in range(lessons):
        teach(journal, *[(label, 4 * number + i) for label in ("cat", "dog", "owl") for i in range(4)])
    trainer = learn(make_trainer(unknown_rate=rate), log(journal))
    snapshot, report = trainer.candidate(names(journal), 0.0)
    rows = np.stack([features(label, 700 + number) for label in ("cat", "dog", "owl") for number in range(100)])
    known = snapshot.decide(rows, snapshot.predict(rows)).count("unknown")
    strange = np.stack([features(f"thing {number}", number) for number in range(300)])
    novel = snapshot.decide(strange, snapshot.predict(strange)).count("unknown")
    assert (report.unknown.rate, report.unknown.below) == (rate, snapshot.unknown_below)
    return known, novel, report.unknown.answers, report.unknown.refused, report.unknown.holdout


def test_a_taught_trainer_refuses_what_it_was_not_taught(new_journal: Callable[..., Journal]) -> None:
    known, novel, count, of_holdout, holdout = life(new_journal(holdout_every=10), 0.05)
    assert count >= 200
    assert known <= 0.10 * 300
    assert novel >= 0.5 * 300
    assert (holdout, of_holdout <= 6) == (30, True)


def test_with_a_rate_of_nothing_it_answers_everything(new_journal: Callable[..., Journal]) -> None:
    known, novel, _, of_holdout, _ = life(new_journal(holdout_every=10), 0.0)
    assert (known, novel, of_holdout) == (0, 0, 0)


def test_before_thirty_right_answers_nothing_is_refused_and_the_report_says_why(new_journal: Callable[..., Journal]) -> None:
    journal = new_journal(holdout_every=10)
    teach(journal, *[(label, number) for label in ("cat", "dog") for number in range(10)])
    report = learn(make_trainer(unknown_rate=0.05), log(journal)).candidate(names(journal), 0.0)[1]
    assert report.unknown.below is None
    assert "too few" in (report.unknown.reason or "")


def test_the_yardstick_is_renewed_as_what_was_learned_grows_and_dropped_by_forgetting() -> None:
    sums, foresight = taught(each=2), Foresight()
    assert foresight.is_due(sums)
    foresight.renew(sums)
    assert not foresight.is_due(sums)
    sums.add(pictures(0, 15, 3), [0] * 15)
    assert not foresight.is_due(sums)
    sums.add(pictures(0, 1, 4), [0])
    assert foresight.is_due(sums)
    foresight.renew(sums)
    foresight.forget(0)
    assert foresight.is_due(sums)
    assert foresight.state()[0] == {}


def test_what_foresight_knows_comes_back_from_a_checkpoint(new_journal: Callable[..., Journal]) -> None:
    journal = new_journal(holdout_every=10)
    for number in range(20):
        teach(journal, *[(label, 4 * number + i) for label in ("cat", "dog", "owl") for i in range(4)])
    trainer = learn(make_trainer(unknown_rate=0.05), log(journal))
    arrays, facts = trainer.state()
    other = make_trainer(unknown_rate=0.05)
    other.restore(arrays, json.loads(json.dumps(facts)), log(journal))
    teach(journal, *[(label, 900 + i) for label in ("cat", "dog", "owl") for i in range(20)])
    for one in (trainer, other):
        learn(one, log(journal, one.seq))
    assert other.foresight.state()[1] == trainer.foresight.state()[1]
    for name, array in trainer.foresight.state()[0].items():
        np.testing.assert_array_equal(other.foresight.state()[0][name], array)


def test_a_version_from_before_there_was_a_threshold_begins_with_none(new_journal: Callable[..., Journal]) -> None:
    journal = new_journal()
    for number in range(12):
        teach(journal, *[(label, 4 * number + i) for label in ("cat", "dog", "owl") for i in range(4)])
    arrays, facts = learn(make_trainer(unknown_rate=0.05), log(journal)).state()
    older = {name: array for name, array in arrays.items() if not name.startswith("foresight.")}
    trainer = make_trainer(unknown_rate=0.05)
    trainer.restore(older, {name: fact for name, fact in facts.items() if name != "foresight"}, log(journal))
    assert trainer.candidate(names(journal), 0.0)[0].unknown_below is None
    for number in range(12, 24):
        teach(journal, *[(label, 4 * number + i) for label in ("cat", "dog", "owl") for i in range(4)])
    learn(trainer, log(journal, trainer.seq))
    assert trainer.candidate(names(journal), 0.0)[0].unknown_below is not None


def test_a_forgotten_class_leaves_neither_answers_nor_drift(new_journal: Callable[..., Journal]) -> None:
    journal = new_journal()
    for number in range(12):
        teach(journal, *[(label, 4 * number + i) for label in ("cat", "dog", "owl") for i in range(4)])
    trainer = learn(make_trainer(), log(journal))
    assert trainer.foresight.drift.of(0) is not None
    journal.forget_class("cat").result(20)
    learn(trainer, log(journal, trainer.seq))
    assert trainer.foresight.drift.of(0) is None
    assert {class_id for class_id, _ in trainer.foresight.answers.state()["kept"]} == {1, 2}
    assert 0 not in trainer.foresight.state()[0]["foresight.class_ids"]
