"""When the blocks above the split sleep, and how much they learn each time. Plain values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from latentd.config import LearnConfig

WARM_UP = 10  # training steps
LAST_RATE = 0.05  # of the learning rate, at the end of a sleep


@dataclass(frozen=True)
class SleepSettings:
    """first, growth: a sleep is due after `first` new samples, and then whenever what was learned has grown by this share.

    epochs: how often one sleep goes over the samples with tokens. minibatch: of them, in one step. microbatch: latents whose activations
    are held at a time. rank: of the change of every matrix. learning_rate: of that change, and four times it of the classifier that
    teaches the blocks and is thrown away afterwards.
    """

    first: int
    growth: float
    epochs: float
    minibatch: int
    microbatch: int
    rank: int
    learning_rate: float
    label_smoothing: float
    seed: int

    @staticmethod
    def of(learn: LearnConfig, blocks: int) -> SleepSettings:
        """blocks: how many learn."""
        return SleepSettings(
            first=learn.sleep_first,
            growth=learn.sleep_growth,
            epochs=learn.sleep_epochs,
            minibatch=learn.sleep_minibatch,
            microbatch=microbatch(learn, blocks),
            rank=learn.sleep_rank,
            learning_rate=learn.sleep_rate,
            label_smoothing=learn.label_smoothing,
            seed=learn.seed,
        )


def microbatch(learn: LearnConfig, blocks: int) -> int:
    """Latents that go through so many blocks at once. The last block computes little with its matrices, so that reading them for more
    latents at once saves time; any other computes every token, and more at once only take more memory."""
    return learn.microbatch or (16 if blocks == 1 else 4)


def rate(step: int, steps: int) -> float:
    """Share of the learning rate at this step: a short warm-up, then half a cosine (Loshchilov & Hutter 2017)."""
    cosine = 0.5 * (1 + float(np.cos(np.pi * step / steps)))
    return min(1.0, (step + 1) / WARM_UP) * (LAST_RATE + (1 - LAST_RATE) * cosine)
