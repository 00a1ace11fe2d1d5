"""Who was at work when: marks of beginning and end, turned into seconds and counts for each interval between two readings.

Owned by the ledger and used under its lock only. A mark is an append to a list; the sums are made when an interval closes.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Deque, Dict, NamedTuple

ACTIVITIES = ("classify", "learn")
IDLE = "idle"

# Marks that may wait for the next reading. There are more only if the meter thread hangs; then what they split is given up, not memory.
MAX_PENDING = 16_384


class Mark:
    """One piece of marked work: what kind, how many images or samples it is for."""

    __slots__ = ("begun_s", "count", "covered_before_s", "kind")

    def __init__(self, kind: str, count: int) -> None:
        self.kind, self.count = kind, count
        self.begun_s = self.covered_before_s = 0.0


class Event(NamedTuple):
    at_s: float
    mark: Mark
    is_end: bool
    done: int  # images or samples that are done by this event


@dataclass
class Work:
    """What was done in one interval.

    active_s: seconds by activity and "idle". counts: images or samples that ended in it. covered_counts: the same, each weighted with the
    part of its work that joules are known for. is_split: False when marks were given up, so that the seconds say nothing.
    """

    active_s: Dict[str, float] = field(default_factory=dict)
    counts: Dict[str, int] = field(default_factory=dict)
    covered_counts: Dict[str, float] = field(default_factory=dict)
    is_split: bool = True

    @property
    def is_idle(self) -> bool:
        return self.is_split and set(self.active_s) == {IDLE}


class Marks:
    """The open marks, and the events since the last closed interval.

    Every moment is divided equally between the marks that are open in it; with none open it is idle.
    """

    def __init__(self, now_s: float) -> None:
        self._cursor_s = now_s  # all before it is in the sums
        self._covered_s = 0.0  # seconds before the cursor whose joules are known
        self._open: Dict[str, int] = {}
        self._pending: Deque[Event] = deque()
        self._work = Work()

    def begin(self, mark: Mark, now_s: float) -> None:
        self._append(Event(now_s, mark, False, 0))

    def end(self, mark: Mark, now_s: float, done: int) -> None:
        self._append(Event(now_s, mark, True, done))

    def close(self, until_s: float, covered: bool) -> Work:
        """The work since the previous call up to `until_s`; later marks stay for the next interval. covered: its joules are known."""
        covered = covered and self._work.is_split
        while self._pending and self._pending[0].at_s <= until_s:
            self._apply(self._pending.popleft(), covered)
        self._advance(until_s, covered)
        work, self._work = self._work, Work()
        return work

    def _append(self, event: Event) -> None:
        if len(self._pending) >= MAX_PENDING:
            self._work.is_split = False
            while self._pending:
                self._apply(self._pending.popleft(), covered=False)
        self._pending.append(event)

    def _apply(self, event: Event, covered: bool) -> None:
        self._advance(event.at_s, covered)
        mark = event.mark
        self._open[mark.kind] = self._open.get(mark.kind, 0) + (-1 if event.is_end else 1)
        if not event.is_end:
            mark.begun_s, mark.covered_before_s = event.at_s, self._covered_s
        elif event.done:
            self._count(event, covered)

    def _count(self, event: Event, covered: bool) -> None:
        mark, work = event.mark, self._work
        lasted_s = event.at_s - mark.begun_s
        share = (self._covered_s - mark.covered_before_s) / lasted_s if lasted_s > 0 else float(covered)
        work.counts[mark.kind] = work.counts.get(mark.kind, 0) + event.done
        work.covered_counts[mark.kind] = work.covered_counts.get(mark.kind, 0.0) + event.done * min(1.0, max(0.0, share))

    def _advance(self, until_s: float, covered: bool) -> None:
        passed_s = until_s - self._cursor_s
        if passed_s <= 0:
            return
        self._cursor_s = until_s
        self._covered_s += passed_s if covered else 0.0
        open_marks = sum(self._open.values())
        shares = {kind: number / open_marks for kind, number in self._open.items() if number} if open_marks else {IDLE: 1.0}
        for kind, share in shares.items():
            self._work.active_s[kind] = self._work.active_s.get(kind, 0.0) + passed_s * share
