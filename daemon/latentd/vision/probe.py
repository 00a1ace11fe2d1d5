"""Probe images: the same pixels on every machine, to compare one implementation of the backbone with another. Any thread; milliseconds."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

PROBE_VERSION = 1
"""Part of every cache key that depends on these pixels: change it when they change."""


def probe_images(size: int) -> NDArray[np.uint8]:
    """Four RGB squares (4, size, size, 3): tiles over a ramp, rings, coarse noise over a ramp, and fine noise beside near darkness.

    Integer arithmetic only, so that no library version or processor changes a value.
    """
    row, column = np.meshgrid(np.arange(size, dtype=np.int64), np.arange(size, dtype=np.int64), indexing="ij")
    ramp = np.stack([row * 255 // size, column * 255 // size, (row + column) * 255 // (2 * size)], axis=-1)
    tiles = np.stack([(row // step + column // step) % 2 * 255 for step in (5, 16, 40)], axis=-1)
    distance = (row - size // 2) ** 2 + (column - size // 3) ** 2
    rings = np.stack([distance // 64 % 256, distance // 128 % 256, 255 - distance // 64 % 256], axis=-1)
    coarse = _noise(row // 28, column // 28) * 3 // 4 + ramp // 4
    halves = np.where((column < size // 2)[..., None], _noise(row, column), 12 + _noise(row // 9, column // 9) // 32)
    return np.stack([tiles // 2 + ramp // 2, rings, coarse, halves]).astype(np.uint8)


def _noise(row: NDArray[np.int64], column: NDArray[np.int64]) -> NDArray[np.int64]:
    """Hashed coordinates, one value 0..255 a pixel and channel."""
    channels = [row * 73_856_093 ^ column * 19_349_663 ^ (channel * 83_492_791 + 7) for channel in range(3)]
    mixed = np.stack(channels, axis=-1) & 0x7FFFFFFF
    for shift, factor in ((13, 1_274_126_177), (16, 668_265_263), (15, 1)):
        mixed = ((mixed ^ (mixed >> shift)) * factor) & 0x7FFFFFFF
    return (mixed >> 7) & 255
