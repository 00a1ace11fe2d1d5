"""From readings to joules: the trapezoid over powers, the difference of counters, and what the device draws when idle.

Plain values under the ledger's lock.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Optional

# More than any machine that this runs on can draw: a larger figure is a counter that was set back, or a sensor gone mad.
MAX_POWER_W = 20_000.0

IDLE_MEMORY_S = 600.0
IDLE_LEAST_S = 5.0


class Point(NamedTuple):
    at_s: float
    power_w: Optional[float]
    energy_j: Optional[float]


class Integral:
    """Joules between one reading and the next, of the total or of one rail."""

    def __init__(self) -> None:
        self._last: Optional[Point] = None

    def step(self, point: Point, gap_s: float) -> Optional[float]:
        """Joules since the previous point; None for the first, after more than `gap_s` seconds, and where the figures make no sense."""
        last, self._last = self._last, point
        passed_s = point.at_s - last.at_s if last is not None else 0.0
        if last is None or not 0 < passed_s <= gap_s:
            return None
        energy_j = _between(last, point, passed_s)
        return energy_j if energy_j is not None and 0 <= energy_j <= MAX_POWER_W * passed_s else None


def _between(last: Point, point: Point, passed_s: float) -> Optional[float]:
    if last.energy_j is not None and point.energy_j is not None:
        return point.energy_j - last.energy_j
    if last.power_w is not None and point.power_w is not None:
        return (last.power_w + point.power_w) / 2 * passed_s
    return None


class IdlePower:
    """The mean power measured while no work was marked, over about the last ten idle minutes.

    Older idle time fades (time constant IDLE_MEMORY_S), so that a change of power mode or the load of starting up is forgotten.
    Only intervals without any mark count: in a mixed one the power can't be told apart.
    """

    def __init__(self) -> None:
        self._energy_j = self._seconds = 0.0

    def add(self, energy_j: float, passed_s: float) -> None:
        kept = math.exp(-passed_s / IDLE_MEMORY_S)
        self._energy_j = self._energy_j * kept + energy_j
        self._seconds = self._seconds * kept + passed_s

    @property
    def power_w(self) -> Optional[float]:
        """Watts; None before IDLE_LEAST_S seconds of idle time were seen."""
        return self._energy_j / self._seconds if self._seconds >= IDLE_LEAST_S else None
