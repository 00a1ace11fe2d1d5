from __future__ import annotations

from typing import Optional

import pytest

from latentd.energy.integral import IDLE_LEAST_S, IdlePower, Integral, Point


def steps(*points: Point, gap_s: float = 2.0) -> list[Optional[float]]:
    integral = Integral()
    return [integral.step(point, gap_s) for point in points]


def test_powers_are_integrated_by_trapezoid() -> None:
    assert steps(Point(0, 2.0, None), Point(1, 4.0, None), Point(1.5, 4.0, None)) == [None, 3.0, 2.0]


def test_counters_are_integrated_by_difference() -> None:
    assert steps(Point(0, None, 100.0), Point(1, None, 107.5)) == [None, 7.5]


def test_a_longer_time_than_the_gap_is_not_bridged_and_the_next_one_counts_again() -> None:
    assert steps(Point(0, 1.0, None), Point(2.1, 1.0, None), Point(3.1, 1.0, None)) == [None, None, 1.0]


def test_a_counter_that_was_set_back_starts_anew() -> None:
    assert steps(Point(0, None, 100.0), Point(1, None, 3.0), Point(2, None, 4.0)) == [None, None, 1.0]


@pytest.mark.parametrize("energy_j", [1e6, float("nan"), float("inf")])
def test_a_jump_that_no_machine_can_draw_is_not_energy(energy_j: float) -> None:
    assert steps(Point(0, None, 0.0), Point(1, None, energy_j))[1] is None


def test_a_power_after_a_counter_is_not_bridged() -> None:
    assert steps(Point(0, None, 1.0), Point(1, 5.0, None)) == [None, None]


def test_idle_power_is_unknown_until_enough_idle_time_was_seen() -> None:
    idle = IdlePower()
    idle.add(4.0, 1.0)
    assert idle.power_w is None
    for _ in range(int(IDLE_LEAST_S) + 1):
        idle.add(4.0, 1.0)
    assert idle.power_w == pytest.approx(4.0)


def test_idle_power_forgets_the_load_of_starting_up() -> None:
    idle = IdlePower()
    for _ in range(30):
        idle.add(15.0, 1.0)
    for _ in range(3600):
        idle.add(3.0, 1.0)
    assert idle.power_w == pytest.approx(3.0, rel=0.01)
