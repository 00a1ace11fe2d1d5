"""Power mode, clocks and throttling, from trees that imitate a Xavier NX with JetPack 5, an Orin and a PC."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import TYPE_CHECKING, Dict, List, Union

import pytest

from latentd.energy import board, sysfs
from latentd.energy.board import Board, Clock

if TYPE_CHECKING:
    from energy.conftest import Break, Plant

MODES = """< PARAM TYPE=FILE NAME=CPU_ONLINE >
< POWER_MODEL ID=2 NAME=MODE_15W_6CORE >
CPU_ONLINE CORE_0 1
< POWER_MODEL ID=5 NAME=MODE_10W_DESKTOP >
< POWER_MODEL ID=8 NAME=MODE_20W_6CORE >
< PM_CONFIG DEFAULT=5 >"""
CHIP = "sys/bus/i2c/drivers/ina3221/7-0040/hwmon/hwmon5"
COOLING = "sys/class/thermal/cooling_device"
GPU = "sys/class/devfreq/17000000.gv11b"


def test_the_mode_that_was_set_is_told_by_its_name(plant: Plant) -> None:
    root = plant({"var/lib/nvpmodel/status": "pmode:0002 fmode:quiet", "etc/nvpmodel.conf": MODES})
    assert board.power_mode(root) == "MODE_15W_6CORE"


def test_while_it_was_never_set_the_boards_default_is_in_force(plant: Plant) -> None:
    assert board.power_mode(plant({"etc/nvpmodel.conf": MODES})) == "MODE_10W_DESKTOP"


def test_a_mode_that_nobody_names_is_told_by_its_number(plant: Plant) -> None:
    assert board.power_mode(plant({"var/lib/nvpmodel/status": "pmode:0007"})) == "mode 7"


@pytest.mark.parametrize("text", ["", "nonsense", "pmode:"])
def test_without_nvpmodel_there_is_no_mode(plant: Plant, text: str) -> None:
    assert board.power_mode(plant({"var/lib/nvpmodel/status": text})) is None


def test_clocks_are_those_of_the_fastest_core_and_of_the_integrated_gpu(plant: Plant) -> None:
    cpu = "sys/devices/system/cpu"
    root = plant(
        {
            f"{cpu}/online": "0-3,5",
            f"{cpu}/cpufreq/policy0/scaling_cur_freq": 1190400,
            f"{cpu}/cpufreq/policy0/scaling_max_freq": 1420800,
            f"{cpu}/cpufreq/policy2/scaling_cur_freq": 1420800,
            f"{cpu}/cpufreq/policy2/scaling_max_freq": 1420800,
            "sys/class/devfreq/15340000.vic/cur_freq": 115200000,
            f"{GPU}/device/of_node/name": "gv11b\0",
            f"{GPU}/cur_freq": 510000000,
            f"{GPU}/max_freq": 1109250000,
            "sys/devices/gpu.0/load": 425,
        }
    )
    found = board.read(root)
    assert found.clocks == {"cpu": Clock(1420.8e6, 1420.8e6), "gpu": Clock(510e6, 1109.25e6)}
    assert (found.cores_online, found.gpu_load_ratio) == (5, 0.425)


def test_a_clock_that_can_not_be_read_is_unknown_and_not_zero(plant: Plant, break_file: Break) -> None:
    policy = "sys/devices/system/cpu/cpufreq/policy0"
    root = plant({f"{policy}/scaling_cur_freq": 1, f"{GPU}/cur_freq": 1, f"{GPU}/max_freq": 2})
    break_file(root / policy / "scaling_cur_freq", errno.EIO)
    break_file(root / GPU / "cur_freq", errno.EAGAIN)
    assert board.read(root).clocks == {"gpu": Clock(None, 2.0)}


def test_what_slows_down_for_heat_is_named_and_a_fan_is_not(plant: Plant) -> None:
    root = plant(
        {
            f"{COOLING}0/type": "pwm-fan",
            f"{COOLING}0/cur_state": 3,
            f"{COOLING}1/type": "thermal-cpufreq-0",
            f"{COOLING}1/cur_state": 4,
            f"{COOLING}1/max_state": 10,
            f"{COOLING}2/type": "17000000.gv11b",
            f"{COOLING}2/cur_state": 1,
            f"{COOLING}3/type": "GPU-throttle-alert",
            f"{COOLING}3/cur_state": 1,
            f"{COOLING}4/type": "intel_powerclamp",
            f"{COOLING}4/cur_state": -1,
        }
    )
    what = ("thermal-cpufreq-0 at 4 of 10", "17000000.gv11b at 1", "GPU-throttle-alert at 1")
    assert board.read(root).throttled == {"thermal": what, "over-current": None}
    assert board.read(root).held_back == {"thermal": what}


@pytest.mark.parametrize("kind", ["pwm-fan", "thermal-cpufreq-0"])
def test_without_a_device_that_tells_of_throttling_it_is_unknown(plant: Plant, break_file: Break, kind: str) -> None:
    root = plant({f"{COOLING}0/type": kind, f"{COOLING}0/cur_state": 0, f"{CHIP}/in1_label": "VDD_IN"})
    if kind != "pwm-fan":
        assert board.read(root).throttled["thermal"] == ()
        break_file(root / f"{COOLING}0" / "cur_state", errno.EACCES)
    assert board.read(root).throttled == {"thermal": None, "over-current": None}


def rail(channel: int, name: str, current_ma: int, max_ma: int, crit_ma: int) -> Dict[str, Union[str, int]]:
    limits = {f"{CHIP}/curr{channel}_max": max_ma, f"{CHIP}/curr{channel}_crit": crit_ma}
    return {f"{CHIP}/in{channel}_label": name, f"{CHIP}/curr{channel}_input": current_ma, **limits}


def test_a_rail_above_either_of_its_limits_is_named(plant: Plant, break_file: Break) -> None:
    root = plant({**rail(1, "VDD_IN", 3100, 3000, 4000), **rail(2, "VDD_CPU_GPU_CV", 900, 1000, 2000), **rail(3, "VDD_SOC", 2, 9, 1)})
    assert board.read(root).throttled["over-current"] == ("VDD_IN", "VDD_SOC")
    plant({f"{CHIP}/curr1_input": 3000, f"{CHIP}/curr3_input": 1})
    assert board.read(root).throttled["over-current"] == ()
    for channel in (1, 2, 3):
        break_file(root / CHIP / f"curr{channel}_input", errno.ENODATA)
    assert board.read(root).throttled["over-current"] is None


def test_alarms_of_the_chip_are_left_alone_for_reading_one_clears_them_all(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: List[str] = []
    read_text = sysfs.read_text

    def read(path: Path) -> str:
        asked.append(path.name)
        return read_text(path)

    monkeypatch.setattr(sysfs, "read_text", read)
    board.read(plant({**rail(1, "VDD_IN", 3100, 3000, 4000), f"{CHIP}/curr1_max_alarm": 1}))
    assert "curr1_input" in asked
    assert not [name for name in asked if "alarm" in name]


def test_a_label_that_can_not_be_read_hides_no_other_rail(plant: Plant, break_file: Break) -> None:
    root = plant({**rail(1, "VDD_IN", 3100, 3000, 4000), f"{CHIP}/in3_label": "VDD_SOC"})
    break_file(root / CHIP / "in3_label", errno.EIO)
    assert board.read(root).throttled["over-current"] == ("VDD_IN",)


def test_an_orin_counts_its_over_currents(plant: Plant) -> None:
    root = plant({"sys/class/hwmon/hwmon3/oc1_event_cnt": 0, "sys/class/hwmon/hwmon3/oc3_event_cnt": 37})
    assert board.read(root).over_current_events == 37


def test_a_machine_that_tells_nothing_is_unknown(plant: Plant) -> None:
    assert board.read(plant({})) == Board()
