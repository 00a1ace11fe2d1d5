"""Sums of joules, seconds and counts, over the life of a device or over one minute of it.

Plain values under the ledger's lock. A tally is written to disk as JSON and read back after a restart.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Dict, Mapping

from latentd.energy.marks import ACTIVITIES, IDLE, Work
from latentd.energy.meters.reading import Quality, Reading


@dataclass
class ActivitySum:
    """energy_j and active_s hold covered time only; covered_count is the part of `count` that these joules were spent on."""

    energy_j: float = 0.0
    active_s: float = 0.0
    count: int = 0
    covered_count: float = 0.0


@dataclass
class RailSum:
    energy_j: float = 0.0
    covered_s: float = 0.0


@dataclass
class Tally:
    """Invariant: energy_j is the sum of the activities' energy_j and unattributed_j, up to rounding."""

    energy_j: float = 0.0
    covered_s: float = 0.0
    estimated_s: float = 0.0  # the part of covered_s in which the meter estimated
    unattributed_j: float = 0.0
    gap_s: float = 0.0
    gaps: int = 0
    activities: Dict[str, ActivitySum] = field(default_factory=lambda: {kind: ActivitySum() for kind in (*ACTIVITIES, IDLE)})
    rails: Dict[str, RailSum] = field(default_factory=dict)
    sources: Dict[str, float] = field(default_factory=dict)  # covered seconds by meter

    @property
    def quality(self) -> Quality:
        """The worst that went into the sum."""
        if self.covered_s <= 0:
            return "unavailable"
        return "estimated" if self.estimated_s > 0 else "measured"

    def count(self, work: Work) -> None:
        """Adds what was done, whether or not its joules are known."""
        for kind, number in work.counts.items():
            self.activities[kind].count += number
            self.activities[kind].covered_count += work.covered_counts[kind]

    def spend(self, energy_j: float, passed_s: float, work: Work, reading: Reading) -> None:
        """Adds the joules of one interval, divided by the time that each activity was at work in it."""
        self.energy_j += energy_j
        self.covered_s += passed_s
        self.estimated_s += passed_s if reading.quality == "estimated" else 0.0
        self.sources[reading.source] = self.sources.get(reading.source, 0.0) + passed_s
        marked_s = sum(work.active_s.values())
        if not work.is_split or marked_s <= 0:
            self.unattributed_j += energy_j
            return
        for kind, active_s in work.active_s.items():
            self.activities[kind].energy_j += energy_j * (active_s / marked_s)
            self.activities[kind].active_s += active_s

    def miss(self, passed_s: float, *, is_new: bool) -> None:
        """Adds time whose joules are not known. is_new: it does not continue the gap before it."""
        self.gap_s += passed_s
        self.gaps += int(is_new)

    def spend_rail(self, name: str, energy_j: float, passed_s: float) -> None:
        rail = self.rails.setdefault(name, RailSum())
        rail.energy_j += energy_j
        rail.covered_s += passed_s

    def merge(self, other: Tally) -> Tally:
        """Adds all of `other` and gives itself."""
        for name in ("energy_j", "covered_s", "estimated_s", "unattributed_j", "gap_s", "gaps"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for kind, their in other.activities.items():
            own = self.activities[kind]
            own.energy_j += their.energy_j
            own.active_s += their.active_s
            own.count += their.count
            own.covered_count += their.covered_count
        for rail, spent in other.rails.items():
            self.spend_rail(rail, spent.energy_j, spent.covered_s)
        for source, covered_s in other.sources.items():
            self.sources[source] = self.sources.get(source, 0.0) + covered_s
        return self

    def as_json(self) -> Dict[str, Any]:
        """Values that JSON can carry; `from_json` reads them."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Tally:
        """The inverse of `as_json`. Raises KeyError, TypeError or ValueError where a value is missing or can't be a sum."""
        tally = cls(gaps=int(_sum(data["gaps"])))
        for name in ("energy_j", "covered_s", "estimated_s", "unattributed_j", "gap_s"):
            setattr(tally, name, _sum(data[name]))
        for kind in (*ACTIVITIES, IDLE):
            row = {name: _sum(value) for name, value in data["activities"][kind].items()}
            tally.activities[kind] = ActivitySum(row["energy_j"], row["active_s"], int(row["count"]), row["covered_count"])
        tally.rails = {str(name): RailSum(_sum(row["energy_j"]), _sum(row["covered_s"])) for name, row in data["rails"].items()}
        tally.sources = {str(name): _sum(value) for name, value in data["sources"].items()}
        return tally


def _sum(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{value!r} is not a sum")
    return float(value)
