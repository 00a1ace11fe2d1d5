"""The floor: a streaming ridge head, exact and order-free, that stores sums and no samples.

Kept are n_c, the class sums of x, and the sum of x x' over everything, in float64. Solved as linear discriminant analysis with the pooled
within-class covariance shrunk towards a sphere by a fixed number of pseudo-samples (a ridge): the same sums as ridge regression on class
indicators, but with equal priors, so that a class of one image stands beside a class of a thousand (Hayes & Kanan 2020, "Lifelong machine
learning with deep streaming linear discriminant analysis"; the shrinkage is the posterior mean under an inverse-Wishart prior). Owned by
the learner thread.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from numpy.typing import NDArray

PRIOR_SAMPLES = (
    300.0  # pseudo-samples of the spherical prior: best or within 0.3 point at 20, 100, 400 and 2000 taught ELPV cells (validation splits)
)
_BLOCK = 64
_PROBES = 16  # random signs that estimate a trace (Hutchinson 1990): within 2 % for features of some hundred dimensions
_NEAREST = 0.25  # share of the usual distance that a class lies off at least: what noise leaves of one image's may be nothing
_FLOOR = 0.05  # share of the mean square that stands in for the within-class variance while every class has one sample


@dataclass(frozen=True)
class Landmarks:
    """Where the classes lie, seen from the mean of everything, in the metric of the shrunk covariance.

    x @ weight - x @ middle - origin is the inner product of a sample and each class mean: on average 0 at the mean of everything, and
    `length` at the class. middle: (F,); origin, length: (C,). spread: (C,) how much farther a sample of the class scatters along the class
    mean, as it is known, than along a mean of many samples: 1 for a class of many.
    """

    middle: NDArray[np.float32]
    origin: NDArray[np.float32]
    length: NDArray[np.float32]
    spread: NDArray[np.float32]


@dataclass(frozen=True)
class LinearHead:
    """Scores of a feature vector: x @ weight + bias. class_ids: (C,) in column order; weight: (F, C); bias: (C,).

    separation: mean squared Mahalanobis distance between two class means; half of it is the score by which a class's own mean wins.
    landmarks: None where nobody taught anything.
    """

    class_ids: Tuple[int, ...]
    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    separation: float = 0.0
    landmarks: Optional[Landmarks] = None

    def only(self, columns: Sequence[int]) -> LinearHead:
        """The same head for these columns alone."""
        marks, chosen = self.landmarks, list(columns)
        return replace(
            self,
            class_ids=tuple(self.class_ids[column] for column in chosen),
            weight=self.weight[:, chosen],
            bias=self.bias[chosen],
            landmarks=replace(marks, origin=marks.origin[chosen], length=marks.length[chosen], spread=marks.spread[chosen])
            if marks
            else None,
        )


class RidgeSums:
    """Counts, sums and second moments of everything learned; see the module docstring.

    Invariant: `add` and `remove` of the same samples leave the sums as they were, up to float64 rounding, in any order. Second moments
    are folded in by whole blocks of samples (a rank-64 update costs the memory traffic of a rank-1 update), at counts that depend on the
    samples alone.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self.class_ids: List[int] = []
        self.counts: NDArray[np.float64] = np.zeros(0)
        self.sums: NDArray[np.float64] = np.zeros((0, width))
        self.gram: NDArray[np.float64] = np.zeros((width, width))
        self._column: Dict[int, int] = {}
        self._block: NDArray[np.float64] = np.zeros((_BLOCK, width))  # samples that are not in gram yet
        self._signs: List[float] = []

    def add(self, features: NDArray[np.float32], class_ids: Sequence[int]) -> None:
        """features: (B, F)."""
        self._accumulate(features, class_ids, 1.0)

    def remove(self, features: NDArray[np.float32], class_ids: Sequence[int]) -> None:
        self._accumulate(features, class_ids, -1.0)
        self._fold()  # a checkpoint writes the block as it is: a removed sample must not stand there

    def move(self, features: NDArray[np.float32], was: int, class_id: int) -> None:
        """Gives one sample (1, F) another class: the second moments stay."""
        for target, sign in ((was, -1.0), (class_id, 1.0)):
            column = self._column_of(target)
            self.counts[column] += sign
            self.sums[column] += sign * features[0].astype(np.float64)

    @property
    def count(self) -> int:
        return int(round(float(self.counts.sum())))

    def count_of(self, class_id: int) -> int:
        column = self._column.get(class_id)
        return 0 if column is None else int(round(float(self.counts[column])))

    def become_rest_of(self, whole: RidgeSums) -> None:
        """Turns into what `whole` has learned beyond this, which is a part of it; in place, for a second (F, F) is megabytes."""
        self._fold()
        np.subtract(whole.gram, self.gram, out=self.gram)
        _rank_update(torch.from_numpy(self.gram), whole._block[: len(whole._signs)], np.array(whole._signs))
        counts, sums = whole.counts.copy(), whole.sums.copy()
        columns = [whole._column[class_id] for class_id in self.class_ids]
        counts[columns] -= self.counts
        sums[columns] -= self.sums
        self.class_ids, self._column, self.counts, self.sums = list(whole.class_ids), dict(whole._column), counts, sums

    def moments(self) -> Tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Mean and standard deviation of each feature (F,), over everything learned."""
        count = max(1.0, float(self.counts.sum()))
        mean = self.sums.sum(axis=0) / count
        rows = self._block[: len(self._signs)]
        squares = np.diagonal(self.gram) + np.array(self._signs) @ np.square(rows)
        variance = np.maximum(squares / count - mean**2, 1e-8)
        return mean.astype(np.float32), np.sqrt(variance).astype(np.float32)

    def solve(self) -> LinearHead:
        """The head for all classes that have samples. O(F^3 / 3) in float64."""
        present = np.flatnonzero(self.counts > 0.5)
        counts = self.counts[present]
        if not len(present):
            return LinearHead((), np.zeros((self.width, 0), np.float32), np.zeros(0, np.float32))
        means, total = self.sums[present] / counts[:, None], float(counts.sum())  # (C, F)
        factor, ridge = self._factor(means, counts)
        weight = torch.cholesky_solve(torch.from_numpy(np.ascontiguousarray(means.T)), factor).numpy() * (total + PRIOR_SAMPLES)  # (F, C)
        noise = _noise(factor, ridge, total + PRIOR_SAMPLES, total - len(counts)) / counts  # (C,)
        bias = -0.5 * np.einsum("cf,fc->c", means, weight)
        ids, marks = tuple(self.class_ids[i] for i in present), _landmarks(means, weight, counts, noise)
        return LinearHead(ids, weight.astype(np.float32), bias.astype(np.float32), _separation(means @ weight), marks)

    def metric(self) -> NDArray[np.float32]:
        """(F, F): a difference of features times it is as long as it is far for the head, whose covariance is that within classes, shrunk.

        Raises ValueError where nothing was learned.
        """
        present = np.flatnonzero(self.counts > 0.5)
        if not len(present):
            raise ValueError("there is no distance where nothing was learned")
        counts = self.counts[present]
        factor, _ = self._factor(self.sums[present] / counts[:, None], counts)
        inverse = torch.linalg.solve_triangular(factor, torch.eye(self.width, dtype=factor.dtype), upper=False)
        found: NDArray[np.float32] = (inverse.T * math.sqrt(float(counts.sum()) + PRIOR_SAMPLES)).float().contiguous().numpy()
        return found

    def _factor(self, means: NDArray[np.float64], counts: NDArray[np.float64]) -> Tuple[torch.Tensor, float]:
        """The Cholesky factor (F, F) of the scatter within classes and a ridge; and that ridge. means: (C, F), counts: (C,)."""
        scatter = torch.from_numpy(self.gram.copy())  # (F, F)
        _rank_update(scatter, self._block[: len(self._signs)], np.array(self._signs))
        mean_square = float(torch.trace(scatter))
        _rank_update(scatter, means, -counts)
        variance = max(float(torch.trace(scatter)), _FLOOR * mean_square) / (float(counts.sum()) * self.width)
        ridge = PRIOR_SAMPLES * max(variance, 1e-12)
        scatter.diagonal().add_(ridge)
        return torch.linalg.cholesky(scatter), ridge

    def state(self) -> Dict[str, NDArray[np.float64]]:
        """The arrays of a checkpoint; of the symmetric second moments only the lower triangle."""
        signs = np.array(self._signs)
        lower = np.tril_indices(self.width)
        ids = np.array(self.class_ids, dtype=np.float64)
        return {
            "ridge.class_ids": ids,
            "ridge.counts": self.counts.copy(),
            "ridge.sums": self.sums.copy(),
            "ridge.gram": self.gram[lower],
            "ridge.block": self._block[: len(signs)].copy(),
            "ridge.signs": signs,
        }

    def restore(self, state: Dict[str, NDArray[np.float64]]) -> None:
        self.class_ids = [int(value) for value in state["ridge.class_ids"]]
        self._column = {class_id: column for column, class_id in enumerate(self.class_ids)}
        self.counts = state["ridge.counts"].copy()
        self.sums = state["ridge.sums"].reshape(len(self.class_ids), self.width).copy()
        lower = np.tril_indices(self.width)
        self.gram = np.zeros((self.width, self.width))
        self.gram[lower] = state["ridge.gram"]
        self.gram.T[lower] = state["ridge.gram"]
        self._signs = [float(sign) for sign in state["ridge.signs"]]
        self._block[: len(self._signs)] = state["ridge.block"].reshape(-1, self.width)

    def _accumulate(self, features: NDArray[np.float32], class_ids: Sequence[int], sign: float) -> None:
        columns = [self._column_of(class_id) for class_id in class_ids]
        wide = features.astype(np.float64)
        np.add.at(self.counts, columns, sign)
        np.add.at(self.sums, columns, sign * wide)
        for row in wide:
            self._block[len(self._signs)] = row
            self._signs.append(sign)
            if len(self._signs) == _BLOCK:
                self._fold()

    def _fold(self) -> None:
        _rank_update(torch.from_numpy(self.gram), self._block[: len(self._signs)], np.array(self._signs))
        self._signs = []

    def _column_of(self, class_id: int) -> int:
        if class_id not in self._column:
            self._column[class_id] = len(self.class_ids)
            self.class_ids.append(class_id)
            self.counts = np.append(self.counts, 0.0)
            self.sums = np.concatenate([self.sums, np.zeros((1, self.width))])
        return self._column[class_id]


def _rank_update(matrix: torch.Tensor, rows: NDArray[np.float64], weights: NDArray[np.float64]) -> None:
    """matrix (F, F) += sum over rows (R, F) of weight * row' row, in place."""
    if len(rows):
        wide = torch.from_numpy(rows)
        matrix.addmm_(wide.T, torch.from_numpy(rows * weights[:, None]))


def _separation(products: NDArray[np.float64]) -> float:
    """Mean over pairs of classes of the squared distance, from the inner products (C, C) of their means."""
    classes = len(products)
    own = np.diagonal(products)
    distances = own[:, None] + own[None, :] - products - products.T
    return float(distances.sum() / (classes * (classes - 1))) if classes > 1 else 0.0


def _noise(factor: torch.Tensor, ridge: float, weight: float, freedom: float) -> float:
    """Expected squared distance of a sample from its class, in the metric of the shrunk covariance: the trace of that metric times the
    unshrunk covariance, about the number of dimensions that the shrinkage leaves.

    factor: Cholesky factor (F, F) of scatter + ridge; weight: what divides that into the shrunk covariance; freedom: samples less classes.
    """
    if freedom < 1:
        return 0.0  # a sample a class: nobody knows how far they scatter
    width = len(factor)
    generator = torch.Generator().manual_seed(0)
    probes = torch.randint(0, 2, (width, _PROBES), generator=generator).to(factor.dtype) * 2 - 1
    inverse_trace = float(torch.linalg.solve_triangular(factor, probes, upper=False).square().sum()) / _PROBES
    return max(0.0, width - ridge * inverse_trace) * weight / freedom


def _landmarks(
    means: NDArray[np.float64], weight: NDArray[np.float64], counts: NDArray[np.float64], noise: NDArray[np.float64]
) -> Landmarks:
    """means (C, F), weight (F, C), counts (C,) of samples, noise (C,) of the means."""
    shares = counts / counts.sum()
    centre, middle = shares @ means, weight @ shares  # (F,), (F,)
    origin = centre @ weight - centre @ middle
    seen = np.einsum("cf,fc->c", means - centre, weight - middle[:, None])
    length = np.maximum(seen - noise, max(_NEAREST * float(np.median(seen)), 1e-6))
    spread = np.sqrt(1 + 1 / counts + noise / length)  # the sample's scatter along the mean and its noise, and the noise along the class
    return Landmarks(*(part.astype(np.float32) for part in (middle, origin, length, spread)))
