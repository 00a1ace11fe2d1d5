from __future__ import annotations

from typing import List, Tuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentd.errors import BadRequest, LabelInvalid, LatentdError, TooLarge
from latentd.service.forms import SPARE_PARTS, ImageForm, label_text

BOUNDARY = "----b0undary"
CONTENT_TYPE = f"multipart/form-data; boundary={BOUNDARY}"


def encoded(*fields: Tuple[str, bytes]) -> bytes:
    parts = [
        b'--%s\r\nContent-Disposition: form-data; name="%s"; filename="f"\r\n\r\n%s\r\n' % (BOUNDARY.encode(), name.encode(), content)
        for name, content in fields
    ]
    return b"".join(parts) + b"--%s--\r\n" % BOUNDARY.encode()


def form(max_images: int = 4, max_image_bytes: int = 1000, max_label_chars: int = 10) -> ImageForm:
    return ImageForm(CONTENT_TYPE, max_images, max_image_bytes, max_label_chars)


@given(
    images=st.lists(st.binary(max_size=200), max_size=4),
    labels=st.lists(st.text(max_size=8), max_size=4),
    cuts=st.lists(st.integers(0, 3000), max_size=20),
)
def test_however_the_body_is_cut_into_chunks_the_fields_arrive_whole(images: List[bytes], labels: List[str], cuts: List[int]) -> None:
    raw_labels = [label.encode("utf-8") for label in labels]
    body = encoded(*(("image", image) for image in images), *(("label", label) for label in raw_labels))
    parsed = form()
    edges = [0, *sorted(cut for cut in cuts if cut < len(body)), len(body)]
    for start, end in zip(edges, edges[1:]):
        parsed.feed(body[start:end])
    parsed.finish()
    assert parsed.images == images
    assert parsed.labels == raw_labels


def test_an_image_that_is_too_large_becomes_its_own_problem_and_is_not_kept() -> None:
    parsed = form(max_image_bytes=1000)
    body = encoded(("image", b"a" * 1000), ("image", b"b" * 50_000), ("image", b"c"))
    for start in range(0, len(body), 500):
        parsed.feed(body[start : start + 500])
        assert len(parsed._content) <= 1000
    assert [type(image) for image in parsed.images] == [bytes, TooLarge, bytes]


def test_the_first_image_too_many_ends_the_reading() -> None:
    parsed = form(max_images=2)
    with pytest.raises(TooLarge, match="more than 2 images"):
        parsed.feed(encoded(*[("image", b"x")] * 3))


def test_fields_are_counted_whatever_they_are_called() -> None:
    parsed = form(max_images=2)
    with pytest.raises(TooLarge, match="fields"):
        parsed.feed(encoded(*[("x", b"")] * (2 * 2 + SPARE_PARTS + 1)))


def test_a_huge_label_or_other_field_is_not_kept() -> None:
    parsed = form(max_label_chars=10)
    parsed.feed(encoded(("label", b"x" * 10_000), ("other", b"y" * 10_000)))
    assert len(parsed.labels[0]) == 41
    assert parsed.other_fields == ["other"]
    assert isinstance(label_text(parsed.labels[0], 10), LabelInvalid)


@pytest.mark.parametrize(
    "body", [b"", b"nonsense", b"--wrong\r\n\r\n", encoded(("image", b"x"))[:-6], b"--" + BOUNDARY.encode() + b"\r\nbroken header\r\n\r\n"]
)
def test_a_malformed_or_unfinished_form_is_a_bad_request(body: bytes) -> None:
    with pytest.raises(BadRequest):
        feed_all(form(), body)


def feed_all(parsed: ImageForm, body: bytes) -> None:
    for start in range(0, len(body), 7):
        parsed.feed(body[start : start + 7])
    parsed.finish()


def test_headers_of_a_field_are_bounded() -> None:
    parsed = form()
    with pytest.raises(BadRequest):
        parsed.feed(b"--" + BOUNDARY.encode() + b"\r\nX: " + b"a" * 100_000)


@pytest.mark.parametrize(
    "content_type", ["multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=" + "x" * 1000]
)
def test_without_a_usable_boundary_the_request_is_bad(content_type: str) -> None:
    with pytest.raises(BadRequest):
        ImageForm(content_type, 1, 1, 1)


def test_label_bytes_that_are_no_utf8_are_an_invalid_label() -> None:
    found = label_text(b"\xff\xfe", 10)
    assert isinstance(found, LatentdError) and found.slug == "label-invalid"
    assert label_text("é".encode(), 10) == "é"
