"""When the learner's state becomes durable, and what the journal may drop from then on.

The order is the promise: latents are wiped, or dropped because the replay memory gave them up, only after a version that can do without
them is on the disk, so that a crash at any moment leaves a version and a log that fit. Owned by the learner thread; blocks on the disk and
on the journal.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import Callable, Iterable, List, Optional

from latentd.errors import JournalError, LatentdError, LearnerError, Overloaded
from latentd.learning import checkpoint
from latentd.learning.trainer import Trainer
from latentd.replay.journal import Journal
from latentd.replay.records import Entry
from latentd.trouble import is_shortage

logger = logging.getLogger(__name__)

RETRY_S = 10.0  # between two tries at a disk that refuses
JOURNAL_S = 30.0  # longest wait for the journal
UNREADABLE = (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError)  # what a version of another make raises
READ_ON = 4096  # log entries that brought nothing to learn, and that a restart may have to read again


class VersionKeeper:
    """Saves a trainer at most every `every_s` seconds, sooner after a wish to forget. trouble: why the last try failed, None when it did
    not.
    """

    def __init__(self, journal: Journal, folder: Path, every_s: float, keep: int) -> None:
        self.trouble: Optional[str] = None
        self._journal = journal
        self._folder = folder
        self._every_s = every_s
        self._keep = keep
        self._saved_seq, self._saved_version = 0, 0
        self._evicted: List[str] = []  # durably out of the replay memory, their latents still stored
        self._trimmed: List[str] = []  # the same of those that lost their tokens alone
        self._told = True  # the journal knows of the saved version
        self._wanted = False  # by a wish to forget, which is done when it is durable
        self._undone = False  # versions before this one know what had to be forgotten
        self._next_at = time.monotonic() + every_s

    def restore(self, make: Callable[[], Trainer], log_until: Callable[[int], Iterable[Entry]]) -> Trainer:
        """A trainer as the newest version left it; log_until: the log up to a sequence number. A version that can't be gone on from is set
        aside for the one before, and in the end for the log alone: a learner that can't begin would never learn again.
        """
        while True:
            trainer, found = make(), checkpoint.newest(self._folder, self._journal.status().head_seq)
            if found is None:
                return trainer
            entries = log_until(int(found[1]["seq"]))
            try:
                trainer.restore(*found, entries)
                break
            except UNREADABLE as cause:
                if is_shortage(cause):
                    raise
                checkpoint.set_newest_aside(self._folder, f"it can't be gone on from: {cause!r}")
        self._saved(trainer)
        self._next_at = time.monotonic()  # a crash may have come between the version and what the journal had to drop
        return trainer

    def forgot(self, *, undone: bool) -> None:
        """A wish to forget was taken: saving is urgent. undone: the trainer had learned it, so the versions before must go."""
        self._wanted, self._undone = True, self._undone or undone
        self._next_at = time.monotonic()

    def due_in_s(self, trainer: Trainer) -> Optional[float]:
        """Seconds until `save` has something to do; None while everything is durable."""
        changed = trainer.version != self._saved_version or trainer.seq > self._saved_seq + READ_ON
        if self._told and not changed and not self._wanted:
            return None
        return max(0.0, self._next_at - time.monotonic())

    def save(self, trainer: Trainer) -> None:
        """Makes the trainer durable and has the journal drop what is not needed any more. A disk that refuses is logged and tried again
        later.
        """
        try:
            if trainer.seq > self._saved_seq or trainer.version > self._saved_version:
                arrays, facts = trainer.state()
                checkpoint.write(self._folder, arrays, facts, 1 if self._undone else self._keep)
                self._saved(trainer)
            if not self._told:
                self._tell()
        except (JournalError, LearnerError, Overloaded, FutureTimeoutError) as cause:
            self.trouble = cause.detail if isinstance(cause, LatentdError) else "the journal does not answer"
            logger.error("the learner's state is not kept, next try in %.0f s: %s", RETRY_S, self.trouble)
            self._next_at = time.monotonic() + RETRY_S

    def _saved(self, trainer: Trainer) -> None:
        self._saved_seq, self._saved_version = trainer.seq, trainer.version
        self._told = self._wanted = self._undone = False
        self._evicted += trainer.evicted
        self._trimmed += trainer.trimmed
        trainer.evicted.clear()
        trainer.trimmed.clear()
        self._next_at = time.monotonic() + self._every_s

    def _tell(self) -> None:
        versions = checkpoint.versions(self._folder)
        everywhere = checkpoint.seq_of(versions[0]) if versions else 0
        self._journal.settle(self._saved_seq, tuple(self._evicted), everywhere, tuple(self._trimmed)).result(JOURNAL_S)
        self._evicted, self._trimmed, self._told, self.trouble = [], [], True, None
