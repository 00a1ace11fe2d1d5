"""How long a piece of work takes and what power it draws: warmed up, repeated inside a box of time, the median. Blocks its caller."""

from __future__ import annotations

import statistics
import time
from typing import Callable, List, NamedTuple, Optional

from latentd.energy.joulemeter import Joulemeter

LEAST = 3
MOST = 1000


class Timing(NamedTuple):
    """seconds: median of `repetitions`. power_w: mean while they ran, None where no meter could tell."""

    seconds: float
    repetitions: int
    power_w: Optional[float]

    @property
    def energy_j(self) -> Optional[float]:
        return None if self.power_w is None else self.power_w * self.seconds


class Stopwatch:
    """box_s: time that one measurement takes, unless three repetitions take longer."""

    def __init__(self, box_s: float, joulemeter: Joulemeter, clock: Callable[[], float] = time.perf_counter) -> None:
        self.box_s = box_s
        self.joulemeter = joulemeter
        self._clock = clock

    def time(self, work: Callable[[], object]) -> Timing:
        """Once to warm up, then at least three times and until the box is full. What `work` raises passes through."""
        work()
        taken: List[float] = []
        with self.joulemeter.stretch() as stretch:
            end = self._clock() + self.box_s
            while len(taken) < LEAST or (self._clock() < end and len(taken) < MOST):
                started = self._clock()
                work()
                taken.append(self._clock() - started)
        return Timing(statistics.median(taken), len(taken), stretch.power_w)
