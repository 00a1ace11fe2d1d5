from __future__ import annotations

from typing import Iterator

import pytest

from latentd.energy.joulemeter import Joulemeter
from latentd.energy.meters import Choice
from latentd.learning.tuning.stopwatch import Stopwatch, Timing

NO_METER = Joulemeter(Choice(None, {}), period_s=0.2, gap_s=2.0)


class Clock:
    """Work takes these seconds, one after the other."""

    def __init__(self, *seconds: float) -> None:
        self._seconds: Iterator[float] = iter(seconds)
        self.now_s = 0.0
        self.done = 0

    def __call__(self) -> float:
        return self.now_s

    def work(self) -> None:
        self.done += 1
        self.now_s += next(self._seconds)


def test_the_first_run_warms_up_and_the_median_of_the_others_counts() -> None:
    clock = Clock(50.0, 1.0, 9.0, 2.0)
    assert Stopwatch(5.0, NO_METER, clock).time(clock.work) == Timing(2.0, 3, None)


def test_work_is_repeated_until_the_box_is_full() -> None:
    clock = Clock(*[1.0] * 20)
    assert Stopwatch(10.0, NO_METER, clock).time(clock.work).repetitions == 10


def test_work_that_is_longer_than_the_box_is_still_done_three_times() -> None:
    clock = Clock(*[60.0] * 10)
    assert Stopwatch(1.0, NO_METER, clock).time(clock.work).repetitions == 3
    assert clock.done == 4


def test_joules_are_power_times_time_and_unknown_without_a_meter() -> None:
    assert Timing(0.5, 3, 8.0).energy_j == pytest.approx(4.0)
    assert Timing(0.5, 3, None).energy_j is None
