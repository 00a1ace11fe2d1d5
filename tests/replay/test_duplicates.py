"""The index of near-duplicates: finds what a search through everything would find."""

from __future__ import annotations

from typing import Dict, List, Tuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from latentd.replay.duplicates import SKETCH_BITS, DuplicateIndex

WIDTH = 24


def row(seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(WIDTH).astype(np.float32)


def at_cosine(features: NDArray[np.float32], cosine: float, seed: int) -> NDArray[np.float32]:
    """A vector at exactly this cosine, in a direction of its own, of another length."""
    aside = row(seed).astype(np.float64)
    unit = features.astype(np.float64) / np.linalg.norm(features)
    aside -= (aside @ unit) * unit
    turned: NDArray[np.float32] = (7.0 * (cosine * unit + np.sqrt(1 - cosine**2) * aside / np.linalg.norm(aside))).astype(np.float32)
    return turned


def differing_bits(one: bytes, other: bytes) -> int:
    return bin(int.from_bytes(one, "big") ^ int.from_bytes(other, "big")).count("1")


@pytest.mark.parametrize("cosine", [0.9995, 0.99, 0.9])
def test_a_near_duplicate_is_among_the_candidates_at_the_threshold_that_was_asked_for(cosine: float) -> None:
    index = DuplicateIndex(WIDTH, 0, cosine)
    missed = 0
    for seed in range(500):
        features = row(seed)
        index.add(seed, seed, index.sketch(features))  # a class each: nothing but the distance decides
        missed += not index.candidates(seed, index.sketch(at_cosine(features, cosine + (1 - cosine) / 10, 10_000 + seed)))
    assert missed == 0


def test_what_is_not_alike_is_rarely_a_candidate() -> None:
    index = DuplicateIndex(WIDTH, 0, 0.9995)
    index.add(0, 0, index.sketch(row(0)))
    assert [seed for seed in range(1, 500) if index.candidates(0, index.sketch(row(seed)))] == []


def test_only_equal_sketches_are_candidates_when_near_duplicates_are_off() -> None:
    assert DuplicateIndex(WIDTH, 0, 1.5).max_bits == 0


def test_a_sketch_depends_on_the_direction_and_the_seed_alone() -> None:
    features = row(1)
    assert DuplicateIndex(WIDTH, 3, 0.99).sketch(features) == DuplicateIndex(WIDTH, 3, 0.5).sketch(3 * features)
    assert DuplicateIndex(WIDTH, 3, 0.99).sketch(features) != DuplicateIndex(WIDTH, 4, 0.99).sketch(features)
    assert len(DuplicateIndex(WIDTH, 3, 0.99).sketch(features)) == SKETCH_BITS // 8


def test_a_forgotten_class_has_no_candidates() -> None:
    index = DuplicateIndex(WIDTH, 0, 0.9)
    sketch = index.sketch(row(0))
    index.add(1, 5, sketch)
    index.add(2, 6, sketch)
    index.remove_class(1)
    assert (index.candidates(1, sketch), index.candidates(2, sketch)) == ([], [6])


Steps = List[Tuple[int, int, int]]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1), st.integers(0, 7)), max_size=60), st.integers(0, 7))
def test_it_agrees_with_a_search_through_everything(steps: Steps, probe: int) -> None:
    """steps: (act, class, kind of picture); act 0 removes the oldest of the class, the others add."""
    index = DuplicateIndex(WIDTH, 0, 0.9)
    kept: Dict[int, Dict[int, bytes]] = {0: {}, 1: {}}
    for seq, (act, class_id, kind) in enumerate(steps, 1):
        if act:
            kept[class_id][seq] = index.sketch(row(kind) + 0.05 * row(100 + seq))
            index.add(class_id, seq, kept[class_id][seq])
        elif kept[class_id]:
            oldest = next(iter(kept[class_id]))
            del kept[class_id][oldest]
            index.remove(class_id, oldest)
    index.remove(0, 9999)
    sketch = index.sketch(row(probe))
    for class_id, sketches in kept.items():
        distances = sorted((differing_bits(other, sketch), seq) for seq, other in sketches.items())
        assert index.candidates(class_id, sketch) == [seq for distance, seq in distances if distance <= index.max_bits][:4]
