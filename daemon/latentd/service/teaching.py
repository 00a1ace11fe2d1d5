"""From encoded images to journal entries: what /v1/learn does between parsing and answering, and what /v1/classify?keep= shares with it.

Awaited on the event loop; quantizing and hashing run in the decode pool, storing in the journal thread. An answer is made only after the
fsync.
"""

from __future__ import annotations

import asyncio
import hashlib
from typing import TYPE_CHECKING, Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request

from latentd.errors import BadRequest, Conflict, IdempotencyKeyReused, LatentdError, Overloaded
from latentd.replay.records import Idempotency, NewSample, SampleRecord
from latentd.service import problems
from latentd.service.answers import request_id
from latentd.service.batcher import EncodedImage, Priority
from latentd.service.bodies import Upload
from latentd.service.clients import while_connected

if TYPE_CHECKING:
    from latentd.service.parts import Parts

MAX_KEY_CHARS = 255
AT_ONCE = 4  # images that one thread of the pool quantizes before it looks for something to decode: milliseconds each
RETRY_LEARN_S = 5  # a learner that is thousands of samples behind needs more than a moment


class Lesson(NamedTuple):
    """One answered learn request. slots: in order, None for the next record, or the problem of an image that could not be used."""

    request_id: str
    slots: Tuple[Optional[Dict[str, Any]], ...]
    records: Tuple[SampleRecord, ...]
    was_replayed: bool = False


class Material(NamedTuple):
    """One image ready to be stored."""

    data: bytes
    encoded: EncodedImage
    label: Optional[str]


def idempotency_key(request: Request) -> Optional[str]:
    """The Idempotency-Key header. Raises BadRequest for one that can't be a key."""
    key = request.headers.get("idempotency-key")
    if key is None:
        return None
    if not 0 < len(key) <= MAX_KEY_CHARS or not (key.isascii() and key.isprintable()):
        raise BadRequest(f"An Idempotency-Key has 1 to {MAX_KEY_CHARS} printable ASCII characters.")
    return key


async def teach(parts: Parts, request: Request, upload: Upload, key: Optional[str]) -> Lesson:
    """Teaches the images, or repeats the stored answer of a request with the same key.

    Raises Conflict while a request with this key still runs, IdempotencyKeyReused for another body, Overloaded, the images' problem when
    none can be used, and what the journal raises.
    """
    if key is None:
        return await _teach(parts, request, upload, None)
    if key in parts.keys_in_flight:
        raise Conflict("A request with this Idempotency-Key still runs.", retry_after_s=1)
    parts.keys_in_flight.add(key)
    try:
        digest = await parts.pipeline.in_pool(upload.digest)
        stored = await asyncio.wrap_future(parts.journal.recall(key))
        if stored is None:
            return await _teach(parts, request, upload, (key, digest))
        if stored.body_sha256 != digest:
            raise IdempotencyKeyReused("This Idempotency-Key came with other images or labels before.")
        return Lesson(stored.request_id, stored.slots, stored.records, was_replayed=True)
    finally:
        parts.keys_in_flight.discard(key)


async def _teach(parts: Parts, request: Request, upload: Upload, keyed: Optional[Tuple[str, str]]) -> Lesson:
    _require_room(parts)
    labels = upload.cleaned(parts.config.http.max_label_chars)
    wanted = [label if isinstance(label, LatentdError) else image for image, label in zip(upload.images, labels)]
    encoded = await while_connected(request, parts.pipeline.encode(wanted, Priority.LEARN, tokens=parts.codec.tokens is not None))
    materials = [
        Material(image, found, label)
        for image, found, label in zip(upload.images, encoded, labels)
        if isinstance(image, bytes) and isinstance(found, EncodedImage) and isinstance(label, str)
    ]
    slots = tuple(problems.document(found) if isinstance(found, LatentdError) else None for found in encoded)
    for _ in range(len(slots) - len(materials)):
        parts.metrics.learned("problem")
    if not materials:
        raise problems.first_problem([found for found in encoded if isinstance(found, LatentdError)])
    idempotency = Idempotency(*keyed, request_id(request), slots) if keyed else None
    return Lesson(request_id(request), slots, await store(parts, materials, idempotency))


async def store(parts: Parts, materials: Sequence[Material], idempotency: Optional[Idempotency] = None) -> Tuple[SampleRecord, ...]:
    """Quantizes the images' latents and stores them durably, as one request. Raises what the journal raises."""
    shares = [materials[start : start + AT_ONCE] for start in range(0, len(materials), AT_ONCE)]
    quantized = await asyncio.gather(*(parts.pipeline.in_pool(_samples, parts, share, priority=Priority.LEARN) for share in shares))
    samples = [sample for share in quantized for sample in share]
    records = await asyncio.wrap_future(parts.journal.admit(samples, idempotency))
    for record in records:
        parts.metrics.learned(record.state)
    return records


def _samples(parts: Parts, materials: Sequence[Material]) -> List[NewSample]:
    """In the decode pool: each image as the journal takes it."""
    features = np.stack([material.encoded.features for material in materials])  # (B, m * D)
    codes = parts.codec.encode(features, tokens_of(parts, [material.encoded for material in materials]))  # (B, code_bytes)
    return [
        NewSample(material.label, code.tobytes(), material.encoded.features, hashlib.sha256(material.data).hexdigest())
        for material, code in zip(materials, codes)
    ]


def tokens_of(parts: Parts, images: Sequence[EncodedImage]) -> Optional[NDArray[np.float32]]:
    """(B, N, D), pooled as they are stored; None where none are stored."""
    if parts.codec.tokens is None:
        return None
    return parts.codec.pooled(np.stack([image.tokens for image in images if image.tokens is not None]))


def _require_room(parts: Parts) -> None:
    lag, capacity = parts.learner.status().lag_samples, parts.config.learn.max_lag_samples
    if lag > capacity:
        parts.metrics.refused("learner", 1)
        raise Overloaded(f"The learner is {lag} samples behind; {capacity} may wait.", retry_after_s=RETRY_LEARN_S)


async def wait_until_learned(parts: Parts, records: Sequence[SampleRecord], wait_s: float) -> Tuple[bool, Tuple[SampleRecord, ...]]:
    """Waits for the learner, at most so long: whether it got there, and the records as they are then."""
    queued = [record.seq for record in records if record.state == "queued"]
    if queued:
        learned = asyncio.wrap_future(parts.learner.learned(max(queued)))
        done, _ = await asyncio.wait({learned}, timeout=wait_s)  # does not cancel it: the learner settles it in its own time
        if not done or learned.exception() is not None:
            return False, tuple(records)
    fresh = await asyncio.gather(*(asyncio.wrap_future(parts.journal.sample(record.sample_id)) for record in records))
    return True, tuple(fresh)


def results(lesson: Lesson, records: Sequence[SampleRecord]) -> List[Dict[str, Any]]:
    """One entry an image, in order."""
    taught = iter(records)
    return [{"problem": slot} if slot is not None else _result(next(taught)) for slot in lesson.slots]


def _result(record: SampleRecord) -> Dict[str, Any]:
    return {"sample_id": record.sample_id, "label": record.label, "state": record.state, "duplicate_of": record.duplicate_of}
