"""What the learner tells of the samples whose label looks wrong."""

from __future__ import annotations

import pytest

from latentd.learning.status import MemoryStatus

IDS = tuple(f"s{number:08d}" for number in (2, 3, 5, 8))


def status(*doubted: str) -> MemoryStatus:
    return MemoryStatus(100, 1, 40, 4000, 0, "int8 token", 0, {}, doubted)


def test_every_doubted_sample_is_known_and_no_other() -> None:
    asked = [f"s{number:08d}" for number in range(10)]
    assert [sample_id for sample_id in asked if status(*IDS).doubts(sample_id)] == list(IDS)
    assert not any(status().doubts(sample_id) for sample_id in asked)


@pytest.mark.parametrize(
    ("after", "count", "found", "more"),
    [("", 2, IDS[:2], True), (IDS[1], 2, IDS[2:], False), ("s00000004", 1, IDS[2:3], True), (IDS[3], 5, (), False), ("", 4, IDS, False)],
)
def test_doubted_samples_come_in_pages_that_begin_beyond_the_last(after: str, count: int, found: object, more: bool) -> None:
    assert status(*IDS).doubted_after(after, count) == (found, more)
