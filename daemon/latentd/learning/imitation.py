"""A pruned backbone trained to give what the whole one gives, after the closed-form repair: no labels, gradients, minutes.

The repair moves two layers of a block; the heads that are left can also learn to look elsewhere. All weights of the blocks that the repair
touches are trained, on images varied anew each time they come, so that the tokens after each of these blocks have the direction of those
of the whole: distillation (Hinton et al. 2015) of tokens, each as the LayerNorm behind it reads it. Later blocks are neither run nor
changed, so cuts in early blocks cost little. The class token counts as much as all others together: the answer hangs on it. Blocks whoever
prunes, for half a second an image and core where all blocks are touched. B images, N tokens, D width.
"""

from __future__ import annotations

import math
from typing import List

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from latentd.learning.redundancy import Pixels, Progress, batches, blocks_of
from latentd.learning.repair import touched
from latentd.learning.varied import varied
from latentd.vision.vit import Vit

RATE = 1e-4  # of Adam at its highest; falls to nothing as half a cosine
WARM_STEPS = 30
BETAS = (0.9, 0.99)


def imitate(whole: Vit, pruned: Vit, pixels: Pixels, count: int, progress: Progress) -> None:
    """Trains `pruned` in place on `count` images made of `pixels`, each seen once; 0: not at all. The patch embedding stays as it is."""
    if count == 0:
        return
    depth = touched(whole, pruned)
    trained = [weight for block in list(blocks_of(pruned))[:depth] for weight in block.parameters()]
    optimiser = torch.optim.Adam(trained, lr=RATE, betas=BETAS)
    for weight in trained:
        weight.requires_grad_(True)
    mixed = pixels[np.random.Generator(np.random.PCG64(1)).permutation(len(pixels))]  # a batch of one place would pull to that place
    with torch.enable_grad():
        for first, tokens in batches(whole, varied(mixed, count, seed=1), progress):
            for group in optimiser.param_groups:
                group["lr"] = _rate(first, count)
            loss = _apart(_after(pruned, tokens, depth), _after(whole, tokens, depth))
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    for weight in trained:
        weight.requires_grad_(False)
        weight.grad = None


def _rate(done: int, count: int) -> float:
    """Of the step after `done` of `count` images."""
    return RATE * min(1.0, (done / 8 + 1) / WARM_STEPS) * (1 + math.cos(math.pi * done / count)) / 2


def _after(vit: Vit, tokens: Tensor, depth: int) -> List[Tensor]:
    """The tokens after each of the first `depth` blocks, (B, N, D), in standard deviations of the token."""
    found = []
    for block in list(blocks_of(vit))[:depth]:
        tokens = block(tokens)
        found.append(F.layer_norm(tokens, tokens.shape[-1:]))
    return found


def _apart(found: List[Tensor], wanted: List[Tensor]) -> Tensor:
    """Mean square of what is missing: of the class token, and of all others."""
    missing = [(one - other).square().mean(dim=-1) for one, other in zip(found, wanted)]  # (B, N) a block
    return torch.stack([each[:, 0].mean() + each[:, 1:].mean() for each in missing]).mean()
