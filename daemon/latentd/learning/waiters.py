"""Who waits until which log entry takes part in the answers. Any thread may wait; the learner thread resolves."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import List, Optional, Tuple

from latentd.errors import LearnerError


class Waiters:
    """Futures by sequence number. Every one is resolved: when the watermark passes it, or when the learner ends."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: List[Tuple[int, Future[None]]] = []
        self._watermark = 0
        self._ended: Optional[str] = None

    def wait_for(self, seq: int) -> Future[None]:
        """Resolves with the watermark at `seq` or beyond; fails with LearnerError."""
        future: Future[None] = Future()
        with self._lock:
            if self._ended is not None:
                future.set_exception(LearnerError(self._ended))  # each its own: raising one again and again makes its traceback grow
            elif self._watermark >= seq:
                future.set_result(None)
            else:
                self._waiting.append((seq, future))
        return future

    def any_until(self, seq: int) -> bool:
        """Whether somebody waits for an entry up to `seq`."""
        with self._lock:
            return any(wanted <= seq for wanted, _ in self._waiting)

    def reach(self, seq: int) -> None:
        """Moves the watermark."""
        with self._lock:
            self._watermark = seq
            due = [future for wanted, future in self._waiting if wanted <= seq]
            self._waiting = [(wanted, future) for wanted, future in self._waiting if wanted > seq]
        for future in due:
            if future.set_running_or_notify_cancel():  # its caller may have gone
                future.set_result(None)

    def end(self, reason: str) -> None:
        """Fails whoever waits, and whoever will."""
        with self._lock:
            self._ended = reason
            left, self._waiting = self._waiting, []
        for _, future in left:
            if future.set_running_or_notify_cancel():
                future.set_exception(LearnerError(reason))
