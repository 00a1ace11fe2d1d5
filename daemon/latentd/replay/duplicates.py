"""Finds taught images that are almost the same as a new one, without keeping their latents in memory.

A 256-bit sign sketch of random projections a sample (Charikar 2002, "Similarity estimation techniques from rounding algorithms"): the
share of differing bits is angle / pi, so a cosine of 0.9999 (0.8 degrees) differs in about 1 bit of 256 and a candidate is anything
within that and five standard deviations. The exact cosine then decides. Owned by the journal thread; pure numpy, nothing blocks.
"""

from __future__ import annotations

import math
from typing import Dict, List, Tuple

import numpy as np
from numpy.typing import NDArray

SKETCH_BITS = 256
_POPCOUNT = np.array([bin(value).count("1") for value in range(256)], dtype=np.uint8)


class DuplicateIndex:
    """Sketches by class; grows by doubling, forgets by swapping the last row in. cosine: of what counts as almost the same."""

    def __init__(self, width: int, seed: int, cosine: float) -> None:
        self.max_bits = _max_bits(cosine)
        rng = np.random.Generator(np.random.PCG64(seed))
        self._planes = rng.standard_normal((width, SKETCH_BITS), dtype=np.float32)
        self._rows: Dict[int, _ClassSketches] = {}

    def sketch(self, features: NDArray[np.float32]) -> bytes:
        """The 32-byte sketch of one feature vector (F,)."""
        return np.packbits(features @ self._planes > 0).tobytes()

    def add(self, class_id: int, seq: int, sketch: bytes) -> None:
        self._rows.setdefault(class_id, _ClassSketches()).add(seq, sketch)

    def remove(self, class_id: int, seq: int) -> None:
        if class_id in self._rows:
            self._rows[class_id].remove(seq)

    def remove_class(self, class_id: int) -> None:
        self._rows.pop(class_id, None)

    def candidates(self, class_id: int, sketch: bytes, limit: int = 4) -> List[int]:
        """Sequence numbers of the class's nearest sketches within max_bits, nearest first."""
        return self._rows[class_id].nearest(sketch, self.max_bits, limit) if class_id in self._rows else []


class _ClassSketches:
    def __init__(self) -> None:
        self._bits = np.empty((16, SKETCH_BITS // 8), dtype=np.uint8)
        self._seqs: List[int] = []
        self._place: Dict[int, int] = {}

    def add(self, seq: int, sketch: bytes) -> None:
        if len(self._seqs) == len(self._bits):
            self._bits = np.concatenate([self._bits, np.empty_like(self._bits)])
        self._place[seq] = len(self._seqs)
        self._bits[len(self._seqs)] = np.frombuffer(sketch, dtype=np.uint8)
        self._seqs.append(seq)

    def remove(self, seq: int) -> None:
        place = self._place.pop(seq, None)
        if place is None:
            return
        last = self._seqs.pop()
        if last != seq:
            self._bits[place] = self._bits[len(self._seqs)]
            self._seqs[place] = last
            self._place[last] = place

    def nearest(self, sketch: bytes, max_bits: int, limit: int) -> List[int]:
        bits = self._bits[: len(self._seqs)] ^ np.frombuffer(sketch, dtype=np.uint8)
        distance = _POPCOUNT[bits].sum(axis=1, dtype=np.int32)
        order: List[Tuple[int, int]] = sorted((int(distance[i]), self._seqs[i]) for i in np.flatnonzero(distance <= max_bits))
        return [seq for _, seq in order[:limit]]


def _max_bits(cosine: float) -> int:
    """Bits in which a pair at this cosine may differ: the mean of the binomial and five standard deviations."""
    share = math.acos(min(1.0, cosine)) / math.pi
    return math.ceil(SKETCH_BITS * share + 5 * math.sqrt(SKETCH_BITS * share * (1 - share)))
