"""The Latent Replay papers' replacement rule and mini-batches, against the counts of NICv2-391's official lists; GDumb's balance."""

from __future__ import annotations

from typing import List

import numpy as np
import pytest

from methods.memories import GreedyBalanced, PaperMemory, composition, endless, epochs, padded

FIRST, LATER, BATCHES, LATENTS = 2999, 300, 391, 1500


def stream(seed: int) -> PaperMemory:
    """A memory after NICv2-391; each latent's label is the number of its batch, its one feature too."""
    memory, rng = PaperMemory(LATENTS, 1), np.random.Generator(np.random.PCG64(seed))
    for index in range(BATCHES):
        count = LATER if index else FIRST
        memory.offer(index, np.full((count, 1), index, np.float32), np.full(count, index), rng)
    return memory


def test_the_stream_of_391_writes_1500_and_7412_latents() -> None:
    memory = stream(0)
    assert memory.written == 1500 + 7412
    assert memory.used == LATENTS


def test_a_lesson_brings_its_share_and_no_more() -> None:
    memory, rng = PaperMemory(LATENTS, 1), np.random.Generator(np.random.PCG64(0))
    brought: List[int] = []
    for index in (0, 1, 4, 5, 9, 390):
        count = LATER if index else FIRST
        brought.append(memory.offer(index, np.zeros((count, 1), np.float32), np.full(count, index), rng))
    assert brought == [1500, 300, 300, 250, 150, 3]


def test_batch_0_keeps_its_expected_share_of_the_memory() -> None:
    # Of each latent of batch 0 a lesson i spares 1 - h/1500: about 8 of 1,500 are left after 391 batches.
    kept = [float((stream(seed).labels == 0).sum()) for seed in range(20)]
    expected = LATENTS * np.prod([1 - min(LATENTS // (index + 1), LATER) / LATENTS for index in range(1, BATCHES)])
    assert 7 < expected < 9
    assert np.mean(kept) == pytest.approx(expected, abs=2.5)


def test_a_latent_keeps_its_label_when_others_are_replaced() -> None:
    memory = stream(1)
    assert memory.features[:, 0].tolist() == memory.labels.tolist()


def test_a_first_lesson_smaller_than_the_memory_leaves_places_that_are_filled_before_any_is_overwritten() -> None:
    memory, rng = PaperMemory(20, 1), np.random.Generator(np.random.PCG64(0))
    for index in range(4):
        memory.offer(index, np.zeros((6, 1), np.float32), np.full(6, index), rng)
    assert memory.used == 20  # 6 + 6 + 6 and 2 more; then 3 of the first ones gave way
    assert np.bincount(memory.labels, minlength=4)[3] == 5


def test_300_new_latents_beside_1500_stored_make_15_mini_batches_of_21_and_107() -> None:
    assert composition(300, 1500) == (21, 107, 15)


def test_a_lesson_without_a_memory_fills_mini_batches_alone() -> None:
    assert composition(2999, 0) == (128, 0, 24)


def test_every_lesson_brings_at_least_one_latent_to_a_mini_batch() -> None:
    assert composition(1, 100_000) == (1, 127, 1)
    assert composition(12, 1500) == (1, 127, 12)


def test_one_epoch_goes_over_lesson_and_memory() -> None:
    plan, rng = composition(300, 1500), np.random.Generator(np.random.PCG64(0))
    new = np.concatenate(padded(300, plan.new, plan.steps, rng))
    replay = endless(1500, plan.replayed, rng)
    old = np.concatenate([next(replay) for _ in range(plan.steps)])
    assert len(new) == 315 and set(new.tolist()) == set(range(300))
    assert len(set(old[:1500].tolist())) == 1500


def test_epochs_show_everything_so_many_times() -> None:
    places = np.concatenate(list(epochs(10, 4, 3, np.random.Generator(np.random.PCG64(0)))))
    assert np.bincount(places).tolist() == [3] * 10


def test_gdumb_fills_up_and_then_balances_the_classes() -> None:
    memory, rng = GreedyBalanced(30, 1), np.random.Generator(np.random.PCG64(0))
    for label, count in ((0, 100), (1, 4), (2, 100), (0, 50)):
        memory.offer(np.full((count, 1), label, np.float32), np.full(count, label), 3, rng)
    counts = np.bincount(memory.labels, minlength=3)
    assert counts.sum() == memory.used == 30
    assert counts[1] == 4
    assert abs(counts[0] - counts[2]) <= 6 and counts[2] == 10
    assert memory.features[:, 0].tolist() == memory.labels.tolist()
