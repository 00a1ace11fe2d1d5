"""multipart/form-data with repeated `image` and `label` fields, parsed while it arrives.

One object a request, on the event loop. Nothing is kept past its limit: the parts are counted, an image that grows too large turns into
its own problem and the rest of it is dropped, other fields are skipped.
"""

from __future__ import annotations

from typing import Dict, List, Optional, Union

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from latentd.errors import BadRequest, LabelInvalid, LatentdError, TooLarge

SPARE_PARTS = 16  # fields besides the images and labels that a form may carry
MAX_HEADER_BYTES = 8192  # of one part
MAX_BOUNDARY_BYTES = 256


class ImageForm:
    """Collects the images and labels of one form. Feed it every chunk, then call finish().

    `images` holds bytes, or the TooLarge of an image; `labels` the raw bytes of each label field, cut a little past the longest label.
    """

    def __init__(self, content_type: str, max_images: int, max_image_bytes: int, max_label_chars: int) -> None:
        boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
        if not 0 < len(boundary) <= MAX_BOUNDARY_BYTES:
            raise BadRequest("The Content-Type has no usable multipart boundary.")
        self.images: List[Union[bytes, LatentdError]] = []
        self.labels: List[bytes] = []
        self.other_fields: List[str] = []
        self._max_images = max_images
        self._limits = {"image": max_image_bytes, "label": 4 * max_label_chars + 1}  # UTF-8 has 4 bytes a character at most
        self._parts = 0
        self._field: Optional[str] = None
        self._content = bytearray()
        self._size = 0
        self._header_bytes = 0
        self._name, self._value = bytearray(), bytearray()
        self._headers: Dict[bytes, bytes] = {}
        self._ended = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._part_begins,
                "on_header_field": self._header_name,
                "on_header_value": self._header_value,
                "on_header_end": self._header_ends,
                "on_headers_finished": self._headers_end,
                "on_part_data": self._data,
                "on_part_end": self._part_ends,
                "on_end": self._form_ends,
            },
        )

    def feed(self, chunk: bytes) -> None:
        """The next bytes of the body. Raises BadRequest, or TooLarge at the first image or field too many."""
        try:
            self._parser.write(chunk)
        except FormParserError as cause:
            raise BadRequest(f"The multipart body is malformed: {cause}.") from cause

    def finish(self) -> None:
        """The body is complete. Raises BadRequest when the form is not."""
        if not self._ended:
            raise BadRequest("The multipart body ends before its last boundary.")

    def _part_begins(self) -> None:
        self._parts += 1
        if self._parts > 2 * self._max_images + SPARE_PARTS:
            raise TooLarge(f"The form has more than {2 * self._max_images + SPARE_PARTS} fields.")
        self._headers, self._field, self._content = {}, None, bytearray()
        self._size = self._header_bytes = 0

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._count_header(end - start)
        self._name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._count_header(end - start)
        self._value += data[start:end]

    def _count_header(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > MAX_HEADER_BYTES:
            raise BadRequest("A field of the form has headers that are too long.")

    def _header_ends(self) -> None:
        self._headers[bytes(self._name).lower()] = bytes(self._value)
        self._name, self._value = bytearray(), bytearray()

    def _headers_end(self) -> None:
        disposition = self._headers.get(b"content-disposition", b"")
        self._field = parse_options_header(disposition)[1].get(b"name", b"").decode("utf-8", "replace")
        if self._field == "image" and len(self.images) >= self._max_images:
            raise TooLarge(f"The request has more than {self._max_images} images.")

    def _data(self, data: bytes, start: int, end: int) -> None:
        self._size += end - start
        limit = self._limits.get(self._field or "", 0)
        if self._field == "image" and self._size > limit:
            self._content.clear()
        else:
            self._content += data[start : min(end, start + max(0, limit - len(self._content)))]

    def _part_ends(self) -> None:
        content = bytes(self._content)
        if self._field == "label":
            self.labels.append(content)
        elif self._field != "image":
            self.other_fields.append((self._field or "")[:40])
        elif self._size > self._limits["image"]:
            self.images.append(TooLarge(f"The image has more than {self._limits['image']} bytes."))
        else:
            self.images.append(content)
        self._content = bytearray()

    def _form_ends(self) -> None:
        self._ended = True


def label_text(raw: bytes, max_chars: int) -> Union[str, LatentdError]:
    """A label field as text, or what is wrong with it."""
    if len(raw) > 4 * max_chars:
        return LabelInvalid(f"The label is too long; the longest may have {max_chars} characters.")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return LabelInvalid("The label is not UTF-8 text.")
