"""The meter thread: chooses a meter, reads it, feeds the ledger, and tries again when it fails.

It owns every sensor, and blocks on them; nobody waits for it. All that it learns goes to the ledger, to `temperatures_c`, `board` and
`battery_charge`. A sensor may hang for ever, and this thread with it: what it last said is known for KNOWN_S, and unknown from then on.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Callable, Mapping, NamedTuple, Optional, Tuple

from latentd.config import EnergyConfig
from latentd.energy import battery, board, thermal
from latentd.energy.board import Board
from latentd.energy.ledger import EnergyLedger, seconds_since_boot
from latentd.energy.meters import Choice, Meter, Reading, check_names, choose_meter
from latentd.errors import MeterUnavailable

log = logging.getLogger(__name__)

RETRY_FIRST_S = 1.0
RETRY_LAST_S = 60.0
BETTER_S = 300.0  # how often a meter that comes earlier in the configured order is tried again
TEMPERATURES_S = 5.0  # between two looks at temperatures, clocks and throttling
KNOWN_S = 30.0  # what a look found; opening a meter takes seconds, and no look comes meanwhile

Wait = Callable[[float], bool]


class Look(NamedTuple):
    """What was found at one time. temperatures_c: zone -> degrees Celsius. limits_c: zone -> what thermal.limits_c says of it."""

    at_s: float = 0.0
    temperatures_c: Mapping[str, Optional[float]] = {}
    limits_c: Mapping[str, float] = {}
    board: Board = Board()
    battery_charge: Optional[float] = None


class MeterThread:
    """Reads the chosen meter once a period until it is stopped.

    A meter that fails is closed, the ledger counts a gap, and all meters are tried again, in order, after 1, 2, 4 … 60 seconds; the wait
    starts over once a meter served for a minute. An unexpected error does the same, is logged with its traceback once, and counted.
    A sensor that was passed over may come back (a driver loaded late, a file made readable): those before the one that serves are tried
    again every five minutes.
    """

    def __init__(
        self,
        ledger: EnergyLedger,
        choose: Callable[[Wait], Choice],
        *,
        root: Path,
        period_s: float,
        clock: Callable[[], float] = seconds_since_boot,
        choose_better: Optional[Callable[[Wait, str], Choice]] = None,
    ) -> None:
        """choose: gives the meter, or none and the reasons; it gets a `wait` that ends at once when the thread is to stop. choose_better:
        the same among those that come before a source.
        """
        self._ledger, self._choose, self._root, self._period_s, self._clock = ledger, choose, root, period_s, clock
        self._choose_better, self._better_due_s = choose_better, clock()
        self._meter: Optional[Meter] = None
        self._newest: Optional[Reading] = None  # of the meter that serves
        self._served_from_s = 0.0
        self._retry_s, self._retry_at_s = RETRY_FIRST_S, clock()
        self._down: Tuple[str, Mapping[str, str]] = ("no meter was tried yet", {})
        self._is_known_down = False
        self._last_error = ""
        self._temperatures_due_s = clock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="meter", daemon=True)
        self._look = Look()  # a new one every five seconds
        self.errors = 0  # unexpected errors so far

    @classmethod
    def from_config(
        cls, config: EnergyConfig, ledger: EnergyLedger, *, root: Path = Path("/"), clock: Callable[[], float] = seconds_since_boot
    ) -> MeterThread:
        """The thread for the meters that the configuration names; not yet started. Raises ConfigError for an unknown name."""
        check_names(config.meters)

        def choose(wait: Wait) -> Choice:
            return choose_meter(config.meters, root, clock=clock, wait=wait, period_s=config.period_s)

        def choose_better(wait: Wait, source: str) -> Choice:
            before = config.meters[: config.meters.index(source)]
            return choose_meter(before, root, clock=clock, wait=wait, period_s=config.period_s)

        return cls(ledger, choose, root=root, period_s=config.period_s, clock=clock, choose_better=choose_better)

    @property
    def temperatures_c(self) -> Mapping[str, Optional[float]]:
        """Zone -> degrees Celsius, None where nobody knows; any thread, as those below."""
        look = self._look
        return look.temperatures_c if self._is_known(look) else dict.fromkeys(look.temperatures_c)

    @property
    def limits_c(self) -> Mapping[str, float]:
        """Zone -> degrees Celsius that it should not pass; nothing of a zone without a limit. They don't change, so they stay known."""
        return self._look.limits_c

    @property
    def board(self) -> Board:
        look = self._look
        return look.board if self._is_known(look) else Board()

    @property
    def battery_charge(self) -> Optional[float]:
        look = self._look
        return look.battery_charge if self._is_known(look) else None

    def _is_known(self, look: Look) -> bool:
        return self._clock() - look.at_s <= KNOWN_S

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
            self._look_at_board(now_s)
            self._return_to_better(now_s)
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
        choice = self._counted(self._choose(self._stopping.wait))
        if choice.meter is None:
            self._back_off(choice.reason, choice.passed_over)
            return False
        self._serve(choice.meter, choice.passed_over)
        return True

    def _serve(self, meter: Meter, passed_over: Mapping[str, str]) -> None:
        self._meter, self._served_from_s, self._is_known_down = meter, self._clock(), False
        self._better_due_s = self._served_from_s + BETTER_S
        self._ledger.serving(meter.source, meter.scope, passed_over)
        log.info("energy is read from %s: %s", meter.source, meter.scope)

    def _return_to_better(self, now_s: float) -> None:
        """Lets a meter that comes before the one that serves take over, if it reads now."""
        if self._meter is None or self._choose_better is None or now_s < self._better_due_s:
            return
        self._better_due_s = now_s + BETTER_S
        better = self._counted(self._choose_better(self._stopping.wait, self._meter.source))
        if better.meter is not None:
            self._close()
            self._serve(better.meter, better.passed_over)

    def _read(self) -> None:
        reading = self._meter.read() if self._meter is not None else None
        if reading is not None:
            self._newest = reading
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

    def _counted(self, choice: Choice) -> Choice:
        for error in choice.errors:
            self._count_error(error)
        return choice

    def _count_error(self, error: Exception) -> None:
        self.errors += 1
        if repr(error) != self._last_error:
            log.error("the meter failed in a way that was not foreseen", exc_info=error)
        self._last_error = repr(error)

    def _look_at_board(self, now_s: float) -> None:
        if now_s < self._temperatures_due_s:
            return
        self._temperatures_due_s = now_s + TEMPERATURES_S
        before, self._look = self._look, self._new_look(now_s)
        _tell_changes(before.board, self._look.board)

    def _new_look(self, now_s: float) -> Look:
        """What the kernel's files say; what they don't, the meter may have said besides."""
        last, temperatures_c, found = self._look, thermal.read(self._root), board.read(self._root)
        limits_c = last.limits_c if temperatures_c.keys() == last.temperatures_c.keys() else thermal.limits_c(self._root)
        if self._newest is not None and not temperatures_c:
            temperatures_c = dict(self._newest.temperatures_c)
            limits_c = dict.fromkeys(temperatures_c, thermal.BOARD_C)
        if self._newest is not None and found.gpu_load_ratio is None:
            found = found._replace(gpu_load_ratio=self._newest.gpu_load_ratio)
        return Look(now_s, temperatures_c, limits_c, found, battery.charge_ratio(self._root))

    def _close(self) -> None:
        meter, self._meter, self._newest = self._meter, None, None
        if meter is not None:
            meter.close()


def _tell_changes(before: Board, now: Board) -> None:
    if now.power_mode != before.power_mode:
        log.info("the power mode is %s", now.power_mode)
    if now.held_back.keys() != before.held_back.keys():
        causes = "; ".join(f"{cause}: {', '.join(what)}" for cause, what in now.held_back.items())
        if causes:
            log.warning("the board slows itself down, %s", causes)
        elif all(now.throttled[cause] is not None for cause in before.held_back):
            log.info("the board runs at its full speed again")
