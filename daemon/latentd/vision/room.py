"""How many pixels may be decoded at once: the memory of decoding is bounded by them, whatever the number of threads.

Shared by the threads of the decode pool, each of which waits here for its turn; nobody else does.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import Iterator


class PixelRoom:
    """Images come in while together they have at most `pixels`; one that is larger by itself comes in alone.

    First come, first served: an image that waits for room is not overtaken by smaller ones for ever.
    """

    def __init__(self, pixels: int) -> None:
        self.pixels = pixels
        self._held = 0
        self._turn = threading.Lock()  # of the one who waits for room
        self._changed = threading.Condition()

    @contextmanager
    def take(self, pixels: int) -> Iterator[None]:
        """Waits until there is room for so many, and holds it."""
        with self._turn, self._changed:
            self._changed.wait_for(lambda: self._held == 0 or self._held + pixels <= self.pixels)
            self._held += pixels
        try:
            yield
        finally:
            with self._changed:
                self._held -= pixels
                self._changed.notify()
