"""The learner thread: reads the journal's log in order, learns it, publishes snapshots.

Owns the trainer (sums, replay memory, trained head) and its checkpoints. It lets waiting classify requests go first before every step,
works in steps of some milliseconds, and blocks only on the journal and on its own checkpoint file. When it dies it is made anew from the
last checkpoint and the log; after MAX_DEATHS in DEATH_WINDOW_S it stays down and serving goes on with the last snapshot.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections import deque
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Deque, Dict, Iterator, List, Optional, Protocol, Sequence, Tuple

import torch

from latentd.errors import JournalError, LatentdError, LearnerError, Overloaded
from latentd.learning import checkpoint
from latentd.learning.accuracy import EMPTY, AccuracyReport
from latentd.learning.snapshot import Snapshot, empty
from latentd.learning.trainer import Trainer
from latentd.replay.journal import Journal
from latentd.replay.records import Entry

logger = logging.getLogger(__name__)

MAX_DEATHS = 3
DEATH_WINDOW_S = 600.0
PUBLISH_SHARE = 0.1  # while more waits: making snapshots takes at most this share of the time
IDLE_SAVE_S = 5.0  # nothing to do for so long: what was learned is saved
NICE = 10  # of the thread: what answers goes before what learns
YIELD_S = 0.25  # longest time that classify requests hold up one step
_PAGE = 256


class LearnerObserver(Protocol):
    """What the metrics hear of the learner; called on its thread."""

    def step(self, seconds: float) -> None: ...
    def published(self, cause: str) -> None: ...
    def rejected(self, reason: str) -> None: ...
    def evicted(self, count: int) -> None: ...


@dataclass(frozen=True)
class LearnerStatus:
    """state: idle, learning, yielding, failed, stopped. watermark_seq: the log up to here takes part in the published answers."""

    state: str
    reason: Optional[str]
    watermark_seq: int
    lag_samples: int
    lag_s: float
    steps: int
    last_step_s: Optional[float]
    deaths: int
    last_publish_rejected: Optional[str]
    gate: Dict[str, Any]


@dataclass(frozen=True)
class MemoryStatus:
    """The replay memory, in samples and bytes; holdout_bytes is kept beside it."""

    slots: int
    used: int
    used_bytes: int
    budget_bytes: int
    evictions: int
    codec: str
    holdout_bytes: int
    classes: Dict[int, int]


@dataclass(frozen=True)
class LearnerSettings:
    """checkpoint_s: longest time between checkpoints while learning; keep_versions: files kept; codec: its name, for status."""

    versions_dir: Path
    checkpoint_s: float
    keep_versions: int
    codec: str
    replay_bytes: int


class Learner:
    """Publishes `snapshot`, an immutable reference that any thread may read; see the module docstring."""

    def __init__(
        self,
        journal: Journal,
        make_trainer: Callable[[], Trainer],
        settings: LearnerSettings,
        *,
        observer: LearnerObserver,
        busy: Callable[[], bool],
        activity: Callable[[int], AbstractContextManager[None]],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._journal = journal
        self._make_trainer = make_trainer
        self._settings = settings
        self._observer = observer
        self._busy = busy
        self._activity = activity
        self._clock = clock
        self._snapshot = empty(clock())
        self._accuracy = EMPTY
        self._memory = MemoryStatus(0, 0, 0, settings.replay_bytes, 0, settings.codec, 0, {})
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._waiters: List[Tuple[int, Future[None]]] = []
        self._deaths: Deque[float] = deque(maxlen=MAX_DEATHS)
        self._state = "idle"
        self._reason: Optional[str] = None
        self._steps = 0
        self._last_step_s: Optional[float] = None
        self._rejected: Optional[str] = None
        self._gate: Dict[str, Any] = {}
        self._behind_since: Optional[float] = None
        self._next_publish_at = 0.0
        self._saved_seq = 0
        self._saved_at = 0.0
        self._restored: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="learner", daemon=True)
        journal.on_append = self._wake.set

    # --- any thread ---------------------------------------------------------------------------------------------------

    def start(self, timeout_s: float = 120.0) -> None:
        """Starts the thread and waits until the last checkpoint is published again."""
        self._thread.start()
        self._restored.result(timeout_s)

    def stop(self, timeout_s: float = 30.0) -> None:
        """Ends after the step in hand, with a checkpoint."""
        self._stop.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    @property
    def snapshot(self) -> Snapshot:
        return self._snapshot

    def learned(self, seq: int) -> Future[None]:
        """Resolves when the log entry `seq` takes part in the published answers; fails with LearnerError when the learner is down."""
        future: Future[None] = Future()
        with self._lock:
            if self._state in ("failed", "stopped"):
                future.set_exception(LearnerError(self._reason or "the learner is stopped"))
            elif self._snapshot.seq >= seq:
                future.set_result(None)
            else:
                self._waiters.append((seq, future))
                self._wake.set()
        return future

    def accuracy(self) -> AccuracyReport:
        return self._accuracy

    def memory(self) -> MemoryStatus:
        return self._memory

    def status(self) -> LearnerStatus:
        lag = max(0, self._journal.status().head_seq - self._snapshot.seq)
        lag_s = self._clock() - self._behind_since if lag and self._behind_since is not None else 0.0
        return LearnerStatus(
            self._state,
            self._reason,
            self._snapshot.seq,
            lag,
            max(0.0, lag_s),
            self._steps,
            self._last_step_s,
            len(self._deaths),
            self._rejected,
            self._gate,
        )

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        torch.set_num_threads(1)  # its matrices are small; the cores belong to the frozen stage
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)  # Linux: of this thread alone
        while not self._stop.is_set():
            try:
                self._study()
            except Exception:  # the border of the learner: whatever it is, serving goes on and the log is still there
                logger.exception("the learner died; it starts again from the last checkpoint and the journal")
                if self._died():
                    break
        if self._state != "failed":
            self._end("stopped", "latentd is stopping")

    def _study(self) -> None:
        trainer = self._restore()
        self._saved_seq, self._saved_at = trainer.seq, time.monotonic()
        while not self._stop.is_set():
            page = self._next_page(trainer.seq)
            if page:
                self._learn_page(trainer, page)
            elif page is not None:
                self._rest(trainer)
        if trainer.seq > self._snapshot.seq:
            self._publish(trainer)
        if trainer.seq > self._saved_seq:
            self._save(trainer)

    def _learn_page(self, trainer: Trainer, page: Sequence[Entry]) -> None:
        for _, batch in itertools.groupby(page, key=lambda entry: entry.batch):
            self._learn(trainer, list(batch))
            if self._awaited(trainer.seq) or time.monotonic() >= self._next_publish_at:
                self._publish(trainer)
            if self._stop.is_set():
                return
        if any(entry.kind in ("forget", "forget_class", "rename") for entry in page):
            self._publish(trainer)
            self._save(trainer)
        elif time.monotonic() - self._saved_at > self._settings.checkpoint_s:
            self._save(trainer)

    def _next_page(self, after_seq: int) -> Optional[List[Entry]]:
        """The log beyond `after_seq`; None when the journal can't be read now: a full disk is no reason to die."""
        try:
            return self._journal.entries(after_seq, _PAGE).result()
        except (JournalError, Overloaded) as cause:
            self._reason = cause.detail
            self._stop.wait(1.0)
            return None

    def _rest(self, trainer: Trainer) -> None:
        """Sleeps until the journal grows, somebody waits for an answer, or a snapshot or checkpoint is due."""
        timeout: Optional[float] = None
        if trainer.seq > self._snapshot.seq:
            timeout = 0.0 if self._awaited(trainer.seq) else max(0.0, self._next_publish_at - time.monotonic())
        elif trainer.seq > self._saved_seq:
            timeout = IDLE_SAVE_S
        if trainer.seq == self._snapshot.seq:
            self._state, self._behind_since = "idle", None
        woken = self._wake.wait(timeout)
        self._wake.clear()
        if woken or timeout is None:
            return
        if trainer.seq > self._snapshot.seq:
            self._publish(trainer)
        else:
            self._save(trainer)

    def _learn(self, trainer: Trainer, batch: Sequence[Entry]) -> None:
        self._state = "learning"
        if self._behind_since is None:
            self._behind_since = self._clock()
        with self._activity(sum(1 for entry in batch if entry.code is not None)):
            self._score(trainer, batch)
            started = time.perf_counter()
            for _ in trainer.take(batch):
                self._observed_step(time.perf_counter() - started)
                self._let_others_go_first()
                started = time.perf_counter()
            self._observed_step(time.perf_counter() - started)
        if trainer.evicted:
            self._journal.evict(trainer.evicted)
            self._observer.evicted(len(trainer.evicted))
            trainer.evicted = []

    def _score(self, trainer: Trainer, batch: Sequence[Entry]) -> None:
        """Prequential accuracy: the published snapshot answers before the batch is learned."""
        taught = [entry for entry in batch if entry.kind == "sample" and entry.code is not None and entry.class_id is not None]
        if not taught:
            return
        snapshot = self._snapshot
        probabilities = snapshot.predict(trainer.features([entry.code for entry in taught if entry.code is not None]))
        for entry, row in zip(taught, probabilities):
            assert entry.class_id is not None, "chosen above"
            trainer.prequential.record(entry.class_id, bool(len(row)) and snapshot.class_ids[int(row.argmax())] == entry.class_id)

    def _publish(self, trainer: Trainer) -> None:
        started = time.monotonic()
        names = {record.class_id: record.name for record in self._journal.classes()}
        snapshot, accuracy = trainer.candidate(names, self._clock())
        self._note_verdict(trainer)
        memory = trainer.memory
        self._memory = MemoryStatus(
            memory.slots,
            memory.used,
            memory.used_bytes,
            self._settings.replay_bytes,
            memory.evictions,
            self._settings.codec,
            trainer.holdout_bytes(),
            memory.counts(),
        )
        with self._lock:
            self._snapshot, self._accuracy = snapshot, accuracy
            self._journal.learned_seq = trainer.seq
            due = [future for seq, future in self._waiters if seq <= trainer.seq]
            self._waiters = [(seq, future) for seq, future in self._waiters if seq > trainer.seq]
        self._next_publish_at = started + (time.monotonic() - started) / PUBLISH_SHARE
        self._observer.published("learned")
        for future in due:
            future.set_result(None)

    def _note_verdict(self, trainer: Trainer) -> None:
        verdict = trainer.last_verdict
        if verdict is None:
            return
        self._gate = {
            "reason": verdict.reason,
            "trained_head_weight": verdict.weight,
            "temperature": verdict.temperature,
            "holdout": verdict.holdout,
            "floor_correct": verdict.floor_correct,
            "candidate_correct": verdict.candidate_correct,
            "negative_flips": verdict.negative_flips,
        }
        if verdict.reason.startswith("kept out"):
            self._rejected = verdict.reason
            self._observer.rejected("holdout")

    def _save(self, trainer: Trainer) -> None:
        """Writes a checkpoint, after which forgotten latents may be wiped. A full disk is logged and tried again later."""
        self._saved_at = time.monotonic()
        arrays, facts = trainer.state()
        try:
            checkpoint.write(self._settings.versions_dir, arrays, facts, self._settings.keep_versions)
        except LearnerError as cause:
            logger.error("%s", cause.detail)
            self._reason = cause.detail
            return
        self._reason = None
        self._saved_seq = trainer.seq
        self._journal.settle(trainer.seq)

    def _restore(self) -> Trainer:
        """The newest whole checkpoint, with memory and hold-out filled from the log; what the log holds beyond it is learned next."""
        found = checkpoint.newest(self._settings.versions_dir)
        trainer = self._make_trainer()
        if found is not None:
            trainer.restore(*found, self._log_until(int(found[1]["seq"])))
        self._publish(trainer)
        if not self._restored.done():
            self._restored.set_result(None)
        return trainer

    def _log_until(self, seq: int) -> Iterator[Entry]:
        after = 0
        while after < seq:
            page = self._journal.entries(after, 1024).result()
            yield from (entry for entry in page if entry.seq <= seq)
            if not page:
                return
            after = page[-1].seq

    def _let_others_go_first(self) -> None:
        deadline = time.monotonic() + YIELD_S
        while self._busy() and not self._stop.is_set() and time.monotonic() < deadline:
            self._state = "yielding"
            self._stop.wait(0.002)
        self._state = "learning"

    def _observed_step(self, seconds: float) -> None:
        self._steps += 1
        self._last_step_s = seconds
        self._observer.step(seconds)

    def _awaited(self, seq: int) -> bool:
        with self._lock:
            return any(wanted <= seq for wanted, _ in self._waiters)

    def _died(self) -> bool:
        """Counts a death; True when it was one too many."""
        now = time.monotonic()
        self._deaths.append(now)
        if len(self._deaths) == MAX_DEATHS and now - self._deaths[0] < DEATH_WINDOW_S:
            self._end("failed", f"died {MAX_DEATHS} times in {DEATH_WINDOW_S / 60:.0f} minutes; the log has the cause")
            return True
        self._stop.wait(1.0)
        return False

    def _end(self, state: str, reason: str) -> None:
        with self._lock:
            self._state, self._reason = state, reason
            waiters, self._waiters = self._waiters, []
        for _, future in waiters:
            future.set_exception(LearnerError(reason))
        if not self._restored.done():
            self._restored.set_exception(LatentdError(reason))
