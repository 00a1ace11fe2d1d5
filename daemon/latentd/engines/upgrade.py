"""Builds a better engine beside the one that serves, and lets it take over once it passed the gate.

One thread, which ends with its work. It waits for the first answer before it begins, so that starting is not slower than without it, and
builds INT8 when there are taught images to calibrate it on: another engine may take over before.
"""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from typing import Callable, Dict, Optional, Sequence

from latentd.engines.choose import Attempt, Choice, Pending
from latentd.engines.compiling import Progress
from latentd.engines.stage import FrozenStage
from latentd.errors import LatentdError

log = logging.getLogger(__name__)

POLL_S = 0.2
FIRST_ANSWER_S = 60.0  # longest wait for it
REPORT_S = 1.0  # how often the elapsed time in the status moves
ROOM_S = 5.0  # between two looks for what a build needs


class Upgrade:
    """swap: lets a stage serve; its future gives the stage that no longer does. publish: takes what /v1/status is to show. obstacle: says
    why nothing can be built now, or None; it is asked until it has nothing to say.

    building: the engine that is being built at this moment; any thread may read it.
    """

    def __init__(
        self,
        choice: Choice,
        swap: Callable[[FrozenStage], Future[FrozenStage]],
        publish: Callable[[Choice], None],
        has_answered: Callable[[], bool],
        obstacle: Callable[[], Optional[str]] = lambda: None,
    ) -> None:
        self.building: Optional[str] = None
        self._obstacle = obstacle
        self._choice = choice
        self._swap, self._publish, self._has_answered = swap, publish, has_answered
        self._attempts: Dict[str, Attempt] = {attempt.engine: attempt for attempt in choice.attempts}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._live, name="upgrade", daemon=True)

    def start(self) -> None:
        """Begins, where there is anything to build."""
        if self._choice.pending:
            self._thread.start()

    def stop(self, timeout_s: float) -> bool:
        """Kills a build that runs. False: the thread did not end in time."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _live(self) -> None:
        try:
            self._wait_for_first_answer()
            self._improve()
        except Exception:  # a border: whatever a builder does, the engine that serves goes on
            log.exception("the engine could not be upgraded")
            for attempt in tuple(self._attempts.values()):
                if attempt.state in ("waiting", "building"):
                    self._show(replace(attempt, state="unavailable", reason="a bug ended the upgrade: see the log"))

    def _wait_for_first_answer(self) -> None:
        deadline = time.monotonic() + FIRST_ANSWER_S
        while not self._has_answered() and time.monotonic() < deadline and not self._stopping.wait(POLL_S):
            pass

    def _improve(self) -> None:
        """Tries what waits and lacks nothing, best first. Once one serves only better ones go on waiting, for what they lack."""
        waiting = list(self._choice.pending)
        while waiting:
            turn = self._first_ready(waiting)
            if turn is None:
                return
            pending, later = waiting[turn], waiting[turn + 1 :]
            stage = self._made(pending)
            del waiting[turn]
            if stage is not None:
                del waiting[turn:]
                self._serve(stage, pending.name, [each.name for each in later])

    def _first_ready(self, waiting: Sequence[Pending]) -> Optional[int]:
        """Which of them can be built now; waits until one can, and shows what each lacks. None when told to stop."""
        while not self._stopping.is_set():
            for turn, pending in enumerate(waiting):
                lacking = pending.lacks()
                if lacking is None:
                    return turn
                if self._attempts[pending.name].reason != lacking:
                    self._show(Attempt(pending.name, "waiting", lacking))
            self._stopping.wait(ROOM_S)
        return None

    def _made(self, pending: Pending) -> Optional[FrozenStage]:
        if not self._wait_for_room(pending):
            return None
        began = time.monotonic()
        log.info("engine %s: building in the background", pending.name)
        self.building = pending.name
        try:
            self._build(pending, began)
        except LatentdError as failed:
            log.warning("engine %s: %s (%.0f s)", pending.name, failed.detail, time.monotonic() - began)
            self._show(Attempt(pending.name, "unavailable", failed.detail, seconds=time.monotonic() - began))
            return None
        finally:
            self.building = None
        stage, attempt = pending.attempt()
        if attempt.state == "waiting":  # the plan that was built a moment ago is not to be had
            attempt = replace(attempt, state="unavailable")
        self._attempts[pending.name] = attempt = replace(attempt, seconds=time.monotonic() - began)
        if stage is None:
            log.warning("engine %s: %s, %s (%.0f s)", attempt.engine, attempt.state, attempt.reason, attempt.seconds)
            self._show(attempt)
        return stage

    def _wait_for_room(self, pending: Pending) -> bool:
        """Waits while something stands against a build, and shows what; False when told to stop."""
        shown: Optional[str] = None
        while not self._stopping.is_set():
            reason = self._obstacle()
            if reason is None:
                return True
            if shown is None:
                log.warning("engine %s: its build is put off: %s", pending.name, reason)
            if reason != shown:
                self._show(Attempt(pending.name, "waiting", reason))
                shown = reason
            self._stopping.wait(ROOM_S)
        return False

    def _build(self, pending: Pending, began: float) -> None:
        shown = began - REPORT_S

        def report(progress: Progress) -> None:
            nonlocal shown
            now = time.monotonic()
            if now - shown >= REPORT_S:
                shown = now
                done = "" if progress.ratio is None else f" {progress.ratio:.0%}"
                self._show(Attempt(pending.name, "building", f"{progress.phase}{done}", None, now - began, progress.ratio))

        pending.build(report, self._stopping)

    def _serve(self, stage: FrozenStage, name: str, later: Sequence[str]) -> None:
        """Swaps it in between two runs, unless serving ended first; what becomes of all engines is shown in one piece."""
        retired = self._swap(stage).result()
        retired.close()
        if retired is stage:
            return
        self._attempts.update((other, Attempt(other, "not tried", f"{stage.name} comes before it and serves")) for other in later)
        self._choice = self._choice._replace(stage=stage)
        for attempt in tuple(self._attempts.values()):
            if attempt.state == "serving" and attempt.engine != name:
                self._attempts[attempt.engine] = replace(attempt, state="replaced", reason=f"{stage.name} serves since")
        self._show(self._attempts[name])
        log.info("engine %s: serving since now, %s", stage.name, self._attempts[name].reason)

    def _show(self, attempt: Attempt) -> None:
        self._attempts[attempt.engine] = attempt
        # What waits holds the weights: nobody but this thread keeps it.
        self._choice = self._choice._replace(attempts=tuple(self._attempts.values()), pending=())
        self._publish(self._choice)
