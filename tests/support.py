"""What several tests need: the environment of a child process, and photographs made from a seed."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Mapping, Optional, Tuple

import numpy as np
from PIL import Image, ImageDraw

from harness import DaemonProcess

SOURCES = Path(__file__).parents[1] / "daemon"
# A warm machine, or one that is short of memory, holds a learner back: what a test waits for must not depend on that.
UNDISTURBED = {"LATENTD_ENERGY__MAX_TEMPERATURE_C": "150", "LATENTD_MEMORY__RESERVE_BYTES": "0"}


def daemon(state_dir: Path, cache_dir: Path) -> DaemonProcess:
    """A ready daemon of this checkout."""
    return DaemonProcess(state_dir, "--cache-dir", str(cache_dir), environ=environment())


def environment(changes: Optional[Mapping[str, str]] = None) -> Mapping[str, str]:
    """The environment of a child process that runs this checkout, UNDISTURBED, with no other configuration but what `changes` says."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LATENTD_")}
    paths = [str(SOURCES), *filter(None, [kept.get("PYTHONPATH")])]
    return {**kept, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", **UNDISTURBED, **(changes or {})}


def photo(seed: int, motif: str = "discs", size: Tuple[int, int] = (320, 240), format: str = "JPEG") -> bytes:
    """An encoded picture with soft light, shapes and grain; another seed is another picture of the same kind of thing.

    motif: "discs", "stripes" or "rings", which a vision model tells apart. size: (width, height) in pixels. format: Pillow's name of it.
    """
    dice = np.random.default_rng(seed)
    patches = dice.integers(60, 196, 3) + dice.integers(-30, 31, (4, 5, 3))
    light = Image.fromarray(patches.astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(light)
    for _ in range(int(dice.integers(5, 9))):
        _shape(draw, motif, dice, size)
    grain = dice.normal(0.0, 6.0, (size[1], size[0], 3))
    pixels = np.clip(np.asarray(light, dtype=np.float64) + grain, 0, 255).astype(np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, format)
    return encoded.getvalue()


def _shape(draw: ImageDraw.ImageDraw, motif: str, dice: np.random.Generator, size: Tuple[int, int]) -> None:
    colour = tuple(int(value) for value in dice.integers(0, 256, 3))
    x, y = (int(dice.integers(0, side)) for side in size)
    reach = int(dice.integers(min(size) // 12 + 2, min(size) // 5 + 3))
    box = (x - reach, y - reach, x + reach, y + reach)
    if motif == "discs":
        draw.ellipse(box, fill=colour)
    elif motif == "rings":
        draw.ellipse(box, outline=colour, width=max(2, reach // 4))
    elif motif == "stripes":
        draw.line((x - size[0], y - reach, x + size[0], y + reach), fill=colour, width=max(2, reach // 2))
    else:
        raise ValueError(f"there is no motif {motif}")
