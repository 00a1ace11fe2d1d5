"""Whether the daemon makes progress, and telling the service manager so: ready once, alive again and again, a line about how it is.

`watch_for_ever` is a task on the event loop, so a loop that hangs tells nothing. The inference threads are alive when an image came out
of the stage since the last turn, a probe's where nobody sent one, and none of them has been inside one run for too long. The learner is
alive when it rests, or got on within its budget. A learner that failed is not waited for: serving outlives learning.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Callable, Optional, Tuple

from latentd.service.notify import Notifier
from latentd.service.parts import Parts

TURNS = 3  # signs of life in the time that the manager waits for one
READY_POLL_S = 0.05
WORKING = ("learning", "yielding", "sleeping")  # states of a learner that takes steps; in the others it rests, or is down
LEARNER_BUDGET_S = 300.0  # the longest that one step, snapshot or checkpoint of the learner may take

log = logging.getLogger(__name__)


class Vitals:
    """The signs of life of one daemon. Every method belongs to the event loop."""

    def __init__(self, parts: Parts, notifier: Notifier, clock: Callable[[], float] = time.monotonic) -> None:
        self.parts = parts
        self._notifier = notifier
        self._clock = clock
        self.is_ready = False  # whether the manager was told so
        self._proven_at: Optional[float] = None  # of the image that proved the engine in the last turn
        self._learner_at = clock()
        self._learner_was: Optional[Tuple[str, int, int]] = None

    async def watch_for_ever(self, listening: Callable[[], bool]) -> None:
        """Tells READY after the first image came out of the engine while the daemon listens, then life; ends by being cancelled."""
        while self.parts.readiness.why_not() is not None or not listening():  # noqa: ASYNC110 - an inference thread proves it
            await asyncio.sleep(READY_POLL_S)
        self.is_ready = True
        self._notifier.ready(self.summary())
        self._notifier.alive()
        every_s = self._period_s()
        while True:
            await asyncio.sleep(every_s)
            await self.turn()

    async def turn(self) -> None:
        """Tells the manager that all is alive, or leaves it waiting and logs what is not."""
        if self._notifier.watchdog_s is not None and self._engine_age_s() > self._period_s() / 2:
            await self.parts.readiness.probe()
        stuck = self.stuck()
        if stuck is None:
            self._notifier.alive()
        else:
            log.error("no sign of life for the service manager: %s", stuck)
        self._notifier.status(stuck or self.summary())

    def stuck(self) -> Optional[str]:
        """What makes no progress; None when everything does, or nobody waits for it."""
        return self._inference_stuck() or self._learner_stuck()

    def summary(self) -> str:
        """One line for `systemctl status`."""
        parts = self.parts
        snapshot, learner = parts.learner.snapshot, parts.learner.status()
        line = f"{parts.choice.stage.name} answers; version {snapshot.version}, {len(snapshot.labels)} classes; learner {learner.state}"
        unready = parts.readiness.why_not()
        reload = f"; restart needed for {', '.join(parts.needs_restart)}" if parts.needs_restart else ""
        return f"{f'not ready: {unready} ' if unready else ''}{line}{reload}"

    def _inference_stuck(self) -> Optional[str]:
        limit_s = self._notifier.watchdog_s
        if limit_s is None:
            return None
        run_s = self.parts.batcher.longest_run_s
        if run_s > limit_s:
            return f"an inference thread has been in one run for {run_s:.0f} s"
        before, self._proven_at = self._proven_at, self.parts.batcher.last_success_at
        return None if before is None or self._proven_at != before else "no image came out of the engine since the last look"

    def _learner_stuck(self) -> Optional[str]:
        learner = self.parts.learner.status()
        now = (learner.state, learner.steps, learner.watermark_seq)
        if now != self._learner_was or learner.state not in WORKING:
            self._learner_was, self._learner_at = now, self._clock()
            return None
        silent_s = self._clock() - self._learner_at
        return f"the learner has been in one step for {silent_s:.0f} s" if silent_s > LEARNER_BUDGET_S else None

    def _engine_age_s(self) -> float:
        age_s = self.parts.readiness.age_s
        return float("inf") if age_s is None else age_s

    def _period_s(self) -> float:
        """Between two turns."""
        return (self._notifier.watchdog_s or 60.0) / TURNS
