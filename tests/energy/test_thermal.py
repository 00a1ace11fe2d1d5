from __future__ import annotations

import errno
from pathlib import Path
from typing import TYPE_CHECKING, Dict, Tuple, Union

from latentd.energy import thermal

if TYPE_CHECKING:
    from energy.conftest import Break, Plant

ZONES = "sys/class/thermal"
Zones = Dict[int, Tuple[str, Dict[str, int]]]  # number -> type, and what its trips are in thousandths of a degree


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


XAVIER: Zones = {0: ("AO-therm", {}), 1: ("CPU-therm", {"critical": 96500, "passive": 90500}), 2: ("PMIC-Die", {"critical": 120000})}
LAPTOP: Zones = {
    0: ("acpitz", {"critical": 103000, "passive": 0}),
    1: ("INT3400 Thermal", {}),
    2: ("SEN1", {"passive": 60050, "critical": -273250, "hot": 90000}),
    3: ("pch_skylake", {"critical": 115000}),
    4: ("x86_pkg_temp", {"passive": 71000}),
    5: ("acpitz", {"critical": 20800}),
}


def machine(plant: Plant, zones: Zones) -> Path:
    """A tree whose zones have these trips."""
    files: Dict[str, Union[str, int]] = {}
    for number, (kind, trips) in zones.items():
        zone = f"{ZONES}/thermal_zone{number}"
        files.update({f"{zone}/type": kind, f"{zone}/temp": 50000})
        for place, (trip, milli_c) in enumerate(trips.items()):
            files.update({f"{zone}/trip_point_{place}_type": trip, f"{zone}/trip_point_{place}_temp": milli_c})
    return plant(files)


def test_every_zone_of_a_board_may_get_as_warm_as_any_other(plant: Plant) -> None:
    assert thermal.limits_c(machine(plant, XAVIER), is_pc=False) == {"AO-therm": 85.0, "CPU-therm": 85.0}


def test_a_board_with_an_earlier_emergency_stays_some_degrees_below_it(plant: Plant) -> None:
    assert thermal.limits_c(machine(plant, {0: ("soc", {"critical": 85000})}), is_pc=False) == {"soc": 80.0}


def test_a_pc_may_run_as_warm_as_it_is_built_for_and_its_odd_trips_hold_nothing(plant: Plant) -> None:
    root = machine(plant, LAPTOP)
    assert thermal.limits_c(root, is_pc=True) == {"acpitz": 98.0, "SEN1": 85.0, "pch_skylake": 110.0}
    assert list(thermal.read(root))[-1] == "acpitz 2"


def test_a_trip_that_can_not_be_read_is_none(plant: Plant, break_file: Break) -> None:
    root = machine(plant, {0: ("acpitz", {"critical": 90000, "hot": 100000})})
    break_file(root / ZONES / "thermal_zone0/trip_point_0_temp", errno.EIO)
    assert thermal.limits_c(root, is_pc=True) == {"acpitz": 95.0}
