"""Latents, memories and settings small enough to sleep on in a test."""

from __future__ import annotations

from typing import Dict, Iterator, Tuple

import numpy as np
from numpy.typing import NDArray

from latentd.learning.sleep import SleepSettings
from latentd.replay.latents import LatentCodec, TokenPool, make_latent_codec
from latentd.replay.memory import ReplayMemory

D, SIDE = 128, 6
POOL = TokenPool(1, SIDE, 3)
CODEC = make_latent_codec("int8", "spatial", (2, D), (POOL.tokens, D), pool=POOL)
SETTINGS = SleepSettings(
    first=8, growth=0.5, epochs=4.0, minibatch=16, microbatch=4, rank=4, learning_rate=3e-3, label_smoothing=0.1, seed=0
)


def latent(class_id: int, number: int) -> Tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Features and tokens of a picture: what tells the classes apart stands in one patch, at another place each time."""
    rng = np.random.default_rng([class_id, number])
    tokens = rng.standard_normal((POOL.tokens, D)).astype(np.float32)
    tokens[1 + rng.integers(POOL.tokens - 1)] += 2 * np.random.default_rng(class_id).standard_normal(D).astype(np.float32)
    return tokens[:2].reshape(-1), tokens


def code(class_id: int, number: int, codec: LatentCodec = CODEC) -> bytes:
    features, tokens = latent(class_id, number)
    return bytes(codec.encode(features[None], tokens[None])[0])


def filled(samples: int, first_id: int = 0) -> ReplayMemory:
    memory = ReplayMemory(str(CODEC), CODEC.code_bytes, 1 << 22, seed=0)
    for number in range(samples):
        memory.admit(f"s{first_id + number:08d}", number % 2, code(number % 2, number))
    return memory


def held(count: int = 40) -> Dict[str, Tuple[int, bytes]]:
    return {f"h{number:08d}": (number % 2, code(number % 2, 1000 + number)) for number in range(count)}


def run(sleep: Iterator[int]) -> int:
    return sum(1 for _ in sleep)
