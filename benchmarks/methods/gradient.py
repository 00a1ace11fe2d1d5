"""Methods that train a linear softmax head by SGD: naive, latent replay by the papers' rule, GDumb, and the joint bound.

One core's worth of torch, no autograd: the gradient of a linear softmax is two matrix products. Where a mini-batch is drawn, numpy's
generator of the method draws it. Settings are those of the best mean accuracy, beside them in percent, on the validation sessions of
Objects-50 NICv2-391 (standard stream, orders 0 and 1: `nicv2.py --choose --orders 0 1`).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Dict, List, Optional

import numpy as np
import torch

from methods.memories import MINIBATCH, GreedyBalanced, PaperMemory, composition, endless, epochs, padded
from methods.protocol import Labels, Latents, Lesson, Normal, Scores, only_taught

MOMENTUM, DECAY = 0.9, 5e-4  # SGD of the Latent Replay papers


class SoftmaxHead:
    """x @ weight + bias over all classes from the start; SGD with momentum and L2 on cross-entropy."""

    def __init__(self, width: int, classes: int, bias: bool = True, decay: float = DECAY, smoothing: float = 0.0) -> None:
        self.weight = torch.zeros((width, classes))
        self.bias = torch.zeros(classes)
        self._has_bias, self._decay, self._smoothing = bias, decay, smoothing
        self.forget_momentum()

    def forget_momentum(self) -> None:
        self._speed = torch.zeros_like(self.weight)
        self._bias_speed = torch.zeros_like(self.bias)

    def step(self, features: Latents, labels: Labels, rate: float) -> None:
        """One SGD step on features (B, F), labels (B,)."""
        X = torch.from_numpy(features)
        (B, _), C = X.shape, self.weight.shape[1]
        wrong = torch.softmax(X @ self.weight + self.bias, dim=1)  # (B, C)
        wrong -= self._smoothing / C
        wrong[torch.arange(B), torch.from_numpy(labels)] -= 1 - self._smoothing
        wrong /= B
        self._speed.mul_(MOMENTUM).addmm_(X.T, wrong).add_(self.weight, alpha=self._decay)
        self.weight.add_(self._speed, alpha=-rate)
        if self._has_bias:
            self._bias_speed.mul_(MOMENTUM).add_(wrong.sum(dim=0))
            self.bias.add_(self._bias_speed, alpha=-rate)

    def scores(self, features: Latents) -> Scores:
        scores: Scores = (torch.from_numpy(features) @ self.weight + self.bias).numpy().astype(np.float64)
        return scores

    def size_bytes(self) -> int:
        return 4 * (self.weight.numel() + self.bias.numel())


class Naive:
    """SGD on the lesson at hand and nothing else: what forgetting costs."""

    every = 1

    def __init__(self, classes: int, seed: int, rate: float = 3e-4, times: int = 4) -> None:
        """rate: 70.7; 69.5 at 1e-3, 59.4 at 1e-4."""
        self._rate, self._times = rate, times
        self._rng = np.random.Generator(np.random.PCG64(seed))
        self._normal, self._taught = Normal(), np.zeros(classes, np.bool_)
        self._head: Optional[SoftmaxHead] = None

    def learn(self, lesson: Lesson) -> None:
        self._normal.fit(lesson.features)
        normal = self._normal(lesson.features)
        if self._head is None:
            self._head = SoftmaxHead(normal.shape[1], len(self._taught))
        self._head.forget_momentum()
        for places in epochs(len(normal), MINIBATCH, self._times, self._rng):
            self._head.step(normal[places], lesson.labels[places], self._rate)
        self._taught[lesson.labels] = True

    def settle(self) -> None:
        """Trained weights answer as they are."""

    def scores(self, features: Latents) -> Scores:
        assert self._head is not None, "no lesson came yet"
        return only_taught(self._head.scores(self._normal(features)), self._taught)

    def size_bytes(self) -> int:
        return self._normal.size_bytes() + (self._head.size_bytes() if self._head else 0)

    def notes(self) -> Dict[str, Any]:
        return {"rate": self._rate, "epochs": self._times}


class LatentReplay:
    """Latent replay by the papers' rule with CWR* consolidation (Pellegrini et al. 2020; Lomonaco et al. 2020), a bias-free linear head.

    Mini-batches of 128: lesson and memory in proportion (21 + 107 for 300 new and 1,500 stored), 4 epochs, random replacement by lesson.
    CWR*: each lesson starts from the consolidated weights of the classes in lesson and memory and zero for the others; afterwards each such
    class's weights, less their common mean, are averaged into the consolidated ones, those having the weight sqrt(past / current).
    """

    every = 1

    def __init__(self, classes: int, seed: int, rate: float = 3e-2, first_rate: float = 1e-3, capacity: int = 1500, times: int = 4) -> None:
        """rate: of lessons after the first: 82.8; 82.3 at 1e-2, 81.5 at the papers' 3e-3 (of features of another scale), 79.4 at 1e-1."""
        self._classes, self._rate, self._first_rate, self._capacity, self._times = classes, rate, first_rate, capacity, times
        self._rng = np.random.Generator(np.random.PCG64(seed))
        self._normal = Normal()
        self._past = np.zeros(classes)  # patterns of each class, lessons and replay, over all lessons so far
        self._head: Optional[SoftmaxHead] = None
        self._kept: Optional[torch.Tensor] = None  # consolidated weights (F, C)
        self.memory: Optional[PaperMemory] = None

    def learn(self, lesson: Lesson) -> None:
        self._normal.fit(lesson.features)
        normal = self._normal(lesson.features)
        if self._head is None or self._kept is None or self.memory is None:
            self._head = SoftmaxHead(normal.shape[1], self._classes, bias=False)
            self._kept = torch.zeros_like(self._head.weight)
            self.memory = PaperMemory(self._capacity, normal.shape[1])
        current = np.bincount(np.concatenate([lesson.labels, self.memory.labels]), minlength=self._classes).astype(np.float64)
        self._load(self._head, self._kept, np.flatnonzero(current))
        self._train(self._head, self.memory, normal, lesson)
        self._consolidate(self._head, self._kept, current)
        self.memory.offer(lesson.number, normal, lesson.labels, self._rng)

    def settle(self) -> None:
        """The consolidated weights answer as they are."""

    def scores(self, features: Latents) -> Scores:
        assert self._kept is not None, "no lesson came yet"
        return only_taught((torch.from_numpy(self._normal(features)) @ self._kept).numpy(), self._past > 0)

    def size_bytes(self) -> int:
        heads = 2 * self._head.size_bytes() if self._head else 0  # the working weights and the consolidated ones
        return self._normal.size_bytes() + heads + (self.memory.size_bytes() if self.memory else 0)

    def notes(self) -> Dict[str, Any]:
        written = self.memory.written if self.memory else 0
        return {"rate": self._rate, "first_rate": self._first_rate, "latents": self._capacity, "latents_written": written}

    def _load(self, head: SoftmaxHead, kept: torch.Tensor, present: Labels) -> None:
        head.weight.zero_()
        head.weight[:, present] = kept[:, present]
        head.forget_momentum()

    def _train(self, head: SoftmaxHead, memory: PaperMemory, normal: Latents, lesson: Lesson) -> None:
        rate = self._rate if lesson.number else self._first_rate
        plan = composition(len(normal), memory.used)
        for _ in range(self._times):
            replay = endless(memory.used, plan.replayed, self._rng) if plan.replayed else None
            for places in padded(len(normal), plan.new, plan.steps, self._rng):
                features, labels = normal[places], lesson.labels[places]
                if replay is not None:
                    drawn = next(replay)
                    features = np.concatenate([features, memory.features[drawn]])
                    labels = np.concatenate([labels, memory.labels[drawn]])
                head.step(features, labels, rate)

    def _consolidate(self, head: SoftmaxHead, kept: torch.Tensor, current: Scores) -> None:
        present = np.flatnonzero(current)
        weights = head.weight[:, present]
        past = torch.from_numpy(np.sqrt(self._past[present] / current[present]).astype(np.float32))
        kept[:, present] = (kept[:, present] * past + (weights - weights.mean())) / (past + 1)
        self._past += current


@dataclass(frozen=True)
class Fitting:
    """How a head is trained from scratch: SGD over everything `times` times, the rate falling to nothing along a cosine."""

    rate: float
    times: int
    smoothing: float = 0.0
    decay: float = DECAY
    size: int = 64  # of a mini-batch

    def head(self, features: Latents, labels: Labels, classes: int, seed: int) -> SoftmaxHead:
        """features (n, F), labels (n,)."""
        rng = np.random.Generator(np.random.PCG64(seed))
        head = SoftmaxHead(features.shape[1], classes, decay=self.decay, smoothing=self.smoothing)
        steps = self.times * -(-len(features) // self.size)
        for step, places in enumerate(epochs(len(features), self.size, self.times, rng)):
            head.step(features[places], labels[places], self.rate * 0.5 * (1 + math.cos(math.pi * step / steps)))
        return head


class GDumb:
    """A greedily balanced memory, and a head trained on it from scratch whenever somebody asks (Prabhu et al. 2020)."""

    every = 39
    fitting = Fitting(rate=3e-2, times=100, smoothing=0.3)  # 86.0; without smoothing at best 70.0

    def __init__(self, classes: int, seed: int, capacity: int = 1500, **changes: Any) -> None:
        """changes: of `fitting`."""
        self._classes, self._seed, self._capacity = classes, seed, capacity
        self.fitting = replace(self.fitting, **changes)
        self._rng = np.random.Generator(np.random.PCG64(seed))
        self._normal = Normal()
        self.memory: Optional[GreedyBalanced] = None
        self._head: Optional[SoftmaxHead] = None

    def learn(self, lesson: Lesson) -> None:
        self._normal.fit(lesson.features)
        if self.memory is None:
            self.memory = GreedyBalanced(self._capacity, lesson.features.shape[1])
        self.memory.offer(self._normal(lesson.features), lesson.labels, self._classes, self._rng)

    def settle(self) -> None:
        assert self.memory is not None, "no lesson came yet"
        self._head = self.fitting.head(self.memory.features, self.memory.labels, self._classes, self._seed)

    def scores(self, features: Latents) -> Scores:
        assert self.memory is not None and self._head is not None, "settle comes before scores"
        taught = np.bincount(self.memory.labels, minlength=self._classes) > 0
        return only_taught(self._head.scores(self._normal(features)), taught)

    def size_bytes(self) -> int:
        return self._normal.size_bytes() + (self.memory.size_bytes() if self.memory else 0)

    def notes(self) -> Dict[str, Any]:
        return {"latents": self._capacity, **asdict(self.fitting)}


class JointSoftmax:
    """All training frames at once, many epochs: what a linear softmax could learn without a stream."""

    every = 1 << 30
    fitting = Fitting(rate=3e-3, times=100, smoothing=0.3)  # 92.1; without smoothing at best 84.3

    def __init__(self, classes: int, seed: int, **changes: Any) -> None:
        """changes: of `fitting`."""
        self._classes, self._seed = classes, seed
        self.fitting = replace(self.fitting, **changes)
        self._normal = Normal()
        self._features: List[Latents] = []
        self._labels: List[Labels] = []
        self._head: Optional[SoftmaxHead] = None

    def learn(self, lesson: Lesson) -> None:
        self._features.append(lesson.features)
        self._labels.append(lesson.labels)

    def settle(self) -> None:
        everything, labels = np.concatenate(self._features), np.concatenate(self._labels)
        self._normal.fit(everything)
        self._head = self.fitting.head(self._normal(everything), labels, self._classes, self._seed)

    def scores(self, features: Latents) -> Scores:
        assert self._head is not None, "settle comes before scores"
        taught = np.bincount(np.concatenate(self._labels), minlength=self._classes) > 0
        return only_taught(self._head.scores(self._normal(features)), taught)

    def size_bytes(self) -> int:
        return sum(part.nbytes for part in self._features) + sum(part.nbytes for part in self._labels)

    def notes(self) -> Dict[str, Any]:
        return asdict(self.fitting)
