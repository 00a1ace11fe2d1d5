"""The durable record of what was taught: one thread, one log, group commit.

The journal thread alone touches the store. Callers submit commands from any thread and get a future that resolves after the commit that
holds their writes is on the disk; commands that arrive while the disk is busy share the next commit. The learner reads the log from here,
so its backlog lies on the disk and not in memory, and a restart is nothing but reading on.
"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import sqlite3
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, TypeVar

from latentd.errors import JournalError, LatentdError, NotReady, Overloaded
from latentd.replay.catalogue import Catalogue
from latentd.replay.latents import LatentCodec
from latentd.replay.limits import JournalLimits
from latentd.replay.records import ClassRecord, Entry, Idempotency, JournalStatus, NewSample, Recalled, SampleRecord
from latentd.replay.store import Store

logger = logging.getLogger(__name__)
T = TypeVar("T")
_GROUP = 64
# What a refusing disk and a damaged file raise: the group fails, the journal goes on.
_FAILURES = (JournalError, sqlite3.Error, ValueError, LookupError, TypeError)
_Command = Tuple[Callable[[], Any], "Future[Any]"]


def holds_anything(path: Path) -> bool:
    """Whether the journal in this file, which nobody has open, has an entry. Raises JournalError for a damaged one."""
    if not path.exists():
        return False
    store = Store(path)
    try:
        return store.get("m/seq") not in (None, b"0")
    finally:
        store.close()


class Journal:
    """Commands in, futures out; see the module docstring.

    Every method may be called from any thread; none blocks except `start` and `close`. Futures fail with JournalError (503, the disk
    refused; nothing of the command is stored), BudgetFull, SampleNotFound, ClassNotFound, Conflict or LabelInvalid.
    """

    def __init__(
        self,
        path: Path,
        *,
        codec: LatentCodec,
        feature_width: int,
        limits: JournalLimits,
        clock: Callable[[], float] = time.time,
        queue_capacity: int = 1024,
        observe_fsync: Optional[Callable[[float], None]] = None,
    ) -> None:
        self._open: Callable[[], Store] = lambda: Store(path, observe_fsync=self._observed)
        self._observe_fsync = observe_fsync
        self._make_catalogue: Callable[[Store], Catalogue] = lambda store: Catalogue(store, codec, feature_width, limits, clock)
        self._budget_bytes = limits.budget_bytes
        self._commands: queue.Queue[Optional[_Command]] = queue.Queue(maxsize=queue_capacity)
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._started: Future[None] = Future()
        self._classes: Tuple[ClassRecord, ...] = ()
        self._head_seq = 0
        self._samples = 0
        self._size_bytes = 0
        self._last_fsync_s: Optional[float] = None
        self._failed: Optional[str] = None
        self._set_aside = 0
        self._closed = False
        self._ended = False
        self._group: Sequence[_Command] = ()  # taken by the thread, not answered yet
        self.learned_seq = 0  # the learner moves it: samples up to here are "learned"
        self.on_append: Callable[[], None] = lambda: None

    def start(self, timeout_s: float = 60.0) -> None:
        """Opens the store and reads the catalogue. Raises JournalError when it can't be opened."""
        self._thread.start()
        self._started.result(timeout_s)

    def close(self, timeout_s: float = 30.0) -> None:
        """Finishes what is queued, commits and closes the file."""
        if self._thread.is_alive() and not self._closed:
            self._closed = True
            try:
                self._commands.put(None, timeout=timeout_s)
            except queue.Full:
                logger.error("the journal did not end in %.0f seconds: the disk does not answer", timeout_s)
                return
            self._thread.join(timeout_s)

    # --- commands -----------------------------------------------------------------------------------------------------

    def admit(self, batch: Sequence[NewSample], idempotency: Optional[Idempotency] = None) -> Future[Tuple[SampleRecord, ...]]:
        """Stores one request's samples, in order; near-duplicates come back as such and are not stored again."""
        return self._submit(lambda: self._catalogue.admit(batch, idempotency))

    def recall(self, key: str) -> Future[Optional[Recalled]]:
        return self._submit(lambda: self._catalogue.recall(key, self.learned_seq))

    def sample(self, sample_id: str) -> Future[SampleRecord]:
        return self._submit(lambda: self._catalogue.sample(sample_id, self.learned_seq))

    def samples_of(self, sample_ids: Sequence[str]) -> Future[Tuple[SampleRecord, ...]]:
        """These samples in their order, without those that are gone."""
        return self._submit(lambda: self._catalogue.samples_of(sample_ids, self.learned_seq))

    def samples(
        self, after: Optional[str], limit: int, label: Optional[str] = None, state: Optional[str] = None
    ) -> Future[Tuple[Tuple[SampleRecord, ...], Optional[str]]]:
        """One page of samples beyond the cursor, oldest first, and the next cursor (None: that was the last).

        Where label or state fit few, a page may be short, or empty, and not the last.
        """
        return self._submit(lambda: self._catalogue.page(after, limit, label, state, self.learned_seq))

    def relabel(self, sample_id: str, label: str, again: bool = False) -> Future[SampleRecord]:
        """again: the learner hears of it even where that is the label already, unless it is about to hear of the sample anyway."""
        return self._submit(lambda: self._catalogue.relabel(sample_id, label, self.learned_seq, again))

    def forget(self, sample_id: str) -> Future[SampleRecord]:
        return self._submit(lambda: self._catalogue.forget(sample_id, self.learned_seq))

    def forget_class(self, name: str) -> Future[ClassRecord]:
        return self._submit(lambda: self._catalogue.forget_class(name))

    def put_class(self, name: str, rename_to: Optional[str] = None) -> Future[Tuple[ClassRecord, bool]]:
        """Creates the class (True) or finds it (False), and renames it when asked to."""
        return self._submit(lambda: self._catalogue.put_class(name, rename_to))

    def entries(self, after_seq: int, limit: int) -> Future[List[Entry]]:
        """The log beyond `after_seq`, in order; whole requests, so the last may carry it past `limit`."""
        return self._submit(lambda: self._catalogue.entries(after_seq, limit))

    def settle(self, seq: int, evicted: Sequence[str] = (), prunable_seq: int = 0, trimmed: Sequence[str] = ()) -> Future[None]:
        """The learner's state up to `seq` is durable: wipes what was forgotten, and drops the latents that the replay memory gave up.

        prunable_seq: every version on the disk has learned the log up to here, so that spent records may make room. trimmed: samples of
        whose latents the tokens go.
        """
        return self._submit(lambda: self._catalogue.settle(seq, evicted, prunable_seq, trimmed))

    def drop_tokens(self) -> Future[None]:
        """Leaves of every latent its features: what stores tokens has changed."""
        return self._submit(lambda: self._catalogue.drop_tokens())

    def put_counters(self, name: str, counters: Dict[str, Any]) -> Future[None]:
        return self._submit(lambda: self._catalogue.put_counters(name, json.dumps(counters).encode()))

    def counters(self, name: str) -> Future[Dict[str, Any]]:
        return self._submit(lambda: self._catalogue.counters(name))

    # --- immediate ----------------------------------------------------------------------------------------------------

    def classes(self) -> Tuple[ClassRecord, ...]:
        """The classes as of the last commit, oldest first."""
        return self._classes

    def status(self) -> JournalStatus:
        return JournalStatus(
            self._head_seq,
            self._samples,
            self._size_bytes,
            self._budget_bytes,
            self._commands.qsize(),
            self._commands.maxsize,
            self._last_fsync_s,
            self._failed,
            self._set_aside,
        )

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _submit(self, command: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        if self._closed or not self._thread.is_alive():
            future.set_exception(JournalError(self._failed or "the journal is closed"))
            return future
        try:
            self._commands.put_nowait((command, future))
        except queue.Full:
            future.set_exception(Overloaded("the journal's queue is full"))
        if self._ended:  # it may have ended between the look and the put: then nobody else answers
            self._refuse_waiting()
        return future

    def _run(self) -> None:
        try:
            with contextlib.closing(self._open()) as self._store:
                self._reload()
                self._catalogue.expire_keys()
                self._started.set_result(None)
                while self._serve_group():
                    pass
        except (*_FAILURES, LatentdError) as cause:
            self._failed = str(cause)
            if not self._started.done():
                self._started.set_exception(_told(cause))
            else:
                logger.exception("the journal stopped; learning answers 503, classify goes on")
        finally:
            self._refuse_all()

    def _serve_group(self) -> bool:
        """Runs the waiting commands under one commit; False at the closing mark."""
        self._group, go_on = self._take_group()
        results: List[Tuple[Future[Any], Any]] = []
        try:
            for command, future in self._group:
                try:
                    results.append((future, command()))
                except JournalError:
                    raise
                except LatentdError as refused:  # refused before it wrote anything
                    results.append((future, refused))
            size_bytes = self._catalogue.size_bytes()
            if self._store.commit():
                self._failed = None
        except _FAILURES as cause:
            self._fail_group(cause)
            return go_on
        if self._catalogue.purge_due:
            self._catalogue.purge_due = not self._store.purge()
        self._publish(size_bytes)
        for future, result in results:
            if isinstance(result, LatentdError):
                future.set_exception(result)
            else:
                future.set_result(result)
        return go_on

    def _take_group(self) -> Tuple[List[_Command], bool]:
        group: List[_Command] = []
        item = self._commands.get()
        while item is not None:
            if item[1].set_running_or_notify_cancel():
                group.append(item)
            if len(group) >= _GROUP:
                return group, True
            try:
                item = self._commands.get_nowait()
            except queue.Empty:
                return group, True
        return group, False

    def _fail_group(self, cause: Exception) -> None:
        """The disk refused: nothing of the group is stored, and the catalogue is read again as the disk has it."""
        self._failed = str(cause)
        logger.error("a journal commit failed, %d commands are refused: %s", len(self._group), cause, exc_info=cause)
        try:
            self._store.roll_back()
        except JournalError:
            self._store.reopen()
        self._reload()
        for _, future in self._group:
            future.set_exception(_told(cause))

    def _reload(self) -> None:
        self._catalogue = self._make_catalogue(self._store)
        self._catalogue.load()
        self._publish(self._catalogue.size_bytes())

    def _publish(self, size_bytes: int) -> None:
        grown = self._catalogue.head_seq > self._head_seq
        self._head_seq = self._catalogue.head_seq
        self._samples = self._catalogue.stored
        self._classes = self._catalogue.class_records()
        self._size_bytes = size_bytes
        self._set_aside = self._catalogue.set_aside
        if grown:
            self.on_append()

    def _observed(self, seconds: float) -> None:
        self._last_fsync_s = seconds
        if self._observe_fsync is not None:
            self._observe_fsync(seconds)

    def _refuse_all(self) -> None:
        """The thread ends: every caller is told instead of left waiting."""
        self._closed = self._ended = True
        if not self._started.done():
            self._started.set_exception(JournalError(self._failed or "the journal stopped while it was opened"))
        for _, future in self._group:
            if not future.done():
                future.set_exception(JournalError(self._failed or "the journal stopped"))
        self._refuse_waiting()

    def _refuse_waiting(self) -> None:
        while True:
            try:
                item = self._commands.get_nowait()
            except queue.Empty:
                return
            if item is not None and item[1].set_running_or_notify_cancel():
                item[1].set_exception(NotReady(self._failed or "the journal is closed"))


def _told(cause: Exception) -> LatentdError:
    return cause if isinstance(cause, LatentdError) else JournalError(f"the journal can't be read or written: {cause}")
