"""Which labels are probably wrong: taught samples that a head which never saw them finds far likelier to be something else.

Two heads learn a half of the replay memory each and judge the other half (cross-validation, as in Northcutt et al. 2021, "Confident
learning"). Halves are drawn by sample, not by lesson: the frames of a video stand on both sides, so what is found is a frame that its
own neighbours contradict, never the first look of a class in a new place. Owned by the learner thread; nothing blocks.
"""

from __future__ import annotations

import zlib
from typing import Callable, Generator, List, Sequence, Set

import numpy as np
from numpy.typing import NDArray

from latentd.learning.analytic import LinearHead, RidgeSums
from latentd.replay.memory import DOUBTED, VOUCHED, Chunk, ReplayMemory
from latentd.replay.packing import Bytes

Features = NDArray[np.float32]
Decode = Callable[[Bytes], Features]
_CHUNK, _LEAST_CHUNK, _CHUNK_BYTES = 512, 16, 4 << 20  # samples of one step: some milliseconds
KNOWN = 20  # samples by which a head knows a class well enough to judge it: at 5, one class in ten lost 3 points of its accuracy


class Doubts:
    """Sample ids whose label is doubted, from one look over the whole memory."""

    def __init__(self, nats: float) -> None:
        """nats: how much likelier another class must be, in natural units of log-likelihood."""
        self._nats = nats

    def look(self, memory: ReplayMemory, whole: RidgeSums, decode: Decode) -> Generator[int, None, Set[str]]:
        """Yields between its steps; the memory must not change meanwhile. whole: everything learned that is not doubted now."""
        half = RidgeSums(whole.width)
        size = max(_LEAST_CHUNK, min(_CHUNK, _CHUNK_BYTES // memory.code_bytes))
        for chunk in memory.all(size):
            yield 0
            first = ~_second(chunk.ids) & (chunk.standing != DOUBTED)
            half.add(decode(chunk.codes[first]), chunk.class_ids[first].tolist())
        judges = [_Judge(half)]
        yield 0
        half.become_rest_of(whole)
        judges.insert(0, _Judge(half))  # of the first half: the one that has not seen it
        found: Set[str] = set()
        for chunk in memory.all(size):
            yield 0
            found.update(self._doubted(chunk, judges, decode))
        return found

    def _doubted(self, chunk: Chunk, judges: Sequence[_Judge], decode: Decode) -> List[str]:
        features, second = decode(chunk.codes), _second(chunk.ids)
        excess = np.where(second, *(judge.excess(features, chunk.class_ids) for judge in reversed(judges)))
        unjudged = (excess == -np.inf) & (chunk.standing == DOUBTED)  # who doubts much of a class must not forget all of it for that
        doubted = ((excess > self._nats) | unjudged) & (chunk.standing != VOUCHED)
        return [chunk.ids[row] for row in np.flatnonzero(doubted)]


class _Judge:
    """The head of some sums, for the classes that they know well."""

    def __init__(self, sums: RidgeSums) -> None:
        head = sums.solve()
        known = [column for column, class_id in enumerate(head.class_ids) if sums.count_of(class_id) >= KNOWN]
        self._head: LinearHead = head.only(known)

    def excess(self, features: Features, class_ids: NDArray[np.int64]) -> NDArray[np.float64]:
        """(B,) nats by which the best other class explains the features (B, F) better than their own; minus infinity where the class is
        not known well enough, or is the only one.
        """
        ids = np.array(self._head.class_ids, np.int64)
        own = class_ids[:, None] == ids[None, :]  # (B, C)
        if len(ids) < 2:
            return np.full(len(features), -np.inf)
        scores = (features @ self._head.weight + self._head.bias).astype(np.float64)
        rival = np.where(own, -np.inf, scores).max(axis=1)
        return np.where(own.any(axis=1), rival - np.where(own, scores, 0.0).sum(axis=1), -np.inf)


def _second(ids: Sequence[str]) -> NDArray[np.bool_]:
    """Which samples belong to the second half: by their name, so that it stays so, and no habit of a teacher meets it."""
    return np.array([zlib.crc32(sample_id.encode()) & 1 for sample_id in ids], np.bool_)
