"""Images as they might have been taken: cropped, mirrored, in other light.

A repair that sees a few hundred images of a few places learns the places with them, and is off in the next one. What is taught to give the
answer of another network needs no labels, so an image may be changed as far as it stays an image. Any thread; some milliseconds an image.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from latentd.engines.stage import planar

AREA = (0.35, 1.0)  # of the image, that a crop keeps
STRETCH = 0.2  # a crop's sides differ by e to this power at most, each way
GAIN = (0.7, 1.3)  # of the light, and of each colour by itself:
TINT = (0.9, 1.1)
_BATCH = 32


def varied(pixels: NDArray[np.uint8], count: int, seed: int = 0) -> NDArray[np.uint8]:
    """(n, S, S, 3) -> (count, S, S, 3): every image about equally often, spread over them where there are more, each time another way."""
    random = np.random.Generator(np.random.PCG64(seed))
    rounds, rest = divmod(count, len(pixels))
    chosen = np.concatenate([np.tile(np.arange(len(pixels)), rounds), np.linspace(0, len(pixels) - 1, rest).round().astype(np.int64)])
    found = np.empty((count, *pixels.shape[1:]), dtype=np.uint8)
    for first in range(0, count, _BATCH):
        found[first : first + _BATCH] = _changed(pixels[chosen[first : first + _BATCH]], random)
    return found


def _changed(pixels: NDArray[np.uint8], random: np.random.Generator) -> NDArray[np.uint8]:
    count, side = pixels.shape[:2]
    window = torch.from_numpy(np.stack([_window(random) for _ in range(count)]))
    grid = F.affine_grid(window, [count, 3, side, side], align_corners=False)
    cropped = F.grid_sample(torch.from_numpy(planar(pixels)).float(), grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    light = random.uniform(*GAIN, (count, 1, 1, 1)) * random.uniform(*TINT, (count, 3, 1, 1))
    lit = (cropped * torch.from_numpy(light.astype(np.float32))).clamp(0, 255).round()
    found: NDArray[np.uint8] = lit.permute(0, 2, 3, 1).byte().numpy()
    return found


def _window(random: np.random.Generator) -> NDArray[np.float32]:
    """(2, 3) for affine_grid: a part of the image, mirrored every other time."""
    side, stretch = np.sqrt(random.uniform(*AREA)), np.exp(random.uniform(-STRETCH, STRETCH))
    width, height = min(1.0, side * stretch), min(1.0, side / stretch)
    x, y = random.uniform(-(1 - width), 1 - width), random.uniform(-(1 - height), 1 - height)
    mirror = random.choice([-1.0, 1.0])
    return np.array([[mirror * width, 0, x], [0, height, y]], dtype=np.float32)
