"""What a state folder has been taught, read without changing anything: for programs that measure while no daemon runs on it.

Opens the journal's file read-only in the caller's thread; blocks on the disk.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from pathlib import Path
from typing import Any, Dict, Iterator, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from numpy.typing import NDArray

from latentd.errors import JournalError
from latentd.replay.codec import Codec, make_codec
from latentd.replay.latents import LatentCodec
from latentd.replay.packing import Bytes
from latentd.replay.records import SampleRow

# The journal's table and keys, as Store and LogTable write them.
_VALUE = "SELECT value FROM journal WHERE key = ?"
_LENGTHS = "SELECT key, length(value) FROM journal WHERE key > 'l/' AND key < 'l0'"
_ROWS = "SELECT key, value FROM journal WHERE key > 'e/' AND key < 'e0' ORDER BY key"


class Taught(NamedTuple):
    """latents: the facts under which the latents were stored (backbone, codecs). seqs, class_ids: samples whose latent is there, oldest
    first, hold-out included. lengths: bytes of their codes, fewer where the tokens are gone."""

    latents: Mapping[str, Any]
    seqs: Tuple[int, ...]
    class_ids: NDArray[np.int64]
    lengths: NDArray[np.int64]


def read_taught(path: Path) -> Taught:
    """The labelled samples that the journal at `path` keeps. Raises JournalError where there is none or it can't be read."""
    with _opened(path) as db:
        facts = db.execute(_VALUE, ("m/counters/latents",)).fetchone()
        samples = [SampleRow.from_bytes(int(key[2:]), value[1:]) for key, value in db.execute(_ROWS) if value[:1] == b"S"]
        bytes_of = {int(key[2:]): length for key, length in db.execute(_LENGTHS)}
    kept = [(row.seq, row.class_id) for row in samples if row.kept and row.state == "stored" and row.class_id is not None]
    found: Dict[str, Any] = {} if facts is None else json.loads(facts[0])
    seqs = tuple(seq for seq, _ in kept)
    lengths = np.array([bytes_of.get(seq, 0) for seq in seqs], dtype=np.int64)
    return Taught(found, seqs, np.array([class_id for _, class_id in kept], dtype=np.int64), lengths)


def read_codes(path: Path, seqs: Sequence[int]) -> Bytes:
    """Codes of these samples, (len(seqs), bytes), in their order: cut to the shortest, where some have no tokens. Raises JournalError, also
    where one is missing."""
    with _opened(path) as db:
        rows = [db.execute(_VALUE, (f"l/{seq:012d}",)).fetchone() for seq in seqs]
    codes = [b"" if row is None else bytes(row[0]) for row in rows]
    length = min(map(len, codes), default=0)
    if not length:
        raise JournalError(f"{path} changed while it was read, or is damaged: latents are missing")
    return np.frombuffer(b"".join(code[:length] for code in codes), dtype=np.uint8).reshape(len(codes), length)


def stored_codec(latents: Mapping[str, Any]) -> Optional[LatentCodec]:
    """The codec that these facts describe; None where they don't say enough: no facts, or a codec calibrated on latents of its own."""
    features, tokens = _codec(latents, "codec"), _codec(latents, "tokens_codec")
    if features is None or (tokens is None and latents.get("tokens_codec")):
        return None
    return LatentCodec(features, tokens)


def _codec(latents: Mapping[str, Any], prefix: str) -> Optional[Codec]:
    described, shape = latents.get(prefix), latents.get(f"{prefix}_shape")
    if not described or not shape or latents.get(f"{prefix}_parameters"):
        return None
    name, kind = [*str(described).split(" "), "token"][:2]
    try:
        return make_codec(name, kind, int(shape[0]), int(shape[1]), int(latents.get(f"{prefix}_seed") or 0))
    except ValueError:
        return None


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    """A read-only connection; what SQLite says is told as a JournalError."""
    try:
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
            yield db
    except sqlite3.Error as cause:
        raise JournalError(f"{path} can't be read: {cause}") from cause
