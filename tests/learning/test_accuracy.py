"""How good it is: counts first, a ratio only where something was counted, and an interval that means what it says."""

from __future__ import annotations

import json
import math
from typing import Tuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentd.learning.accuracy import EMPTY, RECENT, Prequential, Score, report


def test_where_nothing_was_counted_nothing_is_claimed() -> None:
    assert (Score(0, 0).ratio, Score(0, 0).low, Score(0, 0).high) == (None, None, None)
    assert (EMPTY.prequential.ratio, EMPTY.holdout.ratio) == (None, None)


@pytest.mark.parametrize(
    ("correct", "count", "low", "high"),
    [(81, 100, 0.7222, 0.8749), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (1, 1, 0.2065, 1.0), (500, 1000, 0.4691, 0.5309)],
)
def test_the_interval_is_wilsons(correct: int, count: int, low: float, high: float) -> None:
    assert Score(correct, count).low == pytest.approx(low, abs=5e-5)
    assert Score(correct, count).high == pytest.approx(high, abs=5e-5)


@settings(deadline=None)
@given(st.integers(1, 10**6).flatmap(lambda count: st.tuples(st.integers(0, count), st.just(count))))
def test_the_interval_holds_the_ratio_and_stays_between_zero_and_one(pair: Tuple[int, int]) -> None:
    score = Score(*pair)
    assert score.low is not None
    assert score.high is not None
    assert score.ratio is not None
    assert 0.0 <= score.low <= score.ratio + 1e-12
    assert score.ratio - 1e-12 <= score.high <= 1.0


def test_tallies_are_kept_by_class_and_for_the_last_few_hundred() -> None:
    tally = Prequential()
    for number in range(RECENT + 100):
        tally.record(number % 2, correct=number >= 100)
    assert tally.total() == Score(RECENT, RECENT + 100)
    assert tally.recent() == Score(RECENT, RECENT)
    assert tally.of(0) == Score(RECENT // 2, RECENT // 2 + 50)
    assert tally.of(7) == Score(0, 0)
    tally.forget_class(0)
    tally.forget_class(7)
    assert tally.total() == Score(RECENT // 2, RECENT // 2 + 50)


def test_tallies_come_back_through_json() -> None:
    tally, other = Prequential(), Prequential()
    for number in range(30):
        tally.record(number % 3, correct=bool(number % 2))
    other.restore(json.loads(json.dumps(tally.state())))
    for both in (tally, other):
        both.record(1, correct=True)
    assert (other.total(), other.recent(), other.of(1)) == (tally.total(), tally.recent(), tally.of(1))
    assert math.isclose(other.total().ratio or 0.0, 16 / 31)


def test_the_report_counts_the_hold_out_by_class_and_confusion() -> None:
    tally = Prequential()
    tally.record(1, correct=True)
    found = report({0: "cat", 1: "dog", 2: "owl"}, tally, [0, 0, 1, 1], [0, 1, 1, 2])
    assert found.holdout == Score(2, 4)
    assert found.prequential == found.prequential_recent == Score(1, 1)
    assert [(one.name, one.prequential, one.holdout) for one in found.per_class] == [
        ("cat", Score(0, 0), Score(1, 2)),
        ("dog", Score(1, 1), Score(1, 2)),
        ("owl", Score(0, 0), Score(0, 0)),
    ]
    assert found.confusion == {"cat": {"cat": 1, "dog": 1}, "dog": {"dog": 1, "owl": 1}}
