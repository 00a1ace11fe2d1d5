"""The durable table: all or nothing, on the disk, and never a hang."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path
from typing import Any, Dict, Iterator, List, Set

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlitedict import SqliteMultithread

from latentd.errors import JournalError
from latentd.replay import store as store_module
from latentd.replay.store import Store

BLOB = b"\x5a" * 3000


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path / "journal.sqlite")
    yield opened
    opened.close()


def pages_left(store: Store, pages: int) -> None:
    """A disk with room for so many pages more."""
    store._run(f"PRAGMA max_page_count={store._one('PRAGMA page_count') + pages}")


def room_made(store: Store) -> None:
    store._run("PRAGMA max_page_count=1000000")


def content(store: Store) -> Dict[str, bytes]:
    return dict(store.scan("k/"))


def files(store: Store) -> bytes:
    """Everything that is on the disk: the table and its log."""
    return b"".join(path.read_bytes() for path in sorted(store.path.parent.iterdir()))


# --- what a commit means ---


def test_what_was_committed_is_there_after_opening_again_and_what_was_not_is_not(tmp_path: Path) -> None:
    first = Store(tmp_path / "journal.sqlite")
    first.put({"k/1": b"one", "k/2": b""})
    assert first.commit()
    first.put({"k/3": b"three"})
    first.close()
    second = Store(tmp_path / "journal.sqlite")
    assert content(second) == {"k/1": b"one", "k/2": b""}
    second.close()


def test_the_pragmas_that_make_a_commit_durable_are_set(store: Store) -> None:
    found = [store._one(f"PRAGMA {name}") for name in ("synchronous", "journal_mode", "secure_delete")]
    assert found == [2, "wal", 1]


@pytest.mark.parametrize("pragma", ["synchronous=FULL", "secure_delete=ON"])
def test_a_sqlite_that_ignores_a_pragma_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pragma: str) -> None:
    execute = SqliteMultithread.execute

    def deaf(self: SqliteMultithread, request: str, *more: Any) -> None:
        execute(self, f"PRAGMA {pragma.split('=')[0]}=OFF" if request == f"PRAGMA {pragma}" else request, *more)

    monkeypatch.setattr(SqliteMultithread, "execute", deaf)
    with pytest.raises(JournalError, match=f"refuses PRAGMA {pragma}"):
        Store(tmp_path / "journal.sqlite")


def test_a_file_system_without_a_write_ahead_log_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(JournalError, match="journal mode memory, not wal"):
        Store(Path(":memory:"))


def test_a_commit_without_writes_does_not_touch_the_disk(tmp_path: Path) -> None:
    observed: List[float] = []
    store = Store(tmp_path / "journal.sqlite", observe_fsync=observed.append)
    assert not store.commit()
    store.delete(["k/absent"])
    assert store.commit()
    store.close()
    assert len(observed) == 1
    assert observed[0] >= 0


def test_reads_see_what_is_not_committed_yet(store: Store) -> None:
    store.put({"k/1": b"one", "k/2": b"two"})
    store.delete(["k/1"])
    assert store.get("k/1") is None
    assert content(store) == {"k/2": b"two"}


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    opened = Store(tmp_path_factory.mktemp("scan") / "journal.sqlite")
    yield opened
    opened.close()


@settings(deadline=None)
@given(st.sets(st.integers(0, 30)), st.integers(0, 30), st.integers(0, 30), st.integers(-1, 10))
def test_a_scan_gives_what_lies_between_its_bounds_in_order(
    shared_store: Store, numbers: Set[int], after: int, before: int, limit: int
) -> None:
    shared_store.delete([key for key, _ in shared_store.scan("k/")])
    shared_store.put({f"k/{number:02d}": bytes([number]) for number in numbers})
    expected = [number for number in sorted(numbers) if after < number < before]
    found = [value[0] for _, value in shared_store.scan("k/", f"k/{after:02d}", f"k/{before:02d}", limit)]
    assert found == (expected if limit < 0 else expected[:limit])


# --- a disk that refuses ---


def test_a_full_disk_fails_the_whole_group_and_the_next_goes_through_once_there_is_room(store: Store) -> None:
    store.put({"k/old": b"old"})
    store.commit()
    pages_left(store, 3)
    # SQLite undoes the group at the write that fails, and would begin anew with those behind it.
    store.put({f"k/{number:02d}": BLOB for number in range(20)})
    store.put({"k/small": b"small"})
    with pytest.raises(JournalError, match="full"):
        store.commit()
    assert content(store) == {"k/old": b"old"}
    room_made(store)
    assert not store.commit()
    assert content(store) == {"k/old": b"old"}
    store.put({"k/new": BLOB})
    store.commit()
    assert content(store) == {"k/old": b"old", "k/new": BLOB}


def test_a_failed_write_is_told_by_the_next_read_and_rolling_back_leaves_nothing_of_it(store: Store) -> None:
    pages_left(store, 2)
    store.put({"k/0": BLOB, "k/1": BLOB, "k/2": BLOB, "k/3": BLOB})
    with pytest.raises(sqlite3.Error, match="full"):
        store.get("k/0")
    store.put({"k/4": b"after the failure"})
    store.roll_back()
    room_made(store)
    store.put({"k/5": b"new"})
    store.commit()
    assert content(store) == {"k/5": b"new"}


def test_a_commit_that_fails_itself_leaves_nothing_and_hangs_nobody(store: Store) -> None:
    store._run("PRAGMA foreign_keys=ON")
    store._run("CREATE TABLE parent (id INTEGER PRIMARY KEY)")
    store._run("CREATE TABLE child (parent REFERENCES parent(id) DEFERRABLE INITIALLY DEFERRED)")
    store.put({"k/1": b"one"})
    store._run("INSERT INTO child VALUES (7)")  # found out at COMMIT, as a disk that fails there
    with pytest.raises(JournalError, match="FOREIGN KEY"):
        store.commit()
    assert content(store) == {}
    store.put({"k/2": b"two"})
    store.commit()
    assert content(store) == {"k/2": b"two"}


def test_a_dead_thread_of_the_table_is_an_error_and_opening_again_helps(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_POLL_S", 0.01)
    store.put({"k/1": b"one"})
    store.commit()
    store.put({"k/2": b"two"})
    store._db.conn.close(force=True)  # as an I/O error half-way through a SELECT would end it
    store._db.conn.join(10)
    with pytest.raises(JournalError, match="can't be read"):
        store.get("k/1")
    with pytest.raises(JournalError):
        store.commit()
    with pytest.raises(JournalError):
        store.roll_back()
    assert not store.purge()
    store.reopen()
    assert content(store) == {"k/1": b"one"}


def test_an_unreadable_row_in_the_middle_of_a_scan_is_an_error_and_no_hang(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_POLL_S", 0.01)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    store._run("CREATE VIEW broken AS SELECT key, CASE WHEN key > 'k/1' THEN json('{') ELSE key END FROM journal")
    store.put({"k/1": b"one", "k/2": b"two", "k/3": b"three"})
    store.commit()
    with pytest.raises(JournalError, match="can't be read"):
        store._run("SELECT * FROM broken")
    store.reopen()
    assert len(content(store)) == 3


def test_a_file_that_is_no_table_is_an_error_that_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    (tmp_path / "journal.sqlite").write_bytes(b"not a table at all\n" * 400)
    with pytest.raises(JournalError, match="can't be opened") as refused:
        Store(tmp_path / "journal.sqlite")
    assert "backup" in refused.value.hint


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(JournalError, match="can't be written"):
        Store(tmp_path / "file" / "journal.sqlite")


def test_the_trial_of_the_disk_leaves_nothing_behind(store: Store) -> None:
    assert {path.name for path in store.path.parent.iterdir()} == {"journal.sqlite", "journal.sqlite-wal", "journal.sqlite-shm"}


# --- room ---


def test_after_a_purge_deleted_bytes_are_nowhere_on_the_disk(store: Store) -> None:
    secret = b"nobody may ever find this again"
    store.put({f"k/{number:02d}": secret + bytes([number]) * 900 for number in range(40)})
    store.commit()
    store.delete([f"k/{number:02d}" for number in range(1, 40)])
    store.put({"k/00": b"something else"})
    store.commit()
    assert secret in files(store)
    assert store.purge()
    assert secret not in files(store)


def test_the_size_counts_what_is_live_and_sees_the_group_in_hand(store: Store) -> None:
    store.put({f"k/{number:02d}": BLOB for number in range(50)})
    full = store.size_bytes()
    assert full > 50 * len(BLOB)
    store.commit()
    store.delete([f"k/{number:02d}" for number in range(50)])
    assert store.size_bytes() < full / 4
