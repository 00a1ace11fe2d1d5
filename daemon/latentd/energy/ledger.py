"""The energy ledger: where the joules went, by activity, rail, image and learned sample.

The meter thread writes readings; any thread marks its work; any thread asks for reports. One lock, held for sums only (microseconds for a
mark, well under a millisecond for a reading); nothing here blocks on a sensor or a file.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from dataclasses import replace
from itertools import takewhile
from types import TracebackType
from typing import Any, Callable, Deque, Dict, List, Mapping, Optional, Tuple, Type

from latentd.energy.integral import IdlePower, Integral, Point
from latentd.energy.marks import ACTIVITIES, Mark, Marks
from latentd.energy.meters.reading import RAIL_PERIOD_S, Reading
from latentd.energy.report import BUCKET_S, EnergyReport, HistoryBucket, ImageEnergy, MeterState, make_bucket, make_report
from latentd.energy.tally import Tally
from latentd.errors import ConfigError

log = logging.getLogger(__name__)

HISTORY_BUCKETS = 24 * 60
RECENT_S = 600  # image_energy is a mean over about this time

_UNKNOWN_IMAGE = ImageEnergy(None, "unavailable", None)


def seconds_since_boot() -> float:
    """A clock that never jumps and, unlike time.monotonic, goes on while the device is suspended: a suspend shows as a gap."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Activity:
    """The context manager that marks one piece of work; its images or samples count as done only if the body ends without an exception."""

    __slots__ = ("_ledger", "_mark")

    def __init__(self, ledger: EnergyLedger, mark: Mark) -> None:
        self._ledger, self._mark = ledger, mark

    def __enter__(self) -> None:
        self._ledger._begin(self._mark)

    def __exit__(self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]) -> None:
        self._ledger._end(self._mark, self._mark.count if kind is None else 0)


class EnergyLedger:
    """Joules since the device began to count, and minute by minute for the last 24 hours.

    - Between two readings the mean power counts for the whole time: powers are integrated by trapezoid, counters by difference. Each moment
      is divided equally between the marks open in it; a moment without a mark is idle.
    - Time between readings longer than `gap_s`, or in which the meter failed, is a gap: counted in seconds, never bridged. Images that
      were classified in a gap are counted, but take no part in the joules an image.
    - Invariant: total = classify + learn + idle + unattributed (joules whose marks were lost because the meter thread hung).
    """

    def __init__(
        self,
        *,
        period_s: float = 0.2,
        gap_s: float = 2.0,
        clock: Callable[[], float] = seconds_since_boot,
        wall: Callable[[], float] = time.time,
        carried: Optional[Mapping[str, Any]] = None,
    ) -> None:
        """period_s: time between readings. clock: as the meters'. wall: unix seconds, may jump. carried: `totals()` of the run before.

        Raises ConfigError where each interval would be a gap. Totals that can't be read are logged and left behind.
        """
        if gap_s <= period_s:
            raise ConfigError(
                f"energy.gap_s ({gap_s:g}) is not longer than energy.period_s ({period_s:g})", hint="Each reading would be a gap."
            )
        self._gap_s, self._clock, self._wall = gap_s, clock, wall
        self._lock = threading.Lock()
        self._marks = Marks(clock())
        self._life = _carried(carried)
        self._minutes: Deque[Tuple[int, Tally]] = deque(maxlen=HISTORY_BUCKETS)
        self._idle = IdlePower()
        self._meter = MeterState()
        self._counted_s: Optional[float] = None  # all before it is in the sums, as joules or as a gap; None before the first reading
        self._in_gap = False
        self._image = _UNKNOWN_IMAGE
        self._forget_readings()

    # --- any thread ---------------------------------------------------------------------------------------------------

    def activity(self, kind: str, *, images: int = 0, samples: int = 0) -> Activity:
        """Marks the body of a `with` as "classify" (of so many images) or "learn" (of so many samples); costs some microseconds."""
        assert kind in ACTIVITIES, f"{kind!r} is none of the activities {ACTIVITIES}"
        return Activity(self, Mark(kind, images + samples))

    def image_energy(self) -> ImageEnergy:
        """Joules that one image costs: the mean over the last ten minutes, or else over all. Takes no lock."""
        return self._image if self._stale_s() is None else _UNKNOWN_IMAGE

    @property
    def power_w(self) -> Optional[float]:
        """Watts of the total in the newest reading; None when there is no fresh one."""
        return self._meter.power_w if self._stale_s() is None else None

    def report(self, since: Optional[float] = None) -> EnergyReport:
        """All sums since the device began to count, without history; or those of the minutes from `since` (unix seconds) on, with them.

        The first minute is the one that `since` falls into. An interval belongs to the minute in which it ends.
        """
        with self._lock:
            minutes = list(self._minutes)
            if minutes:  # closed minutes never change again; the newest does
                minutes[-1] = (minutes[-1][0], Tally().merge(minutes[-1][1]))
            life, idle_w, rails_w = Tally().merge(self._life), self._idle.power_w, dict(self._rails_w)
        meter = self._fresh_meter()
        rails_w = rails_w if meter.reason is None else {}
        if since is None:
            return make_report(life, meter, idle_w, rails_w)
        tally, history = self._window(minutes, since)
        return make_report(tally, meter, idle_w, rails_w, history[0].start_s if history else None, history)

    def recent(self, seconds: float) -> EnergyReport:
        """The sums of the minutes that this last stretch of time falls into, by the clock that never jumps."""
        return self.report(self._wall() - seconds)

    def totals(self) -> Dict[str, Any]:
        """The sums as JSON values, to be kept over a restart and given to the next ledger as `carried`."""
        with self._lock:
            return self._life.as_json()

    def _begin(self, mark: Mark) -> None:
        with self._lock:
            self._marks.begin(mark, self._clock())

    def _end(self, mark: Mark, count: int) -> None:
        with self._lock:
            self._marks.end(mark, self._clock(), count)

    # --- the meter thread ---------------------------------------------------------------------------------------------

    def serving(self, source: str, scope: str, passed_over: Mapping[str, str]) -> None:
        """A meter was chosen; its readings follow. The time since the last one of another meter is not bridged."""
        with self._lock:
            self._forget_readings()
            self._idle = self._idle if self._life.sources.keys() <= {source} else IdlePower()
            self._meter = MeterState(source, scope, "no reading yet", None, dict(passed_over), source)

    def unavailable(self, reason: str, passed_over: Optional[Mapping[str, str]] = None) -> None:
        """No meter can be read now: what is not counted yet becomes a gap, unless no meter ever served."""
        with self._lock:
            self._forget_readings()
            self._meter = MeterState(reason=reason, passed_over=dict(passed_over or {}), last_source=self._meter.last_source)
            self._image = _UNKNOWN_IMAGE
            self._count(self._clock(), None, None)
            self._in_gap = self._counted_s is not None

    def add(self, reading: Reading) -> None:
        """Takes a reading; one that is not newer than the last is ignored."""
        with self._lock:
            counted_s = self._counted_s
            if counted_s is not None and reading.at_s <= counted_s:
                return
            point = Point(reading.at_s, reading.power_w, reading.energy_j)
            energy_j = self._total.step(point, self._gap_s)
            self._count(reading.at_s, energy_j, reading)
            self._counted_s, self._in_gap = reading.at_s, False
            self._add_rails(reading)
            mean_w = energy_j / (reading.at_s - counted_s) if energy_j is not None and counted_s is not None else None
            power_w = reading.power_w if reading.power_w is not None else mean_w
            self._meter = MeterState(reading.source, self._meter.scope, None, power_w, self._meter.passed_over, reading.source)
            self._image = self._mean_image(reading.source)

    def _count(self, until_s: float, energy_j: Optional[float], reading: Optional[Reading]) -> None:
        """Closes the interval up to `until_s`: as joules, as a gap, or, before the first reading, as neither."""
        passed_s = until_s - self._counted_s if self._counted_s is not None else 0.0
        work = self._marks.close(until_s, covered=energy_j is not None)
        for tally in (self._life, self._minute(until_s)):
            tally.count(work)
            if energy_j is not None and reading is not None:
                tally.spend(energy_j, passed_s, work, reading)
            elif self._counted_s is not None:
                tally.miss(passed_s, is_new=not self._in_gap)
        if energy_j is not None and work.is_idle:
            self._idle.add(energy_j, passed_s)
        if self._counted_s is not None:
            self._counted_s = until_s

    def _add_rails(self, reading: Reading) -> None:
        self._rails_w.update(reading.rails_w)
        points = {name: Point(reading.at_s, power_w, None) for name, power_w in reading.rails_w.items()}
        points.update({name: Point(reading.at_s, None, energy_j) for name, energy_j in reading.rails_j.items()})
        for name, point in points.items():
            rail_s = reading.at_s - self._rails_read_s.get(name, reading.at_s)
            energy_j = self._rails.setdefault(name, Integral()).step(point, self._gap_s + RAIL_PERIOD_S)
            self._rails_read_s[name] = reading.at_s
            if energy_j is not None:
                self._life.spend_rail(name, energy_j, rail_s)
                self._minute(reading.at_s).spend_rail(name, energy_j, rail_s)

    def _forget_readings(self) -> None:
        self._total = Integral()
        self._rails: Dict[str, Integral] = {}
        self._rails_read_s: Dict[str, float] = {}
        self._rails_w: Dict[str, float] = {}

    # --- under the lock, or on values that don't change any more ------------------------------------------------------

    def _minute(self, at_s: float) -> Tally:
        number = int(at_s // BUCKET_S)
        if not self._minutes or self._minutes[-1][0] < number:
            self._minutes.append((number, Tally()))
        return self._minutes[-1][1]

    def _mean_image(self, source: str) -> ImageEnergy:
        oldest = self._minutes[-1][0] - RECENT_S // BUCKET_S
        recent = [tally for _, tally in takewhile(lambda minute: minute[0] >= oldest, reversed(self._minutes))]
        for tallies in (recent, [self._life]):
            images = sum(tally.activities["classify"].covered_count for tally in tallies)
            if images > 0:
                energy_j = sum(tally.activities["classify"].energy_j for tally in tallies)
                is_estimated = any(tally.quality == "estimated" for tally in tallies)
                return ImageEnergy(energy_j / images, "estimated" if is_estimated else "measured", source)
        return _UNKNOWN_IMAGE

    def _stale_s(self) -> Optional[float]:
        """Seconds since the last reading when that is too long ago; None when it is fresh, or when the meter's own reason says more."""
        counted_s = self._counted_s
        silent_s = self._clock() - counted_s if counted_s is not None else 0.0
        return silent_s if silent_s > self._gap_s else None

    def _fresh_meter(self) -> MeterState:
        meter, stale_s = self._meter, self._stale_s()
        if meter.reason is not None or stale_s is None:
            return meter
        return replace(meter, reason=f"no reading for {stale_s:.0f} s", power_w=None)

    def _window(self, minutes: List[Tuple[int, Tally]], since: float) -> Tuple[Tally, List[HistoryBucket]]:
        """Minutes are numbered by the clock that never jumps and dated now, so that setting the device's clock dates them anew."""
        boot = self._wall() - self._clock()
        chosen = [(number * BUCKET_S + boot, tally) for number, tally in minutes if (number + 1) * BUCKET_S + boot > since]
        window = Tally()
        for _, tally in chosen:
            window.merge(tally)
        return window, [make_bucket(start_s, tally) for start_s, tally in chosen]


def _carried(totals: Optional[Mapping[str, Any]]) -> Tally:
    try:
        return Tally.from_json(totals) if totals else Tally()
    except (AttributeError, KeyError, TypeError, ValueError):
        log.warning("the energy totals of the run before can't be read; counting starts at zero", exc_info=True)
        return Tally()
