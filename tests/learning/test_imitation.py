"""Imitation after a repair: it brings what is pruned nearer to the whole on images that it did not see, and touches nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

import tiny
from latentd.learning import imitation
from latentd.learning.imitation import imitate
from latentd.learning.redundancy import see
from latentd.vision.prune import without_heads
from latentd.vision.vit import Vit

SHOWN, OTHERS = tiny.pixels(32, seed=1), tiny.pixels(16, seed=2)


def quiet(_: int) -> None:
    return None


def features(vit: Vit, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    return see(vit, pixels, 1, quiet).features


def cut(whole: Vit) -> Vit:
    pruned = without_heads(tiny.weights(whole), whole.shape, [(0, 1)], see(whole, SHOWN, 1, quiet).means)
    return Vit.from_weights(pruned.weights, pruned.shape)


def test_what_was_cut_comes_nearer_to_the_whole_on_images_it_was_not_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imitation, "RATE", 3e-3)
    whole = tiny.vit()
    pruned, wanted = cut(whole), features(whole, OTHERS)
    before = np.linalg.norm(features(pruned, OTHERS) - wanted)
    done = []
    imitate(whole, pruned, SHOWN, 640, done.append)
    assert np.linalg.norm(features(pruned, OTHERS) - wanted) < 0.95 * before
    assert sum(done) == 640


def test_only_the_blocks_around_the_cut_are_trained_and_none_keeps_a_gradient() -> None:
    whole = tiny.vit()
    kept = tiny.weights(whole)
    pruned = cut(whole)
    before = tiny.weights(pruned)
    imitate(whole, pruned, SHOWN, 16, quiet)
    moved = {name.split(".")[1] for name, value in tiny.weights(pruned).items() if not np.array_equal(value, before[name])}
    assert moved == {"0", "1"}
    assert all(value.grad is None and not value.requires_grad for value in pruned.parameters())
    assert all(np.array_equal(value, kept[name]) for name, value in tiny.weights(whole).items())


def test_no_images_leave_it_as_it_is() -> None:
    whole = tiny.vit()
    pruned = cut(whole)
    before = tiny.weights(pruned)
    imitate(whole, pruned, SHOWN, 0, quiet)
    assert all(np.array_equal(value, before[name]) for name, value in tiny.weights(pruned).items())


def test_the_rate_rises_then_falls_to_nothing() -> None:
    rates = [imitation._rate(done, 1600) for done in range(0, 1600, 8)]
    assert rates[0] < rates[10] < rates[29] and rates[-1] < 0.01 * max(rates)
    assert max(rates) <= imitation.RATE
