"""From encoded bytes to latents: the decode pool, and the queue of the inference thread behind it.

`encode` is awaited on the event loop; decoding runs in a small pool of threads (Pillow releases the interpreter lock). Each image is
decoded on its own and enters the queue from there at once. Nothing here blocks the loop.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import queue
import threading
import time
from concurrent.futures import Future
from typing import Any, Callable, List, Optional, Sequence, Tuple, TypeVar, Union

import numpy as np
from numpy.typing import NDArray

from latentd.errors import LatentdError, OutOfMemory
from latentd.service.batcher import Batcher, EncodedImage, Observer, Priority, Ticket

Decode = Callable[[bytes], NDArray[np.uint8]]
Result = TypeVar("Result")

log = logging.getLogger(__name__)


class DecodePool:
    """A few threads that take work by priority: images to classify never wait behind a pile of images to learn."""

    def __init__(self, threads: int) -> None:
        self._work: queue.PriorityQueue[Tuple[int, int, Callable[[], object]]] = queue.PriorityQueue()
        self._order = itertools.count()  # first come, first served within a priority
        self._threads = [threading.Thread(target=self._live, name=f"decode-{index}", daemon=True) for index in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, priority: Priority, work: Callable[[], object]) -> None:
        """Queues `work`, which must not raise. The callers bound the queue: see Batcher.reserve."""
        self._work.put((priority, next(self._order), work))

    def close(self) -> None:
        """Ends the threads after all that was submitted."""
        for _ in self._threads:
            self._work.put((len(Priority), next(self._order), _end_of_work))
        for thread in self._threads:
            thread.join()

    def _live(self) -> None:
        while True:
            work = self._work.get()[2]
            if work is _end_of_work:
                return
            work()


def _end_of_work() -> None:
    """Marks the end of a decode thread's life."""


class Pipeline:
    """Decode pool and batcher as one call. `decode` turns the bytes of one image into (S, S, 3) pixels or raises a LatentdError. taught:
    is shown the pixels of every image that is there to be learned.
    """

    def __init__(
        self,
        batcher: Batcher,
        decode: Decode,
        threads: int,
        observer: Observer,
        clock: Callable[[], float] = time.monotonic,
        taught: Optional[Callable[[NDArray[np.uint8]], None]] = None,
    ) -> None:
        self.batcher = batcher
        self._decode = decode
        self._observer = observer
        self._clock = clock
        self._taught = taught
        self._pool = DecodePool(threads)

    async def encode(
        self, images: Sequence[Union[bytes, LatentdError]], priority: Priority, tokens: bool = False
    ) -> List[Union[EncodedImage, LatentdError]]:
        """One entry an image, in order: what the frozen stage made of it, or the error that stopped this image alone.

        images: encoded bytes; an error in the place of an image stays where it is. Raises Overloaded when they don't all fit into the
        queue. Cancelling the call drops the images that no thread has taken yet.
        """
        good = [image for image in images if not isinstance(image, LatentdError)]
        tickets = self.batcher.reserve(len(good), priority, tokens)
        now = self._clock()
        for ticket, data in zip(tickets, good):
            self._pool.submit(priority, functools.partial(self._prepare, ticket, data, now))
        futures = [asyncio.wrap_future(ticket.future) for ticket in tickets]
        found = iter(await asyncio.gather(*futures, return_exceptions=True))
        return [image if isinstance(image, LatentdError) else _expected(next(found)) for image in images]

    async def in_pool(self, function: Callable[..., Result], *arguments: Any, priority: Priority = Priority.CLASSIFY) -> Result:
        """Runs a short computation in the decode pool, off the event loop."""
        future: Future[Result] = Future()
        self._pool.submit(priority, functools.partial(_settle, future, function, arguments))
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Ends the pool after what it has begun; call it when no request is left."""
        self._pool.close()

    def _prepare(self, ticket: Ticket, data: bytes, submitted_at: float) -> None:
        """In the decode pool: one image from bytes into the queue."""
        if ticket.future.cancelled():
            self.batcher.give_back(ticket, None)
            return
        began = self._clock()
        ticket.queue_s = began - submitted_at
        try:
            pixels = self._decode(data)
        except LatentdError as refused:
            self.batcher.give_back(ticket, refused)
            return
        except MemoryError:
            log.exception("no memory to decode an image of %d bytes", len(data))
            self.batcher.give_back(ticket, OutOfMemory("There was not enough memory to decode this image."))
            return
        except Exception:  # a border: a bug that one image uncovers must not take the others along
            log.exception("the decoder broke on an image of %d bytes", len(data))
            self.batcher.give_back(ticket, LatentdError("The decoder broke on this image."))
            return
        ticket.decode_s = self._clock() - began
        self._observer.stage("decode", ticket.decode_s)
        if self._taught is not None and ticket.priority is Priority.LEARN:
            self._taught(pixels)
        self.batcher.enqueue(ticket, pixels)


def _settle(future: Future[Result], function: Callable[..., Result], arguments: Tuple[Any, ...]) -> None:
    """Runs a function and hands its result, or what it raised, to the one who awaits it."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function(*arguments))
    except BaseException as error:  # noqa: BLE001 - handed over, not swallowed
        future.set_exception(error)


def _expected(found: Union[EncodedImage, BaseException]) -> Union[EncodedImage, LatentdError]:
    """Results and expected errors pass; anything else is a bug and rises."""
    if isinstance(found, BaseException) and not isinstance(found, LatentdError):
        raise found
    return found
