"""A published version: probabilities that are probabilities, and an opinion that never costs a new class its place."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Optional, Tuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from latentd.learning.adaptive import TrainedHead
from latentd.learning.analytic import LinearHead
from latentd.learning.snapshot import UNKNOWN, Snapshot, blend, empty, softmax

F, H = 3, 4
SOME = np.eye(F, dtype=np.float32)[[0, 1, 2, 0]]


def linear(ids: Tuple[int, ...]) -> LinearHead:
    dice = np.random.default_rng(len(ids))
    return LinearHead(ids, dice.standard_normal((F, len(ids))).astype(np.float32), np.zeros(len(ids), np.float32))


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
    assert nothing.decide(np.zeros(0)) == UNKNOWN


def test_one_class_is_certain_and_none_is_unknown() -> None:
    np.testing.assert_array_equal(snapshot((0,)).predict(SOME), np.ones((4, 1)))
    assert snapshot(()).predict(SOME).shape == (4, 0)
    assert snapshot(()).decide(np.zeros(0)) == UNKNOWN


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("ids", [(0, 1, 2), (2,), (7, 8)])
def test_rows_sum_to_one_whatever_the_trained_head_knows(weight: float, ids: Tuple[int, ...]) -> None:
    probabilities = snapshot(trained=hidden(ids), weight=weight).predict(SOME)
    assert probabilities.shape == (4, 3)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, rtol=1e-12)
    assert (probabilities >= 0).all()


def test_the_decision_is_the_most_probable_label_unless_it_is_too_improbable() -> None:
    assert snapshot().decide(np.array([0.2, 0.5, 0.3])) == "b"
    assert snapshot(unknown_below=0.5).decide(np.array([0.2, 0.5, 0.3])) == "b"
    assert snapshot(unknown_below=0.51).decide(np.array([0.2, 0.5, 0.3])) == UNKNOWN


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
