"""What the journal keeps, as values: samples, classes, log entries; and their bytes.

The journal is a log: every taught sample and every change of one (a new label, a wish to forget) has a sequence number, and the learner's
whole state is a function of the log. Pure data, no thread, nothing blocks.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Dict, Optional, Tuple

import numpy as np
from numpy.typing import NDArray

from latentd.errors import JournalError


@dataclass(frozen=True)
class NewSample:
    """One image on its way into the journal: its quantized latent, and the features that find near-duplicates.

    label: None for an image kept to be labelled later. features: (F,) float32. sha256: hex digest of the encoded image.
    """

    label: Optional[str]
    code: bytes
    features: NDArray[np.float32]
    sha256: str


@dataclass(frozen=True)
class SampleRecord:
    """What is known of one sample; `state`: queued, learned, duplicate, evicted, held or forgotten."""

    sample_id: str
    seq: int
    label: Optional[str]
    state: str
    taught_at: float
    sha256: str
    duplicate_of: Optional[str] = None
    holdout: bool = False

    @classmethod
    def pruned(cls, seq: int, at: float) -> SampleRecord:
        """What is left to say of a sample whose record had to make room."""
        return cls(sample_id_of(seq), seq, None, "evicted", at, "")


@dataclass(frozen=True)
class ClassRecord:
    """A class: its name now, and how many samples of it were taught (hold-out included), held out, and are still stored."""

    class_id: int
    name: str
    created_at: float
    samples: int = 0
    holdout: int = 0
    stored: int = 0


@dataclass(frozen=True)
class Idempotency:
    """The answer to a keyed request.

    slots: in order, None for the next sample of the batch, a problem document for an image that could not be used.
    """

    key: str
    body_sha256: str
    request_id: str
    slots: Tuple[Optional[Dict[str, Any]], ...]


@dataclass(frozen=True)
class Recalled:
    """A stored answer, with its samples as they stand now."""

    body_sha256: str
    request_id: str
    slots: Tuple[Optional[Dict[str, Any]], ...]
    records: Tuple[SampleRecord, ...]


@dataclass(frozen=True)
class Entry:
    """One entry of the log, as the learner reads it.

    kind: "sample", "relabel", "forget", "forget_class", "rename" or "damaged" (a change that can't be read, or
    a sample whose row can't, so that nobody knows its label). batch: sequence number of the
    first entry of the same request: what the learner takes as one mini-batch. class_id: the class at that point of the log; was: the class
    before (relabel, forget; None: was never learned). code: the latent's bytes, None when it is stored no more.
    """

    seq: int
    kind: str
    batch: int
    sample_id: str
    class_id: Optional[int]
    was: Optional[int]
    holdout: bool
    code: Optional[bytes]
    taught_at: float


@dataclass(frozen=True)
class JournalStatus:
    """Gauges of the journal. failed: why the last write failed, None when it did not. set_aside: damaged rows that were."""

    head_seq: int
    samples: int
    size_bytes: int
    budget_bytes: int
    queue_depth: int
    queue_capacity: int
    last_fsync_s: Optional[float]
    failed: Optional[str]
    set_aside: int


@dataclass
class SampleRow:
    """The stored form of a sample, keyed by its sequence number.

    first_class: the class at admission; the learner replays later changes from the log. kept: the latent is stored under its own key.
    changed: sequence number of its last relabel, 0 when there was none.
    """

    seq: int
    batch: int
    first_class: Optional[int]
    class_id: Optional[int]
    taught_at: float
    sha256: str
    sketch: bytes
    state: str = "stored"
    duplicate_of: Optional[int] = None
    holdout: bool = False
    kept: bool = True
    changed: int = 0

    @classmethod
    def stand_in(cls, seq: int) -> SampleRow:
        """For a row that can't be read: it tells nothing of the sample, whose latent is gone too unless somebody finds it."""
        return cls(seq, seq, None, None, 0.0, "", b"", "evicted", kept=False)

    @property
    def stands_in(self) -> bool:
        """Also after it got a label: no image that was taught has neither a time nor a hash."""
        return self.first_class is None and not self.sha256 and self.taught_at == 0.0

    def to_bytes(self) -> bytes:
        body = dict(self.__dict__, sketch=self.sketch.hex())
        del body["seq"]
        return json.dumps(body, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, seq: int, data: bytes) -> SampleRow:
        body = _body(data, len(cls.__dataclass_fields__))
        body["sketch"] = bytes.fromhex(body["sketch"])
        return cls(seq=seq, **body)


@dataclass
class ChangeRow:
    """The stored form of a change: a relabel, or a wish to forget a sample or a class."""

    seq: int
    kind: str
    target: Optional[int]
    class_id: Optional[int]
    was: Optional[int]
    at: float
    settled: bool = field(default=False)

    def to_bytes(self) -> bytes:
        body = dict(self.__dict__)
        del body["seq"]
        return json.dumps(body, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, seq: int, data: bytes) -> ChangeRow:
        return cls(seq=seq, **_body(data, len(cls.__dataclass_fields__)))


def _body(data: bytes, known: int) -> Dict[str, Any]:
    """The fields of a row beside its number. known: how many this version has. Raises JournalError where another had more: such a row is
    whole, and not to be taken for a damaged one.
    """
    body = json.loads(data)
    if isinstance(body, dict) and len(body) >= known:
        raise JournalError(
            f"the journal was written by a newer latentd: a row has the fields {', '.join(body)}",
            hint="Start that version, or a newer one.",
        )
    fields: Dict[str, Any] = body
    return fields


def sample_id_of(seq: int) -> str:
    return f"s{seq:08d}"


def seq_of(sample_id: str) -> Optional[int]:
    """The sequence number in a sample id, None when it is not one."""
    digits = sample_id[1:]
    return int(digits) if sample_id[:1] == "s" and digits.isascii() and digits.isdigit() and len(digits) <= 12 else None
