"""Who stays in the memories of the other methods: the replacement rule of the Latent Replay papers, and GDumb's greedy balance.

latentd's own memory is not here: it is latentd.replay.memory. Plain arrays; the generator is passed in.
"""

from __future__ import annotations

from typing import Iterator, NamedTuple, Tuple

import numpy as np
from numpy.typing import NDArray

from methods.protocol import Labels, Latents

MINIBATCH = 128


class Composition(NamedTuple):
    """One epoch over a lesson: `steps` mini-batches of `new` latents of the lesson and `replayed` ones of the memory."""

    new: int
    replayed: int
    steps: int


def composition(new: int, stored: int, size: int = MINIBATCH) -> Composition:
    """The papers' mini-batches: new and stored latents in proportion, so that one epoch goes once over both (Pellegrini et al. 2020).

    300 new and 1,500 stored give 21 + 107 of 128, 15 times.
    """
    share = min(size, max(1, round(size * new / (new + stored))))
    return Composition(share, size - share if stored else 0, -(-new // share))


class Slots:
    """A fixed number of places for latents and labels; the first `used` ones are filled."""

    def __init__(self, capacity: int, width: int) -> None:
        self.capacity, self.used = capacity, 0
        self._features = np.zeros((capacity, width), np.float32)
        self._labels = np.zeros(capacity, np.int64)

    @property
    def features(self) -> Latents:
        return self._features[: self.used]

    @property
    def labels(self) -> Labels:
        return self._labels[: self.used]

    def write(self, places: NDArray[np.int64], features: Latents, labels: Labels) -> None:
        self._features[places] = features
        self._labels[places] = labels
        self.used = max(self.used, int(places.max()) + 1) if len(places) else self.used

    def size_bytes(self) -> int:
        """Of all places: the memory is bounded, not what happens to be in it."""
        return self._features.nbytes + self._labels.nbytes


class PaperMemory(Slots):
    """Random replacement by lesson (Pellegrini et al. 2020): after lesson i, h = min(capacity // (i + 1), n) random latents of it overwrite
    h random places. While places are free they are filled first. No classes are balanced.
    """

    written = 0  # latents stored over the stream

    def offer(self, number: int, features: Latents, labels: Labels, rng: np.random.Generator) -> int:
        """After this lesson, counted from 0; returns how many of its latents are stored."""
        count = min(self.capacity // (number + 1), len(features))
        chosen = rng.permutation(len(features))[:count]
        free = np.arange(self.used, min(self.used + count, self.capacity))
        full = rng.permutation(self.used)[: count - len(free)]
        self.write(np.concatenate([free, full]).astype(np.int64), features[chosen], labels[chosen])
        self.written += count
        return count


class GreedyBalanced(Slots):
    """GDumb's sampler (Prabhu et al. 2020): a class keeps at most its share of the places; a latent of a class below that share takes the
    place of a random one of the largest class.
    """

    def offer(self, features: Latents, labels: Labels, classes: int, rng: np.random.Generator) -> None:
        for row, label in zip(features, labels.tolist()):
            counts = np.bincount(self.labels, minlength=classes)
            known = int(np.count_nonzero(counts)) + (0 if counts[label] else 1)
            if self.used == self.capacity and counts[label] >= self.capacity // known:
                continue
            place = self.used
            if self.used == self.capacity:
                largest = int(rng.choice(np.flatnonzero(counts == counts.max())))
                place = int(rng.choice(np.flatnonzero(self.labels == largest)))
            self.write(np.array([place]), row[None], np.array([label]))


def epochs(count: int, size: int, times: int, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Places of mini-batches of `size`: `times` random orders of range(count), each cut, the last piece shorter."""
    for _ in range(times):
        order = rng.permutation(count)
        for start in range(0, count, size):
            yield order[start : start + size]


def endless(count: int, size: int, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Mini-batches of `size` places for ever, each place once before any comes again."""
    waiting = np.zeros(0, np.int64)
    while True:
        while len(waiting) < size:
            waiting = np.concatenate([waiting, rng.permutation(count)])
        yield waiting[:size]
        waiting = waiting[size:]


def padded(count: int, share: int, steps: int, rng: np.random.Generator) -> Tuple[NDArray[np.int64], ...]:
    """One epoch of a lesson: `steps` groups of `share` places, filled up from the start of the order so that none is short."""
    order = rng.permutation(count)
    return tuple(np.split(np.resize(order, steps * share), steps))
