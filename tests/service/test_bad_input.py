"""What a client can get wrong with images and labels: a documented problem each, never a 500, never at the cost of another image."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from typing import Any, Callable, Dict, List, Tuple

import numpy as np
import pytest
from PIL import Image

from service.fakes import World, assert_problem, picture

Case = Tuple[bytes, int, str]


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims to be this large and has hardly any data."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def animated(format: str) -> bytes:
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (0, 120, 250)]
    file = io.BytesIO()
    frames[0].save(file, format, save_all=True, append_images=frames[1:])
    return file.getvalue()


UNUSABLE: Dict[str, Case] = {
    "not an image": (b"just some words", 415, "unsupported-media-type"),
    "truncated JPEG": (picture(format="JPEG", size=(64, 64))[:-200], 422, "image-undecodable"),
    "PNG bomb": (png_header(30_000, 30_000), 413, "too-large"),
    "animated GIF": (animated("GIF"), 415, "unsupported-media-type"),
    "animated WebP": (animated("WEBP"), 413, "too-large"),
    "zero bytes": (b"", 422, "image-undecodable"),
    "PNG of nothing": (b"\x89PNG\r\n\x1a\n", 422, "image-undecodable"),
    "web page": (b"<!doctype html><html></html>", 415, "unsupported-media-type"),
}
USABLE: Dict[str, bytes] = {
    "1x1": picture(size=(1, 1)),
    "CMYK": picture(format="JPEG", mode="CMYK"),
    "palette": picture(mode="P"),
    "grey": picture(mode="L"),
    "transparent": picture(mode="RGBA"),
    "bilevel": picture(mode="1"),
}


def sixteen_bit() -> bytes:
    file = io.BytesIO()
    Image.fromarray((np.arange(400, dtype=np.uint16) * 160).reshape(20, 20)).save(file, "PNG")
    return file.getvalue()


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.open(io.BytesIO(picture())).save(file, "JPEG", exif=exif)
    return file.getvalue()


USABLE["16-bit"] = sixteen_bit()
USABLE["EXIF-rotated"] = turned()


@pytest.mark.parametrize("name", UNUSABLE)
def test_an_unusable_image_alone_is_its_problem(world: World, name: str) -> None:
    image, status, code = UNUSABLE[name]
    for path in ("/v1/classify", "/v1/latents", "/v1/learn?label=cat"):
        assert_problem(world.call("POST", path, content=image, headers={"Content-Type": "image/png"}), status, code)


@pytest.mark.parametrize("name", UNUSABLE)
def test_an_unusable_image_among_others_harms_none_of_them(world: World, name: str) -> None:
    image, status, code = UNUSABLE[name]
    classified = world.classify(picture(1), image, picture(2)).json()["results"]
    taught = world.learn((picture(3), "cat"), (image, "dog"), (picture(4), "owl")).json()["results"]
    for results in (classified, taught):
        assert [result.get("problem", {}).get("code") for result in results] == [None, code, None]
        assert results[1] == {"problem": {**results[1]["problem"], "status": status}}
    assert [result.get("state") for result in taught] == ["queued", None, "queued"]


@pytest.mark.parametrize("name", USABLE)
def test_an_unusual_image_is_used_like_any_other(world: World, name: str) -> None:
    assert world.classify(USABLE[name]).json()["results"][0]["decision"] == "cat"
    assert world.learn((USABLE[name], "cat")).json()["results"][0]["state"] == "queued"


BAD_LABELS = {
    "empty": "",
    "spaces": "   ",
    "10 kB": "x" * 10_000,
    "control characters": "ca\x00t",
    "newline inside": "ca\nt",
    "escape": "\x1b[2Jcat",
    "reserved": "unknown",
}


@pytest.mark.parametrize("name", BAD_LABELS)
def test_a_label_that_can_not_be_used_is_refused_by_every_door(world: World, name: str) -> None:
    label, data = BAD_LABELS[name], base64.b64encode(picture()).decode()
    raw = world.call("POST", "/v1/learn", params={"label": label}, content=picture(), headers={"Content-Type": "image/png"})
    form = world.learn((picture(), label))
    coded = world.call("POST", "/v1/learn", json={"images": [{"data": data, "label": label}]})
    for answer in (raw, form, coded):
        assert_problem(answer, 422, "label-invalid")
    assert world.call("GET", "/v1/classes").json() == {"classes": []}


def test_a_label_with_a_lone_surrogate_is_refused(world: World) -> None:
    body = json.dumps({"images": [{"data": base64.b64encode(picture()).decode(), "label": "\ud800"}]})
    answer = world.call("POST", "/v1/learn", content=body, headers={"Content-Type": "application/json"})
    assert_problem(answer, 422, "label-invalid")


def test_a_bad_label_among_good_ones_costs_only_its_own_image(world: World) -> None:
    results = world.learn((picture(1), "cat"), (picture(2), "\x07"), (picture(3), "dog")).json()["results"]
    assert [result.get("label") for result in results] == ["cat", None, "dog"]
    assert results[1]["problem"]["code"] == "label-invalid"


@pytest.mark.parametrize("request_", [{"content": picture(), "headers": {"Content-Type": "image/png"}}, {"files": [("image", picture())]}])
def test_a_missing_label_is_refused(world: World, request_: Dict[str, Any]) -> None:
    assert_problem(world.call("POST", "/v1/learn", **request_), 422, "label-invalid")


def test_labels_that_can_not_be_paired_are_refused(world: World) -> None:
    answer = world.call("POST", "/v1/learn", files=[("image", picture(seed)) for seed in range(3)], data={"label": ["cat", "dog"]})
    assert_problem(answer, 422, "label-invalid")


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/octet-stream", "application/x-www-form-urlencoded", "image/gif", "nonsense", ""]
)
def test_a_wrong_content_type_is_refused(world: World, content_type: str) -> None:
    for path in ("/v1/classify", "/v1/latents", "/v1/learn?label=cat"):
        assert_problem(world.call("POST", path, content=picture(), headers={"Content-Type": content_type}), 415, "unsupported-media-type")


def test_a_compressed_body_is_refused(world: World) -> None:
    answer = world.call("POST", "/v1/classify", content=picture(), headers={"Content-Type": "image/png", "Content-Encoding": "gzip"})
    assert_problem(answer, 415, "unsupported-media-type")


def test_seventeen_images_are_too_many_by_every_door(world: World) -> None:
    entry = {"data": base64.b64encode(picture()).decode()}
    assert world.classify(*[picture()] * 16).status_code == 200
    assert_problem(world.classify(*[picture()] * 17), 413, "too-large")
    assert_problem(world.call("POST", "/v1/classify", json={"images": [entry] * 17}), 413, "too-large")


@pytest.mark.parametrize("body", [{"images": []}, None])
def test_no_image_at_all_is_unprocessable(world: World, body: Any) -> None:
    request: Dict[str, Any] = {"json": body} if body else {"files": [("photo", picture())]}
    problem = assert_problem(world.call("POST", "/v1/classify", **request), 422, "unprocessable")
    assert body or "photo" in problem["detail"]


BAD_JSON: List[bytes] = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'"text"',
    b"\xff\xfe\xfd",
    b"[" * 100_000,
    b'{"images": {}}',
    b'{"images": [1]}',
    b'{"images": [{}]}',
    b'{"images": [{"data": 5}]}',
    b'{"images": [{"data": "aGk=", "label": 5}]}',
    b'{"images": [{"data": "this is not base64!"}]}',
    b'{"images": [{"data": "abc"}]}',
    json.dumps({"images": [{"data": "\u00e9"}]}).encode(),
    b'{"n": ' + b"9" * 6000 + b"}",
]


@pytest.mark.parametrize("body", BAD_JSON, ids=range(len(BAD_JSON)))
def test_bad_json_is_a_bad_request(world: World, body: bytes) -> None:
    answer = world.call("POST", "/v1/classify", content=body, headers={"Content-Type": "application/json"})
    assert_problem(answer, 400, "bad-request")


def test_bad_base64_costs_only_its_own_image(world: World) -> None:
    entries = [{"data": base64.b64encode(picture()).decode()}, {"data": "%%%"}]
    results = world.call("POST", "/v1/classify", json={"images": entries}).json()["results"]
    assert results[0]["decision"] == "cat"
    assert (results[1]["problem"]["code"], results[1]["problem"]["status"]) == ("bad-request", 400)


def test_large_json_is_read_too(world: World) -> None:
    big = picture(size=(400, 400), format="BMP")
    results = world.call("POST", "/v1/classify", json={"images": [{"data": base64.b64encode(big).decode()}]}).json()["results"]
    assert results[0]["decision"] == "cat"


@pytest.mark.parametrize("body", [b"", b"garbage", b"--x\r\n\r\n"])
def test_a_broken_form_is_a_bad_request(world: World, body: bytes) -> None:
    answer = world.call("POST", "/v1/classify", content=body, headers={"Content-Type": "multipart/form-data; boundary=x"})
    assert_problem(answer, 400, "bad-request")


def test_an_image_over_the_limit_is_refused_alone(new_world: Callable[..., World]) -> None:
    world = new_world(max_image_bytes=2048)
    big = picture(format="BMP", size=(64, 64))
    assert len(big) > 2048
    raw = world.call("POST", "/v1/classify", content=big, headers={"Content-Type": "image/bmp"})
    form = world.classify(picture(), big)
    coded = world.call("POST", "/v1/classify", json={"images": [{"data": base64.b64encode(big).decode()}]})
    assert_problem(raw, 413, "too-large")
    assert_problem(coded, 413, "too-large")
    assert [result.get("problem", {}).get("code") for result in form.json()["results"]] == [None, "too-large"]
