from __future__ import annotations

import errno
import logging
import shutil
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Callable, Dict, List, Optional, Union

import pytest

from latentd.config import EnergyConfig
from latentd.energy.board import Board
from latentd.energy.ledger import EnergyLedger
from latentd.energy.meter_thread import BETTER_S, KNOWN_S, MeterThread
from latentd.energy.meters import Choice, Reading
from latentd.errors import ConfigError, MeterUnavailable

if TYPE_CHECKING:
    from energy.conftest import Break, Clock, Plant


class FakeMeter:
    source = "ina3221"
    scope = "everything"

    def __init__(self, clock: Callable[[], float], error: Optional[Exception] = None) -> None:
        self.clock, self.error, self.is_closed = clock, error, False

    def read(self) -> Reading:
        if self.error is not None:
            raise self.error
        return Reading(self.source, "measured", self.clock(), power_w=5.0)

    def close(self) -> None:
        self.is_closed = True


class Telling(FakeMeter):
    """Says of heat and the GPU what tegrastats does."""

    def read(self) -> Reading:
        return replace(super().read(), temperatures_c={"GPU": 61.5, "CV0": None}, gpu_load_ratio=0.42)


class Bench:
    """A meter thread that is ticked by hand; `choices` are given out in turn, the last one for ever."""

    def __init__(self, clock: Clock, *choices: Choice, root: Path = Path("/nonexistent")) -> None:
        self.clock, self.choices = clock, list(choices)
        self.tries_s: List[float] = []
        self.ledger = EnergyLedger(clock=clock)
        self.thread = MeterThread(self.ledger, self._choose, root=root, period_s=0.2, clock=clock)

    def _choose(self, wait: Callable[[float], bool]) -> Choice:
        self.tries_s.append(self.clock.now_s)
        return self.choices.pop(0) if len(self.choices) > 1 else self.choices[0]

    def run(self, seconds: float) -> None:
        end_s = self.clock.now_s + seconds
        while self.clock.now_s < end_s:
            self.clock.now_s += max(self.thread.tick(), 0.001)


NONE = Choice(None, {"ina3221": "no INA3221 sensor", "rapl": "RAPL not readable (root only)"})


def test_a_chosen_meter_feeds_the_ledger_once_a_period(clock: Clock) -> None:
    bench = Bench(clock, Choice(FakeMeter(clock), {"tegrastats": "not found"}))
    assert bench.thread.tick() == pytest.approx(0.2)
    bench.run(10)
    report = bench.ledger.report()
    assert report.energy_j == pytest.approx(50.0, rel=0.05)
    assert (report.is_up, report.meter.passed_over) == (True, {"tegrastats": "not found"})


def test_without_a_meter_the_ledger_has_every_reason_and_is_asked_again_later_and_later(clock: Clock) -> None:
    bench = Bench(clock, NONE)
    bench.run(200)
    waits = [after - before for before, after in zip(bench.tries_s, bench.tries_s[1:])]
    assert waits == pytest.approx([1, 2, 4, 8, 16, 32, 60, 60], abs=0.01)
    report = bench.ledger.report()
    assert report.meter.reason == "no INA3221 sensor; RAPL not readable (root only)"
    assert report.meter.passed_over == NONE.passed_over


def test_a_missing_sensor_is_logged_once(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    Bench(clock, NONE).run(200)
    assert [record.message for record in caplog.records] == ["energy is unavailable: no INA3221 sensor; RAPL not readable (root only)"]


def test_a_meter_that_fails_is_closed_and_replaced_and_leaves_one_gap(clock: Clock) -> None:
    first, second = FakeMeter(clock), FakeMeter(clock)
    bench = Bench(clock, Choice(first, {}), NONE, Choice(second, {}))
    bench.run(10)
    first.error = MeterUnavailable("the sensor is gone")
    bench.thread.tick()
    assert first.is_closed
    assert bench.ledger.report().meter.reason == "the sensor is gone"
    bench.run(20)
    report = bench.ledger.report()
    assert (report.gaps, report.is_up) == (1, True)
    assert report.gap_s == pytest.approx(3.0, abs=0.3)


def test_a_meter_that_keeps_failing_is_tried_less_and_less_often(clock: Clock) -> None:
    bench = Bench(clock, *[Choice(FakeMeter(clock, MeterUnavailable("flaps")), {}) for _ in range(50)])
    bench.run(120)
    assert len(bench.tries_s) <= 8


def test_a_meter_that_served_for_a_minute_is_tried_again_after_a_second(clock: Clock) -> None:
    meters = [FakeMeter(clock), FakeMeter(clock), FakeMeter(clock)]
    bench = Bench(clock, NONE, NONE, NONE, *[Choice(meter, {}) for meter in meters])
    bench.run(100)
    meters[0].error = MeterUnavailable("gone")
    bench.thread.tick()
    failed_s = clock.now_s
    bench.run(2)
    assert bench.tries_s[-1] - failed_s == pytest.approx(1.0, abs=0.01)


def test_an_unforeseen_error_is_logged_once_with_its_traceback_counted_and_survived(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(clock, *[Choice(FakeMeter(clock, ZeroDivisionError("odd")), {}) for _ in range(4)], Choice(FakeMeter(clock), {}))
    with caplog.at_level(logging.ERROR):
        bench.run(30)
    assert bench.thread.errors == 4
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [ZeroDivisionError]
    assert bench.ledger.report().is_up


def test_an_error_while_choosing_is_survived_too(clock: Clock) -> None:
    ledger = EnergyLedger(clock=clock)

    def choose(wait: Callable[[float], bool]) -> Choice:
        raise ZeroDivisionError("odd")

    thread = MeterThread(ledger, choose, root=Path("/nonexistent"), period_s=0.2, clock=clock)
    assert thread.tick() == 1.0
    assert "odd" in (ledger.report().meter.reason or "")


def test_images_are_counted_soon_though_no_meter_serves(clock: Clock) -> None:
    bench = Bench(clock, NONE)
    bench.run(130)
    with bench.ledger.activity("classify", images=3):
        pass
    bench.run(5.1)
    assert bench.ledger.report().activities["classify"].count == 3


def test_temperatures_are_read_every_five_seconds_with_or_without_a_meter(clock: Clock, plant: Plant) -> None:
    zone = "sys/class/thermal/thermal_zone0"
    root = plant({f"{zone}/type": "CPU-therm", f"{zone}/temp": 40000})
    bench = Bench(clock, NONE, root=root)
    bench.thread.tick()
    assert bench.thread.temperatures_c == {"CPU-therm": 40.0}
    plant({f"{zone}/temp": 50000})
    bench.thread.tick()
    assert bench.thread.temperatures_c == {"CPU-therm": 40.0}
    bench.run(6)
    assert bench.thread.temperatures_c == {"CPU-therm": 50.0}


def test_what_the_meter_says_of_heat_and_the_gpu_counts_only_where_the_kernels_files_say_nothing(plant: Plant, clock: Clock) -> None:
    bench = Bench(clock, Choice(Telling(clock), {}), root=plant({"etc/hostname": "nx"}))
    bench.run(6)
    assert (bench.thread.temperatures_c, bench.thread.board.gpu_load_ratio) == ({"GPU": 61.5, "CV0": None}, 0.42)
    assert bench.thread.limits_c == {"GPU": 85.0, "CV0": 85.0}
    zone = "sys/class/thermal/thermal_zone0"
    plant({f"{zone}/type": "CPU-therm", f"{zone}/temp": 40000, "sys/devices/gpu.0/load": 100})
    bench.run(6)
    assert (bench.thread.temperatures_c, bench.thread.board.gpu_load_ratio) == ({"CPU-therm": 40.0}, 0.1)
    assert "GPU" not in bench.thread.limits_c


def test_what_a_meter_said_of_heat_goes_with_it(clock: Clock) -> None:
    meter = Telling(clock)
    bench = Bench(clock, Choice(meter, {}), NONE)
    bench.run(6)
    assert bench.thread.temperatures_c == {"GPU": 61.5, "CV0": None}
    meter.error = MeterUnavailable("tegrastats ended")
    bench.run(6)
    assert bench.thread.temperatures_c == {}


def test_how_warm_a_zone_may_get_is_asked_when_the_zones_change(plant: Plant, clock: Clock) -> None:
    zones = "sys/class/thermal/thermal_zone"
    root = plant({f"{zones}0/type": "a", f"{zones}0/trip_point_0_type": "critical", f"{zones}0/trip_point_0_temp": 80000})
    bench = Bench(clock, NONE, root=root)
    bench.thread.tick()
    assert bench.thread.limits_c == {"a": 75.0}
    plant({f"{zones}1/type": "b", f"{zones}1/trip_point_0_type": "hot", f"{zones}1/trip_point_0_temp": 88000})
    bench.run(6)
    assert bench.thread.limits_c == {"a": 75.0, "b": 83.0}


def test_what_a_sensor_said_before_it_hung_is_unknown_after_a_while(plant: Plant, clock: Clock) -> None:
    zone, supply, cooling = "sys/class/thermal/thermal_zone0", "sys/class/power_supply/BAT0", "sys/class/thermal/cooling_device0"
    files: Dict[str, Union[str, int]] = {f"{zone}/type": "CPU-therm", f"{zone}/temp": 99000, f"{supply}/type": "Battery"}
    more: Dict[str, Union[str, int]] = {f"{supply}/capacity": 40, f"{cooling}/type": "cpu", f"{cooling}/cur_state": 1}
    bench = Bench(clock, NONE, root=plant({**files, **more}))
    bench.thread.tick()
    clock.now_s += KNOWN_S
    found = (bench.thread.temperatures_c, bench.thread.battery_charge, bench.thread.board.throttled)
    assert found == ({"CPU-therm": 99.0}, 0.4, {"thermal": ("cpu at 1",), "over-current": None})
    clock.now_s += 1  # no tick comes: the thread hangs in a read
    assert (bench.thread.temperatures_c, bench.thread.battery_charge) == ({"CPU-therm": None}, None)
    assert bench.thread.board == Board()
    bench.thread.tick()
    assert bench.thread.temperatures_c == {"CPU-therm": 99.0}


def test_the_power_before_a_sensor_hung_is_unknown_after_a_gap(clock: Clock) -> None:
    bench = Bench(clock, Choice(FakeMeter(clock), {}))
    bench.run(5)
    assert bench.ledger.report().meter.power_w == 5.0
    clock.now_s += 2.5
    meter = bench.ledger.report().meter
    assert (bench.ledger.power_w, meter.power_w, meter.reason) == (None, None, "no reading for 3 s")


def test_stopping_is_prompt_and_gives_the_meter_back() -> None:
    was_read = threading.Event()

    class Signalling(FakeMeter):
        def read(self) -> Reading:
            was_read.set()
            return super().read()

    ledger = EnergyLedger(period_s=60.0, gap_s=120.0)
    meter = Signalling(lambda: 1.0)
    thread = MeterThread(ledger, lambda wait: Choice(meter, {}), root=Path("/nonexistent"), period_s=60.0)
    thread.start()
    assert was_read.wait(10)
    assert thread.stop(10)
    assert meter.is_closed


def test_a_thread_that_never_started_can_be_stopped(clock: Clock) -> None:
    assert Bench(clock, NONE).thread.stop()


def test_the_configuration_makes_a_thread_for_its_meters(plant: Plant, clock: Clock) -> None:
    cap = "sys/class/powercap/intel-rapl:0"
    root = plant({f"{cap}/name": "package-0", f"{cap}/energy_uj": 5, f"{cap}/max_energy_range_uj": 1000})
    ledger = EnergyLedger(clock=clock)
    MeterThread.from_config(EnergyConfig(meters=("ina3221", "rapl")), ledger, root=root, clock=clock).tick()
    assert ledger.report().meter.source == "rapl"


def test_an_unknown_meter_is_refused_before_the_thread_is_made(clock: Clock) -> None:
    with pytest.raises(ConfigError, match="wattmeter"):
        MeterThread.from_config(EnergyConfig(meters=("wattmeter",)), EnergyLedger(clock=clock), clock=clock)


def test_a_better_meter_that_comes_back_takes_over_and_is_not_asked_for_all_the_time(plant: Plant, clock: Clock) -> None:
    cap, chip = "sys/class/powercap/intel-rapl:0", "sys/bus/i2c/drivers/ina3221/7-0040/hwmon/hwmon4"
    root = plant({f"{cap}/name": "package-0", f"{cap}/energy_uj": 5, f"{cap}/max_energy_range_uj": 1000})
    ledger = EnergyLedger(clock=clock)
    thread = MeterThread.from_config(EnergyConfig(meters=("ina3221", "tegrastats", "rapl")), ledger, root=root, clock=clock)
    thread.tick()
    assert ledger.report().meter.source == "rapl"
    plant({f"{chip}/in1_label": "VDD_IN", f"{chip}/in1_input": 5000, f"{chip}/curr1_input": 1000})
    clock.now_s += BETTER_S - 1
    thread.tick()
    assert ledger.report().meter.source == "rapl"
    clock.now_s += 1
    thread.tick()
    report = ledger.report()
    assert (report.meter.source, report.meter.passed_over, report.meter.power_w) == ("ina3221", {}, 5.0)


def test_a_better_meter_that_breaks_while_it_is_tried_again_leaves_the_one_that_serves(
    plant: Plant, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def init() -> None:
        raise OSError("the driver's library is broken")

    cap = "sys/class/powercap/intel-rapl:0"
    root = plant({f"{cap}/name": "package-0", f"{cap}/energy_uj": 5, f"{cap}/max_energy_range_uj": 1000})
    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(NVMLError=KeyError, nvmlInit=init))
    ledger = EnergyLedger(clock=clock)
    thread = MeterThread.from_config(EnergyConfig(meters=("nvml", "rapl")), ledger, root=root, clock=clock)
    with caplog.at_level(logging.ERROR):
        while clock.now_s < 1000 + 2.5 * BETTER_S:
            clock.now_s += max(thread.tick(), 0.001)
    report = ledger.report()
    assert (report.is_up, report.source, report.gaps, thread.errors) == (True, "rapl", 0, 3)
    assert "nvml failed" in report.meter.passed_over["nvml"]
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [OSError]


def test_throttling_and_a_new_power_mode_are_logged_when_they_change(plant: Plant, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    cooling = "sys/class/thermal/cooling_device0"
    root = plant({"var/lib/nvpmodel/status": "pmode:0008", f"{cooling}/type": "thermal-cpufreq-0", f"{cooling}/cur_state": 0})
    bench = Bench(clock, NONE, root=root)
    with caplog.at_level(logging.INFO, "latentd.energy.meter_thread"):
        bench.run(20)
        plant({f"{cooling}/cur_state": 2})
        bench.run(20)
        plant({f"{cooling}/cur_state": 0, "var/lib/nvpmodel/status": "pmode:0003"})
        bench.run(20)
    said = [record.message for record in caplog.records if "energy" not in record.message]
    assert said == [
        "the power mode is mode 8",
        "the board slows itself down, thermal: thermal-cpufreq-0 at 2",
        "the power mode is mode 3",
        "the board runs at its full speed again",
    ]
    assert (bench.thread.board.power_mode, bench.thread.board.throttled) == ("mode 3", {"thermal": (), "over-current": None})


def test_a_cooling_device_that_can_not_be_read_any_more_is_not_logged_as_full_speed(
    plant: Plant, break_file: Break, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    cooling = "sys/class/thermal/cooling_device0"
    root = plant({f"{cooling}/type": "thermal-cpufreq-0", f"{cooling}/cur_state": 2})
    bench = Bench(clock, NONE, root=root)
    with caplog.at_level(logging.INFO, "latentd.energy.meter_thread"):
        bench.run(20)
        break_file(root / cooling / "cur_state", errno.EIO)
        bench.run(20)
    assert bench.thread.board.throttled["thermal"] is None
    assert not [record for record in caplog.records if "full speed" in record.message]


def test_a_sensor_that_vanishes_and_returns_under_another_number_costs_a_gap_and_nothing_else(plant: Plant, clock: Clock) -> None:
    chip = "sys/bus/i2c/drivers/ina3221/7-0040/hwmon"
    rail: Dict[str, Union[str, int]] = {"in1_label": "VDD_IN", "in1_input": 5000, "curr1_input": 1000}
    root = plant({f"{chip}/hwmon4/{name}": value for name, value in rail.items()})
    ledger = EnergyLedger(clock=clock)
    thread = MeterThread.from_config(EnergyConfig(meters=("ina3221",)), ledger, root=root, clock=clock)

    def run(seconds: float) -> None:
        end_s = clock.now_s + seconds
        while clock.now_s < end_s:
            clock.now_s += max(thread.tick(), 0.001)

    run(100)
    shutil.rmtree(root / chip)
    run(10)
    report = ledger.report()
    assert (report.is_up, ledger.power_w) == (False, None)
    assert "no INA3221 sensor" in (report.meter.reason or "")
    plant({f"{chip}/hwmon7/{name}": value for name, value in rail.items()})
    run(90)
    report = ledger.report()
    assert (report.is_up, report.gaps, ledger.power_w) == (True, 1, 5.0)
    assert report.covered_s + report.gap_s == pytest.approx(200, abs=1.0)
    assert report.energy_j == pytest.approx(5.0 * report.covered_s)
    assert 9.0 < report.gap_s < 20.0
