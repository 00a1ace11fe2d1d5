"""Temperatures of the board, and how warm it may get, from the kernel's thermal zones.

Stateless; the meter thread calls it. Each zone is one file read, which may wait for the board's power controller.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Tuple

from latentd.energy import sysfs

BOARD_C = 85.0  # for every zone of a board, few of which have the cooling of a PC
MARGIN_C = 5.0  # below the trip of an emergency
LEAST_TRIP_C = 70.0  # firmware of PCs has emergencies at 0, -273 and 20 degrees
IS_PC = platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")  # told by the processor: containers hide the device tree
_EMERGENCIES = ("hot", "critical")
_FOLDERS = ("sys/class/thermal", "sys/devices/virtual/thermal")


def read(root: Path) -> Dict[str, Optional[float]]:
    """Zone -> degrees Celsius; None where the zone can't be read or gives a negative value, as one without power does.

    A second zone of the same type gets a number ("acpitz 2"). PMIC zones are left out: Jetsons report a constant there.
    """
    return {name: _celsius(zone / "temp") for name, zone in _named(root)}


def limits_c(root: Path, is_pc: bool = IS_PC) -> Dict[str, float]:
    """Zone -> degrees Celsius above which nothing should add to its heat; a zone that is not there has no limit.

    MARGIN_C below its lowest "hot" or "critical" trip, where the kernel raises the alarm or switches the machine off; on what is no PC,
    BOARD_C at most. The processors of PCs are built to run at 90 to 100 °C, and slow down by themselves. Passive trips don't count: those
    of PCs are at 0 degrees, or where the case is warm to the hand, or moved along with the temperature by thermald.
    """
    limits = {}
    for name, zone in _named(root):
        own = [trip_c - MARGIN_C for trip_c in _emergencies_c(zone) if trip_c >= LEAST_TRIP_C] + ([] if is_pc else [BOARD_C])
        if own:
            limits[name] = min(own)
    return limits


def _emergencies_c(zone: Path) -> Iterator[float]:
    for kind in sorted(zone.glob("trip_point_*_type")):
        try:
            if sysfs.read_text(kind) in _EMERGENCIES:
                yield sysfs.read_number(kind.with_name(kind.name.replace("_type", "_temp"))) / 1000
        except OSError:
            continue


def _named(root: Path) -> Iterator[Tuple[str, Path]]:
    """Name and folder of each zone that counts."""
    taken: Dict[str, int] = {}
    for zone in _zones(root):
        try:
            kind = sysfs.read_text(zone / "type")
        except OSError:
            continue
        if kind and "PMIC" not in kind.upper():
            taken[kind] = taken.get(kind, 0) + 1
            yield kind if taken[kind] == 1 else f"{kind} {taken[kind]}", zone


def _zones(root: Path) -> List[Path]:
    """Zones in the kernel's order; the first folder that has any counts, the other shows the same ones again."""
    for folder in _FOLDERS:
        zones = [zone for zone in (root / folder).glob("thermal_zone*") if zone.name[len("thermal_zone") :].isdigit()]
        if zones:
            return sorted(zones, key=lambda zone: int(zone.name[len("thermal_zone") :]))
    return []


def _celsius(path: Path) -> Optional[float]:
    try:
        milli_c = sysfs.read_number(path)
    except OSError:
        return None
    return milli_c / 1000 if milli_c >= 0 else None
