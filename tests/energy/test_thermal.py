from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from latentd.energy import thermal

if TYPE_CHECKING:
    from pathlib import Path

    from energy.conftest import Break, Plant

ZONES = "sys/class/thermal"


def test_zones_are_read_in_degrees_celsius(plant: Plant) -> None:
    root = plant(
        {
            f"{ZONES}/thermal_zone0/type": "CPU-therm",
            f"{ZONES}/thermal_zone0/temp": 46500,
            f"{ZONES}/thermal_zone1/type": "thermal-fan-est",
            f"{ZONES}/thermal_zone1/temp": 45600,
        }
    )
    assert thermal.read(root) == {"CPU-therm": 46.5, "thermal-fan-est": 45.6}


def test_the_constant_pmic_zone_is_left_out(plant: Plant) -> None:
    root = plant({f"{ZONES}/thermal_zone0/type": "PMIC-Die", f"{ZONES}/thermal_zone0/temp": 100000})
    assert thermal.read(root) == {}


def test_a_zone_without_power_is_unknown_and_not_minus_256_degrees(plant: Plant) -> None:
    root = plant({f"{ZONES}/thermal_zone2/type": "GPU-therm", f"{ZONES}/thermal_zone2/temp": -256000})
    assert thermal.read(root) == {"GPU-therm": None}


def test_a_zone_that_can_not_be_read_is_unknown_and_hides_no_other(plant: Plant, break_file: Break) -> None:
    root = plant(
        {
            f"{ZONES}/thermal_zone0/type": "GPU-therm",
            f"{ZONES}/thermal_zone0/temp": 40000,
            f"{ZONES}/thermal_zone1/type": "AUX-therm",
            f"{ZONES}/thermal_zone1/temp": 39000,
            f"{ZONES}/thermal_zone2/type": "AO-therm",
            f"{ZONES}/thermal_zone2/temp": "nonsense",
        }
    )
    break_file(root / ZONES / "thermal_zone0/temp", errno.EAGAIN)
    assert thermal.read(root) == {"GPU-therm": None, "AUX-therm": 39.0, "AO-therm": None}


def test_two_zones_of_one_type_are_told_apart_in_the_kernels_order(plant: Plant) -> None:
    root = plant(
        {
            f"{ZONES}/thermal_zone{number}/{file}": content
            for number, temp in ((2, 30000), (10, 31000))
            for file, content in (("type", "acpitz"), ("temp", temp))
        }
    )
    assert thermal.read(root) == {"acpitz": 30.0, "acpitz 2": 31.0}


def test_the_folder_of_virtual_devices_serves_where_the_class_is_missing(plant: Plant) -> None:
    root = plant({"sys/devices/virtual/thermal/thermal_zone0/type": "AO-therm", "sys/devices/virtual/thermal/thermal_zone0/temp": 45000})
    assert thermal.read(root) == {"AO-therm": 45.0}


def test_a_machine_without_zones_has_no_temperatures(tmp_path: Path) -> None:
    assert thermal.read(tmp_path) == {}
