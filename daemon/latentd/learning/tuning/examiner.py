"""Asks candidates of one split on the same samples, divided once: the same questions for all. Blocks its caller for seconds to minutes.

The blocks of a split sleep once, on latents as the first codec stores them, as the daemon lets them; every codec then has the head
refitted on its own latents. A sleep for every codec would take as many times as long, for a difference that a few hundred questions
can't show.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Callable, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from numpy.typing import NDArray

from latentd.config import LearnConfig
from latentd.learning.adapted import Adapted
from latentd.learning.blocks import UpperBlocks
from latentd.learning.sleep import SleepSettings
from latentd.learning.tuning.samples import Latents, Tokens
from latentd.learning.tuning.trial import Answers, answers, divide, fitted, spans
from latentd.replay.latents import LatentCodec
from latentd.replay.memory import ReplayMemory, slot_bytes
from latentd.replay.packing import Bytes

_CHUNK = 8  # token matrices that are in memory as float32 at a time


class Slept(NamedTuple):
    """How much the blocks were trained: epochs over the taught latents, mini-batches, seconds with the refit."""

    epochs: float
    steps: int
    seconds: float


class Examiner:
    """Holds the division of the samples; see the module docstring. class_ids: (M,). sleep_s: time that one sleep may train."""

    def __init__(
        self, class_ids: NDArray[np.int64], learn: LearnConfig, sleep_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.division = divide(class_ids)
        self._learn, self._sleep_s, self._clock = learn, sleep_s, clock
        self._taught_ids, self._asked_ids = class_ids[self.division.taught], class_ids[self.division.asked]

    def ask_head(self, codecs: Sequence[LatentCodec], features: NDArray[np.float32]) -> List[Answers]:
        """The head on frozen features (M, m * D): taught ones as each codec stores them, asked ones as the frozen stage gives them."""
        found = []
        for codec in codecs:
            stored = codec.decode_features(codec.encode(features[self.division.taught]))
            found.append(answers(fitted(stored, self._taught_ids), features[self.division.asked], self._asked_ids))
        return found

    def ask_blocks(self, codecs: Sequence[LatentCodec], latents: Latents, base: UpperBlocks, step_s: float) -> Tuple[List[Answers], Slept]:
        """The head on what the blocks give for tokens as they are stored, after a sleep. step_s: what one mini-batch takes here."""
        assert latents.tokens is not None, "blocks are asked with tokens"
        adapted, slept = self._sleep(codecs[0], latents, base, step_s)
        assert adapted.serving is not None, "a sleep that was not broken off serves"
        blocks, tokens = adapted.serving, latents.tokens
        fresh = _through(blocks, tokens, self.division.asked)
        found = [answers(adapted.head(), fresh, self._asked_ids)]
        for codec in codecs[1:]:
            head = fitted(_through(blocks, tokens, self.division.taught, codec), self._taught_ids)
            found.append(answers(head, fresh, self._asked_ids))
        return found, slept

    def _sleep(self, codec: LatentCodec, latents: Latents, base: UpperBlocks, step_s: float) -> Tuple[Adapted, Slept]:
        """Lets the blocks sleep on a memory of all taught latents, for as many of the configured epochs as fit the time."""
        codes, count = self._codes(codec, latents), len(self.division.taught)
        memory = ReplayMemory(str(codec), codec.code_bytes, count * slot_bytes(codec.code_bytes), self._learn.seed)
        for place, (code, class_id) in enumerate(zip(codes, self._taught_ids.tolist())):
            memory.admit(f"t{place}", class_id, code.tobytes())
        affordable = self._sleep_s / max(step_s, 1e-9) * self._learn.sleep_minibatch / count
        settings = replace(SleepSettings.of(self._learn, len(base.blocks)), epochs=min(max(self._learn.sleep_epochs, 1.0), affordable))
        adapted, started = Adapted(base, codec, settings), self._clock()
        for _ in adapted.sleep(memory, {}, count):
            pass
        steps = adapted.steps(memory)
        return adapted, Slept(steps * settings.minibatch / count, steps, self._clock() - started)

    def _codes(self, codec: LatentCodec, latents: Latents) -> Bytes:
        """Of the taught latents; few tokens are in memory as float32 at a time."""
        places, tokens = self.division.taught, latents.tokens
        assert tokens is not None, "blocks are asked with tokens"
        parts = [
            codec.encode(latents.features[places[span]], tokens[places[span]].astype(np.float32)) for span in spans(len(places), _CHUNK)
        ]
        return np.concatenate(parts)


def _through(blocks: UpperBlocks, tokens: Tokens, places: NDArray[np.intp], codec: Optional[LatentCodec] = None) -> NDArray[np.float32]:
    """What the blocks give for these tokens (P, 2 * D): as they are, or as a codec gives them back."""
    found = []
    for span in spans(len(places), _CHUNK):
        exact = tokens[places[span]].astype(np.float32)
        stored = exact if codec is None or codec.tokens is None else codec.tokens.decode(codec.tokens.encode(exact))
        found.append(blocks.features(stored))
    return np.concatenate(found)
