"""Hours left on a battery, from what the ledger counted: known only where power and work are."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from latentd.energy import battery
from latentd.energy.ledger import EnergyLedger
from latentd.energy.meters.reading import Reading

if TYPE_CHECKING:
    from energy.conftest import Break, Clock, Plant


def counted(clock: Clock, wall: float = 1.8e9) -> EnergyLedger:
    """Ten minutes at 5 W, in which a second at 9 W taught 21 samples each minute."""
    ledger = EnergyLedger(clock=clock, wall=lambda: wall + clock.now_s)
    ledger.serving("ina3221", "everything", {})

    def pass_second(power_w: float) -> None:
        for _ in range(5):
            ledger.add(Reading("ina3221", "measured", clock.now_s, power_w=power_w))
            clock.now_s += 0.2

    for _ in range(10):
        with ledger.activity("learn", samples=21):
            pass_second(9.0)
        for _ in range(59):
            pass_second(5.0)
    return ledger


def test_hours_left_are_the_charge_over_the_mean_power_of_the_recent_time(clock: Clock) -> None:
    ledger = counted(clock)
    found = battery.estimate(50.0, 0.5, ledger.recent(1800.0), ledger.report(), 21)
    assert found is not None
    assert found.power_w == pytest.approx(5.0 + 4.0 / 60, rel=0.01)
    assert found.samples_per_hour == pytest.approx(21 * 60, rel=0.03)
    assert found.hours_left == pytest.approx(25.0 / 5.067, rel=0.01)
    assert found.reason is None


def test_what_is_learned_while_no_meter_reads_does_not_raise_the_rate(clock: Clock) -> None:
    ledger = counted(clock)
    ledger.unavailable("tegrastats ended", {})
    clock.now_s += 10.0
    with ledger.activity("learn", samples=5000):
        clock.now_s += 600.0
    clock.now_s += 10.0
    ledger.serving("ina3221", "everything", {})
    for _ in range(50):
        ledger.add(Reading("ina3221", "measured", clock.now_s, power_w=5.0))
        clock.now_s += 0.2
    recent = ledger.recent(1800.0)
    assert (recent.activities["learn"].count, recent.gaps) == (5210, 1)
    found = battery.estimate(50.0, None, recent, ledger.report(), 21)
    assert found is not None
    assert found.samples_per_hour == pytest.approx(21 * 60, rel=0.03)
    assert found.power_w == pytest.approx(5.0 + 4.0 / 60, rel=0.01)


def test_at_a_mini_batch_a_minute_idle_power_and_the_joules_of_that_batch_count(clock: Clock) -> None:
    ledger = counted(clock)
    found = battery.estimate(50.0, None, ledger.recent(1800.0), ledger.report(), 21)
    assert found is not None
    assert found.hours_at_a_minibatch_a_minute == pytest.approx(50.0 / (5.0 + 4.0 / 60), rel=0.02)
    assert found.charge_ratio is None
    assert found.hours_left == pytest.approx(50.0 / 5.067, rel=0.01)


def test_a_clock_that_jumps_changes_no_rate(clock: Clock) -> None:
    wall = [0.0]
    ledger = EnergyLedger(clock=clock, wall=lambda: wall[0] + clock.now_s)
    ledger.serving("ina3221", "everything", {})
    for _ in range(1000):
        ledger.add(Reading("ina3221", "measured", clock.now_s, power_w=5.0))
        clock.now_s += 0.2
        wall[0] = 1.8e9 if clock.now_s > 1100 else 0.0
    recent = ledger.recent(1800.0)
    assert recent.covered_s == pytest.approx(200.0, abs=0.5)
    assert recent.energy_j == pytest.approx(1000.0, abs=3.0)


def test_without_readings_it_says_why_and_gives_no_figure(clock: Clock) -> None:
    ledger = EnergyLedger(clock=clock)
    found = battery.estimate(50.0, 0.9, ledger.recent(1800.0), ledger.report(), 21)
    assert found is not None
    assert (found.power_w, found.hours_left, found.samples_per_hour, found.hours_at_a_minibatch_a_minute) == (None, None, None, None)
    assert found.reason == "no reading yet"


def test_a_device_on_the_mains_has_no_battery(clock: Clock) -> None:
    ledger = EnergyLedger(clock=clock)
    assert battery.estimate(0.0, None, ledger.recent(60.0), ledger.report(), 21) is None


def test_the_charge_is_that_of_the_boards_battery_and_not_of_a_mouse(plant: Plant, break_file: Break) -> None:
    supplies = "sys/class/power_supply"
    root = plant(
        {
            f"{supplies}/AC/type": "Mains",
            f"{supplies}/BAT0/type": "Battery",
            f"{supplies}/BAT0/capacity": 73,
            f"{supplies}/A-mouse/type": "Battery",
            f"{supplies}/A-mouse/scope": "Device",
            f"{supplies}/A-mouse/capacity": 5,
        }
    )
    assert battery.charge_ratio(root) == 0.73
    break_file(root / supplies / "BAT0/capacity", errno.ENODEV)
    assert battery.charge_ratio(root) is None
