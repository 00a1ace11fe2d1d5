"""What both heads said of images before they were learned, and what the gate makes of it."""

from __future__ import annotations

from typing import List, Tuple

import numpy as np
import pytest
from numpy.typing import NDArray

from latentd.learning.analytic import LinearHead
from latentd.learning.evidence import KEPT, Evidence
from latentd.learning.gate import TEMPERATURES, Opinion, Verdict, decide

IDS = (4, 9)


def head(class_ids: Tuple[int, ...] = IDS) -> LinearHead:
    """Answers the class whose feature is largest."""
    count = len(class_ids)
    return LinearHead(class_ids, np.eye(count, dtype=np.float32), np.zeros(count, np.float32))


def said(truth: List[int], right: List[bool]) -> NDArray[np.float32]:
    """Features by which `head` is right where it should be."""
    columns = [IDS.index(class_id) if good else 1 - IDS.index(class_id) for class_id, good in zip(truth, right)]
    return 4 * np.eye(2, dtype=np.float32)[columns]


def videos(floor: List[bool], own: List[bool], frames: int = 10) -> Evidence:
    """One request a video; in all frames of one, a head is right or it is not."""
    evidence = Evidence()
    for number, (one, other) in enumerate(zip(floor, own)):
        truth = [IDS[number % 2]] * frames
        evidence.record(number, truth, (head(), said(truth, [one] * frames)), (head(), said(truth, [other] * frames)))
    return evidence


def verdict(evidence: Evidence) -> Verdict:
    table = evidence.table(IDS)
    return decide(IDS, table.floor, Opinion(IDS, table.own, TEMPERATURES), table.columns, table.groups, "before learning")


def test_a_head_that_is_better_on_many_requests_takes_part() -> None:
    found = verdict(videos([True] * 6 + [False] * 4, [True] * 10))
    assert found.weight > 0
    assert found.reason == "takes part: before learning 100 against 60 right of 100, 0 negative flips"


def test_the_frames_of_two_videos_are_two_throws_of_the_coin() -> None:
    found = verdict(videos([True] * 8 + [False] * 2, [True] * 10))
    assert (found.weight, found.floor_correct, found.candidate_correct) == (0.0, 80, 100)


def test_one_flip_for_two_gains_is_borne_and_more_are_not() -> None:
    good = [False] * 20 + [True] * 6
    assert verdict(videos(good, [True] * 20 + [False] * 6)).weight > 0
    good = [False] * 20 + [True] * 11
    assert verdict(videos(good, [True] * 20 + [False] * 11)).weight == 0.0


def test_a_class_that_one_of_the_heads_does_not_know_says_nothing() -> None:
    evidence = Evidence()
    evidence.record(0, [4, 9], (head(), np.eye(2, dtype=np.float32)), (head((4,)), np.ones((2, 1), np.float32)))
    table = evidence.table(IDS)
    assert table.columns.tolist() == [0]
    assert table.own[0, 1] < -1e8, "the class that it does not know has no chance"


def test_classes_that_came_later_have_no_chance_in_what_was_said_before() -> None:
    table = videos([True], [True], frames=1).table((9, 4, 11))
    assert table.columns.tolist() == [1]
    assert table.floor[0].tolist() == [0.0, 4.0, pytest.approx(-1e9)]


def test_samples_of_a_class_that_was_forgotten_are_left_out() -> None:
    assert videos([True, True], [True, True], frames=3).table((9,)).columns.tolist() == [0, 0, 0]


def test_only_the_last_samples_count() -> None:
    assert len(videos([True] * 150, [True] * 150)) == KEPT


def test_it_comes_back_from_a_checkpoint() -> None:
    evidence, other = videos([True, False], [False, True], frames=3), Evidence()
    other.restore(evidence.state())
    for mine, theirs in zip(evidence.table(IDS), other.table(IDS)):
        np.testing.assert_array_equal(mine, theirs)


def test_a_checkpoint_of_before_there_was_evidence_is_read() -> None:
    evidence = videos([True], [True])
    evidence.restore({})
    assert len(evidence) == 0
    evidence.restore(Evidence().state())
    assert len(evidence) == 0
