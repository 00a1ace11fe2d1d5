from __future__ import annotations

import errno
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from latentd.energy.meters import choose_meter
from latentd.errors import ConfigError

if TYPE_CHECKING:
    from energy.conftest import Break, Clock, Plant

ALL = ("ina3221", "tegrastats", "nvml", "rapl")
RAPL = "sys/class/powercap/intel-rapl:0"
RAPL_FILES: dict[str, str | int] = {f"{RAPL}/name": "package-0", f"{RAPL}/energy_uj": 5, f"{RAPL}/max_energy_range_uj": 1000}
HWMON = "sys/bus/i2c/drivers/ina3221/7-0040/hwmon/hwmon4"
INA_FILES: dict[str, str | int] = {f"{HWMON}/in1_label": "VDD_IN", f"{HWMON}/in1_input": 5000, f"{HWMON}/curr1_input": 1000}


def no_nvml() -> Any:
    raise ImportError("No module named 'pynvml'")


def test_the_first_meter_that_reads_serves_and_the_better_ones_say_why_not(plant: Plant, clock: Clock) -> None:
    choice = choose_meter(ALL, plant(RAPL_FILES), clock=clock, wait=clock.wait, load_nvml=no_nvml)
    assert choice.meter is not None
    assert choice.meter.source == "rapl"
    assert list(choice.passed_over) == ["ina3221", "tegrastats", "nvml"]


def test_the_configured_order_decides(plant: Plant, clock: Clock) -> None:
    root = plant({**RAPL_FILES, **INA_FILES})
    for names in (("rapl", "ina3221"), ("ina3221", "rapl")):
        choice = choose_meter(names, root, clock=clock, wait=clock.wait)
        assert choice.meter is not None
        assert (choice.meter.source, choice.passed_over) == (names[0], {})


def test_without_any_meter_one_line_has_every_reason(plant: Plant, break_file: Break, clock: Clock) -> None:
    root = plant(RAPL_FILES)
    break_file(root / RAPL / "energy_uj", errno.EACCES)
    choice = choose_meter(ALL, root, clock=clock, wait=clock.wait, load_nvml=no_nvml)
    assert choice.meter is None
    assert choice.reason == (
        f"no INA3221 sensor under {root}/sys/bus/i2c; tegrastats not found ({root}/usr/bin/tegrastats); "
        "the module pynvml is not installed (pip install nvidia-ml-py); RAPL not readable (root only)"
    )


def test_a_sensor_that_is_found_but_can_not_be_read_is_passed_over(plant: Plant, break_file: Break, clock: Clock) -> None:
    root = plant({**INA_FILES, **RAPL_FILES})
    break_file(root / HWMON / "in1_input", errno.EACCES)
    choice = choose_meter(("ina3221", "rapl"), root, clock=clock, wait=clock.wait)
    assert choice.meter is not None
    assert choice.meter.source == "rapl"
    assert "permission denied" in choice.passed_over["ina3221"]


def test_a_candidate_that_breaks_in_a_way_nobody_foresaw_does_not_hide_those_after_it(plant: Plant, clock: Clock) -> None:
    def broken() -> Any:
        raise OSError("libnvidia-ml.so.1: file too short")

    choice = choose_meter(("nvml", "rapl"), plant(RAPL_FILES), clock=clock, wait=clock.wait, load_nvml=broken)
    assert choice.meter is not None
    assert choice.meter.source == "rapl"
    assert "nvml failed: OSError" in choice.passed_over["nvml"]
    assert [type(error) for error in choice.errors] == [OSError]


def test_no_configured_meter_is_a_reason_too(tmp_path: Path, clock: Clock) -> None:
    assert choose_meter((), tmp_path, clock=clock, wait=clock.wait).reason == "no meter is configured (energy.meters is empty)"


def test_an_unknown_name_is_a_configuration_error_that_lists_the_known(tmp_path: Path, clock: Clock) -> None:
    with pytest.raises(ConfigError, match="wattmeter") as error:
        choose_meter(("wattmeter",), tmp_path, clock=clock, wait=clock.wait)
    assert "ina3221, tegrastats, nvml, rapl" in error.value.hint


def executable(path: Path, body: str) -> Path:
    path.write_text(f"#!{sys.executable}\nimport signal, sys\n{body}\n")
    path.chmod(0o755)
    return path


def test_a_tegrastats_that_needs_time_for_its_first_line_is_awaited(tmp_path: Path, clock: Clock) -> None:
    line = "RAM 3168/6851MB (lfb 2x4MB) VDD_IN 2763mW/2846mW"
    program = executable(tmp_path / "stats", f"sys.stdout.write({line!r} + chr(10)); sys.stdout.flush(); signal.pause()")
    choice = choose_meter(("tegrastats",), tmp_path, clock=clock, wait=threading.Event().wait, tegrastats=program)
    assert choice.meter is not None
    choice.meter.close()


def test_a_silent_tegrastats_is_given_up_and_the_next_meter_serves(plant: Plant, clock: Clock, tmp_path: Path) -> None:
    program = executable(tmp_path / "stats", "signal.pause()")
    choice = choose_meter(("tegrastats", "rapl"), plant(RAPL_FILES), clock=clock, wait=clock.wait, tegrastats=program)
    assert choice.meter is not None
    assert choice.meter.source == "rapl"
    assert "tegrastats is silent for 3 s" in choice.passed_over["tegrastats"]


def test_stopping_ends_the_wait_for_a_slow_meter(tmp_path: Path, clock: Clock) -> None:
    program = executable(tmp_path / "stats", "signal.pause()")
    choice = choose_meter(("tegrastats",), tmp_path, clock=clock, wait=lambda seconds: True, tegrastats=program)
    assert choice.meter is None
    assert "latentd stops" in choice.reason
