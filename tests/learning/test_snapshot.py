"""A published version: probabilities that are probabilities, and an opinion that never costs a new class its place."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from typing import Optional, Tuple, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from latentd.learning.adaptive import TrainedHead
from latentd.learning.analytic import Landmarks, LinearHead
from latentd.learning.blocks import UpperBlocks
from latentd.learning.snapshot import UNKNOWN, AdaptedHead, Snapshot, blend, empty, softmax

F, H = 3, 4
SOME = np.eye(F, dtype=np.float32)[[0, 1, 2, 0]]


def linear(ids: Tuple[int, ...]) -> LinearHead:
    """The mean of everything lies at 0, and the classes lie far out."""
    weight = np.random.default_rng(len(ids)).standard_normal((F, len(ids))).astype(np.float32)
    marks = Landmarks(
        np.zeros(F, np.float32), np.zeros(len(ids), np.float32), np.full(len(ids), 10.0, np.float32), np.ones(len(ids), np.float32)
    )
    return LinearHead(ids, weight, np.zeros(len(ids), np.float32), landmarks=marks)


def hidden(ids: Tuple[int, ...]) -> TrainedHead:
    dice = np.random.default_rng(5)
    w1, w2 = dice.standard_normal((F, H)), dice.standard_normal((H, len(ids)))
    zeros = np.zeros(F, np.float32)
    return TrainedHead(
        ids, zeros, zeros + 1, w1.astype(np.float32), np.ones(H, np.float32), w2.astype(np.float32), np.zeros(len(ids), np.float32)
    )


def snapshot(
    ids: Tuple[int, ...] = (0, 1, 2),
    trained: Optional[TrainedHead] = None,
    weight: float = 0.0,
    temperature: float = 1.0,
    unknown_below: Optional[float] = None,
) -> Snapshot:
    return Snapshot(4, ids, tuple("abcdefg"[: len(ids)]), linear(ids), trained, weight, temperature, unknown_below, 0.0, 9)


def test_before_anything_was_taught_everything_is_unknown() -> None:
    nothing = empty(5.0)
    assert (nothing.version, nothing.labels, nothing.seq) == (0, (), 0)
    assert nothing.predict(np.zeros((3, 1536), np.float32)).shape == (3, 0)
    assert nothing.decide(np.zeros((2, 1536), np.float32), np.zeros((2, 0))) == [UNKNOWN, UNKNOWN]


def test_one_class_is_certain_and_none_is_unknown() -> None:
    np.testing.assert_array_equal(snapshot((0,)).predict(SOME), np.ones((4, 1)))
    assert snapshot(()).predict(SOME).shape == (4, 0)
    assert snapshot(()).decide(SOME, np.zeros((4, 0))) == [UNKNOWN] * 4


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("ids", [(0, 1, 2), (2,), (7, 8)])
def test_rows_sum_to_one_whatever_the_trained_head_knows(weight: float, ids: Tuple[int, ...]) -> None:
    probabilities = snapshot(trained=hidden(ids), weight=weight).predict(SOME)
    assert probabilities.shape == (4, 3)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, rtol=1e-12)
    assert (probabilities >= 0).all()


def test_the_decision_is_the_most_probable_label_unless_the_image_looks_like_nothing_taught() -> None:
    probabilities = np.array([[0.2, 0.5, 0.3]] * 4)
    assert snapshot().decide(SOME, probabilities) == ["b"] * 4
    assert snapshot(unknown_below=-1e9).decide(SOME, probabilities) == ["b"] * 4
    least = np.sort((SOME @ linear((0, 1, 2)).weight).max(axis=1) / 10.0)
    decided = snapshot(unknown_below=float(least[:2].mean())).decide(SOME, probabilities)
    assert sorted(decided) == ["b", "b", "b", UNKNOWN]
    assert snapshot(unknown_below=1e9).decide(SOME, probabilities) == [UNKNOWN] * 4


def test_one_class_alone_is_never_unknown() -> None:
    assert snapshot((0,), unknown_below=1e9).decide(SOME, np.ones((4, 1))) == ["a"] * 4


class Upside(AdaptedHead):
    """Blocks above the split that see everything the other way round."""

    def scores(self, tokens: NDArray[np.float32]) -> NDArray[np.float32]:
        scores: NDArray[np.float32] = -100 * tokens[:, 0] @ self.head.weight
        return scores


def test_where_adapted_blocks_answer_the_label_is_theirs_and_the_floor_refuses_what_is_strange() -> None:
    adapted = Upside(cast(UpperBlocks, None), linear((0, 1, 2)), 1.0)
    both = replace(snapshot(), adapted=adapted, weight=1.0)
    told = both.predict(SOME, SOME[:, None])
    floor = both.analytic.weight.argmax(axis=1)[[0, 1, 2, 0]]
    assert (told.argmax(axis=1) != floor).all()
    assert both.decide(SOME, told) == ["abc"[best] for best in told.argmax(axis=1)]
    least = np.sort((SOME @ both.analytic.weight).max(axis=1) / 10.0)
    decided = replace(both, unknown_below=float(least[:2].mean())).decide(SOME, told)
    strange = int(np.argmin((SOME @ both.analytic.weight).max(axis=1)))
    assert [index for index, label in enumerate(decided) if label == UNKNOWN] == [strange]


def test_a_higher_temperature_is_less_sure_and_decides_the_same() -> None:
    cold, warm = (snapshot(temperature=value).predict(SOME) for value in (1.0, 3.0))
    assert (warm.max(axis=1) < cold.max(axis=1)).all()
    np.testing.assert_array_equal(warm.argmax(axis=1), cold.argmax(axis=1))


def test_a_snapshot_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        snapshot().version = 5  # type: ignore[misc]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4, 3e38])
def test_softmax_bears_scores_of_any_size(scale: float) -> None:
    probabilities = softmax(np.array([[scale, -scale, 0.0]], np.float32))
    assert np.isfinite(probabilities).all()
    assert probabilities.sum() == pytest.approx(1.0)
    assert probabilities.argmax() == 0


def rows(columns: int) -> st.SearchStrategy[NDArray[np.float64]]:
    return arrays(np.float64, (5, columns), elements=st.floats(1e-6, 1.0)).map(lambda values: values / values.sum(axis=1, keepdims=True))


@settings(deadline=None)
@given(rows(4), rows(3), st.floats(0.0, 1.0))
def test_a_class_that_the_trained_head_does_not_know_keeps_all_of_its_probability(
    floor: NDArray[np.float64], opinion: NDArray[np.float64], weight: float
) -> None:
    mixed = blend(floor, (3, 0, 9, 1), opinion, (0, 1, 2), weight)
    np.testing.assert_array_equal(mixed[:, [0, 2]], floor[:, [0, 2]])
    np.testing.assert_allclose(mixed.sum(axis=1), 1.0, rtol=1e-9)
    share = opinion[:, [0, 1]] / opinion[:, [0, 1]].sum(axis=1, keepdims=True)
    expected = (1 - weight) * floor[:, [1, 3]] + weight * floor[:, [1, 3]].sum(axis=1, keepdims=True) * share
    np.testing.assert_allclose(mixed[:, [1, 3]], expected, rtol=1e-9)
