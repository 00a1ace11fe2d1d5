"""Methods that keep sums and no samples: nearest class mean, streaming LDA, streaming ridge, random projection with ridge.

All in numpy and torch's linear algebra in float64; a lesson is folded in at once, with the result that sample by sample would have.
Settings are those of the best mean accuracy, beside them in percent, on the validation sessions of Objects-50 NICv2-391 (standard stream,
orders 0 and 1: `nicv2.py --choose --orders 0 1`).
"""

from __future__ import annotations

from typing import Any, Dict, Optional, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from methods.protocol import Labels, Latents, Lesson, Normal, Scores, nbytes, only_taught

Wide = NDArray[np.float64]

RIDGES = tuple(10.0**power for power in range(-3, 7))


class ClassMeans:
    """Counts and sums of each class."""

    def __init__(self, classes: int) -> None:
        self.counts: Wide = np.zeros(classes)
        self.sums: Optional[Wide] = None

    def add(self, features: Latents, labels: Labels) -> None:
        if self.sums is None:
            self.sums = np.zeros((len(self.counts), features.shape[1]))
        np.add.at(self.counts, labels, 1.0)
        np.add.at(self.sums, labels, features.astype(np.float64))

    @property
    def taught(self) -> NDArray[np.bool_]:
        return self.counts > 0

    def mean_of(self, label: int) -> Wide:
        """(F,) of a class that was taught."""
        assert self.sums is not None, "no lesson came yet"
        mean: Wide = self.sums[label] / self.counts[label]
        return mean

    @property
    def means(self) -> Wide:
        """(C, F); zero for a class never taught."""
        assert self.sums is not None, "no lesson came yet"
        return self.sums / np.maximum(self.counts, 1.0)[:, None]


class Linear:
    """Weights (F, C) and bias (C,), as `settle` found them."""

    def __init__(self, weight: Optional[Wide] = None, bias: Optional[Wide] = None) -> None:
        self._weight = None if weight is None else weight.astype(np.float32)
        self._bias = np.float32(0) if bias is None else bias.astype(np.float32)

    def __call__(self, features: Latents) -> Latents:
        assert self._weight is not None, "settle comes before scores"
        scores: Latents = features @ self._weight + self._bias
        return scores


class NearestMean:
    """The class whose mean is nearest. kind: euclid or cosine, over features normalised on the first lesson."""

    every = 1

    def __init__(self, classes: int, kind: str = "euclid") -> None:
        """kind: 66.7; cosine 66.0."""
        self._kind = kind
        self._normal, self._classes = Normal(), ClassMeans(classes)
        self._head = Linear()

    def learn(self, lesson: Lesson) -> None:
        self._normal.fit(lesson.features)
        self._classes.add(self._normal(lesson.features), lesson.labels)

    def settle(self) -> None:
        means = self._classes.means
        if self._kind == "cosine":
            means = means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
        bias = np.zeros(len(means)) if self._kind == "cosine" else -0.5 * np.square(means).sum(axis=1)
        self._head = Linear(means.T, bias)

    def scores(self, features: Latents) -> Scores:
        return only_taught(self._head(self._normal(features)), self._classes.taught)

    def size_bytes(self) -> int:
        return self._normal.size_bytes() + nbytes([self._classes.counts, self._classes.sums])

    def notes(self) -> Dict[str, Any]:
        return {"kind": self._kind}


class Slda:
    """Deep streaming LDA (Hayes & Kanan 2020, "Lifelong machine learning with deep streaming linear discriminant analysis").

    Sample t changes the covariance by t/(t+1) (z - mean)(z - mean)', mean being its class's just before, and then that mean; the precision
    is the inverse of (1 - shrinkage) covariance + shrinkage * identity. The first sample of a class adds nothing: it is its own mean.
    """

    every = 1

    def __init__(self, classes: int, shrinkage: float = 1e-2) -> None:
        """shrinkage: 96.4; 96.3 at 3e-2, 95.0 at 1e-3, 93.8 at the paper's 1e-4."""
        self._shrinkage = shrinkage
        self._normal, self._classes = Normal(), ClassMeans(classes)
        self._scatter: Optional[Wide] = None  # samples times covariance
        self._head = Linear()

    def learn(self, lesson: Lesson) -> None:
        self._normal.fit(lesson.features)
        normal = self._normal(lesson.features)
        seen = float(self._classes.counts.sum())
        rows = np.zeros((len(normal), normal.shape[1]))
        for place, (row, label) in enumerate(zip(normal, lesson.labels.tolist())):
            if self._classes.counts[label]:
                rows[place] = (row - self._classes.mean_of(label)) * np.sqrt((seen + place) / (seen + place + 1))
            self._classes.add(row[None], np.array([label]))
        update = _gram(rows)
        self._scatter = update if self._scatter is None else self._scatter + update

    def settle(self) -> None:
        assert self._scatter is not None, "no lesson came yet"
        count = float(self._classes.counts.sum())
        covariance = torch.from_numpy(self._scatter * ((1 - self._shrinkage) / count))
        covariance.diagonal().add_(self._shrinkage)
        means = self._classes.means
        weight = _solve(covariance, means.T)  # (F, C)
        self._head = Linear(weight, -0.5 * np.einsum("cf,fc->c", means, weight))

    def scores(self, features: Latents) -> Scores:
        return only_taught(self._head(self._normal(features)), self._classes.taught)

    def size_bytes(self) -> int:
        return self._normal.size_bytes() + nbytes([self._classes.counts, self._classes.sums, self._scatter])

    def notes(self) -> Dict[str, Any]:
        return {"shrinkage": self._shrinkage}


class RecursiveRidge:
    """Ridge regression on one-hot targets as a stream: (X'X + ridge I)^-1 kept up to date by Woodbury's identity, exact at every lesson."""

    def __init__(self, classes: int, ridge: float) -> None:
        self._classes, self._ridge = classes, ridge
        self._inverse: Optional[torch.Tensor] = None  # (F, F) float64
        self._products: Optional[torch.Tensor] = None  # X'Y (F, C)

    def add(self, rows: Wide, labels: Labels) -> None:
        """rows: (n, F)."""
        X = torch.from_numpy(rows)
        F = X.shape[1]
        if self._inverse is None or self._products is None:
            self._inverse = torch.eye(F, dtype=torch.float64) / self._ridge
            self._products = torch.zeros((F, self._classes), dtype=torch.float64)
        self._products.index_add_(1, torch.from_numpy(labels), X.T.contiguous())
        for part in torch.split(X, max(1, F // 4)):  # the small system stays small
            wide = self._inverse @ part.T  # (F, n)
            small = torch.eye(len(part), dtype=torch.float64) + part @ wide
            self._inverse.addmm_(wide, torch.linalg.solve(small, wide.T), alpha=-1.0)

    def solve(self) -> Linear:
        assert self._inverse is not None and self._products is not None, "no lesson came yet"
        return Linear((self._inverse @ self._products).numpy())

    def size_bytes(self) -> int:
        return sum(table.numel() * table.element_size() for table in (self._inverse, self._products) if table is not None)


class Ridge:
    """Streaming ridge regression on one-hot targets with an intercept. ridge: added to the diagonal of X'X."""

    every = 1

    def __init__(self, classes: int, ridge: float = 100.0) -> None:
        """ridge: 94.5; 94.4 at 10, 94.0 at 300 to 3000."""
        self._ridge = ridge
        self._normal, self._sums, self._head = Normal(), RecursiveRidge(classes, ridge), Linear()
        self._taught = np.zeros(classes, np.bool_)

    def learn(self, lesson: Lesson) -> None:
        self._normal.fit(lesson.features)
        self._sums.add(self._rows(lesson.features).astype(np.float64), lesson.labels)
        self._taught[lesson.labels] = True

    def settle(self) -> None:
        self._head = self._sums.solve()

    def scores(self, features: Latents) -> Scores:
        return only_taught(self._head(self._rows(features)), self._taught)

    def size_bytes(self) -> int:
        return self._normal.size_bytes() + self._sums.size_bytes()

    def notes(self) -> Dict[str, Any]:
        return {"ridge": self._ridge}

    def _rows(self, features: Latents) -> Latents:
        normal = self._normal(features)
        return np.concatenate([normal, np.ones((len(normal), 1), np.float32)], axis=1)


class RanPac:
    """A fixed random projection to M values, a ReLU, and streaming ridge on top (McDonnell et al. 2023, "RanPAC").

    ridge: None chooses it as the paper does, by the squared error on a fifth of what is at hand: here the first lesson, because the sums
    can't be parted again later.
    """

    every = 5  # projecting the questions is most of the cost

    def __init__(self, classes: int, seed: int, values: int = 2000, ridge: Optional[float] = None) -> None:
        self._classes, self._seed, self._values, self._ridge = classes, seed, values, ridge
        self._normal = Normal()
        self._projection: Optional[Latents] = None  # (F, M)
        self._sums: Optional[RecursiveRidge] = None
        self._head = Linear()
        self._taught = np.zeros(classes, np.bool_)

    def learn(self, lesson: Lesson) -> None:
        self._normal.fit(lesson.features)
        if self._sums is None:
            rng = np.random.Generator(np.random.PCG64(self._seed))
            self._projection = rng.standard_normal((lesson.features.shape[1], self._values), dtype=np.float32)
            self._projection /= np.float32(lesson.features.shape[1] ** 0.5)
            if self._ridge is None:
                self._ridge = chosen_ridge(self._rows(lesson.features).astype(np.float64), lesson.labels, self._classes, rng)
            self._sums = RecursiveRidge(self._classes, self._ridge)
        self._sums.add(self._rows(lesson.features).astype(np.float64), lesson.labels)
        self._taught[lesson.labels] = True

    def settle(self) -> None:
        assert self._sums is not None, "no lesson came yet"
        self._head = self._sums.solve()

    def scores(self, features: Latents) -> Scores:
        return only_taught(self._head(self._rows(features)), self._taught)

    def size_bytes(self) -> int:
        return self._normal.size_bytes() + nbytes([self._projection]) + (self._sums.size_bytes() if self._sums else 0)

    def notes(self) -> Dict[str, Any]:
        return {"values": self._values, "ridge": self._ridge}

    def _rows(self, features: Latents) -> Latents:
        assert self._projection is not None, "it is drawn at the first lesson"
        rows: Latents = np.maximum(self._normal(features) @ self._projection, 0)
        return rows


def chosen_ridge(rows: Wide, labels: Labels, classes: int, rng: np.random.Generator, ridges: Sequence[float] = RIDGES) -> float:
    """The ridge of least squared error on a random fifth of these rows (n, M), learned from the rest."""
    order = rng.permutation(len(rows))
    held, kept = order[: len(rows) // 5], order[len(rows) // 5 :]
    targets = np.eye(classes)[labels]

    def error(ridge: float) -> float:
        # n is far below M here, so the dual form solves an (n, n) system.
        products = torch.from_numpy(rows[kept] @ rows[kept].T)
        products.diagonal().add_(ridge)
        answers = rows[held] @ (rows[kept].T @ _solve(products, targets[kept]))
        return float(np.square(answers - targets[held]).mean())

    return min(ridges, key=error)


def _gram(rows: Wide) -> Wide:
    wide = torch.from_numpy(rows)
    gram: Wide = (wide.T @ wide).numpy()
    return gram


def _solve(matrix: torch.Tensor, right: Wide) -> Wide:
    """matrix (F, F), positive definite, and right (F, C) -> matrix^-1 right."""
    factor = torch.linalg.cholesky(matrix)
    found: Wide = torch.cholesky_solve(torch.from_numpy(np.ascontiguousarray(right)), factor).numpy()
    return found
