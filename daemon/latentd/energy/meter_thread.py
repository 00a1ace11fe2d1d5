"""The meter thread: chooses a meter, reads it, feeds the ledger, and tries again when it fails.

It owns every sensor, and blocks on them; nobody waits for it. All that it learns goes to the ledger and to `temperatures_c`.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Callable, Mapping, Optional, Tuple

from latentd.config import EnergyConfig
from latentd.energy import thermal
from latentd.energy.ledger import EnergyLedger, seconds_since_boot
from latentd.energy.meters import Choice, Meter, check_names, choose_meter
from latentd.errors import MeterUnavailable

log = logging.getLogger(__name__)

RETRY_FIRST_S = 1.0
RETRY_LAST_S = 60.0
TEMPERATURES_S = 5.0

Wait = Callable[[float], bool]


class MeterThread:
    """Reads the chosen meter once a period until it is stopped.

    A meter that fails is closed, the ledger counts a gap, and all meters are tried again, in order, after 1, 2, 4 … 60 seconds; the wait
    starts over once a meter served for a minute. An unexpected error does the same, is logged with its traceback once, and counted.
    """

    def __init__(
        self,
        ledger: EnergyLedger,
        choose: Callable[[Wait], Choice],
        *,
        root: Path,
        period_s: float,
        clock: Callable[[], float] = seconds_since_boot,
    ) -> None:
        """choose: gives the meter, or none and the reasons; it gets a `wait` that ends at once when the thread is to stop."""
        self._ledger, self._choose, self._root, self._period_s, self._clock = ledger, choose, root, period_s, clock
        self._meter: Optional[Meter] = None
        self._served_from_s = 0.0
        self._retry_s, self._retry_at_s = RETRY_FIRST_S, clock()
        self._down: Tuple[str, Mapping[str, str]] = ("no meter was tried yet", {})
        self._is_known_down = False
        self._last_error = ""
        self._temperatures_due_s = clock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="meter", daemon=True)
        self.temperatures_c: Mapping[str, Optional[float]] = {}  # zone -> degrees Celsius; a new mapping every five seconds
        self.errors = 0  # unexpected errors so far

    @classmethod
    def from_config(
        cls, config: EnergyConfig, ledger: EnergyLedger, *, root: Path = Path("/"), clock: Callable[[], float] = seconds_since_boot
    ) -> MeterThread:
        """The thread for the meters that the configuration names; not yet started. Raises ConfigError for an unknown name."""
        check_names(config.meters)

        def choose(wait: Wait) -> Choice:
            return choose_meter(config.meters, root, clock=clock, wait=wait, period_s=config.period_s)

        return cls(ledger, choose, root=root, period_s=config.period_s, clock=clock)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> bool:
        """Ends the thread and gives back its meter; False where it still hangs in a sensor after `timeout_s`."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def tick(self) -> float:
        """One look at the sensors; gives the seconds to wait before the next one."""
        now_s = self._clock()
        try:
            self._read_temperatures(now_s)
            if self._meter is not None or self._open(now_s):
                self._read()
        except MeterUnavailable as cause:
            self._fail(cause.detail)
        except Exception as cause:  # noqa: BLE001  the border: whatever a sensor does, the daemon goes on without it
            self._count_error(cause)
            self._fail(f"the meter failed: {cause!r}")
        if self._meter is not None:
            return max(0.0, self._period_s - (self._clock() - now_s))
        self._ledger.unavailable(*self._down)
        return max(0.0, min(self._temperatures_due_s, self._retry_at_s) - self._clock())

    def _run(self) -> None:
        delay_s = 0.0
        while not self._stopping.wait(delay_s):
            delay_s = self.tick()
        self._close()

    def _open(self, now_s: float) -> bool:
        """Chooses a meter, if it is time to try, and tells the ledger; False when there is none."""
        if now_s < self._retry_at_s:
            return False
        choice = self._choose(self._stopping.wait)
        if choice.meter is None:
            self._back_off(choice.reason, choice.passed_over)
            return False
        self._meter, self._served_from_s, self._is_known_down = choice.meter, self._clock(), False
        self._ledger.serving(choice.meter.source, choice.meter.scope, choice.passed_over)
        log.info("energy is read from %s: %s", choice.meter.source, choice.meter.scope)
        return True

    def _read(self) -> None:
        reading = self._meter.read() if self._meter is not None else None
        if reading is not None:
            self._ledger.add(reading)

    def _fail(self, reason: str) -> None:
        if self._meter is not None and self._clock() - self._served_from_s >= RETRY_LAST_S:
            self._retry_s = RETRY_FIRST_S
        self._close()
        self._back_off(reason, {})

    def _back_off(self, reason: str, passed_over: Mapping[str, str]) -> None:
        if not self._is_known_down:
            log.warning("energy is unavailable: %s", reason)
        self._is_known_down, self._down = True, (reason, passed_over)
        self._retry_at_s = self._clock() + self._retry_s
        self._retry_s = min(RETRY_LAST_S, 2 * self._retry_s)

    def _count_error(self, error: Exception) -> None:
        self.errors += 1
        if repr(error) != self._last_error:
            log.error("the meter failed in a way that was not foreseen", exc_info=error)
        self._last_error = repr(error)

    def _read_temperatures(self, now_s: float) -> None:
        if now_s >= self._temperatures_due_s:
            self._temperatures_due_s = now_s + TEMPERATURES_S
            self.temperatures_c = thermal.read(self._root)

    def _close(self) -> None:
        meter, self._meter = self._meter, None
        if meter is not None:
            meter.close()
