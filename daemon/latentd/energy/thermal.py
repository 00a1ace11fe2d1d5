"""Temperatures of the board, from the kernel's thermal zones.

Stateless; the meter thread calls it. Each zone is one file read, which may wait for the board's power controller.
"""

from __future__ import annotations

from pathlib import Path
from typing import Dict, List, Optional

from latentd.energy import sysfs

_FOLDERS = ("sys/class/thermal", "sys/devices/virtual/thermal")


def read(root: Path) -> Dict[str, Optional[float]]:
    """Zone -> degrees Celsius; None where the zone can't be read or gives a negative value, as one without power does.

    A second zone of the same type gets a number ("acpitz 2"). PMIC zones are left out: Jetsons report a constant there.
    """
    temperatures_c: Dict[str, Optional[float]] = {}
    for zone in _zones(root):
        try:
            kind = sysfs.read_text(zone / "type")
        except OSError:
            continue
        if kind and "PMIC" not in kind.upper():
            temperatures_c[_unused(kind, temperatures_c)] = _celsius(zone)
    return temperatures_c


def _zones(root: Path) -> List[Path]:
    """Zones in the kernel's order; the first folder that has any counts, the other shows the same ones again."""
    for folder in _FOLDERS:
        zones = [zone for zone in (root / folder).glob("thermal_zone*") if zone.name[len("thermal_zone") :].isdigit()]
        if zones:
            return sorted(zones, key=lambda zone: int(zone.name[len("thermal_zone") :]))
    return []


def _unused(kind: str, taken: Dict[str, Optional[float]]) -> str:
    name, number = kind, 1
    while name in taken:
        number += 1
        name = f"{kind} {number}"
    return name


def _celsius(zone: Path) -> Optional[float]:
    try:
        milli_c = sysfs.read_number(zone / "temp")
    except OSError:
        return None
    return milli_c / 1000 if milli_c >= 0 else None
