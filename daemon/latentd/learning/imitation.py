"""A pruned backbone trained to give the features of the whole one, after the closed-form repair: gradients, minutes, no more labels than
the head on top has learned from.

The repair moves two layers of a block; the heads that are left can also learn to look elsewhere. Blocks and the last norm are trained so
that the features come near to the whole's: distillation (Hinton et al. 2015) of features, in the distance by which the closed-form head
tells classes apart (Mahalanobis, `RidgeSums.metric`): in plain distance a few loud directions weigh most, which that head ignores. Blocks
whoever prunes, for about a third of a second of one core an image and pass. n images, B of them at once, F features.
"""

from __future__ import annotations

import math
from typing import List

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from latentd.learning.redundancy import Pixels, Progress, blocks_of, embedded, features_of
from latentd.vision.vit import Vit

RATE = 2e-5  # of Adam at its highest; falls to nothing as half a cosine
BATCH = 16
AT_ONCE = 4  # images whose intermediate values are in memory: 0.1 GB each for a ViT-S at 224 pixels
WARM_STEPS = 10
BETAS = (0.9, 0.98)


def imitate(
    pruned: Vit, pixels: Pixels, wanted: NDArray[np.float32], metric: NDArray[np.float32], epochs: float, progress: Progress, seed: int = 0
) -> None:
    """Trains `pruned` in place; the patch embedding stays as it is. 0 epochs: nothing changes.

    wanted: (n, F) what the whole gives for the images; metric: (F, F), a difference of features times it is as long as it is far.
    """
    steps = steps_of(len(pixels), epochs)
    trained = trained_of(pruned)
    optimiser = torch.optim.Adam(trained, lr=RATE, betas=BETAS)
    far = torch.from_numpy(metric).to(trained[0])
    class_tokens = wanted.shape[1] // pruned.shape.width
    order: List[int] = []
    random = np.random.Generator(np.random.PCG64(seed))
    for weight in trained:
        weight.requires_grad_(True)
    with torch.enable_grad():
        for step in range(steps):
            while len(order) < BATCH:
                order += random.permutation(len(pixels)).tolist()
            chosen, order = order[:BATCH], order[BATCH:]
            for group in optimiser.param_groups:
                group["lr"] = _rate(step, steps)
            optimiser.zero_grad()
            for start in range(0, BATCH, AT_ONCE):
                some = chosen[start : start + AT_ONCE]
                missing = _features(pruned, pixels[some], class_tokens) - torch.from_numpy(wanted[some]).to(far)
                ((missing @ far).square().mean() * len(some) / BATCH).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            progress(len(chosen))
    for weight in trained:
        weight.requires_grad_(False)
        weight.grad = None


def steps_of(images: int, epochs: float) -> int:
    """Batches that so many passes over so many images make: one at least, where there is to be any."""
    return max(1, round(epochs * images / BATCH)) if epochs > 0 else 0


def trained_of(vit: Vit) -> List[nn.Parameter]:
    """Of all blocks, and the norm behind the last."""
    return [weight for part in (*blocks_of(vit), vit.norm) for weight in part.parameters()]


def _features(vit: Vit, pixels: Pixels, class_tokens: int) -> Tensor:
    """(B, F), with a gradient."""
    tokens, after = embedded(vit, pixels), []
    for block in blocks_of(vit):
        tokens = block(tokens)
        after.append(tokens)
    return features_of(vit, after, class_tokens)


def _rate(step: int, steps: int) -> float:
    return RATE * min(1.0, (step + 1) / WARM_STEPS) * (1 + math.cos(math.pi * step / steps)) / 2
