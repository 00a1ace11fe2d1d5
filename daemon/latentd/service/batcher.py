"""The inference thread: owns the frozen stage, takes images from a bounded queue, answers each by a future.

Two priorities: classify before learn. A batch is whatever waits when the stage becomes free, up to the largest size; nothing is held back
to fill one. The lock guards the queue only and is never held while the stage runs. When this thread dies, serving is over: the process
must exit.
"""

from __future__ import annotations

import enum
import logging
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Callable, Deque, Dict, List, NamedTuple, Optional, Protocol, Sequence

import numpy as np
from numpy.typing import NDArray

from latentd.errors import EngineError, LatentdError, LatentNotFinite, NotReady, Overloaded

if TYPE_CHECKING:
    from latentd.energy.ledger import Activity, EnergyLedger
    from latentd.engines.stage import Encoded, FrozenStage

STARVED_S = 1.0  # a learn image that waited longer goes first, so that steady classify traffic can't stop learning
FAILURES_TO_DIE = 3  # runs of the stage that fail one after the other: its device context is beyond help

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


class Batcher:
    """The queue and the thread. `capacity` images may be decoding or waiting; beyond that `reserve` raises Overloaded.

    on_death is called once, from the dying thread, with what killed it. Closing the stage is this thread's last act.
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
        self._max_batch = max_batch
        self._on_death = on_death
        self._clock = clock
        self._changed = threading.Condition()
        self._queues: Dict[Priority, Deque[Ticket]] = {priority: deque() for priority in Priority}
        self._held = dict.fromkeys(Priority, 0)  # reserved, and not yet taken for a run
        self._running: Optional[Priority] = None
        self._refusal: Optional[LatentdError] = None  # why nothing is taken any more
        self._failures = 0
        self._thread = threading.Thread(target=self._live, name="inference", daemon=True)

    @property
    def depth(self) -> int:
        """Images that decode or wait."""
        return sum(self._held.values())

    def busy(self) -> bool:
        """Whether classify requests wait or run; the learner lets them go first."""
        return self._held[Priority.CLASSIFY] > 0 or self._running is Priority.CLASSIFY

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float) -> bool:
        """Fails what still waits, lets the running batch finish, closes the stage. False: the stage did not come back in time."""
        self._refuse(NotReady("latentd is stopping."))
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

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
        batch: List[Ticket] = []
        try:
            while True:
                batch = self._take()
                if not batch:
                    break
                self._run(batch)
        except BaseException as death:
            log.critical("the inference thread died", exc_info=death)
            gone = EngineError("The inference thread died; latentd restarts.")
            for ticket in batch:
                if not ticket.future.done():
                    ticket.future.set_exception(gone)
            self._refuse(gone)
            self._on_death(death)
        finally:
            self.stage.close()

    def _take(self) -> List[Ticket]:
        """The next batch, all of one priority; blocks until there is one. Empty: the end."""
        with self._changed:
            self._running = None
            while self._refusal is None:
                if not any(self._queues.values()):
                    self._changed.wait()
                    continue
                batch = self._pop(self._next_priority())
                if batch:  # else all that was popped had been cancelled, and the other queue comes next
                    self._running = batch[0].priority
                    return batch
        return []

    def _next_priority(self) -> Priority:
        classify, learn = self._queues[Priority.CLASSIFY], self._queues[Priority.LEARN]
        starved = bool(learn) and self._clock() - learn[0].enqueued_at > STARVED_S
        return Priority.CLASSIFY if classify and not starved else Priority.LEARN

    def _pop(self, priority: Priority) -> List[Ticket]:
        """Up to a batch of tickets whose requests still wait for them."""
        batch: List[Ticket] = []
        queue = self._queues[priority]
        while queue and len(batch) < self._max_batch:
            ticket = queue.popleft()
            self._held[priority] -= 1
            if ticket.future.set_running_or_notify_cancel():
                batch.append(ticket)
        return batch

    def _run(self, batch: Sequence[Ticket]) -> None:
        began = self._clock()
        try:
            encoded = self._encode(batch)
        except Exception as error:  # noqa: BLE001 - a border: whatever the engine raises fails these images only
            self._fail(batch, error)
            return
        self._failures = 0
        frozen_s = self._clock() - began
        self._observer.stage("frozen", frozen_s)
        self._observer.batch(len(batch))
        self._reply(batch, encoded, began, frozen_s)

    def _encode(self, batch: Sequence[Ticket]) -> Encoded:
        pixels = np.stack([ticket.pixels for ticket in batch if ticket.pixels is not None])  # (B, S, S, 3)
        with self._activity(batch):
            return self.stage.encode(pixels, tokens=any(ticket.tokens for ticket in batch))

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
        self._failures += 1
        log.error("a run of the frozen stage failed (%d in a row)", self._failures, exc_info=error)
        for ticket in batch:
            ticket.future.set_exception(EngineError(f"The frozen stage failed: {error}"))
        if self._failures >= FAILURES_TO_DIE:
            raise EngineError(f"The frozen stage failed {self._failures} times in a row.") from error

    def _refuse(self, why: LatentdError) -> None:
        """Ends the queue: nothing new is taken, and what waits fails with `why`."""
        with self._changed:
            self._refusal = self._refusal or why
            left = [ticket for queue in self._queues.values() for ticket in queue]
            for queue in self._queues.values():
                queue.clear()
            self._changed.notify_all()
        for ticket in left:
            self.give_back(ticket, why)


def _finite(values: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which rows (B, ...) hold finite numbers only: (B,)."""
    B = len(values)
    rows: NDArray[np.bool_] = np.logical_and.reduce(np.isfinite(values).reshape(B, -1), axis=1)  # (B,)
    return rows
