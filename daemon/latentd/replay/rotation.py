"""The rotation that makes a latent look Gaussian, and the best levels for a Gaussian. Pure data: any thread, nothing blocks.

A token of a ViT has a few huge channels. Random signs and a Hadamard transform are an orthogonal map that spreads each of them over all
channels of its block, so that one scale fits the whole token (QuaRot, 2024; TurboQuant, 2025).
"""

from __future__ import annotations

import functools
import math
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

_MAX_FACTOR = 128  # the transform is a matrix product; a wider block is done as the Kronecker product of two
_NEWTON_STEPS = 30
_GRID_END = 6.0  # beyond every threshold
_GRID_CELLS = 4096  # a cell is narrower than the least distance of two thresholds at 8 bits, 0.017
_FEW = 32  # levels: for so many, asking one after the other takes half as long as the grid


class Rotation:
    """Random signs, then the Hadamard transform of equal blocks of the channels; orthogonal, the same for every token.

    A block is the largest power of two that divides the width: 384 = 3 x 128, 192 = 3 x 64, 768 = 3 x 256. Signs come from the raw PCG64
    stream of the seed, which numpy promises never to change.
    """

    def __init__(self, width: int, seed: int) -> None:
        self.width = width
        self.block = width & -width
        self.signs = random_signs(width, seed)  # (D,)
        inner = min(self.block, _MAX_FACTOR)
        self._inner, self._outer = hadamard(inner), hadamard(self.block // inner)  # each symmetric and its own inverse

    def forward(self, tokens: Floats) -> Floats:
        """(T, D) -> (T, D), rotated; norms are kept."""
        rotated = np.empty_like(tokens)
        self.transform(tokens * self.signs, rotated)
        return rotated

    def inverse(self, rotated: Floats, out: Floats) -> None:
        """Turn rotated (T, D) back, into out (T, D), which must be contiguous and not overlap."""
        self.transform(rotated, out)
        np.multiply(out, self.signs, out=out)

    def basis(self) -> Floats:
        """(P, n, n): the channels of rotated tokens, n at a time, times these matrices are what they were."""
        basis: Floats = hadamard(self.block) * self.signs.reshape(-1, 1, self.block)
        return basis

    def transform(self, tokens: Floats, out: Floats) -> None:
        """The Hadamard transform alone, which is its own inverse: (T, D) into out (T, D), which must be contiguous and not overlap."""
        inner, outer = len(self._inner), len(self._outer)
        np.matmul(tokens.reshape(-1, inner), self._inner, out=out.reshape(-1, inner))
        if outer > 1:
            blocks = out.reshape(-1, outer, inner)
            np.copyto(blocks, np.matmul(self._outer, blocks))


class LloydMax:
    """The scalar quantizer of least mean square error for a standard normal value (Max 1960, Lloyd 1982).

    levels: (2**bits,) ascending. A level is the mean of its cell; cells part half-way between levels.
    """

    def __init__(self, bits: int) -> None:
        levels = _lloyd_max(bits)
        self.levels: Floats = levels.astype(np.float32)
        # The last threshold is beyond every value, so that index + 1 stays inside the table.
        self._thresholds = np.append((levels[1:] + levels[:-1]) / 2, np.inf).astype(np.float32)
        edges = np.linspace(-_GRID_END, _GRID_END, _GRID_CELLS + 1)[:-1]
        self._below = np.searchsorted(self._thresholds, edges).astype(np.uint8)  # level at the lower edge of each grid cell

    def nearest(self, values: Floats) -> npt.NDArray[np.uint8]:
        """Index of the nearest level of each value, any shape.

        A few thresholds are quickest asked one after the other. Of many, a grid that is finer than the distance of any two takes the place
        of a binary search, which mispredicts every branch.
        """
        if len(self.levels) <= _FEW:
            above = np.zeros(values.shape, np.uint8)
            for threshold in self._thresholds[:-1]:
                above += values > threshold
            return above
        scaled = (values + np.float32(_GRID_END)) * np.float32(_GRID_CELLS / (2 * _GRID_END))
        cells = np.clip(scaled, 0, _GRID_CELLS - 1, out=scaled).astype(np.intp)
        below: npt.NDArray[np.uint8] = np.take(self._below, cells)
        below += values > np.take(self._thresholds, below)
        return below


@functools.lru_cache(maxsize=None)
def lloyd_max(bits: int) -> LloydMax:
    """The quantizer for 1 to 8 bits; computed once."""
    return LloydMax(bits)


def _lloyd_max(bits: int) -> npt.NDArray[np.float64]:
    """All levels, ascending.

    The condition is solved for the positive half by Newton steps from the asymptotic density of levels (Panter and Dite 1951): Lloyd's own
    iteration needs tens of thousands of turns at 8 bits.
    """
    half = 1 << (bits - 1)
    spread = NormalDist(0.0, math.sqrt(3.0))
    levels = np.array([spread.inv_cdf((half + i + 0.5) / (2 * half)) for i in range(half)])
    for _ in range(_NEWTON_STEPS):
        step = _newton_step(levels)
        levels = levels + step
        if float(np.abs(step).max()) < 1e-12:
            break
    # Six decimals hide the last bits in which two maths libraries may differ: a stored code must mean the same everywhere.
    levels = np.round(levels, 6)
    return np.concatenate([-levels[::-1], levels])


def _newton_step(levels: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """One Newton step towards levels that are the means of their cells; positive half, so the first cell begins at 0."""
    edges = np.concatenate([[0.0], (levels[1:] + levels[:-1]) / 2, [np.inf]])
    density = np.exp(-np.square(edges) / 2) / math.sqrt(2 * math.pi)
    above = np.array([math.erfc(edge / math.sqrt(2)) / 2 for edge in edges])
    mass = above[:-1] - above[1:]
    means = (density[:-1] - density[1:]) / mass
    by_lower = density[:-1] * (means - edges[:-1]) / mass  # d mean / d lower edge
    by_upper = np.append(density[1:-1] * (edges[1:-1] - means[:-1]) / mass[:-1], 0.0)
    by_lower[0] = 0.0
    slope = np.diag((by_lower + by_upper) / 2 - 1) + np.diag(by_lower[1:] / 2, -1) + np.diag(by_upper[:-1] / 2, 1)
    return np.asarray(np.linalg.solve(slope, levels - means))


def random_signs(width: int, seed: int) -> Floats:
    """(width,) of 1 and -1, the first ones of a longer row too."""
    words = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(-(-width // 64)).astype("<u8")
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")[:width]
    return 1.0 - 2.0 * bits.astype(np.float32)


def hadamard(size: int) -> Floats:
    """Sylvester's matrix, scaled to be orthogonal."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.concatenate([np.concatenate([matrix, matrix], axis=1), np.concatenate([matrix, -matrix], axis=1)])
    return matrix / np.float32(math.sqrt(size))
