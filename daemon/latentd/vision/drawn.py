"""Drawn images: what stands in for photographs where a statistic of latents must be known before the first image is taught.

Each is some shapes over each other ("dead leaves", Lee, Mumford & Huang 2001), from one to sixty, under noise with the spectrum of natural
images (amplitude 1/f or 1/f^1.5) and correlated colours. Their latents have about the mean that those of photographs have; the few probe
images, made to find faults, have another. A statistic of them is kept with what was made with it: other versions of a library may round a
pixel otherwise. Any thread; about a second for 96 images of 224 pixels.
"""

from __future__ import annotations

from typing import Tuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

DRAWN_VERSION = 1
"""Part of every cache key that depends on these pixels: change it when they change."""
_MOST_SHAPES = 60
_SLOPES = (1.0, 1.5)
_NOISE = (0.2, 0.6)  # its share of a pixel


def drawn_images(size: int, count: int = 96, seed: int = 0) -> NDArray[np.uint8]:
    """(count, size, size, 3) RGB; fewer are the first of more."""
    rng = np.random.Generator(np.random.PCG64(seed))
    return np.stack([_drawn(size, rng) for _ in range(count)])


def _drawn(size: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    shapes = round(_MOST_SHAPES ** rng.random())
    share, slope = rng.uniform(*_NOISE), float(rng.choice(_SLOPES))
    mixed = (1 - share) * _leaves(size, shapes, rng) + share * _noise(size, slope, rng)
    return mixed.astype(np.uint8)


def _noise(size: int, slope: float, rng: np.random.Generator) -> NDArray[np.uint8]:
    """(size, size, 3): white noise whose amplitudes fall with the frequency to this power."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    frequency[0, 0] = 1 / size
    waves = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((3, size, size))) / frequency**slope, s=(size, size))
    colours = np.tensordot(1 + 0.5 * rng.standard_normal((3, 3)), waves, 1)  # (3, size, size)
    colours -= colours.mean(axis=(1, 2), keepdims=True)
    found = colours / colours.std() * 50 + rng.uniform(60, 190, (3, 1, 1))
    pixels: NDArray[np.uint8] = np.clip(found, 0, 255).astype(np.uint8).transpose(1, 2, 0)
    return pixels


def _leaves(size: int, shapes: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """(size, size, 3): so many ellipses and boxes, turned at random, over each other; small ones more often than large ones."""
    canvas = Image.new("RGB", (size, size), _colour(rng))
    pen = ImageDraw.Draw(canvas)
    for _ in range(shapes):
        radius = size / 2 * rng.uniform(0.2, 1.0) ** 2
        corners = 24 if rng.random() < 0.5 else 4
        angles = np.linspace(0, 2 * np.pi, corners, endpoint=False) + np.pi / corners
        outline = radius * np.stack([np.cos(angles), rng.uniform(0.4, 1.0) * np.sin(angles)])  # (2, corners)
        turn = rng.uniform(0, np.pi)
        rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        places = (rotation @ outline + rng.uniform(0, size, (2, 1))).T
        pen.polygon([(float(x), float(y)) for x, y in places], fill=_colour(rng))
    return np.asarray(canvas)


def _colour(rng: np.random.Generator) -> Tuple[int, int, int]:
    red, green, blue = (int(value) for value in rng.integers(0, 256, 3))
    return red, green, blue
