"""The floor: a streaming ridge head, exact and order-free, that stores sums and no samples.

Kept are n_c, the class sums of x, and the sum of x x' over everything, in float64. Solved as linear discriminant analysis with the pooled within-class
covariance shrunk towards a sphere by a fixed number of pseudo-samples (a ridge): the same sums as ridge regression on class indicators, but with equal
priors, so that a class of one image stands beside a class of a thousand (Hayes & Kanan 2020, "Lifelong machine learning with deep streaming linear
discriminant analysis"; the shrinkage is the posterior mean under an inverse-Wishart prior). Owned by the learner thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, List, Sequence, Tuple

import numpy as np
import torch
from numpy.typing import NDArray

PRIOR_SAMPLES = 300.0  # pseudo-samples of the spherical prior: best or within 0.3 point at 20, 100, 400 and 2000 taught ELPV cells (validation splits)
_FLOOR = 0.05  # share of the mean square that stands in for the within-class variance while every class has one sample


@dataclass(frozen=True)
class LinearHead:
    """Scores of a feature vector: x @ weight + bias. class_ids: (C,) in column order; weight: (F, C); bias: (C,)."""

    class_ids: Tuple[int, ...]
    weight: NDArray[np.float32]
    bias: NDArray[np.float32]


class RidgeSums:
    """Counts, sums and second moments of everything learned; see the module docstring.

    Invariant: `add` and `remove` of the same samples leave the sums as they were, up to float64 rounding, in any order.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self.class_ids: List[int] = []
        self.counts: NDArray[np.float64] = np.zeros(0)
        self.sums: NDArray[np.float64] = np.zeros((0, width))
        self.gram: NDArray[np.float64] = np.zeros((width, width))
        self._column: Dict[int, int] = {}

    def add(self, features: NDArray[np.float32], class_ids: Sequence[int]) -> None:
        """features: (B, F)."""
        self._accumulate(features, class_ids, 1.0)

    def remove(self, features: NDArray[np.float32], class_ids: Sequence[int]) -> None:
        self._accumulate(features, class_ids, -1.0)

    def move(self, features: NDArray[np.float32], was: int, class_id: int) -> None:
        """Gives one sample (1, F) another class: the second moments stay."""
        for target, sign in ((was, -1.0), (class_id, 1.0)):
            column = self._column_of(target)
            self.counts[column] += sign
            self.sums[column] += sign * features[0].astype(np.float64)

    def clear(self) -> None:
        self.__init__(self.width)  # type: ignore[misc]  # every field anew: there is no other state

    @property
    def count(self) -> int:
        return int(round(float(self.counts.sum())))

    def count_of(self, class_id: int) -> int:
        column = self._column.get(class_id)
        return 0 if column is None else int(round(float(self.counts[column])))

    def moments(self) -> Tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Mean and standard deviation of each feature (F,), over everything learned."""
        count = max(1.0, float(self.counts.sum()))
        mean = self.sums.sum(axis=0) / count
        variance = np.maximum(np.diagonal(self.gram) / count - mean**2, 1e-8)
        return mean.astype(np.float32), np.sqrt(variance).astype(np.float32)

    def solve(self) -> LinearHead:
        """The head for all classes that have samples. O(F^3 / 3) in float64."""
        present = np.flatnonzero(self.counts > 0.5)
        counts = self.counts[present]
        if not len(present):
            return LinearHead((), np.zeros((self.width, 0), np.float32), np.zeros(0, np.float32))
        means = self.sums[present] / counts[:, None]  # (C, F)
        scatter = self.gram - (means * counts[:, None]).T @ means  # (F, F)
        total = counts.sum()
        variance = max(float(np.trace(scatter)), _FLOOR * float(np.trace(self.gram))) / (total * self.width)
        scatter[np.diag_indices(self.width)] += PRIOR_SAMPLES * max(variance, 1e-12)
        scatter /= total + PRIOR_SAMPLES
        factor = torch.linalg.cholesky(torch.from_numpy(scatter))
        weight = torch.cholesky_solve(torch.from_numpy(np.ascontiguousarray(means.T)), factor).numpy()  # (F, C)
        bias = -0.5 * np.einsum("cf,fc->c", means, weight)
        ids = tuple(self.class_ids[i] for i in present)
        return LinearHead(ids, weight.astype(np.float32), bias.astype(np.float32))

    def state(self) -> Dict[str, NDArray[np.float64]]:
        """The arrays of a checkpoint; of the symmetric second moments only the lower triangle."""
        lower = np.tril_indices(self.width)
        ids = np.array(self.class_ids, dtype=np.float64)
        return {"ridge.class_ids": ids, "ridge.counts": self.counts.copy(), "ridge.sums": self.sums.copy(), "ridge.gram": self.gram[lower]}

    def restore(self, state: Dict[str, NDArray[np.float64]]) -> None:
        self.class_ids = [int(value) for value in state["ridge.class_ids"]]
        self._column = {class_id: column for column, class_id in enumerate(self.class_ids)}
        self.counts = state["ridge.counts"].copy()
        self.sums = state["ridge.sums"].reshape(len(self.class_ids), self.width).copy()
        lower = np.tril_indices(self.width)
        self.gram = np.zeros((self.width, self.width))
        self.gram[lower] = state["ridge.gram"]
        self.gram.T[lower] = state["ridge.gram"]

    def _accumulate(self, features: NDArray[np.float32], class_ids: Sequence[int], sign: float) -> None:
        columns = [self._column_of(class_id) for class_id in class_ids]
        wide = features.astype(np.float64)
        np.add.at(self.counts, columns, sign)
        np.add.at(self.sums, columns, sign * wide)
        self.gram += sign * (wide.T @ wide)

    def _column_of(self, class_id: int) -> int:
        if class_id not in self._column:
            self._column[class_id] = len(self.class_ids)
            self.class_ids.append(class_id)
            self.counts = np.append(self.counts, 0.0)
            self.sums = np.concatenate([self.sums, np.zeros((1, self.width))])
        return self._column[class_id]
