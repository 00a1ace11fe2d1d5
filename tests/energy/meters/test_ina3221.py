from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Dict, Union

import pytest

from latentd.energy.meters.ina3221 import Ina3221Meter, discover
from latentd.errors import MeterUnavailable

if TYPE_CHECKING:
    from energy.conftest import Break, Clock, Plant

Files = Dict[str, Union[str, int]]

CHIP = "sys/bus/i2c/drivers/ina3221/7-0040"
HWMON = f"{CHIP}/hwmon/hwmon4"
IIO = "sys/bus/i2c/drivers/ina3221x/7-0040/iio:device0"


def hwmon(folder: str = HWMON) -> Files:
    """JetPack 5 on a Xavier NX: three channels, their shunt voltages, and the sum of these as number 7."""
    files: Files = {f"{folder}/name": "ina3221"}
    for channel, (label, voltage_mv, current_ma) in enumerate(
        (("VDD_IN", 5064, 544), ("VDD_CPU_GPU_CV", 5056, 128), ("VDD_SOC", 5048, 130)), 1
    ):
        files.update(
            {f"{folder}/in{channel}_label": label, f"{folder}/in{channel}_input": voltage_mv, f"{folder}/curr{channel}_input": current_ma}
        )
        files[f"{folder}/in{channel + 3}_input"] = 900
    files.update({f"{folder}/in7_label": "sum of shunt voltages", f"{folder}/in7_input": 2700, f"{folder}/curr4_input": 999999})
    return files


def iio(names: tuple[str, ...] = ("VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC")) -> Files:
    """JetPack 4: powers are there, in mW."""
    files: Files = {}
    for channel, (name, power_mw) in enumerate(zip(names, (6140, 2706, 1074))):
        files.update({f"{IIO}/rail_name_{channel}": name, f"{IIO}/in_power{channel}_input": power_mw})
    return files


def test_jetpack_5_power_is_voltage_times_current_of_the_input_rail(plant: Plant, clock: Clock) -> None:
    reading = Ina3221Meter(plant(hwmon()), clock).read()
    assert (reading.source, reading.quality, reading.energy_j, reading.at_s) == ("ina3221", "measured", None, clock.now_s)
    assert reading.power_w == pytest.approx(5.064 * 0.544)
    assert reading.rails_w == pytest.approx({"VDD_IN": 5.064 * 0.544, "VDD_CPU_GPU_CV": 5.056 * 0.128, "VDD_SOC": 5.048 * 0.130})


def test_jetpack_4_power_is_read_in_milliwatts(plant: Plant, clock: Clock) -> None:
    reading = Ina3221Meter(plant(iio()), clock).read()
    assert reading.power_w == 6.14
    assert reading.rails_w == {"VDD_IN": 6.14, "VDD_CPU_GPU_CV": 2.706, "VDD_SOC": 1.074}


def test_the_nanos_input_rail_has_another_name_and_is_found(plant: Plant, clock: Clock) -> None:
    meter = Ina3221Meter(plant(iio(("POM_5V_GPU", "POM_5V_IN", "POM_5V_CPU"))), clock)
    assert meter.read().power_w == 2.706
    assert "POM_5V_IN" in meter.scope


def test_the_sum_of_shunt_voltages_is_no_rail_whatever_its_number(plant: Plant) -> None:
    assert [rail.name for rail in discover(plant(hwmon())).rails] == ["VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"]


def test_channels_that_are_not_connected_are_skipped(plant: Plant) -> None:
    root = plant(iio(("VDD_IN", "NC", "NC 2")))
    assert [rail.name for rail in discover(root).rails] == ["VDD_IN"]


def test_a_rail_whose_name_only_contains_the_letters_nc_is_kept(plant: Plant) -> None:
    assert [rail.name for rail in discover(plant(iio(("VDD_IN", "SYNC_5V")))).rails] == ["VDD_IN", "SYNC_5V"]


def test_a_channel_without_a_label_is_skipped(plant: Plant) -> None:
    root = plant(hwmon())
    (root / HWMON / "in3_label").unlink()
    assert [rail.name for rail in discover(root).rails] == ["VDD_IN", "VDD_CPU_GPU_CV"]


def test_a_chip_that_bus_and_driver_both_list_counts_once(plant: Plant) -> None:
    root = plant({**hwmon("sys/devices/i2c-7/7-0040/hwmon/hwmon4"), "sys/devices/i2c-7/7-0040/name": "ina3221"})
    for folder in ("sys/bus/i2c/drivers/ina3221", "sys/bus/i2c/devices"):
        (root / folder).mkdir(parents=True)
        (root / folder / "7-0040").symlink_to(root / "sys/devices/i2c-7/7-0040")
    assert len(discover(root).rails) == 3


def test_a_chip_that_only_the_bus_lists_is_found_by_its_name(plant: Plant) -> None:
    chip = "sys/bus/i2c/devices/1-0040"
    root = plant({**hwmon(f"{chip}/hwmon/hwmon1"), f"{chip}/name": "ina3221", "sys/bus/i2c/devices/1-0050/name": "24c02"})
    assert len(discover(root).rails) == 3


def test_the_rails_of_two_chips_are_all_found(plant: Plant, clock: Clock) -> None:
    second = "sys/bus/i2c/drivers/ina3221/1-0041/hwmon/hwmon5"
    root = plant({**hwmon(), f"{second}/in1_label": "VDDQ", f"{second}/in1_input": 1000, f"{second}/curr1_input": 500})
    assert Ina3221Meter(root, clock).read().rails_w["VDDQ"] == 0.5


def test_slow_rails_are_read_once_a_second_and_the_input_always(plant: Plant, clock: Clock) -> None:
    meter = Ina3221Meter(plant(hwmon()), clock)
    seen = []
    for _ in range(11):
        seen.append(set(meter.read().rails_w))
        clock.now_s += 0.2
    everything = {"VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"}
    assert seen == [everything if number in (0, 5, 10) else {"VDD_IN"} for number in range(11)]


def test_noise_below_zero_current_is_zero_power(plant: Plant, clock: Clock) -> None:
    assert Ina3221Meter(plant({**hwmon(), f"{HWMON}/curr2_input": -8}), clock).read().rails_w["VDD_CPU_GPU_CV"] == 0.0


def test_without_a_sensor_the_reason_names_the_place(tmp_path: Path, clock: Clock) -> None:
    with pytest.raises(MeterUnavailable, match=r"no INA3221 sensor under .*/sys/bus/i2c"):
        Ina3221Meter(tmp_path, clock)


def test_a_board_without_input_rail_is_refused_rather_than_summed(plant: Plant, clock: Clock) -> None:
    with pytest.raises(
        MeterUnavailable, match=r"no input rail .VDD_IN or POM_5V_IN., only GPU, CPU, SOC; a sum of rails may count the same joule twice"
    ):
        Ina3221Meter(plant(iio(("GPU", "CPU", "SOC"))), clock)


@pytest.mark.parametrize(
    ("code", "words"),
    [(errno.EACCES, "permission denied .readable by root only."), (errno.ENODATA, "the channel is disabled"), (errno.EIO, "Input/output")],
)
def test_an_input_that_can_not_be_read_says_why(plant: Plant, break_file: Break, clock: Clock, code: int, words: str) -> None:
    root = plant(hwmon())
    break_file(root / HWMON / "curr1_input", code)
    meter = Ina3221Meter(root, clock)
    with pytest.raises(MeterUnavailable, match=f"curr1_input: .*{words}"):
        meter.read()


def test_labels_that_can_not_be_read_say_why(plant: Plant, break_file: Break, clock: Clock) -> None:
    root = plant(iio())
    break_file(root / IIO / "rail_name_0", errno.EACCES)
    with pytest.raises(MeterUnavailable, match="rail_name_0: permission denied"):
        Ina3221Meter(root, clock)


@pytest.mark.parametrize("code", [errno.EACCES, errno.ENODATA, errno.EIO])
def test_a_label_that_can_not_be_read_costs_its_own_rail_alone(plant: Plant, break_file: Break, clock: Clock, code: int) -> None:
    root = plant(hwmon())
    break_file(root / HWMON / "in3_label", code)
    assert set(Ina3221Meter(root, clock).read().rails_w) == {"VDD_IN", "VDD_CPU_GPU_CV"}
    break_file(root / HWMON / "in1_label", code)
    with pytest.raises(MeterUnavailable, match=r"the INA3221 sensor can't be read: .*in1_label"):
        Ina3221Meter(root, clock)


def test_a_disabled_rail_is_left_out_and_the_total_stays(plant: Plant, break_file: Break, clock: Clock) -> None:
    root = plant(hwmon())
    break_file(root / HWMON / "in2_input", errno.ENODATA)
    reading = Ina3221Meter(root, clock).read()
    assert set(reading.rails_w) == {"VDD_IN", "VDD_SOC"}
    assert reading.power_w == pytest.approx(2.754816)


def test_a_file_without_a_number_is_a_failure_and_not_zero(plant: Plant, clock: Clock) -> None:
    meter = Ina3221Meter(plant({**hwmon(), f"{HWMON}/in1_input": ""}), clock)
    with pytest.raises(MeterUnavailable, match="not a whole number"):
        meter.read()


def test_a_hwmon_number_that_changes_after_boot_is_followed_in_the_same_read(plant: Plant, clock: Clock) -> None:
    root = plant(hwmon())
    meter = Ina3221Meter(root, clock)
    meter.read()
    (root / HWMON).rename(root / CHIP / "hwmon/hwmon5")
    clock.now_s += 2
    assert set(meter.read().rails_w) == {"VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"}


def test_a_sensor_that_vanishes_is_reported_gone(plant: Plant, clock: Clock) -> None:
    root = plant(hwmon())
    meter = Ina3221Meter(root, clock)
    shutil.rmtree(root / CHIP)
    with pytest.raises(MeterUnavailable, match="no INA3221 sensor"):
        meter.read()
