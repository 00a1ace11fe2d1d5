"""The journal thread: durable before it answers, all of a group or nothing, and an answer for everybody, whatever breaks."""

from __future__ import annotations

import sqlite3
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Callable, Iterator, List, Tuple

import pytest

from latentd.errors import ConfigError, JournalError, LabelInvalid, NotReady, Overloaded, SampleNotFound
from latentd.replay import store as store_module
from latentd.replay.journal import Journal
from latentd.replay.records import Idempotency
from latentd.replay.store import Store
from lessons import CODEC, FEATURES, WAIT_S, limits, running_journal, sample, teach


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with running_journal(tmp_path) as running:
        yield running


class Hold:
    """Keeps the journal thread busy inside a command, so that the commands behind it share a group."""

    def __init__(self, journal: Journal) -> None:
        self._gate, self._entered = threading.Event(), threading.Event()
        self.future: Future[bool] = journal._submit(self._wait)
        assert self._entered.wait(WAIT_S)

    def _wait(self) -> bool:
        self._entered.set()
        return self._gate.wait(WAIT_S)

    def release(self) -> None:
        self._gate.set()
        self.future.result(WAIT_S)


def pages_left(journal: Journal, pages: int) -> None:
    """A disk with room for so many pages more."""
    journal._submit(lambda: journal._store._run(f"PRAGMA max_page_count={journal._store._one('PRAGMA page_count') + pages}")).result(WAIT_S)


def room_made(journal: Journal) -> None:
    journal._submit(lambda: journal._store._run("PRAGMA max_page_count=1000000")).result(WAIT_S)


def names(journal: Journal) -> List[str]:
    return [record.name for record in journal.classes()]


# --- durable ---


def test_what_was_acknowledged_is_there_when_the_journal_is_opened_again(tmp_path: Path) -> None:
    key = Idempotency("key", "body", "request", (None, None))
    with running_journal(tmp_path) as journal:
        journal.admit([sample("cat", 0), sample("dog", 1)], key).result(WAIT_S)
        journal.put_counters("energy", {"joules": 1.5}).result(WAIT_S)
        records = journal.samples(None, 10).result(WAIT_S)
    with running_journal(tmp_path) as journal:
        assert journal.samples(None, 10).result(WAIT_S) == records
        assert [entry.code for entry in journal.entries(0, 10).result(WAIT_S)] == [sample("cat", 0).code, sample("dog", 1).code]
        assert journal.counters("energy").result(WAIT_S) == {"joules": 1.5}
        recalled = journal.recall("key").result(WAIT_S)
        assert recalled is not None
        assert recalled.records == records[0]
        assert names(journal) == ["cat", "dog"]
        assert (journal.status().head_seq, journal.status().samples) == (2, 2)


def test_an_answer_comes_only_after_the_commit_that_holds_it(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    order: List[str] = []
    commit = Store.commit

    def slow(self: Store) -> bool:
        order.append("commit")
        done = commit(self)
        order.append("on the disk")
        return done

    monkeypatch.setattr(Store, "commit", slow)
    hold = Hold(journal)
    future = journal.admit([sample("cat", 0)])
    future.add_done_callback(lambda _: order.append("answer"))
    hold.release()
    future.result(WAIT_S)
    assert order[-3:] == ["commit", "on the disk", "answer"]


def test_commands_that_wait_together_share_one_commit(tmp_path: Path) -> None:
    observed: List[float] = []
    journal = Journal(tmp_path / "j.sqlite", codec=CODEC, feature_width=FEATURES, limits=limits(), observe_fsync=observed.append)
    journal.start(WAIT_S)
    hold = Hold(journal)
    futures = [journal.admit([sample("cat", number)]) for number in range(20)]
    assert journal.status().queue_depth == 20
    hold.release()
    assert [future.result(WAIT_S)[0].seq for future in futures] == list(range(1, 21))
    assert len(observed) == 1
    assert journal.status().last_fsync_s == observed[0]
    journal.close(WAIT_S)


def test_a_refused_command_does_not_hurt_its_neighbours(journal: Journal) -> None:
    hold = Hold(journal)
    good, bad, other = journal.admit([sample("cat", 0)]), journal.put_class(" "), journal.forget("s00000042")
    last = journal.admit([sample("cat", 1)])
    hold.release()
    assert [future.result(WAIT_S)[0].seq for future in (good, last)] == [1, 2]
    with pytest.raises(LabelInvalid):
        bad.result(WAIT_S)
    with pytest.raises(SampleNotFound):
        other.result(WAIT_S)


def test_the_learner_is_woken_when_its_entry_can_be_read_and_before_the_answer(journal: Journal) -> None:
    order: List[Any] = []
    journal.on_append = lambda: order.append(("woken", journal.status().head_seq))
    hold = Hold(journal)
    future = journal.admit([sample("cat", 0)])
    future.add_done_callback(lambda _: order.append("answer"))
    hold.release()
    future.result(WAIT_S)
    journal.sample("s00000001").result(WAIT_S)
    journal.put_class("dog").result(WAIT_S)
    assert order == [("woken", 1), "answer"]


def test_a_sample_is_learned_when_the_learner_says_so(journal: Journal) -> None:
    teach(journal, ("cat", 0), ("cat", 1))
    journal.learned_seq = 1
    assert [record.state for record in journal.samples(None, 5).result(WAIT_S)[0]] == ["learned", "queued"]


# --- a disk that refuses ---


def test_a_full_disk_fails_the_group_keeps_nothing_of_it_and_the_next_goes_through(journal: Journal) -> None:
    teach(journal, ("cat", 0))
    pages_left(journal, 2)
    hold = Hold(journal)
    futures: List[Future[Any]] = [journal.admit([sample("ghost", number) for number in range(8)]) for _ in range(6)]
    futures += [journal.put_class("small"), journal.sample("s00000001")]
    hold.release()
    for future in futures:
        with pytest.raises(JournalError):
            future.result(WAIT_S)
    status = journal.status()
    assert (status.head_seq, status.samples, names(journal)) == (1, 1, ["cat"])
    assert "full" in str(status.failed)
    room_made(journal)
    assert [record.seq for record in journal.samples(None, 99).result(WAIT_S)[0]] == [1]
    assert "full" in str(journal.status().failed), "only a write that got through proves that the disk takes writes"
    assert [record.state for record in teach(journal, ("ghost", 0), ("ghost", 1))] == ["queued", "queued"]
    assert journal.status().failed is None
    assert journal.status().head_seq == 3


def test_a_duplicate_of_what_the_disk_refused_is_no_duplicate(tmp_path: Path) -> None:
    with running_journal(tmp_path, duplicate_cosine=0.999) as journal:
        journal.put_class("cat").result(WAIT_S)
        pages_left(journal, 1)
        with pytest.raises(JournalError):
            teach(journal, *[("cat", number) for number in range(60)])
        room_made(journal)
        assert teach(journal, ("cat", 0))[0].state == "queued"


def test_a_settling_that_the_disk_refuses_takes_nobody_with_it_unseen(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    teach(journal, ("cat", 0))
    journal.forget("s00000001").result(WAIT_S)
    monkeypatch.setattr(Store, "commit", refuse(times=1))
    hold = Hold(journal)
    settled, admitted = journal.settle(2), journal.admit([sample("cat", 1)])
    hold.release()
    for future in (settled, admitted):
        with pytest.raises(JournalError, match="no room"):
            future.result(WAIT_S)
    monkeypatch.undo()
    assert journal.status().head_seq == 2
    journal.settle(2).result(WAIT_S)
    assert journal.entries(1, 5).result(WAIT_S)[0].code is None


def refuse(times: int) -> Callable[[Store], bool]:
    commit, left = Store.commit, [times]

    def refusing(self: Store) -> bool:
        if self._dirty and left[0]:
            left[0] -= 1
            self.roll_back()
            raise JournalError("no room")
        return commit(self)

    return refusing


def test_a_dead_table_thread_fails_one_group_and_is_replaced(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_POLL_S", 0.01)
    teach(journal, ("cat", 0))
    table = journal._store._db.conn
    table.close(force=True)
    table.join(WAIT_S)
    with pytest.raises(JournalError):
        teach(journal, ("cat", 1))
    assert [record.seq for record in teach(journal, ("cat", 2))] == [2]
    assert len(journal.samples(None, 9).result(WAIT_S)[0]) == 2


def test_a_record_damaged_meanwhile_fails_the_command_that_reads_it_once(journal: Journal) -> None:
    teach(journal, ("cat", 0), ("cat", 1))
    journal._submit(lambda: journal._store.put({"e/000000000001": b"Snonsense"})).result(WAIT_S)
    with pytest.raises(JournalError):
        journal.sample("s00000001").result(WAIT_S)
    assert journal.sample("s00000001").result(WAIT_S).state == "held"
    assert (teach(journal, ("cat", 2))[0].seq, journal.status().set_aside) == (3, 1)


def test_forgotten_bytes_are_gone_from_the_disk_when_settling_is_answered(tmp_path: Path) -> None:
    with running_journal(tmp_path) as journal:
        teach(journal, *[("cat", number) for number in range(30)])
        secrets = [sample("cat", number).code for number in range(30)]
        assert all(secret in on_disk(tmp_path) for secret in secrets)
        journal.forget("s00000003").result(WAIT_S)
        journal.settle(31).result(WAIT_S)
        assert [secret in on_disk(tmp_path) for secret in secrets] == [number != 2 for number in range(30)]
        journal.forget_class("cat").result(WAIT_S)
        journal.settle(32).result(WAIT_S)
        assert not any(secret in on_disk(tmp_path) for secret in secrets)


def on_disk(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.iterdir()) if not path.name.endswith("-shm"))


def test_a_purge_that_failed_is_tried_again(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    answers: List[bool] = []
    purge = Store.purge
    monkeypatch.setattr(Store, "purge", lambda self: answers.pop(0) and purge(self))
    answers += [True] * 9
    teach(journal, ("cat", 0))
    journal.forget("s00000001").result(WAIT_S)
    answers[:] = [False, True]
    journal.settle(2).result(WAIT_S)
    journal.sample("s00000001").result(WAIT_S)
    journal.sample("s00000001").result(WAIT_S)
    assert answers == [], "once at settling, once more with the next command, and then no more"


# --- an answer for everybody ---


def test_a_full_queue_refuses_at_once(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.sqlite", codec=CODEC, feature_width=FEATURES, limits=limits(), queue_capacity=2)
    journal.start(WAIT_S)
    hold = Hold(journal)
    futures = [journal.admit([sample("cat", number)]) for number in range(3)]
    with pytest.raises(Overloaded):
        futures[2].result(0)
    hold.release()
    assert [future.result(WAIT_S)[0].seq for future in futures[:2]] == [1, 2]
    journal.close(WAIT_S)


def test_closing_finishes_what_was_asked_for_and_refuses_the_rest(tmp_path: Path) -> None:
    with running_journal(tmp_path) as journal:
        hold = Hold(journal)
        futures = [journal.admit([sample("cat", number)]) for number in range(150)]
        closer = threading.Thread(target=journal.close, args=(WAIT_S,))
        closer.start()
        hold.release()
        closer.join(WAIT_S)
        assert len({future.result(0)[0].seq for future in futures}) == 150
        with pytest.raises(JournalError, match="closed"):
            teach(journal, ("cat", 200))
    with running_journal(tmp_path) as journal:
        assert journal.status().head_seq == 150


def test_a_command_that_slips_in_while_the_journal_ends_is_answered(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    journal.close(WAIT_S)
    monkeypatch.setattr(journal, "_closed", False)
    monkeypatch.setattr(journal._thread, "is_alive", lambda: True)  # what the caller saw a moment before
    with pytest.raises(NotReady):
        teach(journal, ("cat", 0))
    monkeypatch.undo()


def test_a_cancelled_command_is_not_run_and_harms_nobody(journal: Journal) -> None:
    hold = Hold(journal)
    dropped, kept = journal.admit([sample("cat", 0)]), journal.admit([sample("cat", 1)])
    assert dropped.cancel()
    hold.release()
    assert kept.result(WAIT_S)[0].seq == 1
    assert journal.status().head_seq == 1


def test_an_unforeseen_error_ends_the_journal_and_every_caller_is_told(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    hold = Hold(journal)

    def break_it() -> None:
        raise RuntimeError("unforeseen")

    futures: List[Future[Any]] = [journal.admit([sample("cat", 0)]), journal._submit(break_it)]
    futures += [journal.admit([sample("cat", number)]) for number in range(100)]
    futures[50].cancel()
    hold.release()
    journal._thread.join(WAIT_S)
    for number, future in enumerate(futures):
        if number != 50:
            with pytest.raises((JournalError, NotReady)):
                future.result(WAIT_S)
    with pytest.raises(JournalError):
        teach(journal, ("cat", 0))


@pytest.mark.parametrize("damage", ["no table", "no record"])
def test_a_journal_that_cannot_be_read_says_so_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    path = tmp_path / "journal.sqlite"
    if damage == "no table":
        path.write_bytes(b"not a table at all\n" * 400)
    else:
        with running_journal(tmp_path) as journal:
            teach(journal, ("cat", 0))
        with sqlite3.connect(path) as connection:
            connection.execute("UPDATE journal SET value = 'Sx' WHERE key LIKE 'e/%'")
        connection.close()
    broken = Journal(path, codec=CODEC, feature_width=FEATURES, limits=limits())
    with pytest.raises(JournalError):
        broken.start(WAIT_S)
    with pytest.raises(JournalError):
        teach(broken, ("cat", 0))
    broken.close(WAIT_S)


def test_an_error_of_another_kind_at_the_start_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse_to_open(*_: Any, **__: Any) -> Tuple[()]:
        raise ConfigError("not with this configuration")

    monkeypatch.setattr("latentd.replay.journal.Store", refuse_to_open)
    journal = Journal(tmp_path / "j.sqlite", codec=CODEC, feature_width=FEATURES, limits=limits())
    with pytest.raises(ConfigError):
        journal.start(WAIT_S)


def test_old_keys_are_dropped_at_the_start(tmp_path: Path) -> None:
    now = [1000.0]

    def opened() -> Journal:
        journal = Journal(tmp_path / "j.sqlite", codec=CODEC, feature_width=FEATURES, limits=limits(), clock=lambda: now[0])
        journal.start(WAIT_S)
        return journal

    journal = opened()
    journal.admit([sample("cat", 0)], Idempotency("key", "body", "request", (None,))).result(WAIT_S)
    journal.close(WAIT_S)
    now[0] += 25 * 3600
    journal = opened()
    journal.put_class("dog").result(WAIT_S)
    assert journal._submit(lambda: list(journal._store.scan("k/"))).result(WAIT_S) == []
    journal.close(WAIT_S)
