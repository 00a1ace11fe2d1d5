"""Objects-50: a CORe50-shaped stream of videos from real photographs, made the same on every machine.

50 objects (10 categories x 5) x 11 sessions x FRAMES frames of 128x128. A session is one background, light, colour, tint and scale; a video
is one object in one session: smooth drift, rotation, zoom and background pan, an occluder over part of the object in 40 % of the frames,
sensor noise. Sessions 3, 7 and 10 are the test, as in CORe50; settings are chosen on the validation sessions 5 and 9, which are learned in
a final run. STANDARD is about as hard for frozen features as the published streams of this shape; FAR, with smaller and more turned
objects and more noise, is far from what the backbone was pretrained on. Photographs come from Debian's tuxpaint-stamps-default,
mate-backgrounds and gnome-backgrounds (GPL-2, CC BY-SA): read from the installed packages or fetched with apt-get, never part of this
repository.
"""

from __future__ import annotations

import hashlib
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, List, Sequence, Tuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

FRAMES = 12
SIDE = 128
SESSIONS = tuple(range(1, 12))
TEST_SESSIONS = (3, 7, 10)
VALIDATION_SESSIONS = (5, 9)
PACKAGES = ("tuxpaint-stamps-default", "mate-backgrounds", "gnome-backgrounds")
_VERSION = 2  # of this recipe: part of the cache key

_MAMMALS, _TOOLS = "animals/mammals", "household/tools"
OBJECTS = tuple(
    f"{folder}/{name}"
    for folder, names in (
        (f"{_MAMMALS}/bovines", "bison sheep zebu goat yak"),
        (_MAMMALS, "cats/tiger cats/lion bears/bear elephant hippopotamus"),
        ("animals/birds", "owl pink_flamingo rooster pelican tucan"),
        ("animals/fish", "clownfish lionfish butterflyfish seahorse coraltrout"),
        ("food/fruit", "pineapple banana apple_red strawberry lemon"),
        ("food/vegetables", "tomato broccoli carrot corn eggplant"),
        (_TOOLS, "hammer saw wrench plyers paintbrush_large"),
        ("hobbies/music", "string/guitar_classical string/violin brass/trumpet percussion/drumkit wind/bassoon"),
        ("plants/flowers", "rose daffodil iris red-gazania flower6"),
        ("vehicles", "auto/beetle auto/truck emergency/firetruck masstransit/green_korean_bus garbagetruck"),
    )
    for name in names.split()
)
BACKGROUNDS = (  # one a session
    "mate/nature/Dune.jpg",
    "mate/nature/Garden.jpg",
    "mate/nature/Wood.jpg",
    "mate/nature/GreenMeadow.jpg",
    "mate/nature/Storm.jpg",
    "mate/nature/RainDrops.jpg",
    "mate/nature/Blinds.jpg",
    "mate/nature/YellowFlower.jpg",
    "mate/nature/Aqua.jpg",
    "mate/nature/TwoWings.jpg",
    "mate/nature/LadyBird.jpg",
)


@dataclass(frozen=True)
class Stream:
    """How hard the videos are, as ranges: scale of the object and size of the occluder as shares of the frame, turn in degrees, zoom as a
    share, reach of the drift in pixels. noise: standard deviation in grey levels.
    """

    name: str
    scale: Tuple[float, float]
    turn: Tuple[float, float]
    zoom: Tuple[float, float]
    reach: Tuple[float, float]
    occluder: Tuple[float, float]
    noise: float


STANDARD = Stream("standard", (0.4, 0.75), (10, 50), (0.05, 0.25), (4, 20), (1 / 6, 1 / 3), 8)
FAR = Stream("far", (0.25, 0.45), (20, 90), (0.05, 0.3), (4, 32), (1 / 5, 1 / 3), 12)
STREAMS = {stream.name: stream for stream in (STANDARD, FAR)}


@dataclass(frozen=True)
class Session:
    """What all videos of a session share."""

    background: Image.Image
    brightness: float
    colour: float
    tint: NDArray[np.float32]  # (3,) factors
    scale: float  # of the object, as a share of the frame


def frames(cache_dir: Path, stream: Stream = STANDARD) -> NDArray[np.uint8]:
    """All frames (50, 11, FRAMES, 128, 128, 3), memory-mapped; rendered once and cached."""
    root = package_root(cache_dir)
    path = cache_dir / "datasets" / f"objects50-{recipe(stream)}.npy"
    if not path.exists():
        temporary = path.with_suffix(".tmp.npy")
        store = np.lib.format.open_memmap(temporary, "w+", np.uint8, (len(OBJECTS), len(SESSIONS), FRAMES, SIDE, SIDE, 3))
        for session_index, session in enumerate(_sessions(root, stream)):
            for object_index, name in enumerate(OBJECTS):
                rng = np.random.Generator(np.random.PCG64([_VERSION, session_index, object_index]))
                stamp = Image.open(root / "tuxpaint" / "stamps" / f"{name}.png").convert("RGBA")
                store[object_index, session_index] = np.stack(list(_video(stamp, session, stream, rng)))
        store.flush()
        temporary.replace(path)
    found: NDArray[np.uint8] = np.load(path, mmap_mode="r")
    return found


def nicv2(run: int, sessions: Sequence[int]) -> List[List[Tuple[int, int]]]:
    """The order of NICv2-391: batches of (object, session) videos. Batch 0: the first object of each category in session 1; then one video
    a batch.
    """
    first = [(index, 1) for index in range(0, len(OBJECTS), 5)]
    rest = [(index, session) for index in range(len(OBJECTS)) for session in sessions if (index, session) not in first]
    order = np.random.Generator(np.random.PCG64(run)).permutation(len(rest))
    return [first] + [[rest[i]] for i in order]


def package_root(cache_dir: Path) -> Path:
    """The `share` folder that holds the packages' files: the system's, or an unpacked copy in the cache. Raises SystemExit where neither
    can be had.
    """
    if Path("/usr/share/tuxpaint/stamps").is_dir() and Path("/usr/share/backgrounds/mate/nature").is_dir():
        return Path("/usr/share")
    unpacked = cache_dir / "datasets" / "objects50-packages"
    if not (unpacked / "complete").exists():
        unpacked.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir) as scratch:
            done = subprocess.run(["apt-get", "download", *PACKAGES], cwd=scratch, capture_output=True, check=False)
            if done.returncode:
                raise SystemExit(
                    f"Install the Debian packages {', '.join(PACKAGES)}: apt-get says {done.stderr.decode(errors='replace')[-300:]}"
                )
            for package in sorted(Path(scratch).glob("*.deb")):
                subprocess.run(["dpkg-deb", "--extract", str(package), str(unpacked)], check=True)
        (unpacked / "complete").touch()
    return unpacked / "usr" / "share"


def recipe(stream: Stream = STANDARD) -> str:
    """What the frames depend on; the key of everything that is cached of them."""
    return hashlib.sha256(repr((_VERSION, stream, FRAMES, SIDE, OBJECTS, BACKGROUNDS)).encode()).hexdigest()[:12]


def _sessions(root: Path, stream: Stream) -> Iterator[Session]:
    rng = np.random.Generator(np.random.PCG64(_VERSION))
    for name in BACKGROUNDS:
        picture = Image.open(root / "backgrounds" / name).convert("RGB")
        side = 3 * SIDE
        picture = picture.resize((max(side, side * picture.width // picture.height), side), Image.Resampling.BICUBIC)
        tint = rng.uniform(0.85, 1.15, 3).astype(np.float32)
        yield Session(picture, rng.uniform(0.55, 1.35), rng.uniform(0.5, 1.3), tint, rng.uniform(*stream.scale))


def _video(stamp: Image.Image, session: Session, stream: Stream, rng: np.random.Generator) -> Iterator[NDArray[np.uint8]]:
    """FRAMES frames (128, 128, 3): every movement is a slow sine with a phase and a reach of its own."""
    phase = rng.uniform(0, 2 * np.pi, 6)
    turn, zoom, reach = rng.uniform(*stream.turn), rng.uniform(*stream.zoom), rng.uniform(*stream.reach, 2)
    start = rng.uniform(0, 1, 2)
    for step in range(FRAMES):
        sway = np.sin(2 * np.pi * step / FRAMES * 0.5 + phase)
        frame = _background(session, start, sway[4:6])
        size = session.scale * SIDE * (1 + zoom * sway[0]) / max(stamp.size)
        thing = stamp.resize((max(2, round(stamp.width * size)), max(2, round(stamp.height * size))), Image.Resampling.BICUBIC)
        thing = thing.rotate(turn * sway[1], Image.Resampling.BICUBIC, expand=True)
        left = round((SIDE - thing.width) / 2 + reach[0] * sway[2])
        top = round((SIDE - thing.height) / 2 + reach[1] * sway[3])
        frame.paste(thing, (left, top), thing)
        if rng.random() < 0.4:
            _occlude(frame, session, (left, top, left + thing.width, top + thing.height), stream.occluder, rng)
        yield _develop(frame, session, stream.noise, rng)


def _background(session: Session, start: NDArray[np.float64], sway: NDArray[np.float64]) -> Image.Image:
    """A pane of the session's picture that pans slowly."""
    room = np.array([session.background.width, session.background.height]) - SIDE
    left, top = np.clip(start * room + 8 * sway, 0, room).astype(int)
    return session.background.crop((int(left), int(top), int(left) + SIDE, int(top) + SIDE))


def _occlude(
    frame: Image.Image,
    session: Session,
    thing: Tuple[int, int, int, int],
    size: Tuple[float, float],
    rng: np.random.Generator,
) -> None:
    """Something between lens and object: a piece of the background, its middle somewhere on the object's box (left, top, right, bottom)."""
    width, height = (int(value) for value in rng.integers(int(SIDE * size[0]), int(SIDE * size[1]), 2))
    middle_x, middle_y = int(rng.integers(thing[0], thing[2] + 1)), int(rng.integers(thing[1], thing[3] + 1))
    piece = session.background.crop((0, 0, width, height))
    frame.paste(piece, (middle_x - width // 2, middle_y - height // 2))


def _develop(frame: Image.Image, session: Session, noise: float, rng: np.random.Generator) -> NDArray[np.uint8]:
    """The session's light, colour and tint, and the sensor's noise."""
    frame = ImageEnhance.Color(ImageEnhance.Brightness(frame).enhance(session.brightness)).enhance(session.colour)
    pixels = np.asarray(frame, np.float32) * session.tint + rng.normal(0, noise, (SIDE, SIDE, 3)).astype(np.float32)
    developed: NDArray[np.uint8] = np.clip(pixels, 0, 255).astype(np.uint8)
    return developed
