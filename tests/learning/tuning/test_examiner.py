from __future__ import annotations

from dataclasses import replace
from typing import List, Tuple

import numpy as np
import pytest

import tiny
from latentd.config import LearnConfig
from latentd.learning.blocks import UpperBlocks
from latentd.learning.tuning.examiner import Examiner
from latentd.learning.tuning.samples import Latents
from latentd.replay.latents import LatentCodec, make_latent_codec
from latentd.vision.checkpoints import Backbone

LEARN = replace(LearnConfig(), sleep_minibatch=8, microbatch=4, sleep_rank=4, sleep_epochs=2.0)
WIDTH, TOKENS = tiny.DINOV2.width, 10
IDS = np.repeat(np.array([3, 5, 8]), 20)
FEATURES = (2, WIDTH)


def codecs(*names: str, tokens: bool) -> List[LatentCodec]:
    return [make_latent_codec(name, "rotated", FEATURES, (TOKENS, WIDTH) if tokens else None) for name in names]


@pytest.fixture
def latents() -> Latents:
    """Class by class around a point of its own, in features and tokens alike."""
    dice = np.random.default_rng(0)
    centres = dice.standard_normal((3, 1, TOKENS, WIDTH))
    tokens = np.concatenate([centre + 0.3 * dice.standard_normal((20, TOKENS, WIDTH)) for centre in centres])
    return Latents(tokens[:, :2].reshape(60, -1).astype(np.float32), tokens.astype(np.float16))


def test_every_codec_of_the_head_answers_the_same_questions(latents: Latents) -> None:
    examiner = Examiner(IDS, LEARN, sleep_s=1.0)
    found = examiner.ask_head(codecs("int8", "int2", tokens=False), latents.features)
    assert [(each.score.correct, each.score.count, len(each.right)) for each in found] == [(15, 15, 15)] * 2


def test_labels_that_mean_nothing_are_answered_by_chance(latents: Latents) -> None:
    """The head must not see what it is asked: on shuffled labels it would still be right."""
    shuffled = np.random.default_rng(1).permutation(IDS)
    (found,) = Examiner(shuffled, LEARN, sleep_s=1.0).ask_head(codecs("int8", tokens=False), latents.features)
    assert found.score.ratio is not None
    assert found.score.ratio < 0.8


def asked(backbone: Backbone, latents: Latents, sleep_s: float, step_s: float) -> Tuple[List[int], float, int]:
    examiner = Examiner(IDS, LEARN, sleep_s)
    found, slept = examiner.ask_blocks(codecs("int8", "int3", tokens=True), latents, UpperBlocks.load(backbone, 1), step_s)
    return [each.score.correct for each in found], slept.epochs, slept.steps


def test_the_blocks_sleep_as_configured_where_there_is_time(tiny_backbone: Backbone, latents: Latents) -> None:
    correct, epochs, steps = asked(tiny_backbone, latents, sleep_s=1e6, step_s=0.01)
    assert steps == 11  # two epochs over 45 latents in mini-batches of eight
    assert epochs == pytest.approx(11 * 8 / 45)
    assert min(correct) >= 13


def test_a_sleep_is_as_short_as_the_time_that_a_step_takes_allows(tiny_backbone: Backbone, latents: Latents) -> None:
    assert asked(tiny_backbone, latents, sleep_s=3.0, step_s=1.0)[2] == 3
    assert asked(tiny_backbone, latents, sleep_s=1.0, step_s=50.0)[2] == 1


def test_the_same_samples_give_the_same_answers(tiny_backbone: Backbone, latents: Latents) -> None:
    assert asked(tiny_backbone, latents, 2.0, 1.0) == asked(tiny_backbone, latents, 2.0, 1.0)
