"""Whether latentd is ready: true only while an image passed the real engine in the last 60 seconds.

Traffic proves it by itself; when there is none, a task on the event loop sends a probe image the same way a request would. A learner that
failed does not make it false.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Callable, Optional

import numpy as np
from numpy.typing import NDArray

from latentd.errors import LatentdError
from latentd.service.batcher import Batcher, Priority

FRESH_S = 60.0
PROBE_EVERY_S = 20.0

log = logging.getLogger(__name__)


class Readiness:
    """`pixels` (S, S, 3) is the probe image. Every method belongs to the event loop."""

    def __init__(self, batcher: Batcher, pixels: NDArray[np.uint8], clock: Callable[[], float] = time.monotonic) -> None:
        self._batcher = batcher
        self._pixels = pixels
        self._clock = clock
        self._last_error = "No image has passed the engine yet."

    @property
    def age_s(self) -> Optional[float]:
        """Seconds since an image passed the engine; None: none did yet."""
        last = self._batcher.last_success_at
        return None if last is None else max(0.0, self._clock() - last)

    def why_not(self) -> Optional[str]:
        """None when ready, else the reason."""
        age_s = self.age_s
        if age_s is None:
            return self._last_error
        return None if age_s < FRESH_S else f"No image has passed the engine for {age_s:.0f} seconds. {self._last_error}"

    async def probe_for_ever(self) -> None:
        """Probes whenever nothing else proved the engine for a while; ends by being cancelled."""
        while True:
            age_s = self.age_s
            if age_s is None or age_s >= PROBE_EVERY_S:
                await self.probe()
            await asyncio.sleep(PROBE_EVERY_S / 4)

    async def probe(self) -> None:
        """Sends one probe image through the queue of the inference thread, in front of learning."""
        try:
            ticket = self._batcher.reserve(1, Priority.CLASSIFY)[0]
            ticket.is_probe = True
            self._batcher.enqueue(ticket, self._pixels)
            await asyncio.wait_for(asyncio.wrap_future(ticket.future), FRESH_S)
        except LatentdError as refused:
            self._last_error = refused.detail
        except asyncio.TimeoutError:
            self._last_error = "The engine does not come back from a run."
            log.warning("a probe image did not come back from the engine within %.0f s", FRESH_S)
