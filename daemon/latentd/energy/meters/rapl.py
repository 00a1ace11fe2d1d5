"""RAPL, the energy counters of x86 processors, through the kernel's powercap folder.

Used by the meter thread alone; reads do not block.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Callable, List, Optional

from latentd.energy import sysfs
from latentd.energy.meters.reading import Reading
from latentd.errors import MeterUnavailable

# A package is intel-rapl:N, on AMD too. Deeper folders are parts of a package, and intel-rapl-mmio shows the same package by another door.
_DOMAIN = re.compile(r"intel-rapl:\d+")


class Package:
    """One processor package: a wrapping counter in microjoules, made into one that only grows."""

    def __init__(self, folder: Path) -> None:
        self.name = sysfs.read_text(folder / "name")
        self._path = folder / "energy_uj"
        self._range_uj = sysfs.read_number(folder / "max_energy_range_uj")
        self._last_uj = sysfs.read_number(self._path)
        self._total_uj = 0.0

    def energy_j(self) -> float:
        """Joules since this object was made; right as long as it is called at least once a wrap. Raises OSError."""
        now_uj = sysfs.read_number(self._path)
        step_uj = now_uj - self._last_uj
        self._last_uj = now_uj
        self._total_uj += step_uj if step_uj >= 0 else step_uj + self._range_uj
        return self._total_uj / 1e6


class RaplMeter:
    """Joules of all processor packages together; each package is a rail.

    The quality is "estimated": several processors compute this counter from events, and none counts memory, disks or the power supply.
    """

    source = "rapl"

    def __init__(self, root: Path, clock: Callable[[], float]) -> None:
        self._clock = clock
        folder = root / "sys/class/powercap"
        try:
            self._packages = _packages(folder)
        except PermissionError as cause:
            raise MeterUnavailable("RAPL not readable (root only)") from cause
        except OSError as cause:
            raise MeterUnavailable(f"RAPL not readable: {sysfs.why(cause)}") from cause
        if not self._packages:
            raise MeterUnavailable(f"no RAPL package under {folder}")
        self.scope = "the processor packages; not memory, disks, graphics card and power supply"

    def read(self) -> Reading:
        rails_j = {package.name: self._joules(package) for package in self._packages}
        return Reading(self.source, "estimated", self._clock(), energy_j=sum(rails_j.values()), rails_j=rails_j)

    def close(self) -> None:
        self._packages = []

    def _joules(self, package: Package) -> float:
        try:
            return package.energy_j()
        except OSError as cause:
            raise MeterUnavailable(f"RAPL not readable: {sysfs.why(cause)}") from cause


def _packages(folder: Path) -> List[Package]:
    domains = sorted(domain for domain in folder.glob("intel-rapl:*") if _DOMAIN.fullmatch(domain.name))
    packages = [_package(domain) for domain in domains]
    return [package for package in packages if package is not None]


def _package(domain: Path) -> Optional[Package]:
    """The package, or None for a domain of another kind: "psys" counts the packages again."""
    return Package(domain) if sysfs.read_text(domain / "name").startswith("package") else None
