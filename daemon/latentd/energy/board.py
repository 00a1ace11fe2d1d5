"""How fast the board may run now: power mode, clocks, and whether it holds itself back.

Stateless; the meter thread calls it every few seconds. Small kernel and configuration files, no process: nvpmodel keeps the mode in a
file, and asking the program itself costs a fork and, without root, a page of complaints. Nothing here changes a setting.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Dict, Iterator, Mapping, NamedTuple, Optional, Tuple

from latentd.energy import sysfs
from latentd.energy.meters import ina3221

_MODE_FILE = "var/lib/nvpmodel/status"  # "pmode:0002", written whenever the mode is set; absent while it never was
_MODES_FILE = "etc/nvpmodel.conf"
_GPUS = ("gp10b", "gv11b", "ga10b")  # integrated GPUs of TX2, Xavier and Orin, as the device tree names them
_LOADS = ("sys/devices/gpu.0/load", "sys/devices/platform/gpu.0/load")
_HOLDS_BACK = re.compile(
    r"cpu|gpu|processor|devfreq|throttle|balanced|powerclamp|g[pva]1.b", re.IGNORECASE
)  # not fans, displays, batteries
_LIMITS = ("crit", "max")
UNKNOWN: Mapping[str, Optional[Tuple[str, ...]]] = {"thermal": None, "over-current": None}


class Clock(NamedTuple):
    """Hertz now, and the most that mode and governor allow; None where the kernel does not tell."""

    now_hz: Optional[float]
    limit_hz: Optional[float]


class Board(NamedTuple):
    """power_mode: a Jetson's, by nvpmodel's name. clocks: "cpu" (its fastest core) and "gpu". throttled: cause ("thermal", "over-current")
    -> what is held back; empty while nothing is, None where nothing tells. over_current_events: since boot; only Orin counts them.
    """

    power_mode: Optional[str] = None
    cores_online: Optional[int] = None
    clocks: Mapping[str, Clock] = {}
    gpu_load_ratio: Optional[float] = None
    throttled: Mapping[str, Optional[Tuple[str, ...]]] = UNKNOWN
    over_current_events: Optional[int] = None

    @property
    def held_back(self) -> Mapping[str, Tuple[str, ...]]:
        """What is throttled, by cause, without causes that are absent or unknown."""
        return {cause: what for cause, what in self.throttled.items() if what}


def read(root: Path) -> Board:
    """The board under `root`, the filesystem that holds etc, sys and var."""
    load = next((value for value in (_number(root / path) for path in _LOADS) if value is not None), None)
    return Board(
        power_mode=power_mode(root),
        cores_online=_cores(root),
        clocks=dict(_clocks(root)),
        gpu_load_ratio=None if load is None else min(1.0, load / 1000),
        throttled={"thermal": _cooling(root), "over-current": _over_current(root)},
        over_current_events=_over_current_events(root),
    )


def power_mode(root: Path) -> Optional[str]:
    """The mode's name, or its number where nvpmodel.conf does not name it; None where there is no nvpmodel."""
    modes = _text(root / _MODES_FILE)
    set_to = re.search(r"pmode:0*(\d+)", _text(root / _MODE_FILE)) or re.search(r"<\s*PM_CONFIG\s+DEFAULT=0*(\d+)\s*>", modes)
    if set_to is None:
        return None
    named = re.search(rf"<\s*POWER_MODEL\s+ID=0*{set_to.group(1)}\s+NAME=(\S+?)\s*>", modes)
    return named.group(1) if named else f"mode {set_to.group(1)}"


def _clocks(root: Path) -> Iterator[Tuple[str, Clock]]:
    policies = sorted((root / "sys/devices/system/cpu/cpufreq").glob("policy*"))
    cpu = [_clock(policy / "scaling_cur_freq", policy / "scaling_max_freq", 1e3) for policy in policies]
    running = [clock for clock in cpu if clock.now_hz is not None]
    if running:
        yield "cpu", max(running, key=lambda clock: clock.now_hz or 0.0)
    for device in sorted((root / "sys/class/devfreq").glob("*")):
        if _text(device / "device/of_node/name") in _GPUS or any(device.name.endswith(f".{name}") for name in _GPUS):
            yield "gpu", _clock(device / "cur_freq", device / "max_freq", 1.0)
            return


def _clock(now: Path, limit: Path, unit_hz: float) -> Clock:
    values = (_number(now), _number(limit))
    return Clock(*(None if value is None else value * unit_hz for value in values))


def _cores(root: Path) -> Optional[int]:
    """How many of "0-3,5"; the modes of a Jetson switch some off."""
    text = _text(root / "sys/devices/system/cpu/online")
    spans = re.findall(r"(\d+)(?:-(\d+))?", text)
    return sum(int(last or first) - int(first) + 1 for first, last in spans) or None


def _cooling(root: Path) -> Optional[Tuple[str, ...]]:
    """Cooling devices at work that slow something down; None where there is none that tells."""
    states: Dict[str, bool] = {}
    for device in sorted((root / "sys/class/thermal").glob("cooling_device*")):
        kind, state = _text(device / "type"), _number(device / "cur_state")
        if state is not None and _HOLDS_BACK.search(kind) and "fan" not in kind.lower():
            most = _number(device / "max_state")
            states[f"{kind} at {state:.0f}" + (f" of {most:.0f}" if most is not None else "")] = state > 0
    return tuple(text for text, is_at_work in states.items() if is_at_work) if states else None


def _over_current(root: Path) -> Optional[Tuple[str, ...]]:
    """Rails of an INA3221 that draw more than a limit of theirs; the board then slows down by itself. None where no rail tells.

    Not from the chip's alarms: they are bits of one register, all of which are cleared when any is read, and also by waiting for the next
    conversion, as every reading of a current does.
    """
    rails = [rail for rail in ina3221.discover(root).rails if rail.is_hwmon]
    over = {rail.name: _is_over(rail) for rail in rails}
    known = {name: is_over for name, is_over in over.items() if is_over is not None}
    return tuple(name for name, is_over in known.items() if is_over) if known else None


def _is_over(rail: ina3221.Rail) -> Optional[bool]:
    current_ma, *limits = (_number(rail.folder / f"curr{rail.channel}_{name}") for name in ("input", *_LIMITS))
    known = [limit_ma for limit_ma in limits if limit_ma is not None and limit_ma > 0]
    return current_ma > min(known) if current_ma is not None and known else None


def _over_current_events(root: Path) -> Optional[int]:
    counters = (root / "sys/class/hwmon").glob("hwmon*/oc*_event_cnt")
    counts = [count for count in map(_number, counters) if count is not None]
    return int(sum(counts)) if counts else None


def _number(path: Path) -> Optional[float]:
    try:
        return sysfs.read_number(path)
    except OSError:
        return None


def _text(path: Path) -> str:
    try:
        return sysfs.read_text(path)
    except OSError:
        return ""
