"""INA3221 power monitors of Jetson boards, through sysfs: the hwmon layout of JetPack 5 and later, the iio layout of JetPack 4.

Used by the meter thread alone. A read blocks for a conversion of the chip (7 to 13 ms a file), which is why rails other than the
input are read once a second.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

from latentd.energy import sysfs
from latentd.energy.meters.reading import INPUT_RAILS, RAIL_PERIOD_S, Reading
from latentd.errors import MeterUnavailable

_NOT_CONNECTED = re.compile(r"(?<![A-Za-z])NC(?![A-Za-z])")
_HWMON_CHANNELS = (1, 2, 3)  # in4..in6 are shunt voltages and in7 is their sum: none of them is a rail
_IIO_CHANNELS = (0, 1, 2)


class Rail(NamedTuple):
    """One channel of one chip: its label, and the files of its layout."""

    name: str
    folder: Path
    channel: int
    is_hwmon: bool

    def power_w(self) -> float:
        """Watts now, at least 0 (noise around zero current can be negative); raises OSError."""
        if self.is_hwmon:
            voltage_mv = sysfs.read_number(self.folder / f"in{self.channel}_input")
            current_ma = sysfs.read_number(self.folder / f"curr{self.channel}_input")
            return max(0.0, voltage_mv * current_ma / 1e6)
        return max(0.0, sysfs.read_number(self.folder / f"in_power{self.channel}_input") / 1e3)


class Found(NamedTuple):
    """unreadable: why a label can't be read, of those that are there."""

    rails: List[Rail]
    unreadable: List[OSError]


def discover(root: Path) -> Found:
    """Every connected channel of every INA3221 under `root`."""
    found = Found([], [])
    channels = (channel for chip in _chips(root) for channel in (*_hwmon_channels(chip), *_iio_channels(chip)))
    for label, rail in channels:
        try:
            name = sysfs.read_text(label)
        except FileNotFoundError:
            continue
        except OSError as cause:
            found.unreadable.append(cause)
            continue
        if name and not _NOT_CONNECTED.search(name):
            found.rails.append(rail._replace(name=name))
    return found


class Ina3221Meter:
    """Watts of the input rail at every read, of the other rails once a second.

    Sensors are looked for again whenever a read fails, because the kernel may number them anew when a driver is loaded again.
    """

    source = "ina3221"

    def __init__(self, root: Path, clock: Callable[[], float]) -> None:
        self._root, self._clock = root, clock
        self._rails: List[Rail] = []
        self._rails_due_s = clock()
        self._find()
        self.scope = f"all that the module takes in ({self._input.name}); not the carrier board, camera and fan"

    def read(self) -> Reading:
        try:
            power_w = self._input.power_w()
        except OSError:
            self._find()
            power_w = self._input_power_w()
        at_s = self._clock()
        rails_w = {self._input.name: power_w, **self._parts_w(at_s)}
        return Reading(self.source, "measured", at_s, power_w=power_w, rails_w=rails_w)

    def close(self) -> None:
        self._rails = []

    def _find(self) -> None:
        self._rails, unreadable = discover(self._root)
        names = [rail.name for rail in self._rails]
        found = next((name for name in INPUT_RAILS if name in names), None)
        if found is None and unreadable:
            raise MeterUnavailable(f"the INA3221 sensor can't be read: {sysfs.why(unreadable[0])}") from unreadable[0]
        if not names:
            raise MeterUnavailable(f"no INA3221 sensor under {self._root / 'sys/bus/i2c'}")
        if found is None:
            raise MeterUnavailable(
                f"the INA3221 sensor has no input rail ({' or '.join(INPUT_RAILS)}), only {', '.join(names)}; "
                "a sum of rails may count the same joule twice"
            )
        self._input = self._rails.pop(names.index(found))

    def _input_power_w(self) -> float:
        try:
            return self._input.power_w()
        except OSError as cause:
            raise MeterUnavailable(f"the INA3221 rail {self._input.name} can't be read: {sysfs.why(cause)}") from cause

    def _parts_w(self, now_s: float) -> Dict[str, float]:
        """The rails that can be read, when they are due; one that fails is left out, for the input is what counts."""
        if now_s < self._rails_due_s:
            return {}
        self._rails_due_s = now_s + RAIL_PERIOD_S
        powers_w = ((rail.name, _try_power_w(rail)) for rail in self._rails)
        return {name: power_w for name, power_w in powers_w if power_w is not None}


def _try_power_w(rail: Rail) -> Optional[float]:
    try:
        return rail.power_w()
    except OSError:
        return None


def _chips(root: Path) -> Iterator[Path]:
    """Device folders of the chips, each once: both the bus and the driver list them, as links to the same place."""
    i2c = root / "sys/bus/i2c"
    bound = sorted(i2c.glob("drivers/ina3221*/*-*"))
    named = [device for device in sorted(i2c.glob("devices/*")) if _is_ina3221(device)]
    places = {chip.resolve(): chip for chip in (*named, *bound)}
    yield from places.values()


def _is_ina3221(device: Path) -> bool:
    try:
        return "ina3221" in sysfs.read_text(device / "name")
    except OSError:
        return False


def _hwmon_channels(chip: Path) -> Iterator[Tuple[Path, Rail]]:
    """The file of each channel's label, and the rail that is still without a name."""
    for folder in sorted(chip.glob("hwmon/hwmon*")):
        for channel in _HWMON_CHANNELS:
            yield folder / f"in{channel}_label", Rail("", folder, channel, is_hwmon=True)


def _iio_channels(chip: Path) -> Iterator[Tuple[Path, Rail]]:
    for folder in sorted(chip.glob("iio:device*")):
        for channel in _IIO_CHANNELS:
            yield folder / f"rail_name_{channel}", Rail("", folder, channel, is_hwmon=False)
