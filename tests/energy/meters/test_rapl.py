from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from latentd.energy.meters.rapl import RaplMeter
from latentd.errors import MeterUnavailable

if TYPE_CHECKING:
    from pathlib import Path

    from energy.conftest import Break, Clock, Plant

CAP = "sys/class/powercap"


def domain(name: str, energy_uj: int, folder: str, range_uj: int = 1_000_000) -> dict[str, str | int]:
    return {f"{CAP}/{folder}/name": name, f"{CAP}/{folder}/energy_uj": energy_uj, f"{CAP}/{folder}/max_energy_range_uj": range_uj}


def test_only_packages_count_not_their_parts_nor_the_platform_nor_the_second_door(plant: Plant, clock: Clock) -> None:
    parts = {
        **domain("package-0", 0, "intel-rapl:0"),
        **domain("package-1", 0, "intel-rapl:1"),
        **domain("psys", 0, "intel-rapl:2"),
        **domain("core", 0, "intel-rapl:0:0"),
        **domain("package-0", 0, "intel-rapl-mmio:0"),
    }
    meter = RaplMeter(plant(parts), clock)
    plant({path: 250_000 for path in parts if path.endswith("energy_uj")})
    reading = meter.read()
    assert reading.energy_j == 0.5
    assert reading.rails_j == {"package-0": 0.25, "package-1": 0.25}
    assert (reading.source, reading.quality, reading.power_w, reading.at_s) == ("rapl", "estimated", None, clock.now_s)


def test_a_counter_that_wraps_goes_on_growing(plant: Plant, clock: Clock) -> None:
    meter = RaplMeter(plant(domain("package-0", 900_000, "intel-rapl:0")), clock)
    joules = []
    for energy_uj in (950_000, 50_000, 150_000, 100_000):
        plant(domain("package-0", energy_uj, "intel-rapl:0"))
        joules.append(meter.read().energy_j)
    assert joules == pytest.approx([0.05, 0.15, 0.25, 1.2])


def test_counters_for_root_only_are_refused_with_the_reason(plant: Plant, break_file: Break, clock: Clock) -> None:
    root = plant(domain("package-0", 0, "intel-rapl:0"))
    break_file(root / CAP / "intel-rapl:0/energy_uj", errno.EACCES)
    with pytest.raises(MeterUnavailable, match=r"RAPL not readable \(root only\)"):
        RaplMeter(root, clock)


def test_a_machine_or_a_container_without_powercap_is_refused(tmp_path: Path, clock: Clock) -> None:
    with pytest.raises(MeterUnavailable, match=r"no RAPL package under .*powercap"):
        RaplMeter(tmp_path, clock)


def test_a_counter_that_vanishes_is_a_failure_with_its_path(plant: Plant, clock: Clock) -> None:
    root = plant(domain("package-0", 0, "intel-rapl:0"))
    meter = RaplMeter(root, clock)
    (root / CAP / "intel-rapl:0/energy_uj").unlink()
    with pytest.raises(MeterUnavailable, match="energy_uj: it is not there"):
        meter.read()
