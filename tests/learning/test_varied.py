"""Images changed for the repair: other than they were, the same every time, and all of them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

import tiny
from latentd.learning.varied import varied


def of_colours(count: int) -> NDArray[np.uint8]:
    """Plain images of as many greys: whatever crop and light, their order stays where they are far enough apart."""
    greys = np.array([10, 40, 160])[:count]
    return np.broadcast_to(greys[:, None, None, None], (count, 16, 16, 3)).astype(np.uint8)


def test_every_image_comes_about_equally_often() -> None:
    found = varied(of_colours(3), 7).mean(axis=(1, 2, 3))
    nearest = np.abs(found[:, None] - [10, 40, 160]).argmin(axis=1)
    assert sorted(np.bincount(nearest).tolist()) == [2, 2, 3]


def test_fewer_than_there_are_lie_spread_over_them() -> None:
    found = varied(of_colours(3), 2).mean(axis=(1, 2, 3))
    assert found[0] < 20 < 100 < found[1]


def test_copies_of_an_image_differ_and_the_same_seed_gives_the_same() -> None:
    pixels = tiny.pixels(5)
    found = varied(pixels, 10, seed=3)
    assert found.shape == (10, *pixels.shape[1:]) and found.dtype == np.uint8
    assert not np.array_equal(found[:5], found[5:])
    assert np.array_equal(found, varied(pixels, 10, seed=3))
    assert not np.array_equal(found, varied(pixels, 10, seed=4))


def test_about_half_are_mirrored() -> None:
    ramp = np.broadcast_to(np.linspace(0, 160, 32, dtype=np.uint8)[None, None, :, None], (1, 32, 32, 3))
    found = varied(ramp, 40).astype(np.float64)
    rising = (found[:, :, -1].mean(axis=(1, 2)) > found[:, :, 0].mean(axis=(1, 2))).mean()
    assert 0.25 < rising < 0.75
