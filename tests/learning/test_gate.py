"""The gate: a trained head takes part only where the hold-out finds it no worse than the floor."""

from __future__ import annotations

from typing import Tuple

import numpy as np
import pytest
from numpy.typing import NDArray

from latentd.learning.analytic import LinearHead
from latentd.learning.gate import DEFAULT_TEMPERATURE, MIN_HOLDOUT, TEMPERATURES, Opinion, Verdict, judge, unless_it_flips
from latentd.learning.snapshot import softmax

COUNT = 100
TRUTH = np.arange(COUNT) % 2


def floor(*, wrong: int = 0, score: float = 2.0) -> Tuple[LinearHead, NDArray[np.float32]]:
    """A floor and hold-out features (H, 3) of which it gets so many wrong. Feature 2 names the sample."""
    answers = TRUTH.copy()
    answers[:wrong] = 1 - answers[:wrong]
    some = np.stack([1 - answers, answers, np.arange(COUNT)], axis=1).astype(np.float32)
    return LinearHead((4, 9), np.array([[score, 0.0], [0.0, score], [0.0, 0.0]], np.float32), np.zeros(2, np.float32)), some


def opinion(*, wrong_on: Tuple[int, ...], count: int = COUNT) -> Opinion:
    """Given answers, sure of each."""
    answers = TRUTH.copy()
    answers[list(wrong_on)] = 1 - answers[list(wrong_on)]
    return Opinion((4, 9), 20.0 * np.eye(2, dtype=np.float32)[answers[:count]])


def test_a_better_head_takes_part() -> None:
    analytic, some = floor(wrong=20)
    verdict = judge(analytic, opinion(wrong_on=()), some, TRUTH)
    assert verdict.weight > 0
    assert verdict.reason.startswith("takes part")
    assert (verdict.holdout, verdict.floor_correct, verdict.candidate_correct, verdict.negative_flips) == (COUNT, 80, 100, 0)
    np.testing.assert_array_equal(verdict.answers, TRUTH)


def test_a_worse_head_is_kept_out_and_the_floor_answers() -> None:
    analytic, some = floor(score=0.1)
    verdict = judge(analytic, opinion(wrong_on=tuple(range(60))), some, TRUTH)
    assert (verdict.weight, verdict.floor_correct, verdict.candidate_correct, verdict.negative_flips) == (0.0, 100, 40, 60)
    np.testing.assert_array_equal(verdict.answers, TRUTH)


def test_a_head_that_repairs_much_and_breaks_a_little_too_much_is_kept_out() -> None:
    analytic, some = floor(wrong=30)
    verdict = judge(analytic, opinion(wrong_on=(97, 98, 99)), some, TRUTH)
    assert (verdict.candidate_correct, verdict.negative_flips, verdict.positive_flips, verdict.flips_allowed) == (97, 3, 30, 2)
    assert verdict.weight == 0.0
    assert verdict.reason == "kept out: hold-out 97 against 70 right of 100, 3 negative flips"
    assert (verdict.answers == TRUTH).sum() == 70


@pytest.mark.parametrize(("gained", "let_in"), [(5, False), (6, True)])
def test_the_hold_out_is_asked_so_often_that_five_in_a_row_may_be_luck(gained: int, let_in: bool) -> None:
    analytic, some = floor(wrong=gained)
    verdict = judge(analytic, opinion(wrong_on=()), some, TRUTH)
    assert (verdict.positive_flips, verdict.negative_flips, verdict.weight > 0) == (gained, 0, let_in)


def test_a_gain_that_chance_may_have_given_lets_nobody_in() -> None:
    analytic, some = floor(wrong=2)
    verdict = judge(analytic, opinion(wrong_on=()), some, TRUTH)
    assert (verdict.weight, verdict.reason) == (0.0, "kept out: hold-out 100 against 98 right of 100, 0 negative flips")
    assert (verdict.answers == TRUTH).sum() == 98


def test_two_in_a_hundred_may_flip() -> None:
    analytic, some = floor(wrong=30)
    assert judge(analytic, opinion(wrong_on=(98, 99)), some, TRUTH).weight > 0


@pytest.mark.parametrize("count", [0, 1, MIN_HOLDOUT - 1])
def test_too_small_a_hold_out_lets_nobody_in(count: int) -> None:
    analytic, some = floor(wrong=10)
    verdict = judge(analytic, opinion(wrong_on=(), count=count), some[:count], TRUTH[:count])
    assert (verdict.weight, verdict.temperature, verdict.holdout) == (0.0, DEFAULT_TEMPERATURE, count)
    assert "too few" in verdict.reason
    assert len(verdict.answers) == count


def test_without_a_head_there_is_nothing_to_judge() -> None:
    analytic, some = floor(wrong=10)
    verdict = judge(analytic, None, some, TRUTH)
    assert (verdict.weight, verdict.reason, verdict.floor_correct) == (0.0, "nothing trained yet", 90)


def test_a_floor_without_classes_is_no_error() -> None:
    nothing = LinearHead((), np.zeros((3, 0), np.float32), np.zeros(0, np.float32))
    verdict = judge(nothing, None, np.zeros((0, 3), np.float32), np.zeros(0, np.int64))
    assert (verdict.weight, verdict.holdout) == (0.0, 0)


def test_the_temperature_makes_a_floor_that_errs_less_sure() -> None:
    analytic, some = floor(wrong=30)
    calm, sure = judge(analytic, None, some, TRUTH), judge(analytic, None, floor()[1], TRUTH)
    assert calm.temperature > sure.temperature
    mean = softmax((some @ analytic.weight) / calm.temperature).max(axis=1).mean()
    assert mean == pytest.approx(0.7, abs=0.1)


def test_without_a_hold_out_far_apart_classes_do_not_make_it_certain() -> None:
    head = LinearHead((0, 1), np.eye(3, 2, dtype=np.float32) * 1000, np.zeros(2, np.float32), separation=2000.0)
    verdict = judge(head, None, np.zeros((0, 3), np.float32), np.zeros(0, np.int64))
    assert verdict.temperature == pytest.approx(2000.0 / 2 / 8.0)


def test_an_opinion_that_is_too_sure_of_itself_is_cooled_before_it_is_weighed() -> None:
    analytic, some = floor(wrong=40)
    shouting = opinion(wrong_on=tuple(range(40)))  # where the floor errs too
    verdict = judge(analytic, shouting._replace(temperatures=TEMPERATURES), some, TRUTH)
    assert verdict.opinion_temperature > 1.0
    assert judge(analytic, shouting, some, TRUTH).opinion_temperature == 1.0


def found_elsewhere() -> Verdict:
    """A verdict on other samples, by which the candidate takes part."""
    analytic, some = floor(wrong=20)
    return judge(analytic, opinion(wrong_on=()), some, TRUTH)


def test_what_is_better_elsewhere_takes_part_while_it_flips_little_on_the_hold_out() -> None:
    analytic, some = floor(wrong=10, score=0.1)
    found = unless_it_flips(found_elsewhere(), analytic, opinion(wrong_on=(98, 99)), some, TRUTH)
    assert (found.weight, found.reason) == (found_elsewhere().weight, found_elsewhere().reason)
    assert (found.answers != TRUTH).nonzero()[0].tolist() == [98, 99]


def test_what_is_better_elsewhere_is_kept_out_where_it_flips_too_much_on_the_hold_out() -> None:
    analytic, some = floor(wrong=10, score=0.1)
    found = unless_it_flips(found_elsewhere(), analytic, opinion(wrong_on=(97, 98, 99)), some, TRUTH)
    assert (found.weight, found.reason) == (0.0, "kept out: hold-out 97 against 90 right of 100, 3 negative flips")
    assert (found.holdout, found.floor_correct, found.candidate_correct) == (100, 90, 97)
    assert (found.negative_flips, found.positive_flips, found.flips_allowed) == (3, 10, 2)
    assert (found.answers == TRUTH).sum() == 90
