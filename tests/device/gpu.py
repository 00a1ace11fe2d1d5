"""What the tests on a GPU work with: a model of the usual size, latents of it, and a GPU that is nearly full."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

import tiny
from latentd.engines.stage import StageSpec
from latentd.replay.latents import TokenPool, make_latent_codec
from latentd.replay.memory import ReplayMemory
from latentd.vision import checkpoints
from latentd.vision.shape import VitShape
from latentd.vision.vit import Vit

SMALL = VitShape(width=384, heads=(6,) * 12, mlp_width=(1536,) * 12, patch=16, grid=14)  # ViT-S/16 at 224 pixels
SPLIT, CLASS_TOKENS = 9, 4
POOLED = TokenPool(1, 14, 14)
LARGE = make_latent_codec("int8", "token", (CLASS_TOKENS, SMALL.width), (POOLED.tokens, SMALL.width), pool=POOLED)


class Model(NamedTuple):
    """A ViT-S with random weights: as much work and memory as the real one, and nothing to fetch."""

    vit: Vit
    spec: StageSpec
    backbone: checkpoints.Backbone

    def pixels(self, count: int) -> NDArray[np.uint8]:
        return tiny.pixels(count, self.spec.image_size)


def large_memory() -> ReplayMemory:
    """256 latents of eight classes, of the size that the model gives."""
    memory = ReplayMemory(str(LARGE), LARGE.code_bytes, 1 << 26, seed=0)
    rng = np.random.default_rng(0)
    for number in range(256):
        tokens = rng.standard_normal((1, POOLED.tokens, SMALL.width)).astype(np.float32)
        features = tokens[:, :CLASS_TOKENS].reshape(1, -1)
        memory.admit(f"s{number:08d}", number % 8, bytes(LARGE.encode(features, tokens)[0]))
    return memory


def leave_free(size_bytes: int) -> None:
    """Lets torch reserve so much more than it holds now, as if everything else were taken."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + size_bytes) / total))
