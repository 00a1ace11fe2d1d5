"""The inference threads: own the frozen stage, take images from a bounded queue, answer each by a future.

Two priorities: classify before learn. There is one thread for each lane of the stage. Where it has one, a batch is whatever waits when the
stage becomes free, up to the largest size; nothing is held back to fill one. Where it has several (the cores of a CPU), an image that
comes alone gets the whole stage, and otherwise each lane takes the next image. The lock guards the queue only and is never held while the
stage runs. When one of these threads dies, serving is over: the process must exit.
"""

from __future__ import annotations

import enum
import logging
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Callable, Deque, Dict, List, NamedTuple, Optional, Protocol, Sequence, Tuple

import numpy as np
from numpy.typing import NDArray

from latentd.errors import EngineError, LatentdError, LatentNotFinite, NotReady, OutOfMemory, Overloaded
from latentd.trouble import Trouble, trouble_of

if TYPE_CHECKING:
    from latentd.energy.ledger import Activity, EnergyLedger
    from latentd.engines.stage import Encoded, FrozenStage

STARVED_S = 1.0  # a learn image that waited longer goes first, so that steady classify traffic can't stop learning
FAILURES_TO_DIE = 3  # runs of the stage that fail one after the other: its device context is beyond help, though it does not say so

log = logging.getLogger(__name__)


class Priority(enum.IntEnum):
    """Who goes first."""

    CLASSIFY = 0
    LEARN = 1


class EncodedImage(NamedTuple):
    """What the frozen stage made of one image, and how long it took (seconds)."""

    features: NDArray[np.float32]  # (class_tokens * D,)
    tokens: Optional[NDArray[np.float32]]  # (N, D), when asked for
    queue_s: float
    decode_s: float
    frozen_s: float


@dataclass(eq=False)
class Ticket:
    """One image's place in the queue, held from before it is decoded; `future` is its answer."""

    priority: Priority
    tokens: bool
    future: Future[EncodedImage] = field(default_factory=Future)
    is_probe: bool = False  # nobody's image: not counted among those whose joules are measured
    pixels: Optional[NDArray[np.uint8]] = None  # (S, S, 3), once decoded
    queue_s: float = 0.0  # waited so far
    decode_s: float = 0.0
    enqueued_at: float = 0.0


class Observer(Protocol):
    """Who counts: called from the inference thread and the decode pool."""

    def stage(self, stage: str, duration_s: float) -> None: ...

    def batch(self, images: int) -> None: ...

    def refused(self, queue: str, items: int) -> None: ...


class Batch(NamedTuple):
    """What one thread takes at once, all of one priority. shared: other lanes may run beside it. taken_at: on the batcher's clock."""

    tickets: List[Ticket]
    shared: bool
    taken_at: float


class Batcher:
    """The queue and the threads. `capacity` images may be decoding or waiting; beyond that `reserve` raises Overloaded.

    on_death is called once, from the dying thread, with what killed it. Closing the stage is the last act of the last thread.
    """

    def __init__(
        self,
        stage: FrozenStage,
        ledger: EnergyLedger,
        observer: Observer,
        *,
        max_batch: int,
        capacity: int,
        on_death: Callable[[BaseException], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stage = stage
        self.capacity = capacity
        self.last_success_at: Optional[float] = None  # on `clock`: when an image last came out of the stage in finite numbers
        self._ledger = ledger
        self._observer = observer
        self.max_batch = max_batch
        self._on_death = on_death
        self._clock = clock
        self._changed = threading.Condition()
        self._queues: Dict[Priority, Deque[Ticket]] = {priority: deque() for priority in Priority}
        self._held = dict.fromkeys(Priority, 0)  # reserved, and not yet taken for a run
        self._running: List[Batch] = []
        self._successor: Optional[Tuple[FrozenStage, Future[FrozenStage]]] = None  # serves from the next run on
        self._refusal: Optional[LatentdError] = None  # why nothing is taken any more
        self._failures = 0
        self._lanes = stage.lanes
        self._alive = self._lanes
        self._threads = [threading.Thread(target=self._live, name="inference", daemon=True) for _ in range(self._lanes)]

    @property
    def depth(self) -> int:
        """Images that decode or wait."""
        return sum(self._held.values())

    @property
    def longest_run_s(self) -> float:
        """How long the oldest run under way has taken; 0: none is."""
        return max((self._clock() - batch.taken_at for batch in tuple(self._running)), default=0.0)

    def busy(self) -> bool:
        """Whether classify requests wait or run; the learner lets them go first."""
        return self._held[Priority.CLASSIFY] > 0 or any(batch.tickets[0].priority is Priority.CLASSIFY for batch in tuple(self._running))

    def working(self) -> bool:
        """Whether any image waits or runs; a sleep lets them all go first."""
        return bool(self._running) or any(self._held.values())

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self, timeout_s: float) -> bool:
        """Fails what still waits, lets the running batch finish, closes the stage. False: the stage did not come back in time."""
        self._refuse(NotReady("latentd is stopping."))
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def replace(self, stage: FrozenStage) -> Future[FrozenStage]:
        """Lets `stage` serve from the next run on. The future gives the stage that no longer serves, which the caller closes: the one
        before, when nothing runs on it any more, or `stage` itself where serving ends first.
        """
        retired: Future[FrozenStage] = Future()
        with self._changed:
            assert self._successor is None, "one replacement at a time"
            if self._refusal is None:
                self._successor = stage, retired
                self._changed.notify_all()
                return retired
        retired.set_result(stage)
        return retired

    def reserve(self, images: int, priority: Priority, tokens: bool = False) -> List[Ticket]:
        """A place for each image, before it is decoded. Raises Overloaded when they don't all fit.

        Learning gets no further place while it holds half of them: teaching a thousand images must not turn classify away.
        """
        with self._changed:
            if self._refusal is not None:
                raise self._refusal
            full = self.depth + images > self.capacity
            too_much_learning = priority is Priority.LEARN and self._held[priority] >= self.capacity // 2
            if not (full or too_much_learning):
                self._held[priority] += images
                return [Ticket(priority, tokens) for _ in range(images)]
        self._observer.refused("inference", images)
        raise Overloaded(f"{self.capacity} images wait for the frozen stage already.")

    def enqueue(self, ticket: Ticket, pixels: NDArray[np.uint8]) -> None:
        """Puts a decoded image (S, S, 3) into the queue."""
        with self._changed:
            if self._refusal is None:
                ticket.pixels = pixels
                ticket.enqueued_at = self._clock()
                self._queues[ticket.priority].append(ticket)
                self._changed.notify()
                return
        self.give_back(ticket, self._refusal)

    def give_back(self, ticket: Ticket, error: Optional[LatentdError]) -> None:
        """Frees the place of an image that does not reach the queue; None: nobody waits for it any more."""
        with self._changed:
            self._held[ticket.priority] -= 1
        if error is not None and ticket.future.set_running_or_notify_cancel():
            ticket.future.set_exception(error)

    def _live(self) -> None:
        batch: Optional[Batch] = None
        try:
            while True:
                batch = self._take(batch)
                if batch is None:
                    break
                self._run(batch)
        except BaseException as death:  # the border of the inference thread: whatever kills it, nobody is left waiting and the process ends
            log.critical("an inference thread died", exc_info=death)
            self._die(batch, death)
        finally:
            with self._changed:
                self._alive -= 1
                is_last = self._alive == 0
            if is_last:
                self.stage.close()

    def _die(self, batch: Optional[Batch], death: BaseException) -> None:
        gone = EngineError("The inference thread died; latentd restarts.")
        for ticket in batch.tickets if batch else ():
            if not ticket.future.done():
                ticket.future.set_exception(gone)
        if self._refuse(gone):
            self._on_death(death)

    def _take(self, done: Optional[Batch]) -> Optional[Batch]:
        """Puts away the batch that this thread has done and gives its next; blocks until there is one. None: the end."""
        with self._changed:
            if done is not None:
                self._running.remove(done)
                if not done.shared or self._successor is not None:
                    self._changed.notify_all()
            while self._refusal is None:
                self._succeed()
                may_run = self._successor is None and all(running.shared for running in self._running)
                batch = self._next() if may_run else None
                if batch is not None:
                    self._running.append(batch)
                    return batch
                self._changed.wait()
        return None

    def _succeed(self) -> None:
        """Under the lock: the next stage takes over, unless something still runs on this one. Threads beyond its lanes stay idle."""
        if self._successor is not None and not self._running:
            (stage, retired), self._successor = self._successor, None
            before, self.stage = self.stage, stage
            self._lanes = min(stage.lanes, len(self._threads))
            self._failures = 0
            retired.set_result(before)

    def _next(self) -> Optional[Batch]:
        """What the stage should run now, all of one priority; None while nothing waits."""
        while any(self._queues.values()):
            shared = self._lanes > 1 and (self.depth > 1 or bool(self._running))  # what still decodes mostly comes before this one is done
            tickets = self._pop(self._next_priority(), 1 if shared else self.max_batch)
            if tickets:  # else all that was popped had been cancelled, and the other queue comes next
                return Batch(tickets, shared, self._clock())
        return None

    def _next_priority(self) -> Priority:
        classify, learn = self._queues[Priority.CLASSIFY], self._queues[Priority.LEARN]
        starved = bool(learn) and self._clock() - learn[0].enqueued_at > STARVED_S
        return Priority.CLASSIFY if classify and not starved else Priority.LEARN

    def _pop(self, priority: Priority, most: int) -> List[Ticket]:
        """Up to `most` tickets whose requests still wait for them."""
        batch: List[Ticket] = []
        queue = self._queues[priority]
        while queue and len(batch) < most:
            ticket = queue.popleft()
            self._held[priority] -= 1
            if ticket.future.set_running_or_notify_cancel():
                batch.append(ticket)
        return batch

    def _run(self, batch: Batch) -> None:
        began = self._clock()
        try:
            encoded = self._encode(batch)
        except Exception as error:  # noqa: BLE001 - a border: whatever the engine raises fails these images only
            self._fail(batch.tickets, error)
            return
        self._failures = 0
        frozen_s = self._clock() - began
        self._observer.stage("frozen", frozen_s)
        self._observer.batch(len(batch.tickets))
        self._reply(batch.tickets, encoded, began, frozen_s)

    def _encode(self, batch: Batch) -> Encoded:
        pixels = np.stack([ticket.pixels for ticket in batch.tickets if ticket.pixels is not None])  # (B, S, S, 3)
        with self._activity(batch.tickets):
            return self.stage.encode(pixels, tokens=any(ticket.tokens for ticket in batch.tickets), shared=batch.shared)

    def _activity(self, batch: Sequence[Ticket]) -> Activity:
        """The mark in the energy ledger. Taught samples are counted by the learner, once they are learned."""
        if batch[0].priority is Priority.LEARN:
            return self._ledger.activity("learn")
        return self._ledger.activity("classify", images=sum(not ticket.is_probe for ticket in batch))

    def _reply(self, batch: Sequence[Ticket], encoded: Encoded, began: float, frozen_s: float) -> None:
        finite = _finite(encoded.features)  # (B,)
        if encoded.tokens is not None:
            finite = finite & _finite(encoded.tokens)
        if finite.any():
            self.last_success_at = self._clock()
        for row, ticket in enumerate(batch):
            if not finite[row]:
                ticket.future.set_exception(LatentNotFinite("The frozen stage gave NaN or infinity for this image."))
                continue
            queue_s = ticket.queue_s + began - ticket.enqueued_at
            self._observer.stage("queue", queue_s)
            tokens = encoded.tokens[row] if encoded.tokens is not None and ticket.tokens else None
            ticket.future.set_result(EncodedImage(encoded.features[row], tokens, queue_s, ticket.decode_s, frozen_s))

    def _fail(self, batch: Sequence[Ticket], error: Exception) -> None:
        """Fails these images. A device without memory is waited for; one whose context is lost needs a new process at once."""
        trouble = trouble_of(error)
        with self._changed:
            self._failures += trouble is not Trouble.MEMORY
            failures = self._failures
        log.error("a run of the frozen stage failed (%d in a row)", failures, exc_info=error)
        kind = OutOfMemory if trouble is Trouble.MEMORY else EngineError
        for ticket in batch:
            ticket.future.set_exception(kind(f"The frozen stage failed: {error}"))
        if trouble is Trouble.CONTEXT:
            raise EngineError("The frozen stage lost its device, and no run succeeds before latentd starts again.") from error
        if failures >= FAILURES_TO_DIE and trouble is not Trouble.MEMORY:
            raise EngineError(f"The frozen stage failed {failures} times in a row.") from error

    def _refuse(self, why: LatentdError) -> bool:
        """Ends the queue: nothing new is taken, and what waits fails with `why`. False where it had been ended before."""
        with self._changed:
            is_first = self._refusal is None
            self._refusal = self._refusal or why
            successor, self._successor = self._successor, None
            left = [ticket for queue in self._queues.values() for ticket in queue]
            for queue in self._queues.values():
                queue.clear()
            self._changed.notify_all()
        if successor is not None:
            successor[1].set_result(successor[0])
        for ticket in left:
            self.give_back(ticket, why)
        return is_first


def _finite(values: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which rows (B, ...) hold finite numbers only: (B,)."""
    B = len(values)
    rows: NDArray[np.bool_] = np.logical_and.reduce(np.isfinite(values).reshape(B, -1), axis=1)  # (B,)
    return rows
