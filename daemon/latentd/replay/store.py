"""The durable table under the journal: sqlitedict with what it lacks for power loss.

sqlitedict opens with `synchronous=OFF` and pickles; a failing COMMIT, or an error half-way through a SELECT, kills its thread and leaves
the caller waiting for ever; a failing write is reported one call late, after SQLite has undone what came before it and begun anew with what
came after. This module sets and reads back the pragmas, stores plain bytes, puts a barrier before every commit, commits by a statement that
can fail without killing the thread, and waits for no thread that is dead. Owned by the journal thread; every call may block on the disk.
"""

from __future__ import annotations

import contextlib
import os
import queue
import sqlite3
import time
from pathlib import Path
from typing import Any, Callable, Iterator, List, Mapping, Optional, Sequence, Tuple

from sqlitedict import SqliteDict

from latentd.errors import JournalError

TABLE = "journal"
_PROBE_BYTES = 256 << 10  # room that opening needs: sqlitedict hangs when its own first commit finds the disk full
_POLL_S = 1.0  # between two looks at whether the thread that is to answer still lives


class Store:
    """A table of text keys and byte values whose `commit` returns only after the data is on the disk.

    Invariant: after a JournalError from `commit`, or after `roll_back`, nothing of the uncommitted group is in the table. A write that
    fails is reported by any later call as sqlite3.Error: the caller rolls back.
    """

    def __init__(self, path: Path, *, observe_fsync: Optional[Callable[[float], None]] = None) -> None:
        self.path = path
        self._observe = observe_fsync
        self._connect()

    def _connect(self) -> None:
        self._dirty = False
        _require_room(self.path.parent)
        try:
            self._db = SqliteDict(
                str(self.path), tablename=TABLE, journal_mode="WAL", encode=sqlite3.Binary, decode=bytes, outer_stack=False
            )
            self._set("synchronous", "FULL", 2)
            self._set("secure_delete", "ON", 1)
            mode = str(self._one("PRAGMA journal_mode")).lower()
        except sqlite3.Error as cause:
            raise JournalError(
                f"{self.path} can't be opened: {cause}", hint="Restore the file from a backup, or move it away to start anew."
            ) from cause
        if mode != "wal":
            self.close()
            raise JournalError(
                f"{self.path} is in journal mode {mode}, not wal",
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

    def cut(self, prefix: str, length: int) -> None:
        """Queues for the next commit: of every value whose key starts with `prefix`, its first bytes alone."""
        self._dirty = True
        query = f'UPDATE "{TABLE}" SET value = substr(value, 1, ?) WHERE key > ? AND key < ? AND length(value) > ?'
        self._db.conn.execute(query, (length, prefix, _after(prefix), length))

    def get(self, key: str) -> Optional[bytes]:
        row = self._row(f'SELECT value FROM "{TABLE}" WHERE key = ?', (key,))
        return None if row is None else bytes(row[0])

    def scan(self, prefix: str, after: str = "", before: str = "", limit: int = -1) -> Iterator[Tuple[str, bytes]]:
        """Pairs whose key starts with `prefix` and lies beyond `after` and short of `before`, in key order; at most `limit` (-1: all)."""
        query = f'SELECT key, value FROM "{TABLE}" WHERE key > ? AND key < ? ORDER BY key LIMIT ?'
        for key, value in self._select(query, (max(prefix, after), before or _after(prefix), limit)):
            yield str(key), bytes(value)

    def commit(self) -> bool:
        """Makes everything queued durable, or nothing of it; False when nothing was queued.

        Raises JournalError when the disk refuses.
        """
        if not self._dirty:
            return False
        started = time.perf_counter()
        try:
            self._one("SELECT 1")  # the barrier: a write that failed before raises here, before the commit is queued
            self._run("COMMIT")
        except sqlite3.Error as cause:
            self.roll_back()
            raise JournalError(f"the journal can't be written: {cause}") from cause
        self._dirty = False
        if self._observe is not None:
            self._observe(time.perf_counter() - started)
        return True

    def roll_back(self) -> None:
        """Drops everything queued since the last commit. Raises JournalError when the thread of the table is dead: `reopen` then."""
        for _ in range(3):  # a failure that waits to be told, one that came after it, and then silence
            try:
                self._one("SELECT 1")
                break
            except sqlite3.Error:
                continue
        try:
            self._run("ROLLBACK")
        except sqlite3.Error:
            pass  # SQLite has rolled back by itself (full disk, I/O error): there is no transaction left to end
        self._dirty = False

    def reopen(self) -> None:
        """Opens the file anew, without what was not committed. Raises JournalError when it can't."""
        self.close()
        self._connect()

    def purge(self) -> bool:
        """Moves the write-ahead log into the table file and empties it, so that deleted bytes are nowhere on the disk.

        False when it can't now.
        """
        try:
            return bool(self._one("PRAGMA wal_checkpoint(TRUNCATE)") == 0)
        except (sqlite3.Error, JournalError):
            return False

    def size_bytes(self) -> int:
        """Bytes of live data with what is not committed yet, the log not counted: freed pages are used again before the file grows."""
        pages = int(self._one("PRAGMA page_count")) - int(self._one("PRAGMA freelist_count"))
        return pages * int(self._one("PRAGMA page_size"))

    def close(self) -> None:
        """Closes the file; what was not committed is gone."""
        if self._db.conn is None:
            return
        try:
            self._db.close(force=not self._db.conn.is_alive())
        except sqlite3.Error:  # an old failure that nobody had asked for
            self._db.close(force=True)

    def _set(self, name: str, value: str, expected: int) -> None:
        self._db.conn.execute(f"PRAGMA {name}={value}")
        found = self._one(f"PRAGMA {name}")
        if found != expected:
            self.close()
            raise JournalError(
                f"SQLite refuses PRAGMA {name}={value} (it answers {found})", hint="Use the sqlite3 module of the system's Python."
            )

    def _select(self, query: str, arguments: Tuple[Any, ...] = ()) -> Iterator[Tuple[Any, ...]]:
        answers: queue.Queue[Any] = queue.Queue()
        self._db.conn.execute(query, arguments, answers)
        while True:
            try:
                row = answers.get(timeout=_POLL_S)
            except queue.Empty:
                if self._db.conn.is_alive():
                    continue
                raise JournalError(f"{self.path} can't be read: the disk or the file is broken") from None
            self._db.conn.check_raise_error()
            if isinstance(row, str):  # sqlitedict's mark of the end
                return
            yield row

    def _run(self, statement: str) -> List[Any]:
        return list(self._select(statement))

    def _row(self, query: str, arguments: Tuple[Any, ...] = ()) -> Optional[Tuple[Any, ...]]:
        rows = list(self._select(query, arguments))
        return rows[0] if rows else None

    def _one(self, query: str) -> Any:
        row = self._row(query)
        return None if row is None else row[0]


def _after(prefix: str) -> str:
    """The first text beyond all that start with this one."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1)


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
        with contextlib.suppress(OSError):
            probe.unlink()
        raise JournalError(f"the state folder {folder} can't be written: {cause}") from cause
