"""Decoding: every kind of picture that cameras and people send, and one clear refusal for each kind of bad one."""

from __future__ import annotations

import gc
import io
import random
import struct
import threading
import warnings
import zlib
from contextlib import nullcontext
from typing import Any, List, Optional, Tuple

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from latentd.errors import ImageUndecodable, LatentdError, TooLarge, UnsupportedMedia
from latentd.vision import images
from latentd.vision.images import ImageLimits, decode

LIMITS = ImageLimits(max_bytes=1 << 20, max_pixels=4_000_000, max_frames=1)
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def picture(width: int = 64, height: int = 48) -> Image.Image:
    """Smooth and without symmetry: left dark to right red, top to bottom green, a blue upper left corner."""
    row, column = np.mgrid[0:height, 0:width]
    blue = np.where((row < height // 3) & (column < width // 3), 230, 20)
    return Image.fromarray(np.stack([column * 255 // width, row * 255 // height, blue], axis=-1).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def expected(image: Image.Image, size: int) -> NDArray[np.uint8]:
    return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))


def distance(found: NDArray[np.uint8], wanted: NDArray[np.uint8]) -> float:
    return float(np.abs(found.astype(int) - wanted.astype(int)).mean())


def exif(orientation: int, order: str = "<") -> bytes:
    start = b"II*\0" if order == "<" else b"MM\0*"
    return b"Exif\0\0" + start + struct.pack(order + "IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)


@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("BMP", {}), ("WEBP", {"lossless": True}), ("JPEG", {"quality": 98, "subsampling": 0})]
)
def test_each_format_gives_the_whole_picture_squashed_to_the_square(kind: str, options: Any) -> None:
    found = decode(encoded(picture(), kind, **options), 32, LIMITS)
    assert found.shape == (32, 32, 3)
    assert found.dtype == np.uint8
    assert found.flags.c_contiguous
    assert distance(found, expected(picture(), 32)) < (1.5 if kind == "JPEG" else 0.01)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (2, 3)])
def test_tiny_and_thin_pictures_fill_the_square(size: Any) -> None:
    for kind in ("PNG", "BMP", "WEBP", "JPEG"):
        found = decode(encoded(Image.new("RGB", size, (200, 100, 50)), kind), 28, LIMITS)
        assert distance(found, np.full((28, 28, 3), (200, 100, 50), np.uint8)) < 4


def test_a_large_photo_is_shrunk_while_decoding_and_looks_the_same() -> None:
    large = picture(1600, 1200)
    found = decode(encoded(large, "JPEG", quality=95), 64, LIMITS)
    assert distance(found, expected(large, 64)) < 1.5


def test_a_photo_is_not_shrunk_further_than_its_detail_allows() -> None:
    """400 x 300 to 64: the decoder may halve it; at an eighth, blocks of 12 pixels would blur into each other."""
    blocks = np.random.default_rng(0).integers(0, 256, (25, 34, 3), dtype=np.uint8).repeat(12, axis=0).repeat(12, axis=1)
    photo = Image.fromarray(np.ascontiguousarray(blocks[:, :400]))
    found = decode(encoded(photo, "JPEG", quality=95, subsampling=0), 64, LIMITS)
    assert distance(found, expected(photo, 64)) < 3


def test_a_fine_pattern_is_averaged_and_not_picked_at_random() -> None:
    """Antialiasing: one-pixel stripes of black and white become an even grey."""
    stripes = Image.fromarray(np.tile(np.array([[0, 255]], np.uint8), (600, 300)))
    for kind in ("PNG", "JPEG"):
        found = decode(encoded(stripes, kind), 30, LIMITS)
        assert abs(found.mean() - 127.5) < 2
        assert found.std() < 3


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """What the camera stored, so that turning it back as EXIF says gives `image`."""
    back = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
    }
    back.update({6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270})
    return image.transpose(back[orientation]) if orientation in back else image


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_every_exif_orientation_is_turned_upright(orientation: int, kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {"quality": 98} if kind == "JPEG" else {}
    data = encoded(turned(picture(), orientation), kind, exif=exif(orientation), **options)
    assert distance(decode(data, 32, LIMITS), expected(picture(), 32)) < 2


def test_exif_in_either_byte_order_is_read() -> None:
    data = encoded(turned(picture(), 6), "PNG", exif=exif(6, ">"))
    assert distance(decode(data, 32, LIMITS), expected(picture(), 32)) < 1


@pytest.mark.parametrize("damaged", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", exif(6)[:-12], b"Exif\0\0XX", exif(9), exif(0)])
def test_damaged_exif_does_not_cost_the_picture(damaged: bytes) -> None:
    found = decode(encoded(picture(), "PNG", exif=damaged), 32, LIMITS)
    assert distance(found, expected(picture(), 32)) < 0.01


def test_sixteen_bit_grey_keeps_its_brightness() -> None:
    grey = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    found = decode(encoded(Image.fromarray(grey), "PNG"), 64, LIMITS)
    assert np.abs(found[..., 0].astype(int) - (grey >> 8)).max() <= 1
    assert (found[..., 0] == found[..., 2]).all()


def sixteen_bit_colour_png() -> bytes:
    row = b"".join(struct.pack(">HHH", 0x8040, 0xFFFF, 0x0001) for _ in range(8))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress((b"\0" + row) * 8)) + chunk(b"IEND", b"")


def test_sixteen_bit_colour_keeps_its_upper_half() -> None:
    assert decode(sixteen_bit_colour_png(), 8, LIMITS)[4, 4].tolist() == [0x80, 0xFF, 0x00]


def test_cmyk_photos_come_out_in_their_colours() -> None:
    found = decode(encoded(picture().convert("CMYK"), "JPEG", quality=98), 32, LIMITS)
    assert distance(found, expected(picture().convert("CMYK"), 32)) < 3
    assert distance(found, expected(picture(), 32)) < 12


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA"])
def test_every_mode_of_png_is_decoded(mode: str) -> None:
    image = picture().convert(mode)
    assert distance(decode(encoded(image, "PNG"), 32, LIMITS), expected(image.convert("RGB"), 32)) < 2


def test_transparency_is_laid_on_white_in_every_form() -> None:
    clear = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    half = Image.new("RGBA", (20, 20), (255, 0, 0, 128))
    palette = Image.new("P", (20, 20), 1)
    palette.putpalette([0, 0, 255, 255, 0, 0])
    assert decode(encoded(clear, "PNG"), 8, LIMITS)[3, 3].tolist() == list(WHITE)
    assert decode(encoded(clear, "WEBP", lossless=True), 8, LIMITS)[3, 3].tolist() == list(WHITE)
    assert abs(decode(encoded(half, "PNG"), 8, LIMITS)[3, 3].astype(int) - [255, 127, 127]).max() <= 1
    assert decode(encoded(palette, "PNG", transparency=1), 8, LIMITS)[3, 3].tolist() == list(WHITE)
    assert decode(encoded(palette, "PNG", transparency=b"\xff\0"), 8, LIMITS)[3, 3].tolist() == list(WHITE)
    assert decode(encoded(palette, "PNG", transparency=0), 8, LIMITS)[3, 3].tolist() == list(RED)
    assert decode(encoded(Image.new("RGB", (9, 9), GREEN), "PNG", transparency=GREEN), 8, LIMITS)[3, 3].tolist() == list(WHITE)


def test_the_colour_under_a_transparent_part_does_not_bleed_into_the_rest() -> None:
    image = Image.new("RGBA", (64, 64), (*BLUE, 255))
    image.paste((255, 0, 0, 0), (0, 0, 32, 64))
    found = decode(encoded(image, "PNG"), 16, LIMITS)
    assert (found[..., 2] == 255).all()  # between white and blue nothing turns red or dark
    assert (found[..., 0] == found[..., 1]).all()


def test_a_photo_with_an_embedded_second_picture_is_one_frame() -> None:
    """Phones write MPO files (depth, gain map) under a JPEG's name."""
    data = encoded(picture(), "MPO", save_all=True, append_images=[Image.new("RGB", (64, 48))])
    assert data[:2] == b"\xff\xd8"
    assert distance(decode(data, 32, LIMITS), expected(picture(), 32)) < 3


def animated(kind: str, frames: int) -> bytes:
    others: List[Image.Image] = [Image.new("RGB", (64, 48), (9 * i, 0, 0)) for i in range(1, frames)]
    return encoded(picture(), kind, save_all=True, append_images=others, duration=50)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_an_animation_is_refused_unless_its_frames_are_allowed(kind: str) -> None:
    with pytest.raises(TooLarge, match="3 frames, at most 1"):
        decode(animated(kind, 3), 32, LIMITS)
    allowed = decode(animated(kind, 3), 32, ImageLimits(1 << 20, 4_000_000, 3))
    assert distance(allowed, expected(picture(), 32)) < 4  # the first frame


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (encoded(picture(), "GIF"), "a GIF"),
        (animated("GIF", 3), "a GIF"),
        (encoded(picture(), "TIFF"), "a TIFF"),
        (encoded(picture(), "ICO"), "an icon"),
        (b"\0\0\0\x18ftypavif\0\0\0\0", "an AVIF image"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "a HEIC image"),
        (b"\0\0\0\x18ftypisom\0\0\0\0", "a video or HEIF file"),
        (b"%PDF-1.7", "a PDF"),
        (b'  <svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing"),
        (b"<!DOCTYPE html><html>", "XML or HTML"),
        (b'\n{"image": "x"}', "JSON"),
        (b"PK\3\4rest", "a ZIP archive"),
        (b"just some text", "plain text"),
        (b"\x00\x01\x02\x03rubbish", "starts with 00 01 02 03"),
        (b"RIFF\0\0\0\0WAVE", "starts with 52 49 46 46"),
    ],
)
def test_what_is_no_accepted_image_is_named(data: bytes, found: str) -> None:
    with pytest.raises(UnsupportedMedia) as refused:
        decode(data, 32, LIMITS)
    assert found in refused.value.detail
    assert "not JPEG, PNG, WebP or BMP" in refused.value.detail


def test_the_content_counts_not_what_it_was_called() -> None:
    """A PNG stays a PNG whatever name or type it arrived with: there is no name to look at."""
    assert decode(encoded(picture(), "PNG"), 32, LIMITS).shape == (32, 32, 3)


def test_zero_bytes_are_undecodable_and_say_so() -> None:
    with pytest.raises(ImageUndecodable, match="0 bytes"):
        decode(b"", 32, LIMITS)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
@pytest.mark.parametrize("kept", [0.05, 0.3, 0.6, 0.97])
def test_a_truncated_image_is_undecodable(kind: str, kept: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (150, 200, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    with pytest.raises(ImageUndecodable, match="can't be decoded"):
        decode(data[: int(len(data) * kept)], 32, LIMITS)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
@pytest.mark.parametrize("kept", [0.6, 1.0])
def test_what_a_large_image_took_is_let_go_and_given_back_also_where_it_is_damaged(
    kind: str, kept: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def large() -> int:
        return sum(issubclass(type(each), Image.Image) and each.width > 32 for each in gc.get_objects())

    data = encoded(picture(200, 150), kind)
    held = []
    monkeypatch.setattr(images, "_LARGE", 200 * 150 - 1)
    monkeypatch.setattr(images, "trim", lambda: held.append(large()))
    gc.collect()
    before = large()
    with nullcontext() if kept == 1 else pytest.raises(ImageUndecodable):
        decode(data[: int(len(data) * kept)], 32, LIMITS)
    assert held == [before]


def png_of(width: int, height: int) -> bytes:
    """A PNG that promises these sizes and holds next to nothing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def webp_of(width: int, height: int, chunk: bytes) -> bytes:
    body = {
        b"VP8X": struct.pack("<I", 0x10) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little"),
        b"VP8L": b"\x2f" + struct.pack("<I", (width - 1) | (height - 1) << 14),
        b"VP8 ": b"\x10\0\0\x9d\x01\x2a" + struct.pack("<HH", width, height),
    }[chunk]
    content = b"WEBP" + chunk + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", len(content)) + content


BOMBS = {
    "PNG": png_of(30_000, 30_000),
    "PNG wider than any": png_of(2**31 - 1, 2**31 - 1),
    "BMP": encoded(picture(), "BMP")[:18] + struct.pack("<ii", 30_000, 30_000) + encoded(picture(), "BMP")[26:],
    "WebP extended": webp_of(16_000, 16_000, b"VP8X"),
    "WebP lossless": webp_of(16_000, 16_000, b"VP8L"),
    "WebP lossy": webp_of(16_000, 16_000, b"VP8 "),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_decompression_bomb_is_refused_by_its_header(kind: str) -> None:
    with warnings.catch_warnings(record=True) as escaped:
        warnings.simplefilter("always")
        with pytest.raises(TooLarge, match=r"\d+ x \d+ pixels") as refused:
            decode(BOMBS[kind], 32, LIMITS)
    assert "4,000,000" in refused.value.detail
    assert escaped == []


def test_above_pillows_own_bound_the_configured_limit_still_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow's opener would warn from here on, and refuse from twice as many
    for kind in ("JPEG", "PNG", "BMP"):
        assert decode(encoded(picture(), kind), 8, LIMITS).shape == (8, 8, 3)
    assert isinstance(outcome(encoded(picture(), "WEBP")), (TooLarge, type(None)))  # some versions check WebP in the decoder itself


def test_pixels_at_the_limit_pass_and_one_more_does_not() -> None:
    data = encoded(picture(40, 30), "PNG")
    assert decode(data, 8, ImageLimits(1 << 20, 1200, 1)).shape == (8, 8, 3)
    with pytest.raises(TooLarge, match="40 x 30"):
        decode(data, 8, ImageLimits(1 << 20, 1199, 1))


@pytest.mark.parametrize(("longest", "longer"), [((65_535, 1), (65_536, 1)), ((1, 65_535), (1, 65_536))])
def test_an_image_longer_than_any_jpeg_is_refused_before_it_is_decoded(longest: Tuple[int, int], longer: Tuple[int, int]) -> None:
    assert decode(encoded(Image.new("RGBA", longest, GREEN), "PNG"), 8, LIMITS)[3, 3].tolist() == list(GREEN)
    with pytest.raises(TooLarge, match="65,535 on a side"):
        decode(png_of(*longer), 32, LIMITS)


def test_bytes_at_the_limit_pass_and_one_more_does_not() -> None:
    data = encoded(picture(), "PNG")
    assert decode(data, 8, ImageLimits(len(data), 4_000_000, 1)).shape == (8, 8, 3)
    with pytest.raises(TooLarge, match=f"{len(data):,} bytes"):
        decode(data, 8, ImageLimits(len(data) - 1, 4_000_000, 1))


def test_a_png_of_no_size_is_undecodable() -> None:
    with pytest.raises(ImageUndecodable):
        decode(png_of(0, 10), 32, LIMITS)


def test_the_same_bytes_give_the_same_pixels_from_many_threads_at_once() -> None:
    data = [encoded(picture(300, 200), "JPEG"), encoded(picture(300, 200), "WEBP"), encoded(picture(300, 200).convert("P"), "PNG")]
    alone = [decode(item, 64, LIMITS) for item in data]
    differing: List[int] = []

    def work() -> None:
        rounds = list(range(3)) * 5
        differing.extend(index for index in rounds if not np.array_equal(decode(data[index], 64, LIMITS), alone[index]))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert differing == []


def outcome(data: bytes) -> Optional[Exception]:
    try:
        assert decode(data, 16, ImageLimits(1 << 20, 200_000, 4)).shape == (16, 16, 3)
    except LatentdError as refusal:
        return refusal
    return None


def test_no_damage_raises_anything_but_a_refusal() -> None:
    """2,000 pictures of every kind with bytes changed, cut out or cut off."""
    small = picture(40, 30)
    kinds = [encoded(small, kind) for kind in ("JPEG", "PNG", "WEBP", "BMP")]
    kinds += [
        encoded(small.convert("P"), "PNG", transparency=3),
        encoded(small.convert("1"), "BMP"),
        encoded(small.convert("CMYK"), "JPEG"),
    ]
    kinds += [
        encoded(small, "JPEG", progressive=True, exif=exif(6)),
        encoded(small, "WEBP", lossless=True),
        animated("PNG", 2),
        animated("WEBP", 2),
    ]
    dice = random.Random(5)
    refused = 0
    for _ in range(2000):
        data = bytearray(dice.choice(kinds))
        for _ in range(dice.randint(1, 5)):
            data[dice.randrange(min(len(data), dice.choice((60, 100_000))))] = dice.randrange(256)
        if dice.random() < 0.4:
            del data[dice.randrange(len(data)) :][: dice.choice((20, 100_000))]
        refused += outcome(bytes(data)) is not None
    assert 200 < refused < 2000
