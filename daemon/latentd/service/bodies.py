"""Request bodies: raw image bytes, multipart forms and JSON become one Upload, and never more memory than the limits allow.

Runs on the event loop; large JSON is parsed in the decode pool. Limits hold while the body arrives, whether or not its length was
announced: bytes of the body, of one image, images, time, and the bytes of all requests together.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, AsyncIterator, Awaitable, Callable, List, Sequence, Tuple, Union

from starlette.requests import ClientDisconnect, Request

from latentd.config import HttpConfig
from latentd.errors import BadRequest, LabelInvalid, LatentdError, Overloaded, RequestTimeout, TooLarge, Unprocessable, UnsupportedMedia
from latentd.service.forms import ImageForm, label_text
from latentd.service.labels import clean_label

RAW_TYPES = ("image/jpeg", "image/png", "image/webp", "image/bmp")
MEDIA_TYPES = (*RAW_TYPES, "multipart/form-data", "application/json")
INLINE_JSON_BYTES = 1 << 16  # larger JSON would hold up the event loop
SMALL_JSON_BYTES = 1 << 16  # a body that carries no image

InPool = Callable[..., Awaitable[Any]]
Image = Union[bytes, LatentdError]  # an error stands in the place of an image that can't be used
Label = Union[str, LatentdError, None]  # None: the image came without one


@dataclass
class Upload:
    """The images of one request in order, and the labels that came with them."""

    images: List[Image]
    labels: List[Label]

    def cleaned(self, max_chars: int) -> List[Union[str, LatentdError]]:
        """Each image's label, checked; an error in the place of a label that can't be used."""
        return [_cleaned(label, max_chars) for label in self.labels]

    def digest(self) -> str:
        """SHA-256 over images and labels: the same for the same content, however it was wrapped."""
        parts = hashlib.sha256()
        for image, label in zip(self.images, self.labels):
            content = image if isinstance(image, bytes) else b""
            parts.update(hashlib.sha256(content).digest())
            parts.update(hashlib.sha256(repr(label).encode("utf-8", "backslashreplace")).digest())
        return parts.hexdigest()


class PendingBytes:
    """How many body bytes all requests hold together; used on the event loop only."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.held = 0

    def hold(self, size: int) -> None:
        """Raises Overloaded when there is no room."""
        if self.held + size > self.capacity:
            raise Overloaded("Request bodies fill the memory set aside for them.")
        self.held += size

    def release(self, size: int) -> None:
        self.held -= size


class _Body:
    """The bytes of one request as they arrive, counted against its own limit and everybody's."""

    def __init__(self, request: Request, limit: int, pending: PendingBytes) -> None:
        self._request = request
        self._limit = limit
        self._pending = pending
        self._size = 0

    async def chunks(self) -> AsyncIterator[bytes]:
        announced = self._request.headers.get("content-length", "")
        if announced.isdigit() and int(announced) > self._limit:
            raise self._too_large()
        more = True
        while more:
            message = await self._request.receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            chunk: bytes = message.get("body", b"")
            more = message.get("more_body", False)
            if self._size + len(chunk) > self._limit:
                raise self._too_large()
            self._pending.hold(len(chunk))
            self._size += len(chunk)
            if chunk:
                yield chunk

    async def whole(self) -> bytes:
        return b"".join([chunk async for chunk in self.chunks()])

    def release(self) -> None:
        self._pending.release(self._size)

    def _too_large(self) -> LatentdError:
        return TooLarge(f"The body has more than {self._limit} bytes.")


@asynccontextmanager
async def read_upload(request: Request, limits: HttpConfig, pending: PendingBytes, in_pool: InPool) -> AsyncIterator[Upload]:
    """The images of the request; their bytes count as pending until the block ends.

    Raises BadRequest (malformed), TooLarge (body, images), UnsupportedMedia, RequestTimeout, Overloaded, Unprocessable (no image),
    LabelInvalid (labels that can't be paired), ClientDisconnect.
    """
    kind = _media_type(request)
    body = _Body(request, limits.max_image_bytes if kind in RAW_TYPES else limits.max_body_bytes, pending)
    try:
        images, labels = await _in_time(_parse(request, kind, body, limits, in_pool), limits.body_timeout_s)
        if not images:
            raise Unprocessable("The request has no image.")
        yield Upload(images, _paired(labels, list(request.query_params.getlist("label")), len(images)))
    finally:
        body.release()


async def read_small_json(request: Request, limits: HttpConfig, pending: PendingBytes) -> Any:
    """The JSON of a body that carries no image; None when there is none. Raises BadRequest, TooLarge, UnsupportedMedia."""
    body = _Body(request, SMALL_JSON_BYTES, pending)
    try:
        content = await _in_time(body.whole(), limits.body_timeout_s)
    finally:
        body.release()
    if not content:
        return None
    if _essence(request) != "application/json":
        raise UnsupportedMedia(f"The body is {_essence(request)!r}.", hint="Send application/json.")
    return _json(content)


async def _in_time(reading: Awaitable[Any], timeout_s: float) -> Any:
    try:
        return await asyncio.wait_for(reading, timeout_s)
    except asyncio.TimeoutError as cause:
        raise RequestTimeout(f"The body did not arrive within {timeout_s:g} seconds.") from cause


def _essence(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _media_type(request: Request) -> str:
    kind = _essence(request)
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding != "identity":
        raise UnsupportedMedia(f"The body is coded as {coding[:40]!r}.", hint="Send it without Content-Encoding.")
    if kind not in MEDIA_TYPES:
        named = f"The Content-Type {kind[:80]!r} is not accepted." if kind else "The request has no Content-Type."
        raise UnsupportedMedia(f"{named} Accepted are {', '.join(MEDIA_TYPES)}.")
    return kind


Parsed = Tuple[List[Image], List[Label]]


async def _parse(request: Request, kind: str, body: _Body, limits: HttpConfig, in_pool: InPool) -> Parsed:
    """Images and labels; no labels at all is an empty list."""
    if kind == "multipart/form-data":
        return await _parse_form(request, body, limits)
    content = await body.whole()
    if kind in RAW_TYPES:
        return [content], []
    if len(content) <= INLINE_JSON_BYTES:
        return parse_json_images(content, limits)
    parsed: Parsed = await in_pool(parse_json_images, content, limits)
    return parsed


async def _parse_form(request: Request, body: _Body, limits: HttpConfig) -> Parsed:
    form = ImageForm(request.headers["content-type"], limits.max_images, limits.max_image_bytes, limits.max_label_chars)
    async for chunk in body.chunks():
        form.feed(chunk)
    form.finish()
    if not form.images and form.other_fields:
        raise Unprocessable(
            f"The form has no field named image; it has {', '.join(form.other_fields[:5])}.", hint="Name the file fields image."
        )
    return form.images, [label_text(raw, limits.max_label_chars) for raw in form.labels]


def parse_json_images(content: bytes, limits: HttpConfig) -> Parsed:
    """{"images": [{"data": base64, "label": "…"}]} as images and labels. Raises BadRequest, TooLarge."""
    payload = _json(content)
    entries = payload.get("images") if isinstance(payload, dict) else None
    if not isinstance(entries, list):
        raise BadRequest('The JSON body must be {"images": [{"data": base64, "label": text}]}.')
    if len(entries) > limits.max_images:
        raise TooLarge(f"The request has {len(entries)} images; {limits.max_images} are accepted.")
    images: List[Image] = []
    labels: List[Label] = []
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get("data"), str):
            raise BadRequest(f"images[{index}] must be an object with data, a base64 text.")
        if not isinstance(entry.get("label"), (str, type(None))):
            raise BadRequest(f"images[{index}].label must be a text.")
        images.append(_from_base64(entry["data"], limits.max_image_bytes))
        labels.append(entry.get("label"))
    return images, labels


def _json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as cause:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise BadRequest(f"The body is not JSON: {cause}.") from cause


def _from_base64(text: str, max_bytes: int) -> Image:
    if len(text) // 4 * 3 > max_bytes + max_bytes // 16:  # room for line breaks
        return TooLarge(f"The image has more than {max_bytes} bytes.")
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except ValueError as cause:
        return BadRequest(f"The image's data is not base64: {cause}.")
    return data if len(data) <= max_bytes else TooLarge(f"The image has {len(data)} bytes; {max_bytes} are accepted.")


def _paired(labels: List[Label], from_query: Sequence[str], images: int) -> List[Label]:
    """One label an image: in order, or one for all; the query's serves the images that have none of their own."""
    found = labels if any(label is not None for label in labels) else list(from_query)
    if len(found) not in (0, 1, images):
        raise LabelInvalid(
            f"There are {images} images and {len(found)} labels.", hint="Send one label for all images, or one an image, in order."
        )
    spread = found if len(found) == images else (found or [None]) * images
    default = from_query[0] if len(from_query) == 1 else None
    return [default if label is None else label for label in spread]


def _cleaned(label: Label, max_chars: int) -> Union[str, LatentdError]:
    if label is None:
        return LabelInvalid("The image has no label.")
    if isinstance(label, LatentdError):
        return label
    try:
        return clean_label(label, max_chars)
    except LabelInvalid as refused:
        return refused
