"""Wake and sleep: when the blocks learn, what comes in between, and what it takes to undo it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import tiny
from latentd.engines.torch_queue import TorchQueue
from latentd.learning.adapted import Adapted
from latentd.learning.blocks import UpperBlocks
from latentd.learning.snapshot import UNKNOWN, AdaptedHead
from latentd.learning.trainer import Trainer, TrainerSettings
from latentd.replay.latents import TokenPool, make_latent_codec
from latentd.replay.memory import DOUBTED, ReplayMemory
from latentd.replay.records import Entry, sample_id_of
from sleepers import CODEC, POOL, SETTINGS, D, code, filled, held, latent, run


def right(adapted: Adapted, of: Dict[str, Tuple[int, bytes]]) -> float:
    opinion = adapted.opinion(adapted.head(), list(of))
    answers = np.array(opinion.class_ids)[opinion.scores.argmax(axis=1)]
    return float((answers == np.array([class_id for class_id, _ in of.values()])).mean())


def test_pooling_averages_squares_of_patches_and_leaves_the_class_token() -> None:
    tokens = np.arange((1 + 36) * 2, dtype=np.float32).reshape(1, 37, 2)
    pooled = POOL(tokens)
    assert pooled.shape == (1, 10, 2)
    np.testing.assert_array_equal(pooled[0, 0], tokens[0, 0])
    np.testing.assert_allclose(pooled[0, 1], tokens[0, [1, 2, 7, 8]].mean(axis=0))
    np.testing.assert_allclose(pooled[0, 9], tokens[0, [29, 30, 35, 36]].mean(axis=0))


def test_a_grid_that_does_not_divide_the_side_is_refused_with_those_that_do() -> None:
    with pytest.raises(ValueError, match="1, 2, 3, 6 fit"):
        TokenPool(1, 6, 4)


def test_a_sleep_is_due_after_the_first_samples_and_then_with_growth(base: UpperBlocks) -> None:
    adapted, memory = Adapted(base, CODEC, SETTINGS), filled(20)
    assert not adapted.is_due(7, filled(7))
    assert adapted.is_due(8, memory)
    run(adapted.sleep(memory, {}, 20))
    assert not adapted.is_due(29, memory)
    assert adapted.is_due(30, memory)


def test_one_class_alone_is_nothing_to_learn(base: UpperBlocks) -> None:
    memory = ReplayMemory(str(CODEC), CODEC.code_bytes, 1 << 20, seed=0)
    for number in range(30):
        memory.admit(f"s{number:08d}", 0, code(0, number))
    assert not Adapted(base, CODEC, SETTINGS).is_due(30, memory)


def test_sleep_makes_the_blocks_find_what_the_pretrained_ones_overlook(base: UpperBlocks) -> None:
    settings = dataclasses.replace(SETTINGS, epochs=0.01)
    barely, well = Adapted(base, CODEC, settings), Adapted(base, CODEC, dataclasses.replace(SETTINGS, epochs=5.0))
    memory, asked = filled(200), held(100)
    for adapted in (barely, well):
        run(adapted.sleep(memory, asked, 200))
    assert right(well, asked) > right(barely, asked) + 0.05


def test_what_comes_while_it_sleeps_is_in_the_head_when_it_wakes(base: UpperBlocks) -> None:
    adapted, memory, asked = Adapted(base, CODEC, SETTINGS), filled(20), held(4)
    sleep = adapted.sleep(memory, asked, 20)
    next(sleep)
    memory.admit("s00000090", 7, code(7, 0))
    asked["h00000090"] = (7, code(7, 1))
    run(sleep)
    assert adapted.head().class_ids == (0, 1, 7)
    assert adapted.opinion(adapted.head(), list(asked)).scores.shape == (5, 3)


def test_awake_a_new_class_is_in_the_head_at_once(base: UpperBlocks) -> None:
    adapted = Adapted(base, CODEC, SETTINGS)
    run(adapted.sleep(filled(20), held(2), 20))
    adapted.learn([code(5, 0)], [5], np.zeros((1, 2 * D), np.float32), 1)
    assert 5 in adapted.head().class_ids


def test_forgetting_in_the_middle_of_a_sleep_leaves_nothing_of_it(base: UpperBlocks) -> None:
    adapted, memory = Adapted(base, CODEC, SETTINGS), filled(20)
    sleep = adapted.sleep(memory, {}, 20)
    next(sleep)
    adapted.forget()
    assert run(sleep) == 0
    assert adapted.serving is None
    assert adapted.sleeps == 0
    np.testing.assert_array_equal(
        adapted.blocks.features(np.ones((1, POOL.tokens, D), np.float32)), base.features(np.ones((1, POOL.tokens, D), np.float32))
    )


def test_a_relabelled_sample_ends_the_sleep_and_moves_in_the_sums(base: UpperBlocks) -> None:
    adapted, memory = Adapted(base, CODEC, SETTINGS), filled(20)
    run(adapted.sleep(memory, {}, 20))
    sleep = adapted.sleep(memory, {}, 40)
    next(sleep)
    adapted.move("s00000001", code(0, 0), 0, 9)
    assert run(sleep) == 0
    assert adapted.head().class_ids == (0, 1, 9)


def test_after_a_restart_it_answers_as_before(base: UpperBlocks) -> None:
    adapted, memory, asked = Adapted(base, CODEC, SETTINGS), filled(20), held(6)
    run(adapted.sleep(memory, asked, 20))
    again = Adapted(base, CODEC, SETTINGS)
    again.restore(*adapted.state(), asked)
    ids: List[str] = list(asked)
    np.testing.assert_allclose(again.opinion(again.head(), ids).scores, adapted.opinion(adapted.head(), ids).scores, rtol=1e-4, atol=1e-3)
    assert (again.sleeps, again.learned_at) == (1, 20)


def test_the_same_memory_gives_the_same_sleep(base: UpperBlocks) -> None:
    first, second = (Adapted(base, CODEC, SETTINGS) for _ in range(2))
    for adapted in (first, second):
        run(adapted.sleep(filled(20), {}, 20))
    one, other = first.state()[0], second.state()[0]
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def starving(adapted: Adapted, most: int, after: int = 0) -> List[int]:
    """Makes passes of more than `most` latents through the blocks that learn run out of memory, but for the first `after`; gives the sizes
    that were tried."""
    tried: List[int] = []
    forward = adapted.blocks.forward

    def pass_through(tokens: torch.Tensor, basis: Optional[torch.Tensor] = None) -> torch.Tensor:
        tried.append(len(tokens))
        if len(tokens) > most and len(tried) > after:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return forward(tokens, basis)

    blocks = adapted.blocks
    blocks.forward = pass_through  # type: ignore[method-assign]
    adapted._fresh = lambda: blocks  # type: ignore[method-assign]
    return tried


def gradient(adapted: Adapted) -> List[torch.Tensor]:
    """Of one mini-batch of ten latents."""
    codes = np.frombuffer(b"".join(code(number % 2, number) for number in range(10)), np.uint8).reshape(10, -1)
    classifier = torch.nn.Linear(adapted._base.features_width, 2)
    with torch.no_grad():
        classifier.weight.copy_(torch.linspace(-1, 1, classifier.weight.numel()).reshape(2, -1))
        classifier.bias.zero_()
    learned = [parameter for _, parameter in adapted.blocks.learned()]
    optimizer = torch.optim.SGD([*learned, *classifier.parameters()], lr=0.1)
    assert list(adapted._gradient(classifier, optimizer, codes, np.array([0, 1] * 5)))
    return [parameter.grad for parameter in (*learned, *classifier.parameters()) if parameter.grad is not None]


def test_where_memory_is_out_in_the_middle_of_a_step_it_begins_again_with_half_as_many(base: UpperBlocks) -> None:
    short, roomy = Adapted(base, CODEC, SETTINGS), Adapted(base, CODEC, SETTINGS)
    tried = starving(short, 1, after=1)
    found, expected = gradient(short), gradient(roomy)
    assert tried == [4, 4, 2] + [1] * 10
    assert (short.microbatch, roomy.microbatch) == (1, 4)
    assert len(found) == len(expected) > 2
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_a_sleep_over_rotated_tokens_is_the_same_sleep(tmp_path: Path) -> None:
    base = UpperBlocks.load(tiny.backbone(tmp_path), 2)
    codec = make_latent_codec("int4", "spatial", (2, D), (POOL.tokens, D), pool=POOL)
    memory = ReplayMemory(str(codec), codec.code_bytes, 1 << 22, seed=0)
    for number in range(48):
        memory.admit(f"s{number:08d}", number % 2, code(number % 2, number, codec))
    asked = [code(number % 2, 1000 + number, codec) for number in range(8)]
    rotated, straight = Adapted(base, codec, SETTINGS), Adapted(base, codec, SETTINGS)
    assert rotated._basis is not None
    straight._basis = None
    for adapted in (rotated, straight):
        run(adapted.sleep(memory, {}, 48))
    assert rotated.serving is not None
    assert straight.serving is not None
    found, expected = (adapted._features(adapted.serving, asked) for adapted in (rotated, straight))  # type: ignore[arg-type]
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert np.abs(found - rotated._features(base, asked)).max() > 0.1, "nothing was learned"
    for class_id in (0, 1):
        np.testing.assert_allclose(rotated.head().weight[:, class_id], straight.head().weight[:, class_id], atol=1e-3)


def test_a_sleep_begins_with_the_pretrained_blocks_whatever_was_learned_before(base: UpperBlocks) -> None:
    twice, once = Adapted(base, CODEC, SETTINGS), Adapted(base, CODEC, SETTINGS)
    run(twice.sleep(filled(16), {}, 16))
    once.sleeps = 1  # the random choices of a second sleep
    for adapted in (twice, once):
        run(adapted.sleep(filled(32), {}, 32))
    for (name, mine), (_, theirs) in zip(twice.blocks.learned(), once.blocks.learned()):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, msg=name)


def test_a_sleep_does_not_learn_from_doubted_samples(base: UpperBlocks) -> None:
    with_doubts, without = filled(32), filled(32)
    for sample_id in with_doubts.ids()[:6]:
        with_doubts.judge(sample_id, DOUBTED)
        without.remove(sample_id)
    one, other = Adapted(base, CODEC, SETTINGS), Adapted(base, CODEC, SETTINGS)
    for adapted, memory in ((one, with_doubts), (other, without)):
        for _ in adapted._refit(adapted.blocks, adapted._sums, {}, adapted._left_out, memory, {}):
            pass
    assert one._sums.count == other._sums.count == 26
    assert one._left_out == set(with_doubts.ids()[:6])
    np.testing.assert_allclose(one.head().weight, other.head().weight, rtol=1e-4, atol=1e-6)


def test_a_relabelled_sample_counts_once_and_one_that_was_left_out_not_at_all(base: UpperBlocks) -> None:
    memory = filled(20)
    doubted, sure = memory.ids()[0], memory.ids()[1]
    memory.judge(doubted, DOUBTED)
    adapted = Adapted(base, CODEC, SETTINGS)
    run(adapted.sleep(memory, {}, 20))
    counts = {class_id: adapted._sums.count_of(class_id) for class_id in (0, 1)}
    adapted.move(doubted, code(0, 0), 0, 1)
    assert {class_id: adapted._sums.count_of(class_id) for class_id in (0, 1)} == counts
    again = Adapted(base, CODEC, SETTINGS)
    again.restore(*adapted.state(), {})
    again.move(doubted, code(0, 0), 0, 1)
    again.move(sure, code(1, 1), 1, 0)
    assert {class_id: again._sums.count_of(class_id) for class_id in (0, 1)} == {0: counts[0] + 1, 1: counts[1] - 1}


def test_a_sleep_with_little_memory_comes_to_its_end(base: UpperBlocks) -> None:
    adapted = Adapted(base, CODEC, dataclasses.replace(SETTINGS, epochs=1.0))
    tried = starving(adapted, 1)
    run(adapted.sleep(filled(32), held(), 32))
    assert (tried[:4], adapted.sleeps) == ([4, 2, 1, 1], 1)


def test_a_step_that_fails_for_one_latent_fails_for_good(base: UpperBlocks) -> None:
    adapted = Adapted(base, CODEC, SETTINGS)
    starving(adapted, 0)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(adapted.sleep(filled(32), held(), 32))


def test_other_failures_are_not_tried_again(base: UpperBlocks, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = Adapted(base, CODEC, SETTINGS)

    def broken(*_: Any) -> torch.Tensor:
        raise RuntimeError("the shapes do not fit")

    blocks = adapted.blocks
    monkeypatch.setattr(blocks, "forward", broken)
    monkeypatch.setattr(adapted, "_fresh", lambda: blocks)
    with pytest.raises(RuntimeError, match="shapes"):
        run(adapted.sleep(filled(32), held(), 32))
    assert adapted.microbatch == SETTINGS.microbatch


def test_features_are_made_one_half_after_the_other_where_memory_is_out(base: UpperBlocks, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = Adapted(base, CODEC, SETTINGS)
    codes = np.frombuffer(b"".join(code(0, number) for number in range(7)), np.uint8).reshape(7, -1)
    whole, features = adapted._through(base, codes), UpperBlocks.features

    def short(
        blocks: UpperBlocks, tokens: NDArray[np.float32], queue: Optional[TorchQueue] = None, basis: Optional[NDArray[np.float32]] = None
    ) -> NDArray[np.float32]:
        if len(tokens) > 2:
            raise MemoryError
        return features(blocks, tokens, queue, basis)

    monkeypatch.setattr(UpperBlocks, "features", short)
    np.testing.assert_allclose(adapted._through(base, codes), whole, atol=1e-5)


def test_the_threshold_of_unknown_stays_through_a_sleep_and_holds_for_what_the_blocks_answer(base: UpperBlocks) -> None:
    """The floor tells two classes apart here, and finds a third strange, whoever answers."""

    def seen(class_id: int, number: int) -> Tuple[NDArray[np.float32], NDArray[np.float32]]:
        features, tokens = latent(class_id, number)
        return features + 0.5 * np.random.default_rng(class_id).standard_normal(2 * D).astype(np.float32), tokens

    training = TrainerSettings(1 << 22, 16, 1.0, 1e-3, 0.1, 0, unknown_rate=0.05)
    trainer = Trainer(CODEC, 2 * D, training, Adapted(base, CODEC, SETTINGS))
    for first in range(1, 241, 8):
        batch = []
        for seq in range(first, first + 8):
            features, tokens = seen(seq % 2, seq)
            packed = bytes(CODEC.encode(features[None], tokens[None])[0])
            batch.append(Entry(seq, "sample", first, sample_id_of(seq), seq % 2, None, seq % 10 < 2, packed, 0.0))
        run(trainer.take(batch))
    before = trainer.candidate({0: "cat", 1: "dog"}, 0.0)[0]
    run(trainer.sleep())
    after = trainer.candidate({0: "cat", 1: "dog"}, 0.0)[0]
    assert before.unknown_below is not None
    assert after.unknown_below == before.unknown_below
    adapted = trainer.adapted
    assert adapted is not None and adapted.serving is not None
    both = dataclasses.replace(after, adapted=AdaptedHead(adapted.serving, adapted.head(), 1.0), weight=0.7)

    def refused(class_id: int) -> int:
        features, tokens = (np.stack(each) for each in zip(*[seen(class_id, number) for number in range(1000, 1100)]))
        return both.decide(features, both.predict(features, tokens)).count(UNKNOWN)

    assert refused(0) + refused(1) <= 25
    assert refused(7) >= 80


def test_the_trainer_moves_a_relabelled_sample_once_in_the_adapted_sums_too(base: UpperBlocks) -> None:
    adapted = Adapted(base, CODEC, SETTINGS)
    trainer = Trainer(CODEC, 2 * D, TrainerSettings(1 << 22, 16, 1.0, 1e-3, 0.1, 0), adapted)
    batch = [Entry(seq, "sample", 1, sample_id_of(seq), seq % 2, None, False, code(seq % 2, seq), 0.0) for seq in range(1, 41)]
    run(trainer.take(batch))
    run(trainer.sleep())
    asked = len(adapted.evidence)
    run(trainer.take([Entry(41, "relabel", 41, sample_id_of(4), 1, 0, False, code(0, 4), 0.0)]))
    assert [trainer.sums.count_of(class_id) for class_id in (0, 1)] == [19, 21]
    assert [adapted._sums.count_of(class_id) for class_id in (0, 1)] == [19, 21]
    assert len(adapted.evidence) == asked, "it was learned before"
