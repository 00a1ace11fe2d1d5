"""Between two steps of the learner: who goes first, what it waits for, and since when something waits to be learned.

Used by the learner thread alone, but for what `Pace` and `Arrivals` tell, which any thread may read. Blocks on time and on the journal.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Callable, Deque, Dict, Mapping, Optional, Tuple

from latentd.errors import JournalError, Overloaded
from latentd.learning.restraint import LEARN, LOOK_S, SLEEP, Reason
from latentd.replay.journal import Journal

YIELD_S = 0.25  # longest time that classify requests hold up one step of learning
CALM_S = 0.25  # a step of a sleep waits until no request was seen for so long: between two of one client there are milliseconds
SLEEP_YIELD_S = 2.5  # or for so long: who never rests sleeps slowly, in a hundredth of the time
_POLL_S = {LEARN: 0.002, SLEEP: 0.01}
FORGETS = frozenset(("forget", "forget_class"))
_PAGE = 256
_MARKS = 4096  # arrivals remembered; beyond that, several share the time of the first
_APART_S = 1.0


class Pace:
    """Lets waiting requests go before a step, and waits for power, temperature, memory and builds.

    busy: by kind of work, whether there is a request that goes first. interruption: "yielding" or "waiting" while the learner does either,
    else None. reason: what it waits for. waited_s: by cause, so far.
    """

    def __init__(
        self,
        busy: Mapping[str, Callable[[], bool]],
        restraint: Callable[[str], Optional[Reason]],
        stopping: threading.Event,
        observe: Callable[[str, float], None],
    ) -> None:
        self._busy, self._restraint, self._stopping, self._observe = busy, restraint, stopping, observe
        self.interruption: Optional[str] = None
        self.reason: Optional[str] = None
        self.waited_s: Dict[str, float] = {}
        self._busy_at = -CALM_S

    def before_step(self, work: str, urgent: Callable[[], bool], settle: Callable[[], None] = lambda: None) -> bool:
        """Returns when a step of this work ("learn" or "sleep") may be taken. urgent: ends the wait; settle: called once before one, which
        may be long. False: told to stop meanwhile.
        """
        if work == SLEEP:
            self._yield(SLEEP, SLEEP_YIELD_S, CALM_S, urgent)
        else:
            self.give_way()
        may_go = self._hold(work, urgent, settle)
        self.interruption = self.reason = None
        return may_go

    def give_way(self) -> None:
        """Lets waiting classify requests go first, for a moment."""
        self._yield(LEARN, YIELD_S, 0.0, lambda: False)

    def _yield(self, work: str, longest_s: float, calm_s: float, urgent: Callable[[], bool]) -> None:
        deadline = time.monotonic() + longest_s
        while self._disturbs(work, calm_s) and not self._stopping.is_set() and not urgent() and time.monotonic() < deadline:
            self.interruption = "yielding"
            self._stopping.wait(_POLL_S[work])
        self.interruption = None

    def _disturbs(self, work: str, calm_s: float) -> bool:
        """Whether a request is there that this work lets go first, or was a moment ago."""
        now = time.monotonic()
        if self._busy[work]():
            self._busy_at = now
            return True
        return now - self._busy_at < calm_s

    def _hold(self, work: str, urgent: Callable[[], bool], settle: Callable[[], None]) -> bool:
        reason = self._restraint(work)
        if reason is not None and not urgent():
            settle()
        while reason is not None and not urgent():
            if self._stopping.is_set():
                return False
            self.interruption, self.reason = "waiting", reason.text
            began = time.monotonic()
            self._stopping.wait(LOOK_S)
            self._count(reason.cause, time.monotonic() - began)
            reason = self._restraint(work)
        return True

    def _count(self, cause: str, seconds: float) -> None:
        self.waited_s = {**self.waited_s, cause: self.waited_s.get(cause, 0.0) + seconds}
        self._observe(cause, seconds)


class Urgency:
    """Whether the log holds what must wait for neither power nor temperature: a wish to forget. Reads each entry once."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._looked_seq = self._urgent_seq = 0

    def after(self, seq: int) -> bool:
        """Whether an entry beyond `seq` is such a wish. Waits for the journal, which answers in milliseconds, and is calm when it can't."""
        self._looked_seq = max(self._looked_seq, seq)
        try:
            while self._looked_seq < self._journal.status().head_seq:
                page = self._journal.entries(self._looked_seq, _PAGE).result()
                if not page:
                    break
                self._urgent_seq = max([self._urgent_seq, *(entry.seq for entry in page if entry.kind in FORGETS)])
                self._looked_seq = page[-1].seq
        except (JournalError, Overloaded):
            return False
        return self._urgent_seq > seq


class Arrivals:
    """When the entries of the log came, by a clock that never jumps: a board without a battery may boot decades in the past.

    What was there at the start counts from the start. The journal thread notes, any thread asks.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._marks: Deque[Tuple[int, float]] = deque(maxlen=_MARKS)  # the log up to this entry came not before this time

    def note(self, head_seq: int) -> None:
        now_s = self._clock()
        if self._marks and now_s - self._marks[-1][1] < _APART_S:
            self._marks[-1] = (head_seq, self._marks[-1][1])
        else:
            self._marks.append((head_seq, now_s))

    def age_s(self, watermark_seq: int) -> float:
        """Seconds since the oldest entry beyond the watermark came; 0 where there is none."""
        oldest_s = next((at_s for seq, at_s in tuple(self._marks) if seq > watermark_seq), None)
        return 0.0 if oldest_s is None else max(0.0, self._clock() - oldest_s)
