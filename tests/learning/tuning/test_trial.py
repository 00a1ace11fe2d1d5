from __future__ import annotations

from collections import Counter

import numpy as np

from latentd.learning.tuning.trial import answers, divide, fitted, spans, thinned


def ids(**counts: int) -> np.ndarray:
    return np.concatenate([np.full(count, int(name[1:]), np.int64) for name, count in counts.items()])


def test_a_quarter_of_each_class_is_asked_and_the_rest_is_taught() -> None:
    class_ids = ids(c3=40, c8=100)
    division = divide(class_ids)
    assert Counter(class_ids[division.asked].tolist()) == {3: 10, 8: 25}
    assert sorted([*division.asked, *division.taught]) == list(range(140))
    assert division.classes == 2


def test_at_least_five_of_a_class_are_asked_and_a_class_below_ten_takes_no_part() -> None:
    class_ids = ids(c0=10, c1=9)
    division = divide(class_ids)
    assert Counter(class_ids[division.asked].tolist()) == {0: 5}
    assert Counter(class_ids[division.taught].tolist()) == {0: 5}
    assert division.classes == 1


def test_no_samples_divide_into_none() -> None:
    division = divide(np.zeros(0, np.int64))
    assert (len(division.taught), len(division.asked), division.classes) == (0, 0, 0)


def test_thinning_takes_evenly_of_the_classes_and_all_of_a_small_one() -> None:
    class_ids = ids(c0=100, c1=5, c2=100)
    assert Counter(class_ids[thinned(class_ids, 45)].tolist()) == {0: 20, 1: 5, 2: 20}
    assert thinned(class_ids, 1000).tolist() == list(range(205))


def test_the_head_is_asked_question_by_question() -> None:
    rng = np.random.default_rng(0)
    class_ids = np.repeat(np.array([4, 9]), 30)
    features = (rng.standard_normal((60, 6)) + 8 * (class_ids == 9)[:, None]).astype(np.float32)
    head = fitted(features, class_ids)
    wrong_once = class_ids.copy()
    wrong_once[0] = 9
    found = answers(head, features, wrong_once)
    assert (found.score.correct, found.score.count) == (59, 60)
    assert found.right == (False, *[True] * 59)


def test_spans_cover_everything_once() -> None:
    assert [(span.start, span.stop) for span in spans(7, 3)] == [(0, 3), (3, 6), (6, 7)]
    assert list(spans(0, 3)) == []
