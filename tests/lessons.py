"""Lessons for tests of journal and learner: images that were never seen, as the features a frozen stage would give. No torch here."""

from __future__ import annotations

import hashlib
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, Optional, Tuple

import numpy as np
from numpy.typing import NDArray

from latentd.replay.journal import Journal
from latentd.replay.latents import LatentCodec, make_latent_codec
from latentd.replay.limits import JournalLimits
from latentd.replay.records import NewSample, SampleRecord

TOKENS, WIDTH = 2, 8
FEATURES = TOKENS * WIDTH
CODEC = make_latent_codec("int8", "token", (TOKENS, WIDTH))
SLOT_BYTES = CODEC.code_bytes + (16 + 4 + 4 + 1) + (4 + 4 + 8) + 8  # code, id row, class row, order
WAIT_S = 20.0  # nothing here takes that long; it bounds a test that fails


def features(label: str, number: int, spread: float = 0.4) -> NDArray[np.float32]:
    """(F,) features of picture `number` of what `label` names: near the others of the label, and never twice the same."""
    centre = np.random.default_rng(zlib.crc32(label.encode())).standard_normal(FEATURES)
    noise = np.random.default_rng([zlib.crc32(label.encode()), number]).standard_normal(FEATURES)
    return (centre + spread * noise).astype(np.float32)


def sample(label: Optional[str], number: int, *, shows: Optional[str] = None, codec: LatentCodec = CODEC) -> NewSample:
    """Picture `number` of what it `shows` (the label, unless told), under this label."""
    row = features(shows or label or "", number)
    code = codec.encode(row[None])[0].tobytes()
    return NewSample(label, code, row, sha256_of(shows or label or "", number))


def sha256_of(shows: str, number: int) -> str:
    return hashlib.sha256(f"{shows} {number}".encode()).hexdigest()


def limits(**changes: Any) -> JournalLimits:
    """Room for everything, exact duplicates only, nothing held out; `changes` say otherwise."""
    usual = {"budget_bytes": 1 << 26, "duplicate_cosine": 1.5, "holdout_every": 0, "holdout_per_class": 50, "max_label_chars": 100}
    return JournalLimits(**{**usual, **changes})


@contextmanager
def running_journal(folder: Path, **changes: Any) -> Iterator[Journal]:
    """A started journal in this folder, closed at the end; `changes` are of its limits."""
    journal = Journal(folder / "journal.sqlite", codec=CODEC, feature_width=FEATURES, limits=limits(**changes))
    journal.start(WAIT_S)
    try:
        yield journal
    finally:
        journal.close(WAIT_S)


def teach(journal: Journal, *batch: Tuple[Optional[str], int]) -> Tuple[SampleRecord, ...]:
    """Admits one request of (label, number) pictures and waits until it is durable."""
    return journal.admit([sample(label, number) for label, number in batch]).result(WAIT_S)
