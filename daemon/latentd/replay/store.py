"""The durable table under the journal: sqlitedict with what it lacks for power loss.

sqlitedict opens with `synchronous=OFF` and pickles; a failing COMMIT kills its thread and leaves the caller waiting for ever, and a
failing write is reported one call late, after its neighbours were committed. This module sets and reads back the pragmas, stores plain
bytes, puts a barrier before every commit, and commits by a statement that can fail without killing the thread. Owned by the journal
thread; every call may block on the disk.
"""

from __future__ import annotations

import os
import sqlite3
import time
from pathlib import Path
from typing import Any, Callable, Iterator, List, Mapping, Optional, Sequence, Tuple

from sqlitedict import SqliteDict

from latentd.errors import JournalError

TABLE = "journal"
_PROBE_BYTES = 256 << 10  # room that opening needs: sqlitedict hangs when its own first commit finds the disk full


class Store:
    """A table of text keys and byte values whose `commit` returns only after the data is on the disk.

    Invariant: after a JournalError from `commit` nothing of the uncommitted group is in the table.
    """

    def __init__(self, path: Path, *, observe_fsync: Optional[Callable[[float], None]] = None) -> None:
        self.path = path
        self._observe = observe_fsync
        self._dirty = False
        _require_room(path.parent)
        try:
            self._db = SqliteDict(str(path), tablename=TABLE, journal_mode="WAL", encode=sqlite3.Binary, decode=bytes, outer_stack=False)
            self._set("synchronous", "FULL", 2)
            self._set("secure_delete", "ON", 1)
            mode = str(self._one("PRAGMA journal_mode")).lower()
        except sqlite3.Error as cause:
            raise JournalError(
                f"{path} can't be opened: {cause}", hint="Restore the file from a backup, or move it away to start anew."
            ) from cause
        if mode != "wal":
            raise JournalError(
                f"{path} is in journal mode {mode}, not wal",
                hint="Put the state folder on a local disk: network file systems can't do this.",
            )

    def put(self, items: Mapping[str, bytes]) -> None:
        """Queues key -> value writes for the next commit."""
        self._dirty = self._dirty or bool(items)
        for key, value in items.items():
            self._db[key] = value

    def delete(self, keys: Sequence[str]) -> None:
        """Queues deletions for the next commit; absent keys are no error."""
        self._dirty = self._dirty or bool(keys)
        for key in keys:
            self._db.conn.execute(f'DELETE FROM "{TABLE}" WHERE key = ?', (key,))

    def get(self, key: str) -> Optional[bytes]:
        row = self._row(f'SELECT value FROM "{TABLE}" WHERE key = ?', (key,))
        return None if row is None else bytes(row[0])

    def scan(self, prefix: str, after: str = "", limit: int = -1, *, newest_first: bool = False) -> Iterator[Tuple[str, bytes]]:
        """Pairs whose key starts with `prefix` and lies beyond `after`, in key order; at most `limit` (-1: all)."""
        end = prefix[:-1] + chr(ord(prefix[-1]) + 1)
        if newest_first:
            query = f'SELECT key, value FROM "{TABLE}" WHERE key >= ? AND key < ? ORDER BY key DESC LIMIT ?'
            bounds: Tuple[Any, ...] = (prefix, after or end, limit)
        else:
            query = f'SELECT key, value FROM "{TABLE}" WHERE key > ? AND key < ? ORDER BY key LIMIT ?'
            bounds = (max(prefix, after), end, limit)
        for key, value in self._db.conn.select(query, bounds):
            yield str(key), bytes(value)

    def commit(self) -> None:
        """Makes everything queued durable, or nothing of it.

        Raises JournalError when the disk refuses.
        """
        if not self._dirty:
            return
        started = time.perf_counter()
        self._dirty = False
        try:
            self._one("SELECT 1")  # the barrier: a write that failed before raises here, before the commit is queued
            self._run("COMMIT")
        except sqlite3.Error as cause:
            self._roll_back()
            raise JournalError(f"the journal can't be written: {cause}") from cause
        if self._observe is not None:
            self._observe(time.perf_counter() - started)

    def purge(self) -> None:
        """Moves the write-ahead log into the table file and empties it, so that deleted bytes are nowhere on the disk."""
        self._run("PRAGMA wal_checkpoint(TRUNCATE)")

    def size_bytes(self) -> int:
        """Bytes of live data, the log not counted: freed pages are used again before the file grows."""
        pages = int(self._one("PRAGMA page_count")) - int(self._one("PRAGMA freelist_count"))
        return pages * int(self._one("PRAGMA page_size"))

    def close(self) -> None:
        self._db.close()

    def _set(self, name: str, value: str, expected: int) -> None:
        self._db.conn.execute(f"PRAGMA {name}={value}")
        found = self._one(f"PRAGMA {name}")
        if found != expected:
            raise JournalError(
                f"SQLite refuses PRAGMA {name}={value} (it answers {found})", hint="Use the sqlite3 module of the system's Python."
            )

    def _roll_back(self) -> None:
        try:
            self._run("ROLLBACK")
        except sqlite3.Error:
            pass  # SQLite has rolled back by itself (full disk, I/O error): there is no transaction left to end

    def _run(self, statement: str) -> List[Any]:
        return list(self._db.conn.select(statement))

    def _row(self, query: str, arguments: Tuple[Any, ...] = ()) -> Optional[Tuple[Any, ...]]:
        rows = list(self._db.conn.select(query, arguments))
        return rows[0] if rows else None

    def _one(self, query: str) -> Any:
        row = self._row(query)
        return None if row is None else row[0]


def _require_room(folder: Path) -> None:
    """Writes and removes a small file, so that a full or read-only disk is an error instead of a hang."""
    probe = folder / ".room"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(probe, "wb") as file:
            file.write(b"\0" * _PROBE_BYTES)
            file.flush()
            os.fsync(file.fileno())
        probe.unlink()
    except OSError as cause:
        probe.unlink() if probe.exists() else None
        raise JournalError(f"the state folder {folder} can't be written: {cause}") from cause
