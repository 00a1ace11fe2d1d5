"""Drift: an alarm soon after a class changes, none for years when it does not."""

from __future__ import annotations

import json
from typing import Iterator, List, Optional

import numpy as np
import pytest

from latentd.learning.drift import ALARM, LESSON_SAMPLES, MIN_LESSONS, Drift, DriftWatch

CAT, DOG = 3, 8


def lessons(watch: DriftWatch, values: Iterator[float], count: int, first_seq: int = 1) -> Optional[int]:
    """Teaches so many lessons of one image each, another class between them; the lesson at which the class began to drift."""
    for number in range(count):
        watch.observe(CAT, first_seq + 2 * number, next(values))
        watch.observe(DOG, first_seq + 2 * number + 1, 0.7)
        found = watch.of(CAT)
        if found is not None and found.drifting:
            return number + 1
    return None


def normal(seed: int, mean: float = 0.6, slope: float = 0.0) -> Iterator[float]:
    dice = np.random.default_rng(seed)
    number = 0
    while True:
        yield float(mean - slope * number + 0.1 * dice.standard_normal())
        number += 1


def test_alarms_over_stationary_lessons_are_as_rare_as_the_documentation_says() -> None:
    alarms, taught = 0, 0
    for seed in range(120):
        found = lessons(DriftWatch(), normal(seed), 1000)
        alarms += found is not None
        taught += found or 1000
    assert taught / max(1, alarms) > 4000


def test_a_class_that_is_taught_other_images_alarms_within_a_few_lessons() -> None:
    delays: List[int] = []
    for seed in range(40):
        watch = DriftWatch()
        if lessons(watch, normal(seed), 40) is None:
            delays.append(lessons(watch, normal(seed + 1000, mean=0.3), 30, 1000) or 99)
    assert np.median(delays) <= 5
    assert max(delays) <= 12


def test_a_slow_drift_is_found_too() -> None:
    delays = []
    for seed in range(20):
        watch = DriftWatch()
        if lessons(watch, normal(seed), 60) is None:
            delays.append(lessons(watch, normal(seed + 1000, slope=0.001), 400, 1000) or 999)
    assert np.median(delays) < 200


def test_a_class_that_looks_more_like_itself_does_not_drift() -> None:
    watch = DriftWatch()
    assert lessons(watch, normal(1), 30) is None
    assert lessons(watch, normal(2, mean=0.95), 100, 1000) is None


def test_the_first_strange_sample_is_named_and_a_new_normal_ends_the_alarm() -> None:
    watch, before = DriftWatch(), normal(4)
    lessons(watch, before, 60)
    while (watch.of(CAT) or Drift(0.0, None, drifting=False)).score:
        lessons(watch, before, 1, 500)
    assert lessons(watch, normal(5, mean=0.2), 20, 1001) is not None
    found = watch.of(CAT)
    assert found is not None
    assert (found.since_sample, found.score >= 1) == ("s00001001", True)
    for _ in range(300):
        watch.observe(CAT, 5001, 0.2)
        watch.observe(DOG, 5002, 0.7)
    found = watch.of(CAT)
    assert found is not None
    assert (found.drifting, found.since_sample, found.score) == (False, None, 0.0)


def test_one_wild_lesson_is_no_drift() -> None:
    watch = DriftWatch()
    lessons(watch, normal(6), 50)
    assert lessons(watch, iter([-50.0]), 1, 1000) is None
    assert lessons(watch, normal(7), 30, 2000) is None


def test_a_lesson_counts_once_however_many_images_it_has() -> None:
    """Sixteen alike strange images in a row are one lesson: on their own they are no alarm."""
    watch = DriftWatch()
    lessons(watch, normal(8), 50)
    for number in range(LESSON_SAMPLES):
        watch.observe(CAT, 1000 + number, 0.1)
    watch.observe(DOG, 2000, 0.7)
    found = watch.of(CAT)
    assert found is not None
    assert not found.drifting


def test_too_few_lessons_say_nothing() -> None:
    watch = DriftWatch()
    assert watch.of(CAT) is None
    lessons(watch, normal(9), MIN_LESSONS)
    assert watch.of(CAT) is None
    lessons(watch, normal(9), 1, 100)
    assert watch.of(CAT) is not None


def test_images_that_are_all_the_same_are_no_drift_and_no_division_by_zero() -> None:
    watch = DriftWatch()
    assert lessons(watch, iter([0.5] * 500), 500) is None


def test_the_score_is_bounded_so_that_an_alarm_can_end() -> None:
    watch = DriftWatch()
    lessons(watch, normal(10), 50)
    for number in range(50):
        watch.observe(CAT, number, -3.0)
        watch.observe(DOG, number, 0.7)
    found = watch.of(CAT)
    assert found is not None
    assert 1.0 <= found.score <= 2.0
    assert ALARM > MIN_LESSONS


@pytest.mark.parametrize("at", [0, 7, 33, 61])
def test_it_goes_on_after_a_restart_as_if_there_had_been_none(at: int) -> None:
    values = normal(11)
    one, other = DriftWatch(), DriftWatch()
    for number in range(80):
        if number == at:
            other.restore(json.loads(json.dumps(one.state())))
        value, class_id = next(values), CAT if number % 7 < 5 else DOG
        one.observe(class_id, number, value)
        if number >= at:
            other.observe(class_id, number, value)
    assert other.state() == one.state()


def test_a_forgotten_class_starts_anew() -> None:
    watch = DriftWatch()
    lessons(watch, normal(12), 30)
    watch.observe(CAT, 100, 0.5)
    watch.forget_class(CAT)
    watch.observe(DOG, 101, 0.7)
    assert watch.of(CAT) is None
    assert watch.of(DOG) is not None
    lessons(watch, normal(13), MIN_LESSONS + 1, 200)
    assert watch.of(CAT) is not None
