"""A published version, loaded and immutable: what classify answers with.

Made by the learner thread, read by any; one reference swap publishes it. Nothing blocks, nothing changes after construction.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import List, Optional, Tuple

import numpy as np
from numpy.typing import NDArray

from latentd.learning.adaptive import TrainedHead
from latentd.learning.analytic import LinearHead
from latentd.learning.blocks import UpperBlocks
from latentd.learning.place import answering
from latentd.learning.unknown import refused
from latentd.trouble import FAILURES, Trouble, in_halves, trouble_of

logger = logging.getLogger(__name__)
UNKNOWN = "unknown"


@dataclass(frozen=True)
class AdaptedHead:
    """The blocks above the split as they learned, and the closed-form head on what they give."""

    blocks: UpperBlocks
    head: LinearHead
    temperature: float

    @property
    def class_ids(self) -> Tuple[int, ...]:
        return self.head.class_ids

    def scores(self, tokens: NDArray[np.float32]) -> NDArray[np.float32]:
        """Tokens after block `split`, as they are stored, (B, N, D) -> logits (B, C)."""
        queue = answering(self.blocks)
        features = np.concatenate(in_halves(lambda rows: self.blocks.features(rows, queue), tokens))
        scores: NDArray[np.float32] = (features @ self.head.weight + self.head.bias) / np.float32(self.temperature)
        return scores


@dataclass(frozen=True)
class Snapshot:
    """A numbered adaptive stage with its labels.

    class_ids, labels: (C,) in column order of the analytic head. trained, adapted: one of them takes part with `weight` where the gate let
    it. temperature: of the analytic scores. unknown_below: least likeness (learning/unknown.py) of a decision; None: no threshold yet.
    """

    version: int
    class_ids: Tuple[int, ...]
    labels: Tuple[str, ...]
    analytic: LinearHead
    trained: Optional[TrainedHead]
    weight: float
    temperature: float
    unknown_below: Optional[float]
    published_at: float
    seq: int = 0
    adapted: Optional[AdaptedHead] = None

    @property
    def wants_tokens(self) -> bool:
        """Whether `predict` needs an image's tokens, and some milliseconds of every core, besides its features."""
        return self.adapted is not None

    def predict(self, features: NDArray[np.float32], tokens: Optional[NDArray[np.float32]] = None) -> NDArray[np.float64]:
        """Features (B, F), and tokens (B, N, D) where they are wanted -> (B, C) probabilities; rows sum to 1. Without tokens the floor
        answers.
        """
        floor = softmax((features @ self.analytic.weight + self.analytic.bias) / self.temperature)
        if self.adapted is not None and tokens is not None:
            try:
                return blend(floor, self.class_ids, softmax(self.adapted.scores(tokens)), self.adapted.class_ids, self.weight)
            except FAILURES as error:
                if trouble_of(error) is Trouble.OTHER:
                    raise
                logger.warning("the floor answers alone, for the device of the adapted blocks fails: %s", error)
                return floor
        if self.trained is None or self.weight == 0.0:
            return floor
        return blend(floor, self.class_ids, softmax(self.trained.scores(features)), self.trained.class_ids, self.weight)

    def decide(self, features: NDArray[np.float32], probabilities: NDArray[np.float64]) -> List[str]:
        """Features (B, F) and what `predict` gave for them -> the most probable label of each, or "unknown" for what looks like nothing
        that was taught.
        """
        if not self.labels:
            return [UNKNOWN] * len(probabilities)
        strange = refused(self.analytic, features, self.unknown_below)
        return [UNKNOWN if odd else self.labels[int(best)] for odd, best in zip(strange, probabilities.argmax(axis=1))]


def empty(published_at: float) -> Snapshot:
    """Version 0: nothing is known."""
    head = LinearHead((), np.zeros((0, 0), np.float32), np.zeros(0, np.float32))
    return _Empty(0, (), (), head, None, 0.0, 1.0, None, published_at)


class _Empty(Snapshot):
    def predict(self, features: NDArray[np.float32], tokens: Optional[NDArray[np.float32]] = None) -> NDArray[np.float64]:
        return np.zeros((len(features), 0))


def softmax(scores: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = scores.astype(np.float64)
    wide = np.exp(wide - wide.max(axis=1, keepdims=True)) if wide.shape[1] else wide
    probabilities: NDArray[np.float64] = wide / wide.sum(axis=1, keepdims=True) if wide.shape[1] else wide
    return probabilities


def blend(
    floor: NDArray[np.float64], floor_ids: Tuple[int, ...], trained: NDArray[np.float64], trained_ids: Tuple[int, ...], weight: float
) -> NDArray[np.float64]:
    """Mixes two opinions (B, C) and (B, C').

    The trained one only shares out the mass of the classes it knows, so a new class keeps all of its own.
    """
    position = {class_id: column for column, class_id in enumerate(trained_ids)}
    known = [column for column, class_id in enumerate(floor_ids) if class_id in position]
    if not known:
        return floor
    opinion = trained[:, [position[floor_ids[column]] for column in known]]
    opinion = opinion / np.maximum(opinion.sum(axis=1, keepdims=True), 1e-12)
    mass = floor[:, known].sum(axis=1, keepdims=True)
    mixed = floor.copy()
    mixed[:, known] = (1 - weight) * floor[:, known] + weight * mass * opinion
    return mixed
