"""Accuracy on taught data: which samples are taught and which are asked, and the closed-form head's answers. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, Iterator, List, NamedTuple, Tuple

import numpy as np
from numpy.typing import NDArray

from latentd.learning.accuracy import Score
from latentd.learning.analytic import LinearHead, RidgeSums

HELD_SHARE = 0.25
HELD_LEAST = 5  # of each class

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Division:
    """Which samples are taught and which are asked, as places in the set; both hold every class that takes part, `classes` of them."""

    taught: NDArray[np.intp]
    asked: NDArray[np.intp]
    classes: int


class Answers(NamedTuple):
    """score: over all questions. right: question by question."""

    score: Score
    right: Tuple[bool, ...]


def divide(class_ids: Ids, seed: int = 0) -> Division:
    """A quarter of each class, at least 5 samples, is kept to ask; a class with fewer than 10 takes no part."""
    rng = np.random.Generator(np.random.PCG64(seed))
    taught: List[NDArray[np.intp]] = []
    asked: List[NDArray[np.intp]] = []
    for class_id in np.unique(class_ids):
        places = rng.permutation(np.flatnonzero(class_ids == class_id))
        if len(places) < 2 * HELD_LEAST:
            continue
        held = max(HELD_LEAST, round(HELD_SHARE * len(places)))
        asked.append(places[:held])
        taught.append(places[held:])
    none = np.zeros(0, np.intp)
    return Division(np.sort(np.concatenate([none, *taught])), np.sort(np.concatenate([none, *asked])), len(taught))


def thinned(class_ids: Ids, most: int, seed: int = 0) -> NDArray[np.intp]:
    """Places of at most `most` samples: of every class as many as of the others, or all that it has."""
    rng = np.random.Generator(np.random.PCG64(seed))
    mixed = rng.permutation(len(class_ids))
    turns: Dict[int, int] = {}
    order = []
    for place in mixed.tolist():
        turn = turns[int(class_ids[place])] = turns.get(int(class_ids[place]), 0) + 1
        order.append((turn, place))
    return np.sort(np.array([place for _, place in sorted(order)[:most]], dtype=np.intp))


def fitted(features: NDArray[np.float32], class_ids: Ids) -> LinearHead:
    """The closed-form head on taught features (T, F)."""
    sums = RidgeSums(features.shape[1])
    sums.add(features, class_ids.tolist())
    return sums.solve()


def answers(head: LinearHead, features: NDArray[np.float32], class_ids: Ids) -> Answers:
    """What the head makes of features (A, F) whose classes are known."""
    found = np.array(head.class_ids)[np.argmax(features @ head.weight + head.bias, axis=1)]
    right = found == class_ids
    return Answers(Score(int(right.sum()), len(right)), tuple(right.tolist()))


def spans(count: int, size: int) -> Iterator[slice]:
    """Slices of `size` that cover `count`; the last one may be shorter."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
