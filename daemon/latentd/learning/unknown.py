"""Unknown: whether an image looks like anything that was taught. Pure functions, and the record that the threshold comes from.

Likeness is how far a sample lies from the mean of everything towards a class, in the metric of the floor: 0 there, 1 at the class, negative
beyond. It is the difference of two Mahalanobis distances, to the class and to the mean of everything (Ren et al. 2021, "A simple fix to
Mahalanobis distance for improving near-OOD detection", with one covariance for both), as a share of the distance between the two: it costs
one product with a vector besides the scores, and means the same in a young model and an old one. Distances to the class alone find a little
more of what was never taught, but find every new room unknown too.

The threshold is a quantile of the likeness of right answers that were given before their images were learned: later the images beside them
have been learned, and make them look nearer than any new picture will. Owned by the learner thread; nothing blocks.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, Deque, Dict, Mapping, Optional, Tuple

import numpy as np
from numpy.typing import NDArray

from latentd.learning.analytic import LinearHead

MIN_ANSWERS = 30  # fewer right answers say nothing of the rare ones
KEPT = 500  # the last right answers: the model that gave older ones knew less


@dataclass(frozen=True)
class UnknownReport:
    """rate: share of right answers that may be refused. below: least likeness of a decision; None: nothing is refused, and reason says why.

    answers: right answers behind it. refused: of the `holdout` samples that are kept.
    """

    rate: float
    below: Optional[float]
    reason: Optional[str]
    answers: int
    refused: int
    holdout: int


NOTHING_TAUGHT = UnknownReport(0.0, None, "nothing was taught yet", 0, 0, 0)


def likeness(head: LinearHead, features: NDArray[np.float32]) -> NDArray[np.float64]:
    """(B, F) -> (B, C) likeness to each class of the head."""
    if head.landmarks is None:
        return np.zeros((len(features), len(head.class_ids)))
    marks = head.landmarks
    products = features @ head.weight - (features @ marks.middle)[:, None] - marks.origin
    found: NDArray[np.float64] = products.astype(np.float64) / marks.length
    return found


def to_answer(head: LinearHead, features: NDArray[np.float32]) -> Tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The column that the head answers (B,), and the likeness to that class (B,), for at least one class.

    What is missing to 1 counts less where few images of the class are known, as its pictures scatter more around those: so the second
    picture of a new class is refused no more often than others.
    """
    products = features @ head.weight
    columns = np.argmax(products + head.bias, axis=1)
    marks = head.landmarks
    if marks is None:
        return columns, np.zeros(len(features))
    own = products[np.arange(len(features)), columns] - features @ marks.middle - marks.origin[columns]
    missing = 1 - own.astype(np.float64) / marks.length[columns]
    return columns, 1 - missing / marks.spread[columns]


def refused(head: LinearHead, features: NDArray[np.float32], below: Optional[float]) -> NDArray[np.bool_]:
    """(B,): which of the features (B, F) look like nothing that was taught. With one class there is nothing to tell it from."""
    if below is None or len(head.class_ids) < 2:
        return np.zeros(len(features), np.bool_)
    found: NDArray[np.bool_] = to_answer(head, features)[1] < below
    return found


class RightAnswers:
    """The likeness of the last KEPT right answers that were given before their images were learned."""

    def __init__(self) -> None:
        self._kept: Deque[Tuple[int, float]] = deque(maxlen=KEPT)

    def __len__(self) -> int:
        return len(self._kept)

    def record(self, class_id: int, likeness: float) -> None:
        self._kept.append((class_id, likeness))

    def forget_class(self, class_id: int) -> None:
        self._kept = deque((item for item in self._kept if item[0] != class_id), maxlen=KEPT)

    def threshold(self, rate: float) -> Tuple[Optional[float], Optional[str]]:
        """What a share `rate` of the next right answers is expected to stay below (split conformal prediction, Vovk et al. 2005), or None
        and why.
        """
        if rate <= 0:
            return None, "learn.unknown_rate is 0"
        rank = int(rate * (len(self) + 1))
        needed = max(MIN_ANSWERS, int(np.ceil(1 / rate)) - 1)
        if len(self) < needed or rank < 1:
            return None, f"{len(self)} right answers before learning are too few to know what is usual ({needed} needed)"
        return sorted(likeness for _, likeness in self._kept)[rank - 1], None

    def state(self) -> Dict[str, Any]:
        """JSON-able; exact."""
        return {"kept": [list(item) for item in self._kept]}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._kept = deque(((int(class_id), float(value)) for class_id, value in state["kept"]), maxlen=KEPT)


def auroc(known: NDArray[np.floating[Any]], novel: NDArray[np.floating[Any]]) -> float:
    """How likely a known image looks more like something taught than a never taught one does; ties count half (Mann & Whitney 1947).

    known, novel: likeness, at least one each.
    """
    order = np.sort(novel)
    below, upto = np.searchsorted(order, known, "left"), np.searchsorted(order, known, "right")
    return float((below + upto).sum() / 2 / (len(known) * len(novel)))
