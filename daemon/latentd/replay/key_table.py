"""The answers to requests with an Idempotency-Key, kept for a day. Owned by the journal thread."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Callable, Dict, Optional, Sequence

from latentd.replay.records import Idempotency
from latentd.replay.store import Store

KEY_LIFETIME_S = 24 * 3600.0
CLOCK_SET_S = 1735689600.0  # 2025-01-01: what is dated before was dated by a clock that was not set yet, and its age is unknown


class KeyTable:
    """Keys by their hash. Writes are queued for the store's next commit."""

    def __init__(self, store: Store, clock: Callable[[], float]) -> None:
        self._store, self._clock = store, clock

    def write(self, idempotency: Idempotency, seqs: Sequence[int]) -> None:
        facts = {"body": idempotency.body_sha256, "request_id": idempotency.request_id, "slots": idempotency.slots}
        self._store.put({_key_of(idempotency.key): json.dumps({**facts, "at": self._clock(), "seqs": seqs}).encode()})

    def find(self, key: str) -> Optional[Dict[str, Any]]:
        """What was written under the key; None where that is nothing, or too old."""
        data = self._store.get(_key_of(key))
        body: Dict[str, Any] = {} if data is None else json.loads(data)
        return None if not body or CLOCK_SET_S <= body["at"] < self._clock() - KEY_LIFETIME_S else body

    def expire(self) -> None:
        """Drops the keys that are too old to be recalled."""
        limit = self._clock() - KEY_LIFETIME_S
        self._store.delete([key for key, value in self._store.scan("k/") if json.loads(value)["at"] < limit])


def _key_of(key: str) -> str:
    return "k/" + hashlib.sha256(key.encode()).hexdigest()
