"""The learner thread: reads the journal's log in order, learns it, publishes snapshots.

Owns the trainer (sums, replay memory, trained head) and its checkpoints. It lets waiting classify requests go first before every step,
works in steps of some milliseconds, and blocks only on the journal and on its own checkpoint file. When it dies it is made anew from the
last checkpoint and the log; after MAX_DEATHS in DEATH_WINDOW_S it stays down and serving goes on with the last snapshot. Running out of
memory is no death: it waits for memory, and begins again.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections import deque
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, Deque, Dict, Iterator, Optional, Sequence

import torch

from latentd.errors import ConfigError, LatentdError, LearnerError
from latentd.learning.accuracy import EMPTY, AccuracyReport
from latentd.learning.keeper import VersionKeeper
from latentd.learning.log_reader import LogReader, Stopping
from latentd.learning.pacing import FORGETS, Arrivals, Pace, Urgency
from latentd.learning.place import Place
from latentd.learning.restraint import LEARN, SLEEP, Reason, unrestrained
from latentd.learning.snapshot import Snapshot, empty
from latentd.learning.status import LearnerObserver, LearnerStatus, MemoryStatus, gate_facts, memory_status
from latentd.learning.trainer import Trainer
from latentd.learning.waiters import Waiters
from latentd.replay.journal import Journal
from latentd.replay.records import Entry
from latentd.trouble import is_shortage, trim

logger = logging.getLogger(__name__)

MAX_DEATHS = 3
DEATH_WINDOW_S = 600.0
PUBLISH_SHARE = 0.05  # while more waits: making snapshots takes at most this share of the time
UNHURRIED = "new samples wait for the next version, and take part in answers shortly"
NICE = 10  # of the thread: what answers goes before what learns
FINISH_S = 2.0  # after stop: how long the request in hand may take to its end
RESTART_S = 1.0  # after a death
STARVED_S = 30.0  # after running out of memory
STARVED_FIRST_S = 1.0  # the same before there is anything to answer with; twice as long each time


@dataclass(frozen=True)
class LearnerSettings:
    """checkpoint_s: longest time between checkpoints while learning; keep_versions: files kept; codec: its name, for status; sleep_threads:
    cores that a sleep may use.
    """

    versions_dir: Path
    checkpoint_s: float
    keep_versions: int
    codec: str
    replay_bytes: int
    sleep_threads: int = 1


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
        working: Callable[[], bool] = lambda: False,
        activity: Callable[[int], AbstractContextManager[None]],
        restraint: Callable[[str], Optional[Reason]] = unrestrained,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """busy: whether classify requests wait, which go before a step of learning; working: whether any images do, which go before one of
        a sleep. restraint: says why a kind of work must wait now. clock: dates versions, may jump; monotonic: measures the lag.
        """
        self._journal = journal
        self._make_trainer = make_trainer
        self._settings = settings
        self._observer = observer
        self._activity = activity
        self._clock = clock
        self._snapshot = empty(clock())
        self._accuracy = EMPTY
        self._memory = MemoryStatus(0, 0, 0, settings.replay_bytes, 0, settings.codec, 0, {})
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._waiters = Waiters()
        self._deaths: Deque[float] = deque(maxlen=MAX_DEATHS)
        self._state = "idle"
        self._reason: Optional[str] = None
        self._steps = 0
        self._last_step_s: Optional[float] = None
        self._rejected: Optional[str] = None
        self._gate: Dict[str, Any] = {}
        self._arrivals = Arrivals(monotonic)
        self._next_publish_at = 0.0
        self._stop_by = float("inf")
        self._log = LogReader(journal, self._stop)
        self._short: Optional[str] = None  # of memory: what became of the work
        self._starved_s = STARVED_FIRST_S
        self._keeper = VersionKeeper(journal, settings.versions_dir, settings.checkpoint_s, settings.keep_versions)
        self._made: Optional[Snapshot] = None  # the last that the trainer in hand made, served or not
        self._place = Place()
        self._restored: Future[None] = Future()
        self._pace = Pace({LEARN: busy, SLEEP: lambda: busy() or working()}, restraint, self._stop, observer.waited)
        self._urgency = Urgency(journal)
        self._thread = threading.Thread(target=self._run, name="learner", daemon=True)
        journal.on_append = self._on_append

    # --- any thread ---------------------------------------------------------------------------------------------------

    def start(self, timeout_s: float = 120.0) -> None:
        """Starts the thread and waits until the last checkpoint is published again, or the learner has failed for good, or time is up:
        serving then begins without what was learned, which answers as soon as it could be read.

        Raises ConfigError where another configuration is what it needs.
        """
        self._arrivals.note(self._journal.status().head_seq)
        self._thread.start()
        try:
            self._restored.result(timeout_s)
        except FutureTimeoutError:
            logger.error("serving starts without what was learned, which was not read in %.0f s: %s", timeout_s, self.status().reason)

    def stop(self, timeout_s: float = 30.0) -> None:
        """Ends after the request in hand, with a checkpoint; leaves it half-learned, to be learned again, where it takes too long."""
        self._stop_by = time.monotonic() + FINISH_S
        self._stop.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    @property
    def snapshot(self) -> Snapshot:
        return self._snapshot

    def learned(self, seq: int) -> Future[None]:
        """Resolves when the log entry `seq` takes part in the published answers; fails with LearnerError when the learner is down."""
        future = self._waiters.wait_for(seq)
        self._wake.set()
        return future

    def accuracy(self) -> AccuracyReport:
        return self._accuracy

    def memory(self) -> MemoryStatus:
        return self._memory

    def status(self) -> LearnerStatus:
        lag = max(0, self._journal.status().head_seq - self._snapshot.seq)
        unhurried = UNHURRIED if self._state == "waiting" else None
        return LearnerStatus(
            self._pace.interruption or self._state,
            self._pace.reason or self._reason or self._short or self._log.trouble or self._keeper.trouble or unhurried,
            self._snapshot.seq,
            lag,
            self._arrivals.age_s(self._snapshot.seq) if lag else 0.0,
            self._steps,
            self._last_step_s,
            len(self._deaths),
            self._rejected,
            self._gate,
            self._pace.waited_s,
            self._place.name,
            self._place.reason,
        )

    def _on_append(self) -> None:
        """On the journal thread."""
        self._arrivals.note(self._journal.status().head_seq)
        self._wake.set()

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        torch.set_num_threads(1)  # its matrices are small; the cores belong to the frozen stage
        with suppress(OSError):  # a sandbox may forbid it
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)  # Linux: of this thread alone
        while not self._stop.is_set():
            starved: Optional[str] = None
            try:
                self._study()
            except Stopping:
                logger.info("the learner stops in the middle of a request; it learns it again after the next start")
            except ConfigError as cause:  # no later try would be different
                self._end("failed", cause)
                return
            except Exception as cause:  # the border of the learner: whatever it is, serving goes on and the log is still there
                starved = str(cause) if is_shortage(cause) else None
                if starved is None:
                    logger.exception("the learner died; it starts again from the last checkpoint and the journal")
                    if self._died():
                        return
            if starved is not None:  # out here, where no exception keeps what the failed step held
                self._starve(starved)
        self._end("stopped", LearnerError("latentd is stopping"))

    def _study(self) -> None:
        trainer = self._restore()
        sleep: Optional[Iterator[int]] = None
        while not self._stop.is_set():
            page = self._log.page(trainer.seq)
            if page:
                self._learn_page(trainer, page)
            elif not self._publish_due(trainer) and (sleep is not None or trainer.wants_sleep()):
                sleep = self._sleep(trainer, sleep or trainer.sleep())
            else:
                self._rest(trainer)
            if self._keeper.due_in_s(trainer) == 0.0:
                self._keeper.save(trainer)
        self._settle(trainer)

    def _settle(self, trainer: Trainer) -> None:
        """Lets all that was learned answer, and makes it durable."""
        if trainer.seq > self._snapshot.seq:
            self._publish(trainer, "learned")
        self._keeper.save(trainer)

    def _restore(self) -> Trainer:
        """The newest whole checkpoint, with memory and hold-out filled from the log; what the log holds beyond it is learned next."""
        self._keeper = VersionKeeper(self._journal, self._settings.versions_dir, self._settings.checkpoint_s, self._settings.keep_versions)
        trainer = self._keeper.restore(self._make_trainer, self._log.until)
        self._place = trainer.place
        self._made = None
        self._publish(trainer, "restored")
        self._state, self._short = "idle", None
        if not self._restored.done():
            self._restored.set_result(None)
        return trainer

    def _learn_page(self, trainer: Trainer, page: Sequence[Entry]) -> None:
        for _, group in itertools.groupby(page, key=lambda entry: entry.batch):
            batch, version = list(group), trainer.version
            kinds = {entry.kind for entry in batch}
            if not self._learn(trainer, batch):
                return
            if kinds & FORGETS:
                self._keeper.forgot(undone=trainer.version > version)
                self._publish(trainer, "learned")
                return  # to be saved, and wiped from the disk, before anything that may have to wait
            hurry = "rename" in kinds or self._waiters.any_until(trainer.seq)
            if hurry or time.monotonic() >= self._next_publish_at:
                self._publish(trainer, "learned")
            if self._stop.is_set():
                return

    def _sleep(self, trainer: Trainer, sleep: Iterator[int]) -> Optional[Iterator[int]]:
        """Goes on with a sleep until the log grows, a snapshot is due, or it ends; what is left of it."""
        torch.set_num_threads(self._settings.sleep_threads)
        self._state, is_over = "sleeping", False
        while not is_over and not self._awoken(trainer):
            self._pace.before_step(SLEEP, lambda: self._awoken(trainer))
            is_over = not self._awoken(trainer) and self._step(sleep)
        torch.set_num_threads(1)
        if is_over:
            self._keeper.save(trainer)  # first: it took minutes, and what it answers from now on must outlive a power cut
            self._publish(trainer, "slept")
            trim()
        return None if is_over else sleep

    def _awoken(self, trainer: Trainer) -> bool:
        return self._stop.is_set() or self._journal.status().head_seq != trainer.seq or self._publish_due(trainer)

    def _publish_due(self, trainer: Trainer) -> bool:
        """Whether what was learned must be let answer now: it may wait a moment, unless somebody waits for it."""
        unpublished = trainer.seq > self._snapshot.seq
        return unpublished and (self._waiters.any_until(trainer.seq) or time.monotonic() >= self._next_publish_at)

    def _step(self, steps: Iterator[int]) -> bool:
        """One step of work, measured and marked; True where it was the last."""
        started = time.perf_counter()
        with self._activity(0):
            is_over = next(steps, None) is None
        self._observed_step(time.perf_counter() - started)
        return is_over

    def _rest(self, trainer: Trainer) -> None:
        """Sleeps until the journal grows, somebody waits for an answer, or a snapshot or version is due."""
        if self._publish_due(trainer):
            self._state = "learning"
            self._publish(trainer, "learned")
            return  # whether to sleep now is asked anew
        unpublished = trainer.seq > self._snapshot.seq
        self._state = "waiting" if unpublished else "idle"
        waits = [self._keeper.due_in_s(trainer), self._next_publish_at - time.monotonic() if unpublished else None]
        known = [wait for wait in waits if wait is not None]
        self._wake.wait(max(0.0, min(known)) if known else None)
        self._wake.clear()  # what is awaited or appended after this line is seen in the turn to come, or wakes again

    def _learn(self, trainer: Trainer, batch: Sequence[Entry]) -> bool:
        """Learns one request; False where it was told to stop before it could begin."""
        self._state = "learning"
        evictions, before = trainer.memory.evictions, batch[0].seq - 1
        if not self._pace.before_step(LEARN, lambda: self._urgency.after(before), lambda: self._settle(trainer)):
            return False
        with self._activity(0):
            self._score(trainer, batch)
        steps = trainer.take(batch)
        while not self._step(steps):
            self._pace.give_way()  # a request is learned whole: half of it can be neither published nor kept
            if time.monotonic() > self._stop_by:
                raise Stopping
        with self._activity(sum(1 for entry in batch if entry.kind == "sample" and entry.code is not None)):
            if trainer.memory.evictions > evictions:
                self._observer.evicted(trainer.memory.evictions - evictions)
        return True

    def _score(self, trainer: Trainer, batch: Sequence[Entry]) -> None:
        """Prequential accuracy: the last snapshot answers before the batch is learned."""
        taught = [entry for entry in batch if entry.kind == "sample" and entry.code is not None and entry.class_id is not None]
        snapshot = self._made
        if not taught or snapshot is None:
            return
        codes = [entry.code for entry in taught if entry.code is not None]
        probabilities = snapshot.predict(trainer.features(codes), trainer.tokens(codes) if snapshot.wants_tokens else None)
        for entry, row in zip(taught, probabilities):
            assert entry.class_id is not None, "chosen above"
            trainer.prequential.record(entry.class_id, bool(len(row)) and snapshot.class_ids[int(row.argmax())] == entry.class_id)

    def _publish(self, trainer: Trainer, cause: str) -> None:
        """Makes a snapshot and serves it, unless one that knows more is served: after a death, until the log is learned again."""
        if self._made is not None and self._made.version == trainer.version:
            self._made = replace(self._made, seq=trainer.seq)  # the log went on, but brought nothing to learn
            self._serve(self._made, self._accuracy)
            return
        started = time.monotonic()
        names = {record.class_id: record.name for record in self._journal.classes()}
        self._made, accuracy = trainer.candidate(names, self._clock())
        self._note_verdict(trainer)
        self._memory = memory_status(trainer.memory, trainer.whole, trainer.holdout_bytes(), self._settings.codec)
        self._next_publish_at = started + (time.monotonic() - started) / PUBLISH_SHARE
        if self._serve(self._made, accuracy):
            self._observer.published(cause)

    def _serve(self, snapshot: Snapshot, accuracy: AccuracyReport) -> bool:
        if snapshot.seq < self._snapshot.seq:
            return False
        self._snapshot, self._accuracy = snapshot, accuracy
        self._journal.learned_seq = snapshot.seq
        self._waiters.reach(snapshot.seq)
        return True

    def _note_verdict(self, trainer: Trainer) -> None:
        verdict = trainer.last_verdict
        if verdict is None:
            return
        self._gate = gate_facts(verdict)
        if not verdict.weight and "kept out: " in verdict.reason:
            self._rejected = verdict.reason
            self._observer.rejected("holdout")

    def _observed_step(self, seconds: float) -> None:
        self._steps += 1
        self._last_step_s = seconds
        self._observer.step(seconds)

    def _starve(self, cause: str) -> None:
        """Gives back what the trainer held and waits a while: a death would bring it down for good after the third. Not for long while
        serving still waits for the last checkpoint, or serves without it.
        """
        if self._restored.done():
            wait_s, work = STARVED_S, "in the middle of a step; what was taught waits in the journal"
        else:
            wait_s, work = min(STARVED_S, self._starved_s), "while the last checkpoint was read; it is tried again"
            self._starved_s = 2 * wait_s
        logger.warning("the learner ran out of memory, next try in %.0f s: %s", wait_s, cause)
        self._state, self._short = "waiting", f"memory was out {work}"
        self._stop.wait(wait_s)

    def _died(self) -> bool:
        """Counts a death; True when it was one too many."""
        now = time.monotonic()
        self._deaths.append(now)
        if len(self._deaths) == MAX_DEATHS and now - self._deaths[0] < DEATH_WINDOW_S:
            self._end("failed", LearnerError(f"died {MAX_DEATHS} times in {DEATH_WINDOW_S / 60:.0f} minutes; the log has the cause"))
            return True
        self._stop.wait(RESTART_S)
        return False

    def _end(self, state: str, cause: LatentdError) -> None:
        self._state, self._reason = state, cause.detail
        self._waiters.end(cause.detail)
        if isinstance(cause, ConfigError) and not self._restored.done():
            self._restored.set_exception(cause)
        elif not self._restored.done():
            self._restored.set_result(None)  # serving goes on without it
