"""The power drawn during one piece of work: for programs that measure, beside the daemon's ledger.

Whoever opens a Joulemeter owns its sensors. While a stretch runs, a thread of its own reads them, and nobody else does; beginning and
ending a stretch waits for one reading (milliseconds, with tegrastats up to one period).
"""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterator, Optional, Tuple

from latentd.config import EnergyConfig
from latentd.energy.integral import Integral, Point
from latentd.energy.ledger import seconds_since_boot
from latentd.energy.meters import Choice, Meter, Quality, choose_meter
from latentd.errors import MeterUnavailable

LEAST_S = 0.5  # a shorter stretch is over before most sensors have a new value
LEAST_COVERED = 0.5  # share of a stretch that readings must cover
IDLE_S = 3.0
_FIRST_READING_S = 5.0


class Stretch:
    """One piece of work. After its end: mean power in watts over the part that readings cover, or None and the reason."""

    def __init__(self) -> None:
        self.power_w: Optional[float] = None
        self.reason = "the work is not finished"


class Joulemeter:
    """The first configured meter that reads, or none with the reason; see the module docstring."""

    def __init__(self, choice: Choice, *, period_s: float, gap_s: float, clock: Callable[[], float] = seconds_since_boot) -> None:
        self._meter: Optional[Meter] = choice.meter
        self._period_s, self._gap_s, self._clock = period_s, gap_s, clock
        self.source = choice.meter.source if choice.meter is not None else None
        self.scope = choice.meter.scope if choice.meter is not None else None
        self.reason = None if choice.meter is not None else choice.reason
        self.quality: Quality = "unavailable"
        self.idle_power_w: Optional[float] = None

    @classmethod
    def from_config(cls, config: EnergyConfig, *, root: Path = Path("/"), clock: Callable[[], float] = seconds_since_boot) -> Joulemeter:
        """Tries the configured meters, which may take seconds. Raises ConfigError for an unknown name."""

        def wait(seconds: float) -> bool:
            time.sleep(seconds)
            return False

        choice = choose_meter(config.meters, root, clock=clock, wait=wait, period_s=config.period_s)
        return cls(choice, period_s=config.period_s, gap_s=config.gap_s, clock=clock)

    def measure_idle(self, wait: Callable[[float], object] = time.sleep) -> None:
        """What the device draws while this program does nothing: waits for some seconds, if there is a meter."""
        if self._meter is not None:
            with self.stretch() as stretch:
                wait(IDLE_S)
            self.idle_power_w = stretch.power_w

    @contextmanager
    def stretch(self) -> Iterator[Stretch]:
        """Measures the body of a `with`. Never raises because of a sensor."""
        stretch = Stretch()
        if self._meter is None:
            stretch.reason = str(self.reason)
            yield stretch
            return
        watch = _Watch(self._meter, self._period_s, self._gap_s, self._clock)
        watch.start()
        watch.begun.wait(_FIRST_READING_S)
        try:
            yield stretch
        finally:
            ended_s = self._clock()
            watch.ended.set()
            watch.join(_FIRST_READING_S)
            stretch.power_w, stretch.reason = watch.verdict(ended_s)
            self.quality = watch.quality

    def close(self) -> None:
        if self._meter is not None:
            self._meter.close()
            self._meter, self.reason = None, "the meter was closed"


class _Watch(threading.Thread):
    """Reads the meter from the begin to the end of one stretch. begun: set after the first reading; ended: set by who waits for the end."""

    def __init__(self, meter: Meter, period_s: float, gap_s: float, clock: Callable[[], float]) -> None:
        super().__init__(name="joulemeter", daemon=True)
        self._meter, self._period_s, self._gap_s, self._clock = meter, period_s, gap_s, clock
        self.begun, self.ended = threading.Event(), threading.Event()
        self._began_s = 0.0
        self._integral = Integral()
        self._last_s: Optional[float] = None
        self._energy_j = self._covered_s = 0.0
        self._failure = ""
        self.quality: Quality = "unavailable"

    def run(self) -> None:
        try:
            self._read()
            self._began_s = self._clock()
            self.begun.set()
            while not self.ended.wait(self._period_s):
                self._read()
            self._read()
        except MeterUnavailable as cause:
            self._failure = cause.detail
            self.begun.set()

    def verdict(self, ended_s: float) -> Tuple[Optional[float], str]:
        """Mean power in watts, or None and the reason."""
        if self._failure or self.is_alive():
            return None, self._failure or "the meter hangs"
        passed_s = ended_s - self._began_s
        if passed_s < LEAST_S or self._covered_s < LEAST_COVERED * passed_s:
            return None, f"readings cover {self._covered_s:.1f} of {passed_s:.1f} seconds, which is too little"
        return self._energy_j / self._covered_s, ""

    def _read(self) -> None:
        reading = self._meter.read()
        if reading is None:
            return
        self.quality = reading.quality
        energy_j = self._integral.step(Point(reading.at_s, reading.power_w, reading.energy_j), self._gap_s)
        if energy_j is not None and self._last_s is not None:
            self._energy_j += energy_j
            self._covered_s += reading.at_s - self._last_s
        self._last_s = reading.at_s
