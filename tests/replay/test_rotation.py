"""The rotation and the Lloyd-Max levels, against their definitions and the published distortion of a Gaussian."""

from __future__ import annotations

import math
from typing import Tuple

import numpy as np
import numpy.typing as npt
import pytest

from latentd.replay.rotation import Rotation, lloyd_max

# Max 1960, table I.
PUBLISHED_MSE = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499}


Doubles = npt.NDArray[np.float64]


def cells(bits: int) -> Tuple[Doubles, Doubles, Doubles]:
    """Levels, and of each cell the probability and the first moment, in float64."""
    levels = lloyd_max(bits).levels.astype(np.float64)
    edges = [-math.inf, *((levels[1:] + levels[:-1]) / 2), math.inf]
    below = np.array([math.erfc(-edge / math.sqrt(2)) / 2 for edge in edges])
    density = np.array([math.exp(-edge * edge / 2) / math.sqrt(2 * math.pi) for edge in edges])
    return levels, np.diff(below), density[:-1] - density[1:]


def distortion(bits: int) -> float:
    levels, mass, moment = cells(bits)
    return float(1 - 2 * (levels * moment).sum() + (levels * levels * mass).sum())


@pytest.mark.parametrize("bits", range(1, 6))
def test_levels_lose_what_is_published(bits: int) -> None:
    assert distortion(bits) == pytest.approx(PUBLISHED_MSE[bits], rel=0.003)


@pytest.mark.parametrize("bits", range(6, 9))
def test_many_levels_lose_a_little_less_than_the_asymptote_of_panter_and_dite(bits: int) -> None:
    asymptote = math.sqrt(3) * math.pi / 2 / 4**bits
    assert 0.965 * asymptote < distortion(bits) < asymptote


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_level_is_the_mean_of_its_cell(bits: int) -> None:
    levels, mass, moment = cells(bits)
    inner = slice(1, -1) if bits == 8 else slice(None)  # the tail cell of 8 bits holds too little mass for this arithmetic
    np.testing.assert_allclose(levels[inner], (moment / mass)[inner], atol=2e-5)
    np.testing.assert_array_equal(levels, -levels[::-1])
    assert (np.diff(levels) > 0).all()


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_nearest_level_is_the_nearest(bits: int) -> None:
    quantizer = lloyd_max(bits)
    values = np.concatenate([np.linspace(-9, 9, 20_001), [-1e30, 1e30, 0.0]]).astype(np.float32)
    distance = np.abs(values[:, None].astype(np.float64) - quantizer.levels)
    taken = np.take_along_axis(distance, quantizer.nearest(values)[:, None].astype(np.intp), axis=1)[:, 0]
    assert (taken <= distance.min(axis=1) + 1e-6).all()


def test_levels_are_computed_once() -> None:
    assert lloyd_max(5) is lloyd_max(5)


@pytest.mark.parametrize(("width", "block"), [(384, 128), (192, 64), (768, 256), (1024, 1024), (12, 4), (7, 1)])
def test_a_rotation_is_orthogonal_and_undone_by_its_inverse(width: int, block: int) -> None:
    rotation = Rotation(width, seed=3)
    assert rotation.block == block
    tokens = np.random.default_rng(0).standard_normal((10, width), dtype=np.float32)
    rotated = rotation.forward(tokens)
    np.testing.assert_allclose(np.linalg.norm(rotated, axis=1), np.linalg.norm(tokens, axis=1), rtol=1e-5)
    back = np.empty_like(tokens)
    rotation.inverse(rotated, back)
    np.testing.assert_allclose(back, tokens, atol=1e-5)


@pytest.mark.parametrize(("width", "block"), [(384, 128), (768, 256)])
def test_one_huge_channel_is_spread_evenly_over_its_block(width: int, block: int) -> None:
    token = np.zeros((1, width), np.float32)
    token[0, block + 5] = 8.0
    rotated = Rotation(width, seed=0).forward(token)
    np.testing.assert_allclose(np.abs(rotated[0, block : 2 * block]), 8 / math.sqrt(block), rtol=1e-5)
    assert (rotated[0, :block] == 0).all()
    assert (rotated[0, 2 * block :] == 0).all()


def test_signs_are_the_same_on_every_platform_and_every_numpy() -> None:
    signs = Rotation(64, seed=0).signs
    assert "".join("+" if sign > 0 else "-" for sign in signs) == "-----+-++-+++++-+-++++---++--+------++----+-+-------++++--+++-+-"
