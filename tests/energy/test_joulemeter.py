from __future__ import annotations

import threading
from pathlib import Path
from typing import Callable, Iterator, List, Optional, Sequence

import pytest

from latentd.config import EnergyConfig
from latentd.energy.joulemeter import Joulemeter
from latentd.energy.meters import Choice, Reading
from latentd.errors import ConfigError, MeterUnavailable

WAIT_S = 10.0  # nothing here takes that long; it bounds a test that fails


class Scripted:
    """A meter that gives these readings, one a read, then the last one again; `read_out` is set when all were given."""

    source, scope = "scripted", "the whole imagined device"

    def __init__(self, readings: Sequence[Optional[Reading]], fails: str = "") -> None:
        self._left: List[Optional[Reading]] = list(readings)
        self._last = readings[-1] if readings else None
        self._fails = fails
        self.read_out = threading.Event()
        self.closed = False
        self.now_s = 0.0

    def read(self) -> Optional[Reading]:
        if self._left:
            self._last = self._left.pop(0)
        elif self._fails:
            self.read_out.set()
            raise MeterUnavailable(self._fails)
        if not self._left and not self._fails:
            self.read_out.set()
        self.now_s = self._last.at_s if self._last is not None else self.now_s
        return self._last

    def close(self) -> None:
        self.closed = True


def reading(at_s: float, power_w: Optional[float] = None, energy_j: Optional[float] = None) -> Reading:
    return Reading("scripted", "measured", at_s, power_w, energy_j)


def joulemeter(meter: Scripted, gap_s: float = 60.0, clock: Optional[Callable[[], float]] = None) -> Joulemeter:
    return Joulemeter(Choice(meter, {}), period_s=0.001, gap_s=gap_s, clock=clock or (lambda: meter.now_s))


def measured(meter: Scripted, **options: object) -> Iterator[object]:
    found = joulemeter(meter, **options)  # type: ignore[arg-type]
    with found.stretch() as stretch:
        assert meter.read_out.wait(WAIT_S)
    yield from (stretch.power_w, stretch.reason, found.quality)


def test_the_power_of_a_counter_is_its_difference_over_the_time() -> None:
    power_w, reason, quality = measured(Scripted([reading(at, energy_j=100 + 7 * at) for at in (0.0, 1.0, 3.0, 4.0)]))
    assert power_w == pytest.approx(7.0)
    assert (reason, quality) == ("", "measured")


def test_the_power_of_watts_is_their_mean_over_the_time() -> None:
    power_w, _, _ = measured(Scripted([reading(0.0, power_w=2.0), reading(1.0, power_w=4.0), reading(3.0, power_w=4.0)]))
    assert power_w == pytest.approx((3.0 * 1 + 4.0 * 2) / 3)


def test_a_meter_without_news_is_passed_over() -> None:
    power_w, _, _ = measured(Scripted([reading(0.0, energy_j=0.0), None, reading(2.0, energy_j=10.0)]))
    assert power_w == pytest.approx(5.0)


def test_a_meter_that_fails_in_the_middle_gives_no_power_and_the_reason() -> None:
    power_w, reason, _ = measured(Scripted([reading(0.0, energy_j=0.0), reading(5.0, energy_j=9.0)], fails="the sensor fell off"))
    assert (power_w, reason) == (None, "the sensor fell off")


def test_readings_that_cover_less_than_half_of_the_work_give_no_power() -> None:
    times = iter((0.0, 100.0))
    power_w, reason, _ = measured(Scripted([reading(0.0, energy_j=0.0), reading(10.0, energy_j=50.0)]), clock=lambda: next(times))
    assert power_w is None
    assert reason == "readings cover 10.0 of 100.0 seconds, which is too little"


def test_a_gap_between_readings_is_not_bridged() -> None:
    readings = [reading(0.0, energy_j=0.0), reading(50.0, energy_j=5000.0), reading(80.0, energy_j=5090.0), reading(110.0, energy_j=5180.0)]
    power_w, _, _ = measured(Scripted(readings), gap_s=40.0)
    assert power_w == pytest.approx(3.0)


def test_work_that_is_over_at_once_has_no_power() -> None:
    power_w, reason, _ = measured(Scripted([reading(0.0, energy_j=0.0), reading(0.1, energy_j=1.0)]))
    assert power_w is None
    assert "too little" in str(reason)


def test_an_error_in_the_work_passes_through() -> None:
    meter = joulemeter(Scripted([reading(0.0, energy_j=0.0)]))
    with pytest.raises(ZeroDivisionError), meter.stretch():
        raise ZeroDivisionError


def test_without_a_meter_the_reasons_are_told_and_nothing_is_measured(tmp_path: Path) -> None:
    meter = Joulemeter.from_config(EnergyConfig(meters=("ina3221", "rapl")), root=tmp_path)
    assert meter.source is None
    assert "INA3221" in str(meter.reason)
    assert "RAPL" in str(meter.reason)
    with meter.stretch() as stretch:
        pass
    assert (stretch.power_w, stretch.reason) == (None, meter.reason)
    meter.measure_idle(wait=lambda seconds: pytest.fail("there is nothing to wait for"))
    assert meter.idle_power_w is None
    meter.close()


def test_the_idle_power_is_that_of_doing_nothing() -> None:
    script = Scripted([reading(at, power_w=3.0) for at in (0.0, 1.0, 2.0)])
    meter = joulemeter(script)
    meter.measure_idle(wait=lambda seconds: script.read_out.wait(WAIT_S))
    assert meter.idle_power_w == pytest.approx(3.0)
    meter.close()
    assert script.closed


def test_a_meter_of_an_unknown_name_is_an_error_of_the_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="wattson"):
        Joulemeter.from_config(EnergyConfig(meters=("wattson",)), root=tmp_path)
