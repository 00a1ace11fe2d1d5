"""Closes connections on which no request head comes: between two requests uvicorn has a time limit, for a head it has none, and whoever
holds all connections open shuts everybody else out. On the event loop; never blocks.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any, Callable, Dict, Iterable

log = logging.getLogger(__name__)

HEAD_S = 30.0  # from the first look at a connection that waits for a head
_LOOKS = 4  # in that time


async def close_for_ever(connections: Callable[[], Iterable[Any]]) -> None:
    """connections: uvicorn's protocols of all open connections."""
    since: Dict[Any, float] = {}
    while True:
        await asyncio.sleep(HEAD_S / _LOOKS)
        now = time.monotonic()
        since = {each: since.get(each, now) for each in connections() if _waits_for_head(each)}
        late = [each for each, began in since.items() if now - began >= HEAD_S]
        for each in late:
            each.transport.abort()
        if late:
            log.info("closed %d connections on which no whole request head came within %g seconds", len(late), HEAD_S)


def _waits_for_head(connection: Any) -> bool:
    is_answering = connection.cycle is not None and not connection.cycle.response_complete
    is_idle = connection.timeout_keep_alive_task is not None  # uvicorn itself closes it
    return not is_answering and not is_idle
