"""What the ledger tells: values only, made from a tally. Unknown is None, never 0."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Dict, Mapping, NamedTuple, Optional, Sequence, Tuple

from latentd.energy.meters.reading import Quality
from latentd.energy.tally import ActivitySum, Tally

BUCKET_S = 60


class ImageEnergy(NamedTuple):
    """Joules that one classified image costs, as a mean of the recent ones; value_j and source are None when unknown."""

    value_j: Optional[float]
    quality: Quality
    source: Optional[str]


@dataclass(frozen=True)
class ActivityEnergy:
    """One activity. `count` is its images (classify) or samples (learn), 0 for idle.

    above_idle_j leaves out what the device would have drawn idle in the same time; it is None until the idle power is known, and may be
    a little below 0. per_item_j divides by covered_count, the images or samples whose joules are known.
    """

    energy_j: Optional[float]
    above_idle_j: Optional[float]
    active_s: float
    count: int
    covered_count: float
    per_item_j: Optional[float]
    per_item_above_idle_j: Optional[float]


@dataclass(frozen=True)
class RailEnergy:
    """One rail. Rails overlap (VDD_IN feeds the others): they don't add up to the total."""

    energy_j: Optional[float]
    covered_s: float
    power_w: Optional[float]


@dataclass(frozen=True)
class HistoryBucket:
    """One minute from `start_s` (unix seconds by the clock as it is set now): joules by activity, what was done, time without."""

    start_s: float
    energy_j: Optional[float]
    activities_j: Mapping[str, Optional[float]]
    images: int
    samples: int
    covered_s: float
    gap_s: float


@dataclass(frozen=True)
class MeterState:
    """The meter that serves now. reason: why none does; passed_over: meter -> why it does not serve. last_source: the one that serves, or
    served last since the start."""

    source: Optional[str] = None
    scope: Optional[str] = None
    reason: Optional[str] = "no reading yet"
    power_w: Optional[float] = None
    passed_over: Mapping[str, str] = field(default_factory=dict)
    last_source: Optional[str] = None


@dataclass(frozen=True)
class EnergyReport:
    """Everything about energy, for the life of the device or since `since_s` (unix seconds; the start of a minute).

    quality and source say where the joules come from ("a+b" when meters changed), `meter` whether there are new ones. covered_s is time
    whose joules are known, gap_s time between readings whose joules are not; joules of gaps are in no figure. energy_j is the sum of
    the activities and unattributed_j.
    """

    source: Optional[str]
    quality: Quality
    meter: MeterState
    since_s: Optional[float]
    idle_w: Optional[float]
    energy_j: Optional[float]
    above_idle_j: Optional[float]
    unattributed_j: Optional[float]
    covered_s: float
    gap_s: float
    gaps: int
    activities: Mapping[str, ActivityEnergy]
    rails: Mapping[str, RailEnergy]
    history: Tuple[HistoryBucket, ...]

    @property
    def is_up(self) -> bool:
        return self.meter.reason is None


def make_report(
    tally: Tally,
    meter: MeterState,
    idle_w: Optional[float],
    rails_w: Mapping[str, float],
    since_s: Optional[float] = None,
    history: Sequence[HistoryBucket] = (),
) -> EnergyReport:
    """The report of one tally. idle_w: watts while idle; rails_w: newest watts by rail, empty when no meter serves."""
    is_known = tally.covered_s > 0
    return EnergyReport(
        source="+".join(sorted(tally.sources)) or meter.source,
        quality=tally.quality,
        meter=meter,
        since_s=since_s,
        idle_w=idle_w,
        energy_j=tally.energy_j if is_known else None,
        above_idle_j=_above_idle_j(tally.energy_j, tally.covered_s, idle_w) if is_known else None,
        unattributed_j=tally.unattributed_j if is_known else None,
        covered_s=tally.covered_s,
        gap_s=tally.gap_s,
        gaps=tally.gaps,
        activities={kind: _activity(activity, is_known, idle_w) for kind, activity in tally.activities.items()},
        rails=_rails(tally, rails_w),
        history=tuple(history),
    )


def make_bucket(start_s: float, tally: Tally) -> HistoryBucket:
    """One minute of the history."""
    is_known = tally.covered_s > 0
    return HistoryBucket(
        start_s,
        tally.energy_j if is_known else None,
        {kind: activity.energy_j if is_known else None for kind, activity in tally.activities.items()},
        tally.activities["classify"].count,
        tally.activities["learn"].count,
        tally.covered_s,
        tally.gap_s,
    )


def _above_idle_j(energy_j: float, seconds: float, idle_w: Optional[float]) -> Optional[float]:
    return None if idle_w is None else energy_j - idle_w * seconds


def _activity(activity: ActivitySum, is_known: bool, idle_w: Optional[float]) -> ActivityEnergy:
    above_j = _above_idle_j(activity.energy_j, activity.active_s, idle_w) if is_known else None
    items = activity.covered_count
    return ActivityEnergy(
        energy_j=activity.energy_j if is_known else None,
        above_idle_j=above_j,
        active_s=activity.active_s,
        count=activity.count,
        covered_count=items,
        per_item_j=activity.energy_j / items if items > 0 else None,
        per_item_above_idle_j=above_j / items if items > 0 and above_j is not None else None,
    )


def _rails(tally: Tally, rails_w: Mapping[str, float]) -> Dict[str, RailEnergy]:
    rails = {}
    for name in sorted({*tally.rails, *rails_w}):
        spent = tally.rails.get(name)
        energy_j, covered_s = (spent.energy_j, spent.covered_s) if spent is not None else (None, 0.0)
        rails[name] = RailEnergy(energy_j, covered_s, rails_w.get(name))
    return rails
