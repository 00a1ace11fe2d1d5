"""What a method is, and what all of them share: lessons, normalisation on the first lesson, the columns of classes never taught.

Values and pure functions; nothing blocks.
"""

from __future__ import annotations

from typing import Any, Dict, List, NamedTuple, Optional

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Protocol

Latents = NDArray[np.float32]  # (B, F)
Labels = NDArray[np.int64]  # (B,)
Scores = NDArray[np.float64]  # (B, C)

_LEAST_DEVIATION = 1e-3


class Lesson(NamedTuple):
    """One batch of the stream. number: from 0. features (n, F), labels (n,)."""

    number: int
    features: Latents
    labels: Labels


class Method(Protocol):
    """A continual learner of a fixed number of classes.

    every: it is settled and asked after each `every`-th lesson and after the last one: 1 where that is cheap, more where it costs a
    training run of its own (GDumb, the joint bounds).
    """

    every: int

    def learn(self, lesson: Lesson) -> None:
        """Takes one lesson; it never comes again."""

    def settle(self) -> None:
        """Makes ready to answer: solves what `learn` only added to. It belongs to the cost of learning."""

    def scores(self, features: Latents) -> Scores:
        """(B, F) -> (B, C), larger is likelier; -inf for a class that was never taught. Only between `settle` and the next `learn`."""

    def size_bytes(self) -> int:
        """What it keeps between two lessons: statistics, weights, stored latents. Not what it needs for a moment."""

    def notes(self) -> Dict[str, Any]:
        """What a reader of the result should know, as JSON values."""


class Normal:
    """Zero mean and unit deviation by the first lesson alone: nobody knows the statistics of a stream that has not come yet."""

    def __init__(self) -> None:
        self._shift: Optional[Latents] = None
        self._scale: Optional[Latents] = None

    def fit(self, features: Latents) -> None:
        """Does nothing from the second lesson on."""
        if self._shift is None:
            self._shift = features.mean(axis=0)
            self._scale = (1.0 / np.maximum(features.std(axis=0), _LEAST_DEVIATION)).astype(np.float32)

    def __call__(self, features: Latents) -> Latents:
        assert self._shift is not None and self._scale is not None, "no lesson came yet"
        normal: Latents = (features - self._shift) * self._scale
        return normal

    def size_bytes(self) -> int:
        return nbytes([self._shift, self._scale])


def nbytes(arrays: List[Optional[NDArray[Any]]]) -> int:
    return sum(array.nbytes for array in arrays if array is not None)


def only_taught(scores: NDArray[Any], taught: NDArray[np.bool_]) -> Scores:
    """The scores (B, C) with -inf in the columns of classes never taught, taught (C,)."""
    masked: Scores = np.where(taught[None, :], scores.astype(np.float64), -np.inf)
    return masked
