"""Rounds of pruning: which heads go, when it stops, and what comes back."""

from __future__ import annotations

from typing import List, Set, Tuple

import numpy as np
import pytest
from numpy.typing import NDArray

import tiny
from latentd.learning import pruning
from latentd.learning.pruning import Lesson, Wish
from latentd.vision.prune import without_heads
from latentd.vision.vit import Vit

MODULE = tiny.vit()
WEIGHTS = tiny.weights(MODULE)


def lesson(count: int, seed: int) -> Lesson:
    """Noise of three classes, each with a colour of its own."""
    class_ids = np.arange(count, dtype=np.int64) % 3
    pixels: NDArray[np.uint8] = tiny.pixels(count, seed=seed) // 2
    pixels[np.arange(count), :, :, class_ids] += 100
    return Lesson(pixels, class_ids + 5)


SHOWN, HELD = lesson(24, 1), lesson(12, 2)


def pruned(wish: Wish, doing: Set[str]) -> pruning.Outcome:
    def watch(what: str, done: int, total: int) -> None:
        assert 0 < done <= total
        doing.add(what)

    return pruning.prune(WEIGHTS, MODULE.shape, tiny.SIZE, 2, SHOWN, HELD, wish, watch)


@pytest.mark.parametrize("score", ["residual", "entropy", "gradient", "leave-one-out"])
def test_half_of_the_heads_go_in_rounds_and_every_block_keeps_one(score: str) -> None:
    doing: Set[str] = set()
    outcome = pruned(Wish(0.5, 100.0, score, rounds=2), doing)
    assert [len(step.removed) for step in outcome.steps] == [2, 3]
    assert set(outcome.steps[0].removed) < set(outcome.removed)
    assert outcome.best.shape.heads == (1, 1, 1)
    assert [len(row) for row in outcome.worth] == [2, 2, 2]
    assert doing == {"asking", "scoring heads", "repairing", "imitating the whole"}
    assert outcome.before > 50, "three colours can be told apart"
    assert Vit.from_weights(outcome.best.weights, outcome.best.shape).shape == outcome.best.shape


def test_without_repair_the_weights_are_those_of_the_cut() -> None:
    outcome = pruned(Wish(0.2, 100.0, "gradient", rounds=1, repaired=False, epochs=0), set())
    cut = without_heads(WEIGHTS, MODULE.shape, outcome.removed)
    for name, value in cut.weights.items():
        if not name.endswith("proj.bias"):
            np.testing.assert_array_equal(outcome.best.weights[name], value)


def test_repair_changes_the_projections_and_the_second_layers_alone() -> None:
    outcome = pruned(Wish(0.2, 100.0, "gradient", rounds=1, epochs=0), set())
    cut = without_heads(WEIGHTS, MODULE.shape, outcome.removed)
    changed = {name for name, value in cut.weights.items() if not np.array_equal(outcome.best.weights[name], value)}
    assert changed
    assert {name.split(".")[2] for name in changed} <= {"proj", "fc2"}


def test_a_step_that_costs_too_much_is_the_last_and_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    accuracies = iter([90.0, 89.8, 89.0])
    asked = pruning._Rounds._ask
    monkeypatch.setattr(pruning._Rounds, "_ask", lambda self, vit: (asked(self, vit)[0], next(accuracies)))
    outcome = pruned(Wish(0.5, 0.5, "gradient", rounds=3), set())
    assert [step.accuracy for step in outcome.steps] == [89.8, 89.0]
    assert (outcome.kept_steps, outcome.before, outcome.after) == (1, 90.0, 89.8)
    assert outcome.removed == outcome.steps[0].removed
    assert sum(outcome.best.shape.heads) == 5


def test_where_not_even_the_first_step_is_cheap_enough_nothing_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    accuracies = iter([90.0, 80.0])
    asked = pruning._Rounds._ask
    monkeypatch.setattr(pruning._Rounds, "_ask", lambda self, vit: (asked(self, vit)[0], next(accuracies)))
    outcome = pruned(Wish(0.5, 0.5, "gradient", rounds=3), set())
    assert (outcome.removed, outcome.after, outcome.best.shape) == ((), 90.0, MODULE.shape)


def test_the_same_images_prune_the_same_heads() -> None:
    one, other = (pruned(Wish(0.34, 100.0, "residual"), set()) for _ in range(2))
    assert one.removed == other.removed
    assert all(np.array_equal(one.best.weights[name], other.best.weights[name]) for name in one.best.weights)


@pytest.mark.parametrize(
    ("gone", "count", "expected"),
    [
        ((), 2, [(0, 1), (2, 0)]),
        (((0, 1),), 2, [(2, 0), (1, 0)]),  # block 0 has one left: its 0.1 is not for sale
        ((), 6, [(0, 1), (2, 0), (1, 0)]),
    ],
)
def test_the_least_worth_goes_first(gone: Tuple[Tuple[int, int], ...], count: int, expected: List[Tuple[int, int]]) -> None:
    whole = [[0.3, 0.1], [0.25, 0.9], [0.2, 0.8]]
    scores = [np.array([value for head, value in enumerate(row) if (block, head) not in gone]) for block, row in enumerate(whole)]
    assert pruning.least(scores, tiny.DINOV2, frozenset(gone), count) == expected


def test_a_few_of_many_are_spread_over_all() -> None:
    assert pruning.spread(9, 3).tolist() == [0, 4, 8]
    assert pruning.spread(3, 9).tolist() == [0, 1, 2]


def test_halves_share_out_every_class() -> None:
    first, second = pruning.halves(np.array([4, 4, 7, 4, 7, 4, 4]))
    assert (first.tolist(), second.tolist()) == ([0, 2, 3, 6], [1, 4, 5])
