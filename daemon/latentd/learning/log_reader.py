"""The journal's log as the learner reads it: in pages, in order, patiently. Owned by the learner thread; blocks on the journal."""

from __future__ import annotations

import threading
from typing import Iterator, List, Optional

from latentd.errors import JournalError, Overloaded
from latentd.replay.journal import Journal
from latentd.replay.records import Entry

AGAIN_S = 1.0  # between two tries at a journal that can't be read
_PAGE = 256


class Stopping(Exception):
    """The learner was told to stop, and what is in hand takes too long."""


class LogReader:
    """Waits for a journal that can't be read now: a full disk is no reason to die. trouble: why it waits, None when it does not.

    Raises Stopping where `stop` is set meanwhile.
    """

    def __init__(self, journal: Journal, stop: threading.Event) -> None:
        self.trouble: Optional[str] = None
        self._journal, self._stop = journal, stop

    def page(self, after_seq: int) -> List[Entry]:
        """The log beyond `after_seq`; empty at its end."""
        while True:
            try:
                page = self._journal.entries(after_seq, _PAGE).result()
                self.trouble = None
                return page
            except (JournalError, Overloaded) as cause:
                self.trouble = cause.detail
            if self._stop.wait(AGAIN_S):
                raise Stopping

    def until(self, seq: int) -> Iterator[Entry]:
        """The log from its beginning up to `seq`."""
        after = 0
        while after < seq:
            page = self.page(after)
            yield from (entry for entry in page if entry.seq <= seq)
            if not page:
                return
            after = page[-1].seq
