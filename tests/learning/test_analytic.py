"""The floor: exact sums in any order, and an answer for a class of one image."""

from __future__ import annotations

from typing import Dict, List, Sequence, Tuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from latentd.learning.analytic import RidgeSums
from lessons import FEATURES, features

WIDTH = FEATURES


def rows(label: str, numbers: Sequence[int], spread: float = 0.4) -> NDArray[np.float32]:
    return np.array([features(label, number, spread) for number in numbers], np.float32).reshape(-1, WIDTH)


def taught(*lessons: Tuple[int, NDArray[np.float32]]) -> RidgeSums:
    sums = RidgeSums(WIDTH)
    for class_id, some in lessons:
        sums.add(some, [class_id] * len(some))
    return sums


def answers(sums: RidgeSums, some: NDArray[np.float32]) -> List[int]:
    head = sums.solve()
    return [head.class_ids[column] for column in (some @ head.weight + head.bias).argmax(axis=1)]


def assert_same_head(one: RidgeSums, other: RidgeSums) -> None:
    """The same classes with the same scores, whatever the order of the columns."""
    first, second = one.solve(), other.solve()
    assert sorted(first.class_ids) == sorted(second.class_ids)
    order = [second.class_ids.index(class_id) for class_id in first.class_ids]
    probe = rows("probe", range(5))
    found, expected = probe @ second.weight[:, order] + second.bias[order], probe @ first.weight + first.bias
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4 * max(1.0, float(np.abs(expected).max(initial=0.0))))


def test_nothing_taught_gives_a_head_without_classes() -> None:
    head = RidgeSums(WIDTH).solve()
    assert (head.class_ids, head.weight.shape, head.bias.shape) == ((), (WIDTH, 0), (0,))


def test_it_is_linear_discriminant_analysis_with_shrunk_pooled_covariance() -> None:
    some = {0: rows("cat", range(40)), 1: rows("dog", range(90)), 7: rows("owl", range(11))}
    head = taught(*some.items()).solve()
    means = np.stack([chunk.astype(np.float64).mean(axis=0) for chunk in some.values()])
    within = sum((chunk - mean).T.astype(np.float64) @ (chunk - mean) for chunk, mean in zip(some.values(), means))
    total, prior = 141, 300.0
    covariance = (within + prior * np.trace(within) / total / WIDTH * np.eye(WIDTH)) / (total + prior)
    weight = np.linalg.solve(covariance, means.T)
    assert head.class_ids == (0, 1, 7)
    np.testing.assert_allclose(head.weight, weight, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(head.bias, -0.5 * np.einsum("cf,fc->c", means, weight), rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 500)), min_size=1, max_size=150), st.randoms(use_true_random=False))
def test_the_order_of_teaching_does_not_matter(lessons: List[Tuple[int, int]], dice: object) -> None:
    shuffled = list(lessons)
    dice.shuffle(shuffled)  # type: ignore[attr-defined]
    one, other = RidgeSums(WIDTH), RidgeSums(WIDTH)
    for sums, order in ((one, lessons), (other, shuffled)):
        for class_id, number in order:
            sums.add(features(f"class {class_id}", number)[None], [class_id])
    assert_same_head(one, other)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 500)), min_size=1, max_size=100),
    st.lists(st.tuples(st.integers(0, 4), st.integers(501, 999)), min_size=1, max_size=100),
)
def test_what_was_added_and_removed_was_never_there(kept: List[Tuple[int, int]], passing: List[Tuple[int, int]]) -> None:
    sums, pure = RidgeSums(WIDTH), RidgeSums(WIDTH)
    for class_id, number in passing:
        sums.add(features(f"class {class_id}", number)[None], [class_id])
    for class_id, number in kept:
        sums.add(features(f"class {class_id}", number)[None], [class_id])
        pure.add(features(f"class {class_id}", number)[None], [class_id])
    for class_id, number in passing:
        sums.remove(features(f"class {class_id}", number)[None], [class_id])
    assert sums.count == len(kept)
    assert_same_head(sums, pure)


def test_a_moved_sample_was_always_there() -> None:
    sums = taught((0, rows("cat", range(70))), (1, rows("dog", range(30))))
    sums.move(rows("cat", [5]), 0, 1)
    sums.move(rows("cat", [6]), 0, 2)
    others = [number for number in range(70) if number not in (5, 6)]
    assert_same_head(sums, taught((0, rows("cat", others)), (1, rows("dog", range(30))), (1, rows("cat", [5])), (2, rows("cat", [6]))))
    assert (sums.count_of(0), sums.count_of(1), sums.count_of(2), sums.count_of(9)) == (68, 31, 1, 0)


def test_batches_of_any_size_give_the_same_bits() -> None:
    one, other = taught((0, rows("cat", range(150)))), RidgeSums(WIDTH)
    for number in range(150):
        other.add(rows("cat", [number]), [0])
    assert one.solve().weight.tobytes() == other.solve().weight.tobytes()


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 130])
def test_what_is_restored_is_equal_to_the_last_bit_and_goes_on_so(count: int) -> None:
    sums = taught((3, rows("cat", range(count))), (1, rows("dog", range(count // 3))))
    other = RidgeSums(WIDTH)
    other.restore({name: array.copy() for name, array in sums.state().items()})
    for both in (sums, other):
        both.moments()  # reading changes nothing
        both.add(rows("owl", range(70)), [5] * 70)
        both.remove(rows("owl", [2]), [5])
    first, second = sums.solve(), other.solve()
    assert first.class_ids == second.class_ids
    assert (first.weight.tobytes(), first.bias.tobytes()) == (second.weight.tobytes(), second.bias.tobytes())
    assert [array.tobytes() for array in sums.state().values()] == [array.tobytes() for array in other.state().values()]


def test_a_checkpoint_holds_no_row_of_a_removed_sample() -> None:
    sums = taught((0, rows("cat", range(10))))
    secret = rows("cat", [4]).astype(np.float64).tobytes()
    assert secret in sums.state()["ridge.block"].tobytes()
    sums.remove(rows("cat", [4]), [0])
    assert all(secret not in array.tobytes() for array in sums.state().values())


def test_moments_are_those_of_everything_added() -> None:
    some = rows("cat", range(100))
    mean, deviation = taught((0, some[:60]), (1, some[60:])).moments()
    np.testing.assert_allclose(mean, some.mean(axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(deviation, some.std(axis=0), rtol=1e-3)


def test_a_class_of_one_image_is_answered_for_that_image_at_once_beside_classes_of_hundreds() -> None:
    sums = taught((0, rows("cat", range(400))), (1, rows("dog", range(400))))
    image = rows("owl", [0])
    sums.add(image, [2])
    assert answers(sums, image) == [2]
    assert answers(sums, rows("cat", range(400, 420))) == [0] * 20
    assert answers(sums, rows("dog", range(400, 420))) == [1] * 20


def test_the_first_two_images_ever_are_told_apart() -> None:
    one, two = rows("cat", [0]), rows("dog", [0])
    assert answers(taught((0, one), (1, two)), np.concatenate([one, two])) == [0, 1]


def test_a_class_of_one_hundredth_is_not_drowned() -> None:
    sums = taught((0, rows("cat", range(1000))), (1, rows("dog", range(10))))
    recall = [answers(sums, rows(label, range(2000, 2100))).count(class_id) for class_id, label in ((0, "cat"), (1, "dog"))]
    assert min(recall) >= 97


def test_one_image_taught_many_times_over_makes_no_nonsense() -> None:
    sums = taught((0, np.repeat(rows("cat", [0]), 200, axis=0)), (1, rows("dog", [0])))
    head = sums.solve()
    assert np.isfinite(head.weight).all()
    assert answers(sums, np.concatenate([rows("cat", [0]), rows("dog", [0])])) == [0, 1]


def test_a_feature_that_is_always_zero_makes_no_nonsense() -> None:
    some: Dict[int, NDArray[np.float32]] = {0: rows("cat", range(5)), 1: rows("dog", range(5))}
    for chunk in some.values():
        chunk[:, 3] = 0.0
    sums = taught(*some.items())
    assert np.isfinite(sums.solve().weight).all()
    assert answers(sums, np.concatenate(list(some.values()))) == [0] * 5 + [1] * 5
    nothing = taught((0, np.zeros((3, WIDTH), np.float32)))
    assert np.isfinite(nothing.solve().weight).all()
