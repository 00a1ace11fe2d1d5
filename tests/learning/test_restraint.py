"""What holds the learner back, and when it may go on: limits with some distance, unknown figures that hold nothing."""

from __future__ import annotations

from typing import Dict, Mapping, Optional, Tuple

import pytest

from latentd.headroom import Headroom
from latentd.learning.restraint import APART_S, CALM_S, LEARN, LOOK_S, SLEEP, Limits, Restraint, Senses

MIB = 1 << 20


class Device:
    """A board whose figures a test sets; asking again takes time."""

    def __init__(self, **limits: float) -> None:
        self.now_s = 0.0
        self.power_w: Optional[float] = 4.0
        self.temperatures_c: Dict[str, Optional[float]] = {"CPU-therm": 50.0, "GPU-therm": None}
        self.limits_c: Dict[str, float] = {}
        self.throttled: Mapping[str, Tuple[str, ...]] = {}
        self.available: Optional[int] = 4000 * MIB
        self.total = 6800 * MIB
        self.building: Optional[str] = None
        self.looks = 0
        senses = Senses(
            power_w=lambda: self.power_w,
            temperatures_c=lambda: self.temperatures_c,
            limits_c=lambda: self.limits_c,
            throttled=lambda: self.throttled,
            headroom=self._headroom,
            building=lambda: self.building,
        )
        needs = {LEARN: 50 * MIB, SLEEP: 600 * MIB}
        usual = Limits(limits.get("budget_w", 0.0), limits.get("max_temperature_c", 0.0), 400 * MIB, needs)
        self.restraint = Restraint(usual, senses, clock=lambda: self.now_s)

    def _headroom(self) -> Headroom:
        self.looks += 1
        return Headroom(self.available, self.total)

    def cause(self, work: str = SLEEP) -> Optional[str]:
        self.now_s += LOOK_S
        reason = self.restraint(work)
        return None if reason is None else reason.cause


def test_a_board_at_ease_holds_nothing_back() -> None:
    device = Device(budget_w=10.0, max_temperature_c=85.0)
    assert (device.cause(LEARN), device.cause(SLEEP)) == (None, None)


def test_a_small_machine_keeps_an_eighth_and_learns() -> None:
    device = Device()
    device.total, device.available = 1000 * MIB, 180 * MIB
    assert device.cause(LEARN) is None
    device.available = 120 * MIB
    assert device.cause(LEARN) == "memory"


def test_power_above_the_budget_holds_until_it_is_kept_with_some_distance() -> None:
    device = Device(budget_w=10.0)
    device.power_w = 10.1
    assert (device.cause(LEARN), device.cause(SLEEP)) == ("power", "power")
    device.power_w = 9.9
    assert device.cause(LEARN) == "power"
    device.power_w = 9.4
    assert device.cause(LEARN) is None
    device.power_w = 9.9
    assert device.cause(LEARN) is None


def test_a_board_that_steadily_keeps_just_below_a_limit_learns_again_after_some_minutes() -> None:
    device = Device(budget_w=5.0, max_temperature_c=85.0)
    for name, over, just_below in (("power_w", 5.2, 4.8), ("temperatures_c", {"CPU-therm": 86.0}, {"CPU-therm": 84.0})):
        setattr(device, name, over)
        cause = device.cause()
        assert cause is not None
        setattr(device, name, just_below)
        device.now_s += CALM_S - 2 * LOOK_S
        assert device.cause() == cause
        assert device.cause() is None
        assert device.cause() is None


def test_an_excursion_begins_the_minutes_anew() -> None:
    device = Device(budget_w=5.0)
    for power_w, held in ((5.2, "power"), (4.8, "power"), (5.1, "power"), (4.8, "power"), (4.8, None)):
        device.power_w = power_w
        assert device.cause() == held
        device.now_s += 0.6 * CALM_S


def test_room_in_memory_is_not_found_by_waiting() -> None:
    device = Device()
    device.available = 900 * MIB
    assert device.cause() == "memory"
    device.now_s += 2 * CALM_S
    assert device.cause() == "memory"


def test_other_limits_count_from_the_next_look_on() -> None:
    device = Device(budget_w=10.0)
    device.power_w = 12.0
    assert device.cause() == "power"
    device.restraint.obey(Limits(15.0, 0.0, 0, {}))
    assert device.cause() is None


def test_the_reason_names_the_figure_and_the_key() -> None:
    device = Device(budget_w=10.0)
    device.power_w = 12.34
    reason = device.restraint(LEARN)
    assert reason is not None
    assert reason.text == ("12.3 W are drawn, energy.budget_w is 10 W; learning goes on below 9.5 W, or after 5 minutes below 10 W")


def test_without_a_meter_a_budget_holds_nothing_back() -> None:
    device = Device(budget_w=10.0)
    device.power_w = None
    assert device.cause() is None


def test_without_limits_no_power_and_no_heat_is_too_much() -> None:
    device = Device()
    device.power_w, device.temperatures_c = 1000.0, {"CPU-therm": 120.0}
    assert device.cause() is None


def test_the_warmest_zone_counts_and_has_to_cool_by_some_degrees() -> None:
    device = Device(max_temperature_c=85.0)
    device.temperatures_c = {"AUX-therm": 40.0, "GPU-therm": 86.0, "CPU-therm": None}
    assert device.cause(LEARN) == "temperature"
    device.temperatures_c["GPU-therm"] = 83.0
    assert device.cause(LEARN) == "temperature"
    device.temperatures_c["GPU-therm"] = 81.0
    assert device.cause(LEARN) is None


def test_without_a_number_each_zone_has_its_own_limit_or_none() -> None:
    device = Device()
    device.limits_c = {"acpitz": 95.0, "pch": 105.0}
    device.temperatures_c = {"acpitz": 94.0, "pch": 100.0, "x86_pkg_temp": 99.0}
    assert device.cause(LEARN) is None
    device.temperatures_c["acpitz"] = 96.0
    reason = device.restraint(LEARN) if device.cause(LEARN) else None
    assert reason is not None and reason.text.startswith("acpitz is at 96 °C, 95 °C are allowed there; learning goes on below 92 °C")
    device.temperatures_c["acpitz"] = 93.0
    assert device.cause(LEARN) == "temperature"
    device.temperatures_c["acpitz"] = 91.0
    assert device.cause(LEARN) is None


def test_a_number_counts_for_every_zone_instead_of_their_own_limits() -> None:
    device = Device(max_temperature_c=70.0)
    device.limits_c, device.temperatures_c = {"acpitz": 95.0}, {"acpitz": 60.0, "x86_pkg_temp": 71.0}
    assert device.cause(LEARN) == "temperature"
    device.restraint.obey(Limits(0.0, 150.0, 0, {}))
    device.temperatures_c["acpitz"] = 140.0
    assert device.cause(LEARN) is None


def test_zones_that_nobody_can_read_hold_nothing_back() -> None:
    device = Device(max_temperature_c=85.0)
    device.temperatures_c = {"GPU-therm": None}
    assert device.cause() is None


def test_the_next_sleep_has_to_find_room_again() -> None:
    device = Device()
    device.available = 1001 * MIB
    assert device.cause(SLEEP) is None
    device.available = 500 * MIB
    device.now_s += APART_S + 1
    assert device.cause(SLEEP) == "memory"


def test_a_sleep_begins_only_with_room_for_all_of_it_and_then_needs_the_reserve() -> None:
    device = Device()
    device.available = 900 * MIB
    assert (device.cause(LEARN), device.cause(SLEEP)) == (None, "memory")
    device.available = 1001 * MIB
    assert device.cause(SLEEP) is None
    device.available = 500 * MIB  # its own activations
    assert device.cause(SLEEP) is None
    device.available = 399 * MIB
    assert device.cause(SLEEP) == "memory"
    device.available = 900 * MIB
    assert device.cause(SLEEP) == "memory"


def test_memory_that_is_not_told_holds_nothing_back() -> None:
    device = Device()
    device.available = None
    assert device.cause(SLEEP) is None


@pytest.mark.parametrize(
    ("field", "value", "cause"), [("throttled", {"thermal": ("cpu at 2",)}, "throttling"), ("building", "tensorrt-fp16", "building")]
)
def test_throttling_and_building_hold_a_sleep_and_nobody_who_waits_for_an_answer(field: str, value: object, cause: str) -> None:
    device = Device()
    setattr(device, field, value)
    assert (device.cause(LEARN), device.cause(SLEEP)) == (None, cause)
    setattr(device, field, type(value)())
    assert device.cause(SLEEP) is None


def test_steps_of_a_millisecond_do_not_look_every_time() -> None:
    device = Device()
    for _ in range(100):
        device.restraint(SLEEP)
        device.now_s += LOOK_S / 50
    assert device.looks <= 3
