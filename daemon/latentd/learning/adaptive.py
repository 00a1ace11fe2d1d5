"""The trained part above the cut: a small head that learns by latent replay, in PyTorch.

A hidden layer and a softmax over normalised features, trained with AdamW and label smoothing on mini-batches of new and replayed latents.
Class columns are added as classes come. All randomness comes from a generator that is passed in, so the same log gives the same weights.
Owned by the learner thread; on a GPU its step is one piece of work of the learner's queue.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from latentd.learning.place import Place
from latentd.trouble import FAILURES

HIDDEN = 256
DROPOUT = 0.3


@dataclass(frozen=True)
class TrainedHead:
    """The head's weights as immutable arrays for answering: relu(((x - shift) * scale) @ w1 + b1) @ w2 + b2, columns in class_ids order."""

    class_ids: Tuple[int, ...]
    shift: NDArray[np.float32]
    scale: NDArray[np.float32]
    w1: NDArray[np.float32]
    b1: NDArray[np.float32]
    w2: NDArray[np.float32]
    b2: NDArray[np.float32]

    def scores(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """(B, F) -> (B, C) logits."""
        hidden = np.maximum(((features - self.shift) * self.scale) @ self.w1 + self.b1, 0)
        scores: NDArray[np.float32] = hidden @ self.w2 + self.b2
        return scores


class AdaptiveHead:
    """Weights and optimizer state of the trained head; see the module docstring.

    shift, scale: (F,) normalisation, fixed when the head is made (statistics that move under a trained layer would make it forget).
    """

    def __init__(
        self,
        shift: NDArray[np.float32],
        deviation: NDArray[np.float32],
        *,
        learning_rate: float,
        label_smoothing: float,
        seed: int,
        place: Optional[Place] = None,
    ) -> None:
        self._place = place or Place()
        generator = torch.Generator().manual_seed(seed)
        width = len(shift)
        self.class_ids: List[int] = []
        self.steps = 0
        self._rate = learning_rate
        self._smoothing = label_smoothing
        self._shift = torch.from_numpy(shift.copy())
        self._scale = torch.from_numpy((1.0 / np.maximum(deviation, 1e-3)).astype(np.float32))
        bound = (6.0 / width) ** 0.5  # He et al. 2015, uniform
        self._weights: Dict[str, Tensor] = {
            "w1": torch.empty(width, HIDDEN).uniform_(-bound, bound, generator=generator),
            "b1": torch.zeros(HIDDEN),
            "w2": torch.zeros(HIDDEN, 0),
            "b2": torch.zeros(0),
        }
        self._first = {name: torch.zeros_like(weight) for name, weight in self._weights.items()}
        self._second = {name: torch.zeros_like(weight) for name, weight in self._weights.items()}
        self._settle()

    def grow(self, class_ids: Sequence[int]) -> None:
        """Adds zero columns for classes that the head does not know."""
        new = [class_id for class_id in class_ids if class_id not in self.class_ids]
        self.class_ids += new
        with self._place.queue.work():
            for table in (self._weights, self._first, self._second):
                device = table["w2"].device
                table["w2"] = torch.cat([table["w2"].detach(), torch.zeros(HIDDEN, len(new), device=device)], dim=1)
                table["b2"] = torch.cat([table["b2"].detach(), torch.zeros(len(new), device=device)])

    def train_step(self, features: NDArray[np.float32], class_ids: Sequence[int], rng: np.random.Generator) -> float:
        """One AdamW step on a mini-batch: features (B, F). Returns the loss. Where the GPU has no memory for it, on the CPU from now on."""
        column = {class_id: index for index, class_id in enumerate(self.class_ids)}
        target = np.array([column[class_id] for class_id in class_ids], np.int64)
        mask = (rng.random((len(features), HIDDEN), dtype=np.float32) >= DROPOUT).astype(np.float32) / (1 - DROPOUT)
        try:
            return self._step(features, target, mask)
        except FAILURES as error:
            if not self._place.leaves(error):
                raise
        self._settle()
        return self._step(features, target, mask)

    def _step(self, features: NDArray[np.float32], target: NDArray[np.int64], mask: NDArray[np.float32]) -> float:
        queue = self._place.queue
        with queue.work():
            weights = {name: weight.requires_grad_(True) for name, weight in self._weights.items()}
            normal = (queue.upload(features) - self._shift) * self._scale
            hidden = functional.relu(normal @ weights["w1"] + weights["b1"]) * queue.upload(mask)
            scores = hidden @ weights["w2"] + weights["b2"]
            loss = functional.cross_entropy(scores, queue.upload(target), label_smoothing=self._smoothing)
            gradients = torch.autograd.grad(loss, list(weights.values()))
            with torch.no_grad():
                self._adamw(dict(zip(weights, gradients)))
            return float(loss.detach())

    def _settle(self) -> None:
        """Brings all tensors to the place where it learns; on the CPU they are there already."""
        try:
            self._move()
        except FAILURES as error:
            if not self._place.leaves(error):
                raise
            self._move()

    def _move(self) -> None:
        device = self._place.queue.device
        with torch.no_grad(), self._place.queue.work():
            self._shift, self._scale = self._shift.to(device), self._scale.to(device)
            for table in (self._weights, self._first, self._second):
                for name in table:
                    table[name] = table[name].detach().to(device)

    def frozen(self) -> TrainedHead:
        """The weights now, copied."""
        arrays = {name: weight.detach().cpu().numpy().copy() for name, weight in self._weights.items()}
        return TrainedHead(tuple(self.class_ids), self._shift.cpu().numpy(), self._scale.cpu().numpy(), **arrays)

    def state(self) -> Dict[str, NDArray[np.float32]]:
        """The arrays of a checkpoint."""
        tables = {"weight": self._weights, "first": self._first, "second": self._second}
        found = {f"head.{kind}.{name}": value.detach().cpu().numpy() for kind, table in tables.items() for name, value in table.items()}
        ids = np.array(self.class_ids, dtype=np.float32)
        return dict(found, **{"head.shift": self._shift.cpu().numpy(), "head.scale": self._scale.cpu().numpy(), "head.class_ids": ids})

    def restore(self, state: Dict[str, NDArray[np.float32]], steps: int) -> None:
        self.class_ids = [int(value) for value in state["head.class_ids"]]
        self.steps = steps
        self._shift, self._scale = (torch.from_numpy(state[f"head.{name}"].copy()) for name in ("shift", "scale"))
        for kind, table in (("weight", self._weights), ("first", self._first), ("second", self._second)):
            for name in table:
                table[name] = torch.from_numpy(state[f"head.{kind}.{name}"].copy())
        self._settle()

    def _adamw(self, gradients: Dict[str, Tensor]) -> None:
        """Loshchilov & Hutter 2019, with decay 0.01; written out because columns are added while it runs."""
        self.steps += 1
        correct1, correct2 = 1 - 0.9**self.steps, 1 - 0.999**self.steps
        for name, gradient in gradients.items():
            weight, first, second = self._weights[name], self._first[name], self._second[name]
            first.mul_(0.9).add_(gradient, alpha=0.1)
            second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            weight.mul_(1 - self._rate * 0.01).addcdiv_(first / correct1, (second / correct2).sqrt_().add_(1e-8), value=-self._rate)
