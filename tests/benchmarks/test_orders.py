"""The orders of NICv2 on Objects-50, against the counts of the official lists."""

from __future__ import annotations

from typing import List, Set

import pytest

import objects50
import orders

TRAINING = [session for session in objects50.SESSIONS if session not in objects50.TEST_SESSIONS]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("protocol", [79, 196, 391])
@pytest.mark.parametrize("run", [0, 4])
def test_a_stream_has_as_many_batches_as_its_name_says_and_every_video_once(protocol: int, run: int, late: bool) -> None:
    batches = orders.stream(protocol, run, TRAINING, late)
    videos = [video for batch in batches for video in batch]
    assert len(batches) == protocol
    assert sorted(videos) == sorted((thing, session) for thing in range(50) for session in TRAINING)
    assert {len(batch) for batch in batches[1:]} == {orders.VIDEOS_A_BATCH[protocol]}


@pytest.mark.parametrize("protocol", [79, 196, 391])
def test_batch_0_is_the_first_object_of_each_category_in_session_1(protocol: int) -> None:
    assert orders.stream(protocol, 3, TRAINING)[0] == [(thing, 1) for thing in range(0, 50, 5)]


def classes_a_batch(protocol: int, late: bool = False) -> List[int]:
    return [len({thing for thing, _ in batch}) for run in range(5) for batch in orders.stream(protocol, run, TRAINING, late)[1:]]


def test_a_batch_has_as_many_classes_as_in_the_official_lists() -> None:
    assert set(classes_a_batch(391)) == {1}
    assert set(classes_a_batch(196)) == {1, 2}
    assert set(classes_a_batch(79)) <= {2, 3, 4, 5}
    assert sum(count >= 4 for count in classes_a_batch(79)) > 0.9 * len(classes_a_batch(79))


def test_the_protocols_of_a_run_are_one_sequence_cut_differently() -> None:
    flat = [[video for batch in orders.stream(protocol, 2, TRAINING) for video in batch] for protocol in (79, 196, 391)]
    assert flat[0] == flat[1] == flat[2]
    assert flat[0] != [video for batch in orders.stream(391, 3, TRAINING) for video in batch]


def last_arrival(protocol: int, run: int, late: bool) -> int:
    """The batch in which the last class is there for the first time."""
    seen: Set[int] = set()
    last = 0
    for index, batch in enumerate(orders.stream(protocol, run, TRAINING, late)):
        new = {thing for thing, _ in batch} - seen
        last, seen = (index, seen | new) if new else (last, seen)
    assert len(seen) == 50
    return last


@pytest.mark.parametrize("run", range(5))
def test_late_classes_arrive_as_late_as_in_the_official_lists(run: int) -> None:
    # The 50th class first appears in batches 66-68, 151-165 and 321-340 of the ten official runs.
    assert 60 <= last_arrival(79, run, late=True) <= 72
    assert 150 <= last_arrival(196, run, late=True) <= 175
    assert 310 <= last_arrival(391, run, late=True) <= 345
    assert last_arrival(391, run, late=False) < 250
