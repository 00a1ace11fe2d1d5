"""Reading a replay mini-batch beside the training step that it feeds, and that step beside the same one in bare PyTorch.

    OMP_NUM_THREADS=1 python benchmarks/codec_step.py [--rounds 40] [--split 11] [--microbatch 4]

Other settings are those of benchmarks/vitlr.py. In every round, on one thread, each of these runs once: drawing a mini-batch and decoding
it micro-batch by micro-batch; the daemon's own training step (Adapted.sleep) on latents that are decoded already; the same step as the
papers have it and anybody would write it, with float32 matrices in torch.nn.Linear and keys and values of every token; and the daemon's
step that reads for itself, which finds less in the core's cache than reading alone. Prints JSON: medians in milliseconds, and medians of
the rounds' ratios.
Run by benchmarks/codec.py in a process of its own, because BLAS takes its number of threads from the environment.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from typing import Any, Callable, Dict, List, Optional, Tuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

import vitlr
from latentd import config
from latentd.learning.adapted import Adapted
from latentd.learning.blocks import RankedBlocks, UpperBlocks
from latentd.learning.sleep import SleepSettings
from latentd.replay.latents import LatentCodec, make_latent_codec
from latentd.replay.memory import ReplayMemory
from latentd.replay.records import sample_id_of
from latentd.vision import checkpoints

CLASSES = 50
STORED = 256  # latents in the memory: more than a core's cache holds
LOT = 16  # of them different
WARM_UP = 3  # rounds


class Decoded(LatentCodec):
    """A codec that has its answers at hand: what a step takes without it."""

    def __init__(self, codec: LatentCodec, tokens: NDArray[np.float32]) -> None:
        super().__init__(codec.features, codec.tokens)
        self._at_hand = tokens

    def decode_tokens(self, codes: NDArray[np.uint8], rotated: bool = False) -> NDArray[np.float32]:
        return self._at_hand[: len(codes)]


class Plain(nn.Module):
    """A linear layer and its change of low rank, as anybody would write them."""

    def __init__(self, inward: int, outward: int, rank: int) -> None:
        super().__init__()
        self.whole = nn.Linear(inward, outward).requires_grad_(False)
        self.inward = nn.Parameter(torch.randn(inward, rank) / inward**0.5)
        self.outward = nn.Parameter(torch.zeros(rank, outward))

    def forward(self, tokens: Tensor) -> Tensor:
        return cast(Tensor, self.whole(tokens)) + (tokens @ self.inward) @ self.outward


class PlainBlocks(RankedBlocks):
    """The same blocks in the order of the papers: keys and values of all tokens, then the class token's attention to them."""

    def __init__(self, base: UpperBlocks, rank: int, seed: int) -> None:
        super().__init__(base, rank, seed)
        for block in self.blocks:
            for name in ("qkv", "proj", "fc1", "fc2"):
                linear = getattr(block, name).linear
                setattr(block, name, Plain(linear.in_features, linear.out_features, rank))

    def forward(self, tokens: Tensor, basis: Optional[Tensor] = None) -> Tensor:
        assert basis is None, "nobody but latentd leaves tokens rotated"
        seen: List[Tensor] = []
        for block in self.blocks[:-1]:
            tokens = block(tokens)
            seen.append(tokens[:, :1])
        seen.append(self.blocks[-1](tokens, 1))
        class_tokens = cast(Tensor, self.norm(torch.cat(seen, dim=1)))
        return torch.cat([class_tokens.flatten(1), self.norm(tokens[:, self.lead :]).mean(dim=1)], dim=1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--split", type=int, default=11)
    parser.add_argument("--microbatch", type=int, default=4)
    arguments = parser.parse_args()
    json.dump(measured(arguments.rounds, {"backbone.split": arguments.split, "learn.microbatch": arguments.microbatch}), sys.stdout)
    return 0


def measured(rounds: int, chosen: Dict[str, int]) -> Dict[str, Any]:
    torch.set_num_threads(1)
    settings = config.load(os.environ, {**vitlr.PROFILE, "learn.sleep_epochs": 100.0, **chosen})
    split = settings.backbone.split
    backbone = checkpoints.find(settings.cache_dir, settings.backbone.name)
    learn, shape = settings.learn, backbone.shape
    count = shape.tokens(settings.backbone.image_size)
    features = (settings.backbone.class_tokens, shape.width)
    codec = make_latent_codec(learn.token_codec, learn.token_codec_kind, features, (count, shape.width), seed=learn.seed)
    base = UpperBlocks.load(backbone, split)
    memory, tokens = _filled(codec, (count, shape.width))
    calls = [
        _reading(codec, memory, learn),
        _learning(Decoded(codec, tokens), memory, base, learn),
        _bare(base, tokens, learn),
        _learning(codec, memory, base, learn),
    ]
    seconds: List[List[float]] = [_round(calls) for _ in range(WARM_UP + rounds)][WARM_UP:]
    reads, steps, bare, whole = (1e3 * statistics.median(column) for column in zip(*seconds))
    return {
        "settings": f"split {split}, {codec.tokens.spec if codec.tokens else ''}, {count} x {shape.width} tokens, "
        f"mini-batch {learn.sleep_minibatch}, micro-batch {learn.microbatch}",
        "rounds": rounds,
        "read_ms": reads,
        "step_ms": steps,
        "bare_step_ms": bare,
        "whole_step_ms": whole,
        "read_share": statistics.median(read / step for read, step, _, _ in seconds),
        "read_share_of_bare": statistics.median(read / plain for read, _, plain, _ in seconds),
        "whole_against_bare": statistics.median(both / plain for _, _, plain, both in seconds),
        "against_bare": statistics.median(step / plain for _, step, plain, _ in seconds),
    }


def _filled(codec: LatentCodec, shape: Tuple[int, int]) -> Tuple[ReplayMemory, NDArray[np.float32]]:
    """A memory of STORED latents, and the tokens of one micro-batch or more. Their values don't matter to any time."""
    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((LOT, *shape), dtype=np.float32)
    spec = codec.features.spec
    codes = codec.encode(rng.standard_normal((LOT, spec.tokens * spec.width), dtype=np.float32), tokens)
    memory = ReplayMemory(str(codec), codec.code_bytes, STORED * (codec.code_bytes + 64), seed=0)
    for place in range(STORED):
        memory.admit(sample_id_of(place + 1), place % CLASSES, codes[place % len(codes)].tobytes())
    return memory, tokens


def _reading(codec: LatentCodec, memory: ReplayMemory, learn: config.LearnConfig) -> Callable[[], None]:
    rng = np.random.default_rng(0)

    def read() -> None:
        codes, _ = memory.draw(learn.sleep_minibatch, rng)
        for start in range(0, len(codes), learn.microbatch):
            codec.decode_tokens(codes[start : start + learn.microbatch], rotated=True)

    return read


def _learning(codec: LatentCodec, memory: ReplayMemory, base: UpperBlocks, learn: config.LearnConfig) -> Callable[[], None]:
    """As many of a sleep's micro-steps as a mini-batch has."""
    sleep = Adapted(base, codec, SleepSettings.of(learn, len(base.blocks))).sleep(memory, {}, memory.used)

    def step() -> None:
        for _ in range(0, learn.sleep_minibatch, learn.microbatch):
            next(sleep)

    return step


def _bare(base: UpperBlocks, tokens: NDArray[np.float32], learn: config.LearnConfig) -> Callable[[], None]:
    blocks = PlainBlocks(base, learn.sleep_rank, learn.seed)
    classifier = nn.Linear(blocks.features_width, CLASSES)
    learned = [parameter for parameter in [*blocks.parameters(), *classifier.parameters()] if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=learn.sleep_rate, weight_decay=0.01)
    latents = torch.from_numpy(tokens[: learn.microbatch])
    targets = torch.arange(learn.microbatch) % CLASSES

    def step() -> None:
        for _ in range(0, learn.sleep_minibatch, learn.microbatch):
            loss = functional.cross_entropy(classifier(blocks(latents)), targets, label_smoothing=learn.label_smoothing, reduction="sum")
            torch.autograd.backward(loss / learn.sleep_minibatch)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _round(calls: List[Callable[[], None]]) -> List[float]:
    """Seconds of each call."""
    found = []
    for call in calls:
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return found


if __name__ == "__main__":
    sys.exit(main())
