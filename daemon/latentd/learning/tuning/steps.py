"""What one training step costs: of the head alone, and of the blocks above a split as they sleep; and what the sums under both take.

Everything is the daemon's own code, run on noise-free probe latents. Blocks its caller.
"""

from __future__ import annotations

import math
import statistics
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Callable, Iterator, List, NamedTuple, Optional

import numpy as np
import torch
from numpy.typing import NDArray

from latentd.config import LearnConfig
from latentd.engines.onnx import usable_cores
from latentd.learning.adapted import Adapted
from latentd.learning.adaptive import AdaptiveHead
from latentd.learning.analytic import RidgeSums
from latentd.learning.blocks import UpperBlocks, parameter_bytes
from latentd.learning.sleep import SleepSettings
from latentd.learning.tuning.footprint import peak_growth
from latentd.learning.tuning.stopwatch import LEAST, Stopwatch, Timing
from latentd.replay.codec import Codec
from latentd.replay.latents import LatentCodec
from latentd.replay.memory import ReplayMemory, slot_bytes

_PROBED = 8  # latents that a codec is timed on
_AHEAD = 1 << 16  # mini-batches: more than any box holds


@dataclass(frozen=True)
class StepCost:
    """A training step on this device.

    step: of a whole mini-batch, latents decoded from the codec that was given; micro-batches are alike, so as many are timed as fit the
    box, and `repetitions` counts those. forward: one latent on its way to an answer; None where no blocks learn. weights_bytes: what
    learning holds between steps (pretrained blocks and the learned change, twice where one copy answers). gradients_bytes,
    optimizer_bytes: counted tensors. peak_bytes: by how much memory grew while all but the pretrained blocks was made and stepped; None
    where the system can't tell.
    """

    step: Timing
    forward: Optional[Timing]
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    peak_bytes: Optional[int]
    peak_kept_bytes: int

    @property
    def kept_bytes(self) -> int:
        """Held between two steps."""
        return self.weights_bytes + self.optimizer_bytes

    @property
    def transient_bytes(self) -> int:
        """Gradients, activations and whatever else lives during a step only; at least the gradients."""
        return max(self.gradients_bytes, (self.peak_bytes or 0) - self.peak_kept_bytes)


class RidgeCost(NamedTuple):
    """Of streaming sums of one width: bytes held, and the further ones that solving takes at its peak (an estimate where unmeasurable)."""

    kept_bytes: int
    transient_bytes: int


class BlockProbe:
    """The blocks above a split, made to sleep on a memory of one mini-batch, one micro-batch at a time.

    A mini-batch here is two micro-batches, so that every second one ends with the optimizer's update; both kinds are timed apart.
    """

    def __init__(self, base: UpperBlocks, codec: LatentCodec, learn: LearnConfig, memory: ReplayMemory) -> None:
        settings = SleepSettings.of(learn, len(base.blocks))
        micro = min(settings.microbatch, learn.sleep_minibatch)
        settings = replace(settings, minibatch=2 * micro, microbatch=micro, epochs=float(_AHEAD))
        self.adapted = Adapted(base, codec, settings)
        self._work = self.adapted.sleep(memory, {}, memory.used)
        self._parity = 0
        next(self._work)  # up to the first micro-batch

    def micro_batch(self) -> bool:
        """Does the next one; True where it ended with an update."""
        next(self._work)
        self._parity ^= 1
        return not self._parity


def filled(codec: LatentCodec, features: NDArray[np.float32], tokens: NDArray[np.float32], classes: int, count: int) -> ReplayMemory:
    """A memory of `count` latents like these (M, ...), in turn of so many classes."""
    codes = codec.encode(features, tokens)
    memory = ReplayMemory(str(codec), codec.code_bytes, count * slot_bytes(codec.code_bytes), 0)
    for place in range(count):
        memory.admit(f"p{place}", place % classes, codes[place % len(codes)].tobytes())
    return memory


def block_step(
    base: UpperBlocks, codec: LatentCodec, memory: ReplayMemory, tokens: NDArray[np.float32], learn: LearnConfig, stopwatch: Stopwatch
) -> StepCost:
    """The blocks, learning from a memory that `filled` made; tokens: (M, N, D) like those in it."""
    made: List[BlockProbe] = []

    def life() -> None:
        made[:] = [BlockProbe(base, codec, learn, memory)]
        for _ in range(4):  # after the first update there are gradients, optimizer state and activations at once
            made[0].micro_batch()

    with torch_threads(learn.sleep_threads or usable_cores()):
        life()  # libraries set up their own caches on first use
        made.clear()
        peak = peak_growth(life)
        step = _timed(made[0], math.ceil(learn.sleep_minibatch / made[0].adapted.microbatch), stopwatch)
    serving = made[0].adapted.blocks.frozen()
    # In the decode pool, whose threads compute with all cores.
    forward = stopwatch.time(lambda: serving.features(tokens[:1]))
    learned = sum(parameter.numel() * parameter.element_size() for _, parameter in made[0].adapted.blocks.learned())
    weights = parameter_bytes([base, made[0].adapted.blocks, serving])
    return StepCost(step, forward, weights, learned, 2 * learned, peak, peak_kept_bytes=3 * learned)


def _timed(probe: BlockProbe, per_step: int, stopwatch: Stopwatch, clock: Callable[[], float] = time.perf_counter) -> Timing:
    """A whole mini-batch of `per_step` micro-batches and one update."""
    plain: List[float] = []
    updating: List[float] = []
    with stopwatch.joulemeter.stretch() as stretch:
        end = clock() + stopwatch.box_s
        while len(updating) < LEAST or clock() < end:
            started = clock()
            (updating if probe.micro_batch() else plain).append(clock() - started)
    micro_s = statistics.median(plain)
    seconds = per_step * micro_s + max(0.0, statistics.median(updating) - micro_s)
    return Timing(seconds, len(plain) + len(updating), stretch.power_w)


def head_step(features: NDArray[np.float32], classes: int, learn: LearnConfig, stopwatch: Stopwatch) -> StepCost:
    """The trained head on mini-batches of features like these (M, F)."""
    batch = np.resize(features, (learn.minibatch, features.shape[1]))
    ids = [place % classes for place in range(learn.minibatch)]
    rng = np.random.Generator(np.random.PCG64(0))
    made: List[AdaptiveHead] = []

    def life() -> None:
        head = AdaptiveHead(batch.mean(axis=0), batch.std(axis=0), learning_rate=1e-3, label_smoothing=0.1, seed=0)
        head.grow(range(classes))
        head.train_step(batch, ids, rng)
        made[:] = [head]

    with torch_threads(1):  # as the learner does it
        life()
        made.clear()
        peak = peak_growth(life)
        step = stopwatch.time(lambda: made[0].train_step(batch, ids, rng))
    sizes = {name: array.nbytes for name, array in made[0].state().items()}
    weights = sum(size for name, size in sizes.items() if name.startswith("head.weight"))
    # The snapshot that answers holds a copy of the weights.
    return StepCost(step, None, 2 * weights, weights, 2 * weights, peak, peak_kept_bytes=3 * weights)


def ridge_cost(width: int, classes: int) -> RidgeCost:
    """Second-moment sums of features of this width, filled with noise and solved once."""
    rng = np.random.Generator(np.random.PCG64(0))
    noise = rng.standard_normal((2 * classes, width)).astype(np.float32)
    sums = RidgeSums(width)
    sums.add(noise, [place % classes for place in range(2 * classes)])
    sums.solve()
    growth = peak_growth(sums.solve)
    return RidgeCost(sums.gram.nbytes + sums.sums.nbytes, 2 * sums.gram.nbytes if growth is None else growth)


def decoding(codec: Codec, latents: NDArray[np.float32], stopwatch: Stopwatch) -> float:
    """Seconds that decoding one latent (N, D) takes as training does it, from a batch of latents like these (M, N, D)."""
    codes = codec.encode(np.resize(latents, (_PROBED, *latents.shape[1:])))
    return stopwatch.time(lambda: codec.decode_rotated(codes)).seconds / len(codes)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """So many threads for torch's operators inside the `with`."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
