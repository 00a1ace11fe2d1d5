"""latentd itself as a method: the daemon's own Trainer, codec and gate, taught the entries that its journal would hand over.

Also the joint discriminant: the daemon's ridge sums over every training frame, unquantized, none held out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Dict, Optional

import numpy as np

from latentd.config import LearnConfig
from latentd.learning.analytic import LinearHead, RidgeSums
from latentd.learning.snapshot import Snapshot
from latentd.learning.trainer import Trainer, TrainerSettings
from latentd.replay.latents import LatentCodec, make_latent_codec
from latentd.replay.records import Entry, sample_id_of
from methods.protocol import Latents, Lesson, Scores


class Latentd:
    """The learner with its shipped settings, without HTTP, journal and clock: the same entries give the same weights.

    tokens: class tokens in a feature vector. codec: None makes the configured one. floor_only: the closed-form head alone, no trained one.
    """

    every = 1

    def __init__(
        self, classes: int, learn: LearnConfig, width: int, tokens: int, codec: Optional[LatentCodec] = None, floor_only: bool = False
    ) -> None:
        self._classes, self._learn = classes, learn
        self._codec = codec or make_latent_codec(learn.codec, learn.codec_kind, (tokens, width // tokens), seed=learn.seed)
        settings = TrainerSettings.of(learn)
        self.trainer = Trainer(self._codec, width, replace(settings, epochs=0.0) if floor_only else settings)
        self._samples = np.zeros(classes, np.int64)
        self._held = np.zeros(classes, np.int64)
        self._seq = 0
        self._last: Optional[Snapshot] = None
        if floor_only:
            self.every = 10  # it differs from the whole learner only where the gate lets the trained head in

    def learn(self, lesson: Lesson) -> None:
        codes = self._codec.encode(lesson.features)
        first = self._seq + 1
        batch = [self._entry(first, label, code.tobytes()) for label, code in zip(lesson.labels.tolist(), codes)]
        for _ in self.trainer.take(batch):
            pass
        self._last = None

    def settle(self) -> None:
        names = {label: str(label) for label in np.flatnonzero(self._samples).tolist()}
        self._last = self.trainer.candidate(names, 0.0)[0]

    @property
    def snapshot(self) -> Snapshot:
        """What the daemon would publish now."""
        assert self._last is not None, "settle comes before scores"
        return self._last

    def scores(self, features: Latents) -> Scores:
        snapshot = self.snapshot
        scores = np.full((len(features), self._classes), -np.inf)
        scores[:, list(snapshot.class_ids)] = snapshot.predict(features)
        return scores

    def size_bytes(self) -> int:
        """Replay memory, hold-out, and everything that a checkpoint holds."""
        arrays, _ = self.trainer.state()
        return self.trainer.memory.used_bytes + self.trainer.holdout_bytes() + sum(array.nbytes for array in arrays.values())

    def notes(self) -> Dict[str, Any]:
        memory, snapshot = self.trainer.memory, self.snapshot
        return {
            "codec": str(self._codec),
            "latents": memory.used,
            "replay_bytes": memory.used_bytes,
            "trained_head_weight": snapshot.weight,
            "verdict": self.trainer.last_verdict.reason if self.trainer.last_verdict else None,
        }

    def _entry(self, first: int, label: int, code: bytes) -> Entry:
        """The next sample of the log, held out of training by the journal's rule."""
        self._seq += 1
        every, held = self._learn.holdout_every, int(self._held[label])
        holdout = every > 0 and held < self._learn.holdout_per_class and (held + 1) * every <= self._samples[label] + 1
        self._samples[label] += 1
        self._held[label] += int(holdout)
        return Entry(self._seq, "sample", first, sample_id_of(self._seq), label, None, bool(holdout), code, 0.0)


class JointDiscriminant:
    """The daemon's closed-form head on everything at once: order-free, so also the bound of what its stream can reach."""

    every = 1 << 30

    def __init__(self, classes: int, width: int) -> None:
        self._classes, self._sums = classes, RidgeSums(width)
        self._head: Optional[LinearHead] = None

    def learn(self, lesson: Lesson) -> None:
        self._sums.add(lesson.features, lesson.labels.tolist())

    def settle(self) -> None:
        self._head = self._sums.solve()

    def scores(self, features: Latents) -> Scores:
        head = self._head
        assert head is not None, "settle comes before scores"
        scores = np.full((len(features), self._classes), -np.inf)
        scores[:, list(head.class_ids)] = features @ head.weight + head.bias
        return scores

    def size_bytes(self) -> int:
        return sum(array.nbytes for array in self._sums.state().values())

    def notes(self) -> Dict[str, Any]:
        return {}
