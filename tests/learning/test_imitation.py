"""A pruned backbone learns to give the features of the whole, in the distance that it is told."""

from __future__ import annotations

from typing import List

import numpy as np
import pytest
from numpy.typing import NDArray

import tiny
from latentd.learning import imitation
from latentd.learning.analytic import RidgeSums
from latentd.learning.imitation import imitate, steps_of
from latentd.learning.redundancy import see
from latentd.vision.prune import without_heads
from latentd.vision.vit import Vit

WHOLE = tiny.vit()
SHOWN, OTHERS = tiny.pixels(48, seed=1), tiny.pixels(16, seed=2)
PLAIN = np.eye(2 * WHOLE.shape.width, dtype=np.float32)


def quiet(_: int) -> None:
    return None


def features(vit: Vit, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    return see(vit, pixels, 2, quiet).features


def cut() -> Vit:
    pruned = without_heads(tiny.weights(WHOLE), WHOLE.shape, [(0, 1), (1, 0)], see(WHOLE, SHOWN, 2, quiet).means)
    return Vit.from_weights(pruned.weights, pruned.shape)


def missing(vit: Vit, metric: NDArray[np.float32], pixels: NDArray[np.uint8] = OTHERS) -> float:
    return float(np.square((features(vit, pixels) - features(WHOLE, pixels)) @ metric).mean())


def test_features_come_nearer_on_images_that_were_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imitation, "RATE", 1e-3)
    pruned = cut()
    before = missing(pruned, PLAIN)
    imitate(pruned, SHOWN, features(WHOLE, SHOWN), PLAIN, 8.0, quiet)
    assert missing(pruned, PLAIN) < 0.9 * before
    assert not any(weight.requires_grad or weight.grad is not None for weight in pruned.parameters())


def test_the_distance_decides_which_features_come_nearer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imitation, "RATE", 1e-3)
    first = np.diag((np.arange(len(PLAIN)) < 16).astype(np.float32) * 4)  # sixteen features count, the others don't
    told, plain = cut(), cut()
    imitate(told, SHOWN, features(WHOLE, SHOWN), first, 8.0, quiet)
    imitate(plain, SHOWN, features(WHOLE, SHOWN), PLAIN, 8.0, quiet)
    assert missing(told, first, SHOWN) < missing(plain, first, SHOWN)
    assert missing(told, PLAIN, SHOWN) > missing(plain, PLAIN, SHOWN)


def test_the_patch_embedding_stays_and_the_same_images_give_the_same_weights() -> None:
    one, other, before = cut(), cut(), tiny.weights(cut())
    for pruned in (one, other):
        imitate(pruned, SHOWN, features(WHOLE, SHOWN), PLAIN, 1.0, quiet)
    changed = {name for name, value in tiny.weights(one).items() if not np.array_equal(value, before[name])}
    assert changed
    assert all(name.startswith(("blocks.", "norm.")) for name in changed)
    for name, value in tiny.weights(one).items():
        np.testing.assert_array_equal(value, tiny.weights(other)[name])


def test_no_epoch_changes_nothing_and_few_images_make_a_batch() -> None:
    pruned = cut()
    seen: List[int] = []
    imitate(pruned, SHOWN, features(WHOLE, SHOWN), PLAIN, 0.0, seen.append)
    assert not seen
    for name, value in tiny.weights(cut()).items():
        np.testing.assert_array_equal(tiny.weights(pruned)[name], value)
    imitate(pruned, SHOWN[:3], features(WHOLE, SHOWN[:3]), PLAIN, 0.5, seen.append)
    assert seen == [imitation.BATCH]
    assert steps_of(48, 2.0) == 6


def test_the_metric_of_the_sums_is_the_distance_of_their_head() -> None:
    random = np.random.default_rng(0)
    class_ids = np.arange(400) % 4
    means = 3 * random.normal(size=(4, 12))
    rows = (means[class_ids] + random.normal(size=(400, 12)) * np.linspace(0.1, 3, 12)).astype(np.float32)
    sums = RidgeSums(12)
    sums.add(rows, class_ids.tolist())
    metric, head = sums.metric(), sums.solve()
    centres = np.stack([rows[class_ids == one].mean(axis=0) for one in range(4)])
    column = {class_id: place for place, class_id in enumerate(head.class_ids)}
    for one in range(1, 4):
        apart = centres[one] - centres[0]
        weight = head.weight[:, column[one]] - head.weight[:, column[0]]
        np.testing.assert_allclose(np.square(apart @ metric).sum(), apart @ weight, rtol=1e-4)
    with pytest.raises(ValueError, match="nothing was learned"):
        RidgeSums(12).metric()
