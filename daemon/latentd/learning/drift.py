"""Drift: whether new images of an old class stop looking like it. Owned by the learner thread; nothing blocks.

What comes in is the likeness (learning/unknown.py) of each taught image to the class it was taught as, before it was learned. Images of
one lesson are alike, so a lesson counts once, with its mean. For each class a self-starting CUSUM (Hawkins 1987) compares each lesson with
those before it: under no drift its steps are about standard normal from MIN_LESSONS lessons on, whatever the class's own mean and spread,
so that the rate of false alarms is known. Simulated with independent normal lessons (a test repeats it): one in about 5,000 lessons of a
class in its first thousand, one in 8,000 over the first three thousand; with lessons as skewed as a gamma distribution of shape 2, one in
2,000. After thirty lessons a shift of three standard deviations is found within five more, one of two within seven, one of a single
standard deviation within sixteen or, a quarter of the time, never; a slow drift of a hundredth each lesson within a hundred. What stays
changed becomes the new normal after about two hundred lessons, and the alarm ends.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, Optional

from latentd.replay.records import sample_id_of

MIN_LESSONS = 6  # before that nobody knows what is usual for the class
LESSON_SAMPLES = 16  # a longer run of one class is several lessons
LEAST_SHARE = 0.01  # of one lesson in what is usual: older ones fade
SLACK = 0.5  # standard deviations a lesson that are no drift
ALARM = 7.0  # sum of standard deviations beyond the slack
SUSPICION = 0.5  # share of that from which lessons stay out of what is usual, until it is decided
LARGEST = 2.0  # what one lesson counts at most: a few alone are no drift
_LEAST_SPREAD = 1e-3  # of likeness: pictures that are all the same have none


@dataclass(frozen=True)
class Drift:
    """score: 1 and more is an alarm. since_sample: the taught sample with which the images began to look different; None at score 0."""

    score: float
    since_sample: Optional[str]
    drifting: bool


@dataclass
class _Track:
    """What is usual for a class, and how far the last lessons fall behind it."""

    lessons: int = 0
    mean: float = 0.0
    variance: float = 0.0
    doubt: float = 1.0  # of the mean: one over the number of lessons that it is worth
    fall: float = 0.0
    since: int = 0

    def take(self, likeness: float, seq: int) -> None:
        """One lesson: its mean likeness, and its first sample's number in the log."""
        if self.lessons >= MIN_LESSONS:
            spread = max(_LEAST_SPREAD, math.sqrt(self.variance / (1 - self.doubt)))
            before, step = self.fall, _normal((self.mean - likeness) / (spread * math.sqrt(1 + self.doubt)), 1 / self.doubt - 1)
            self.fall = min(max(0.0, self.fall + min(step, LARGEST) - SLACK), 2 * ALARM)
            self.since = seq if before == 0.0 else self.since
            if SUSPICION * ALARM <= self.fall < ALARM:
                return
            likeness = min(max(likeness, self.mean - LARGEST * spread), self.mean + LARGEST * spread)
        self._add(likeness)

    def _add(self, likeness: float) -> None:
        """Counts a lesson as usual. Later ones weigh more: the class was known less well when the first were looked at."""
        self.lessons += 1
        share, change = max(2 / (self.lessons + 1), LEAST_SHARE), likeness - self.mean
        self.mean += share * change
        self.variance = (1 - share) * (self.variance + share * change**2)
        self.doubt = (1 - share) ** 2 * self.doubt + share**2


class DriftWatch:
    """One track a class, and the lesson that is open: a run of samples of one class."""

    def __init__(self) -> None:
        self._tracks: Dict[int, _Track] = {}
        self._class = -1
        self._first = 0
        self._sum = 0.0
        self._count = 0

    def observe(self, class_id: int, seq: int, likeness: float) -> None:
        """One taught sample, in the order of the log."""
        if self._count and (class_id != self._class or self._count == LESSON_SAMPLES):
            self._close()
        if not self._count:
            self._class, self._first = class_id, seq
        self._sum += likeness
        self._count += 1

    def of(self, class_id: int) -> Optional[Drift]:
        """None while the class has had too few lessons."""
        track = self._tracks.get(class_id)
        if track is None or track.lessons <= MIN_LESSONS:
            return None
        return Drift(track.fall / ALARM, sample_id_of(track.since) if track.fall else None, track.fall >= ALARM)

    def forget_class(self, class_id: int) -> None:
        self._tracks.pop(class_id, None)
        if self._class == class_id:
            self._sum, self._count = 0.0, 0

    def state(self) -> Dict[str, Any]:
        """JSON-able; exact."""
        tracks = [[key, *dataclasses.astuple(each)] for key, each in self._tracks.items()]
        return {"tracks": tracks, "open": [self._class, self._first, self._sum, self._count]}

    def restore(self, state: Mapping[str, Any]) -> None:
        rows: List[List[Any]] = state["tracks"]
        self._tracks = {int(key): _Track(*values) for key, *values in rows}
        self._class, self._first, self._sum, self._count = state["open"]

    def _close(self) -> None:
        self._tracks.setdefault(self._class, _Track()).take(self._sum / self._count, self._first)
        self._sum, self._count = 0.0, 0


def _normal(value: float, freedom: float) -> float:
    """The standard normal quantile of a Student t value (Wallace 1959; within 0.02 from about four degrees of freedom on)."""
    scale = (8 * freedom + 1) / (8 * freedom + 3) * math.sqrt(freedom * math.log1p(value * value / freedom))
    return math.copysign(scale, value)
