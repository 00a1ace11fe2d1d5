"""Rows of the store that can't be read, out of the way: their bytes are kept under another key, and everything else goes on.

SQLite notices a broken page, but no broken byte inside a value. Owned by the journal thread.
"""

from __future__ import annotations

import logging
from typing import Optional

from latentd.errors import JournalError
from latentd.replay.store import Store

logger = logging.getLogger(__name__)

DAMAGE = (ValueError, TypeError, LookupError, AttributeError)  # what it raises to read bytes that are no row
MOST = 16  # rows at once; more are no accident of a disk, but another version's file, or another program's
_PREFIX = "x/"


class Aside:
    """count: rows that lie aside, from this run or another. Writes are queued for the store's next commit."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._taken = 0
        self.count = sum(1 for _ in store.scan(_PREFIX))

    def take(self, key: str, value: bytes, cause: Exception, instead: str) -> None:
        """Puts a row aside. instead: what becomes of what it said, for the log. Raises JournalError where too many are damaged."""
        self._taken += 1
        if self._taken > MOST:
            raise JournalError(
                f"more than {MOST} rows of the journal can't be read, the last one {key}: {cause}",
                hint="Restore the file from a backup, or start the version of latentd that wrote it. Nothing was changed.",
            )
        logger.error("row %s of the journal is damaged (%s); its bytes are set aside as %s%s: %s", key, cause, _PREFIX, key, instead)
        self._store.put({f"{_PREFIX}{key}": value})
        self._store.delete([key])
        self.count += 1

    def drop(self, key: str) -> None:
        """Forgets the bytes that were once under this key, if they lie aside."""
        if self.count and self._store.get(f"{_PREFIX}{key}") is not None:
            self._store.delete([f"{_PREFIX}{key}"])
            self.count -= 1

    def number(self, key: str) -> Optional[int]:
        """The whole number under a key; None where there is none."""
        data = self._store.get(key)
        try:
            return None if data is None else int(data)
        except ValueError as cause:
            self.take(key, data or b"", cause, "it is counted anew")
            return None
