"""The answers to requests with an Idempotency-Key, kept for a day. Owned by the journal thread."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Callable, Dict, Optional, Sequence

from latentd.replay.aside import DAMAGE, Aside
from latentd.replay.records import Idempotency
from latentd.replay.store import Store

KEY_LIFETIME_S = 24 * 3600.0
CLOCK_SET_S = 1735689600.0  # 2025-01-01: what is dated before was dated by a clock that was not set yet, and its age is unknown


class KeyTable:
    """Keys by their hash. Writes are queued for the store's next commit."""

    def __init__(self, store: Store, clock: Callable[[], float], aside: Aside) -> None:
        self._store, self._clock, self._aside = store, clock, aside

    def write(self, idempotency: Idempotency, seqs: Sequence[int]) -> None:
        facts = {"body": idempotency.body_sha256, "request_id": idempotency.request_id, "slots": idempotency.slots}
        self._store.put({_key_of(idempotency.key): json.dumps({**facts, "at": self._clock(), "seqs": seqs}).encode()})

    def find(self, key: str) -> Optional[Dict[str, Any]]:
        """What was written under the key; None where that is nothing, or too old."""
        data = self._store.get(_key_of(key))
        body = None if data is None else self._read(_key_of(key), data)
        return None if body is None or CLOCK_SET_S <= body["at"] < self._clock() - KEY_LIFETIME_S else body

    def expire(self) -> None:
        """Drops the keys that are too old to be recalled."""
        limit = self._clock() - KEY_LIFETIME_S
        bodies = {key: self._read(key, value) for key, value in list(self._store.scan("k/"))}
        self._store.delete([key for key, body in bodies.items() if body is not None and body["at"] < limit])

    def _read(self, key: str, value: bytes) -> Optional[Dict[str, Any]]:
        try:
            body: Dict[str, Any] = json.loads(value)
            return {**body, "at": float(body["at"])}
        except DAMAGE as cause:
            self._aside.take(key, value, cause, "that request is answered anew if it comes again")
            return None


def _key_of(key: str) -> str:
    return "k/" + hashlib.sha256(key.encode()).hexdigest()
