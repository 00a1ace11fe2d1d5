"""Encoded image bytes to the square of pixels that a backbone takes.

`decode` keeps no state: any number of threads may call it (the decode pool does), and it blocks for as long as decoding takes. All limits
are checked in the header, before pixels are decoded. Pillow's decoders are opened by class, not through Image.open: the content decides,
one format is tried, and none of Pillow's process-wide switches matters.
"""

from __future__ import annotations

import contextlib
import io
import struct
import traceback
import zlib
from dataclasses import dataclass
from typing import Callable, Dict, Optional, Tuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, features
from PIL.BmpImagePlugin import BmpImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from latentd.errors import ImageUndecodable, TooLarge, UnsupportedMedia
from latentd.trouble import trim
from latentd.vision.room import PixelRoom

# What Pillow's decoders raise on damaged files. UserWarning: some damage is only warned about, and warnings may be errors.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    EOFError,
    OverflowError,
    struct.error,
    zlib.error,
    UserWarning,
)
_GAP = 2.0
"""Decoders and box averaging shrink to this many times the target before the exact bicubic step."""
_LARGE = 4_000_000  # pixels; what a smaller image leaves behind is used for the next one
_LONGEST = 65_535
"""Pixels on a side, as many as a JPEG can have. Some versions of Pillow make each of a million rows as wide as the square before they take
the rows together: 1 kB for each pixel of an image that is one pixel wide."""
_OPENERS: Dict[str, Callable[[io.BytesIO], Image.Image]] = {
    "JPEG": JpegImageFile,
    "PNG": PngImageFile,
    "WebP": WebPImageFile,
    "BMP": BmpImageFile,
}
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_STARTS: Tuple[Tuple[bytes, str], ...] = (
    (b"\xff\xd8", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"BM", "BMP"),
    (b"GIF8", "a GIF"),
    (b"II*\0", "a TIFF"),
    (b"MM\0*", "a TIFF"),
    (b"\0\0\1\0", "an icon"),
    (b"%PDF", "a PDF"),
    (b"PK\3\4", "a ZIP archive"),
    (b"\x1f\x8b", "gzip data"),
    (b"\xff\x0a", "a JPEG XL image"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL image"),
    (b"\0\0\0\x0cjP  ", "a JPEG 2000 image"),
    (b"8BPS", "a Photoshop file"),
    (b"<svg", "an SVG drawing"),
    (b"<", "XML or HTML"),
    (b"{", "JSON"),
)
_BRANDS = {b"avif": "an AVIF image", b"avis": "an AVIF image", b"heic": "a HEIC image", b"heix": "a HEIC image", b"mif1": "a HEIF image"}


@dataclass(frozen=True)
class ImageLimits:
    """What one image may have at most; each is checked before decoding."""

    max_bytes: int
    max_pixels: int
    max_frames: int


def decode(data: bytes, size: int, limits: ImageLimits, room: Optional[PixelRoom] = None) -> NDArray[np.uint8]:
    """JPEG, PNG, WebP or BMP bytes -> RGB pixels (size, size, 3), turned as EXIF says; the whole picture is squashed to the square.

    Bicubic with antialiasing. Transparency goes on white, 16-bit values keep their upper half, of several frames the first counts. room:
    waited for before pixels are decoded. Raises UnsupportedMedia (another kind of content), TooLarge (bytes, pixels, frames),
    ImageUndecodable (empty, cut short, damaged).
    """
    if len(data) > limits.max_bytes:
        raise TooLarge(f"the image has {len(data):,} bytes, at most {limits.max_bytes:,} are accepted")
    kind = _kind(data)
    try:
        pixels = _pixels(data, kind, limits)
        with contextlib.nullcontext() if room is None else room.take(pixels):
            try:
                square = _squashed(data, kind, size, limits)
            except (MemoryError, *_DAMAGE) as cause:
                _let_go(cause)
                raise
            finally:
                if pixels > _LARGE:
                    trim()  # the C library would keep up to half of what this took, in each thread
    except (MemoryError, Image.DecompressionBombError) as cause:
        raise TooLarge(f"decoding the {kind} needs more memory than it may take: {cause}") from cause
    except _DAMAGE as cause:
        raise ImageUndecodable(f"the {kind} can't be decoded: {cause}") from cause
    return np.array(square, dtype=np.uint8)


def _let_go(failure: Optional[BaseException]) -> None:
    """Frees what was decoded before a failure, which would hold it until the request is answered."""
    while failure is not None:
        traceback.clear_frames(failure.__traceback__)
        failure = failure.__context__


def _kind(data: bytes) -> str:
    """JPEG, PNG, WebP or BMP by content; otherwise an error that says what the bytes look like."""
    if not data:
        raise ImageUndecodable("the image is empty: 0 bytes", hint="Send the file's bytes; the upload may have been cut short.")
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        if not features.check("webp"):
            raise UnsupportedMedia("this device's Pillow was built without WebP", hint="Send JPEG or PNG.")
        return "WebP"
    start = data[:64].lstrip()
    found = next((kind for magic, kind in _STARTS if data.startswith(magic) or (magic[:1] in b"<{" and start.startswith(magic))), None)
    if found in _OPENERS:
        return str(found)
    if data[4:8] == b"ftyp":
        found = _BRANDS.get(data[8:12], "a video or HEIF file")
    raise UnsupportedMedia(f"this is {found or _described(data)}, not JPEG, PNG, WebP or BMP")


def _described(data: bytes) -> str:
    sample = data[:64]
    if all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in sample):
        return "plain text"
    return f"no image format known here (it starts with {sample[:8].hex(' ')})"


def _pixels(data: bytes, kind: str, limits: ImageLimits) -> int:
    """How many the header promises, within the limits. A WebP is not opened for that: its decoder allocates the whole canvas then."""
    return _counted(_webp_size(data) if kind == "WebP" else _OPENERS[kind](io.BytesIO(data)).size, limits)


def _opened(data: bytes, kind: str, limits: ImageLimits) -> Image.Image:
    """The image with its header read and its limits checked; no pixel is decoded yet."""
    image = _OPENERS[kind](io.BytesIO(data))
    _counted(image.size, limits)
    frames = getattr(image, "n_frames", 1)
    if frames > limits.max_frames:
        raise TooLarge(f"the {kind} has {frames} frames, at most {limits.max_frames} are accepted", hint="Send the one frame that matters.")
    return image


def _counted(size: Tuple[int, int], limits: ImageLimits) -> int:
    width, height = size
    if width < 1 or height < 1:
        raise ValueError(f"its header says {width} x {height} pixels")
    if width * height > limits.max_pixels:
        raise TooLarge(
            f"the image is {width} x {height} pixels, at most {limits.max_pixels:,} in all are accepted", hint="Scale it down first."
        )
    if max(size) > _LONGEST:
        raise TooLarge(f"the image is {width} x {height} pixels, at most {_LONGEST:,} on a side are accepted", hint="Cut it up first.")
    return width * height


def _webp_size(data: bytes) -> Tuple[int, int]:
    """Canvas size from the first chunk of a WebP file (RFC 9649); struct.error where the file ends before it."""
    chunk = data[12:16]
    if chunk == b"VP8X":
        width, wide, height, high = struct.unpack_from("<HBHB", data, 24)  # two 24-bit numbers
        return (width | wide << 16) + 1, (height | high << 16) + 1
    if chunk == b"VP8L":
        bits = struct.unpack_from("<I", data, 21)[0]
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", data, 26)
    return width & 0x3FFF, height & 0x3FFF


def _squashed(data: bytes, kind: str, size: int, limits: ImageLimits) -> Image.Image:
    """RGB, size x size, upright. Alpha is laid on white after resizing, which gives the same as before it and costs less."""
    image, gap = _opened(data, kind, limits), int(size * _GAP)
    image.draft(image.mode, (gap, gap))  # a JPEG decodes at 1/2, 1/4 or 1/8 where that is still large enough
    image.load()
    turn = _TURNS.get(_orientation(image.info.get("exif")))
    image = _eight_bits(image)  # which lets go of the one before: with both, resizing would take half as much again
    square = image.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=_GAP)
    if square.mode == "RGBA":
        square = Image.alpha_composite(Image.new("RGBA", square.size, "white"), square)
    square = square.convert("RGB")
    return square if turn is None else square.transpose(turn)


def _eight_bits(image: Image.Image) -> Image.Image:
    """The image as L, RGB, RGBA or CMYK: modes that can be resized."""
    if image.mode.startswith("I"):  # 16-bit grey; 32-bit in older versions of Pillow
        return Image.fromarray((np.asarray(image) >> 8).clip(0, 0xFF).astype(np.uint8))
    if image.mode in ("LA", "PA", "La", "RGBa") or "transparency" in image.info:
        return image.convert("RGBA")
    return image if image.mode in ("L", "RGB", "RGBA", "CMYK") else image.convert("RGB")


def _orientation(exif: Optional[bytes]) -> int:
    """The orientation tag (1..8) of raw EXIF data; 1 where there is none or it is damaged, which must not cost the image."""
    try:
        tiff = exif[6:] if exif and exif.startswith(b"Exif\0\0") else exif or b""
        order = {b"II": "<", b"MM": ">"}[tiff[:2]]
        offset = struct.unpack_from(order + "I", tiff, 4)[0]
        for entry in range(struct.unpack_from(order + "H", tiff, offset)[0]):
            tag, kind = struct.unpack_from(order + "HH", tiff, offset + 2 + 12 * entry)
            if tag == 0x0112 and kind == 3:
                return int(struct.unpack_from(order + "H", tiff, offset + 10 + 12 * entry)[0])
    except (KeyError, struct.error):
        pass
    return 1
