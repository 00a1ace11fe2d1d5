from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import tiny
from latentd.config import LearnConfig
from latentd.learning.blocks import UpperBlocks
from latentd.learning.tuning.footprint import peak_growth
from latentd.learning.tuning.steps import BlockProbe, block_step, decoding, filled, head_step, ridge_cost, torch_threads
from latentd.learning.tuning.stopwatch import Stopwatch
from latentd.replay.codec import make_codec
from latentd.replay.latents import LatentCodec, make_latent_codec
from latentd.replay.memory import ReplayMemory
from latentd.vision.checkpoints import Backbone

LEARN = replace(LearnConfig(), minibatch=8, sleep_minibatch=8, microbatch=2, sleep_threads=1, sleep_rank=4)
WIDTH, COUNT = tiny.DINOV2.width, tiny.DINOV2.tokens(tiny.SIZE)
CODEC = make_latent_codec("int8", "token", (2, WIDTH), (COUNT, WIDTH))


def arrays(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((4, 2 * WIDTH)).astype(np.float32), rng.standard_normal((4, COUNT, WIDTH)).astype(np.float32)


def memory(codec: LatentCodec = CODEC) -> ReplayMemory:
    return filled(codec, *arrays(), classes=3, count=8)


def test_every_second_micro_batch_of_the_probe_ends_with_an_update(tiny_backbone: Backbone) -> None:
    probe = BlockProbe(UpperBlocks.load(tiny_backbone, 1), CODEC, LEARN, memory())
    parameter = next(parameter for name, parameter in probe.adapted.blocks.learned() if name.endswith("outward"))
    assert (probe.micro_batch(), probe.micro_batch()) == (
        False,
        True,
    )  # this update gives the classifier weights; then gradients reach down
    changed = []
    for _ in range(4):
        before = parameter.detach().clone()
        ended = probe.micro_batch()
        changed.append((ended, not torch.equal(before, parameter.detach())))
    assert changed == [(False, False), (True, True), (False, False), (True, True)]


def test_the_memory_of_a_step_is_counted_tensor_by_tensor(tiny_backbone: Backbone, stopwatch: Stopwatch) -> None:
    base = UpperBlocks.load(tiny_backbone, 1)
    cost = block_step(base, CODEC, memory(), arrays()[1], LEARN, stopwatch)
    learned = sum(parameter.numel() * 4 for _, parameter in BlockProbe(base, CODEC, LEARN, memory()).adapted.blocks.learned())
    pretrained = sum(parameter.numel() * parameter.element_size() for parameter in base.parameters())
    assert cost.gradients_bytes == learned
    assert cost.optimizer_bytes == 2 * learned
    # Norms of the pretrained blocks are held beside those that learn; everything learned is there twice: one copy answers.
    assert cost.weights_bytes == pretrained + 2 * learned
    assert cost.kept_bytes == pretrained + 4 * learned
    assert cost.transient_bytes >= learned


def test_a_step_of_more_micro_batches_takes_as_much_longer(tiny_backbone: Backbone, stopwatch: Stopwatch) -> None:
    """Sixteen times as many: a machine may be busy, but not that unevenly."""
    base = UpperBlocks.load(tiny_backbone, 2)
    few = block_step(base, CODEC, memory(), arrays()[1], replace(LEARN, sleep_minibatch=8), stopwatch)
    many = block_step(base, CODEC, memory(), arrays()[1], replace(LEARN, sleep_minibatch=128), stopwatch)
    assert many.step.seconds > 2 * few.step.seconds > 0
    assert few.step.repetitions >= 6
    assert few.forward is not None
    assert few.forward.seconds > 0


def test_the_head_alone_counts_weights_gradients_and_two_moments(stopwatch: Stopwatch) -> None:
    cost = head_step(arrays()[0], 3, LEARN, stopwatch)
    weights = 4 * (2 * WIDTH * 256 + 256 + 256 * 3 + 3)
    assert (cost.gradients_bytes, cost.optimizer_bytes, cost.weights_bytes) == (weights, 2 * weights, 2 * weights)
    assert cost.forward is None


def test_second_moments_take_the_square_of_the_width() -> None:
    cost = ridge_cost(256, 5)
    assert cost.kept_bytes == 8 * (256 * 256 + 5 * 256)
    assert cost.transient_bytes >= 0


def test_decoding_takes_time_for_each_latent(stopwatch: Stopwatch) -> None:
    assert decoding(make_codec("int4", "rotated", COUNT, WIDTH), arrays()[1], stopwatch) > 0


def test_the_peak_is_found_although_the_memory_was_given_back() -> None:
    def work() -> None:
        np.ones(8 << 20)

    growth = peak_growth(work)
    assert growth is not None
    assert 60 << 20 < growth < 160 << 20


def test_where_the_peak_cannot_be_read_it_is_unknown_and_the_work_is_done_once(tmp_path: Path) -> None:
    done = []
    assert peak_growth(lambda: done.append(1), proc=tmp_path / "absent") is None
    assert done == [1]


def test_torch_gets_its_threads_back() -> None:
    before = torch.get_num_threads()
    with torch_threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
