"""The stresses: what they change of a course, and that they are run."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

import nicv2_stress
import objects50
from courses import A_VIDEO, CLASSES, SmallSource, course
from latentd import config
from streams import Course, Objects50

SETTINGS = config.load({}, {"energy.meters": ""})


def taught(given: Course) -> NDArray[np.int64]:
    return np.concatenate(given.batches)


def test_wrong_frames_are_as_many_as_asked_for_and_truly_wrong() -> None:
    given = course()
    wrong = nicv2_stress.wrong_frames(given, CLASSES, 0, share=0.25)
    rows = taught(given)
    changed = wrong.told[rows] != given.labels[rows]
    assert 0.2 < changed.mean() < 0.3
    assert np.array_equal(wrong.labels, given.labels)
    assert np.array_equal(wrong.told[given.asked], given.labels[given.asked])
    assert set(wrong.told.tolist()) <= set(range(CLASSES))


def test_the_same_seed_errs_the_same() -> None:
    first, second, other = (nicv2_stress.wrong_frames(course(), CLASSES, seed).told for seed in (1, 1, 2))
    assert np.array_equal(first, second) and not np.array_equal(first, other)


def test_wrong_videos_are_wrong_as_a_whole() -> None:
    given = course()
    wrong = nicv2_stress.wrong_lessons(given, CLASSES, 0, share=0.5)
    for places in given.batches:
        for label in np.unique(given.labels[places]):
            assert len(set(wrong.told[places[given.labels[places] == label]].tolist())) == 1
    assert 0.2 < (wrong.told[taught(given)] != given.labels[taught(given)]).mean() < 0.8


def test_a_starved_class_keeps_a_tenth_of_its_frames_and_the_others_keep_all() -> None:
    given = course()
    starved = nicv2_stress.starved(given, np.array([1, 4]), share=0.1)
    before, after = (np.bincount(given.labels[taught(one)], minlength=CLASSES) for one in (given, starved))
    assert after[[0, 2, 3, 5]].tolist() == before[[0, 2, 3, 5]].tolist()
    assert after[[1, 4]].sum() == before[[1, 4]].sum() // 10
    assert all(len(places) for places in starved.batches)


def test_away_and_back_teaches_the_same_videos_at_the_two_ends() -> None:
    given, chosen = course(), np.array([2, 3])
    changed, gone, back = nicv2_stress.away(given, chosen)
    assert sorted(taught(changed).tolist()) == sorted(taught(given).tolist())
    labels = [set(given.labels[places].tolist()) for places in changed.batches]
    assert all(label <= {2, 3} for label in labels[1:gone] + labels[back:])
    assert not any(label & {2, 3} for label in labels[gone:back])
    assert len(labels[1:gone]) == len(labels[back:]) == 4


def test_classes_never_taught_are_still_asked() -> None:
    given = course()
    changed = nicv2_stress.never_taught(given, np.array([0, 5]))
    assert not set(given.labels[taught(changed)].tolist()) & {0, 5}
    assert set(given.labels[changed.asked].tolist()) == set(range(CLASSES))
    assert len(taught(changed)) == len(taught(given)) - 8 * A_VIDEO


def test_auroc_counts_pairs_in_the_right_order() -> None:
    assert nicv2_stress.auroc(np.array([3.0, 4.0]), np.array([1.0, 2.0])) == 100
    assert nicv2_stress.auroc(np.array([1.0, 2.0]), np.array([3.0, 4.0])) == 0
    assert nicv2_stress.auroc(np.array([1.0, 1.0]), np.array([1.0])) == 50
    known, unknown = np.random.default_rng(0).random(50), np.random.default_rng(1).random(40) - 0.2
    pairs = np.mean([one > other for one in known for other in unknown])
    assert nicv2_stress.auroc(known, unknown) == pytest.approx(100 * pairs)


@pytest.mark.parametrize("closed_form", [False, True])
@pytest.mark.parametrize("name", nicv2_stress.NAMES)
def test_every_stress_runs_and_gives_figures(name: str, closed_form: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nicv2_stress, "AWAY", 2)
    monkeypatch.setattr(nicv2_stress, "NEVER", 2)
    found = nicv2_stress.run(name, 0, 391, True, closed_form, SmallSource(), SETTINGS)
    assert 50 < found["accuracy"] <= 100
    assert all(0 <= value <= 100 for value in found.values())
    if name == "never taught":
        assert found["auroc likeness"] > 60
        assert found["auroc largest probability"] > 60
    if name == "away and back":
        assert found["taught_again"] > 90 and found["lessons_away"] >= 10


def test_late_classes_are_late_on_objects50_and_as_they_are_elsewhere() -> None:
    assert nicv2_stress.late_source(Objects50(SETTINGS, objects50.FAR)) == Objects50(SETTINGS, objects50.FAR, late=True)
    assert nicv2_stress.late_source(SmallSource()) == SmallSource()


def test_a_summary_is_over_orders() -> None:
    assert nicv2_stress.summary([{"accuracy": 90.0}, {"accuracy": 94.0}]) == {"accuracy": {"mean": 92.0, "std": 2.0}}
