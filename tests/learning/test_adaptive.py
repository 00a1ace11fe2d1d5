"""The trained head: learns, grows, and is the same for the same seed, also over a checkpoint."""

from __future__ import annotations

from typing import List, Tuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional

from latentd.learning.adaptive import HIDDEN, AdaptiveHead
from lessons import FEATURES, features

LABELS = ("cat", "dog", "owl")


def batch(seed: int, classes: int = 2, size: int = 24) -> Tuple[NDArray[np.float32], List[int]]:
    dice = np.random.default_rng(seed)
    ids = [int(number) for number in dice.integers(0, classes, size)]
    return np.stack([features(LABELS[class_id], int(dice.integers(0, 10_000)), 1.5) for class_id in ids]), ids


def head(seed: int = 0, rate: float = 3e-3) -> AdaptiveHead:
    made = AdaptiveHead(
        np.full(FEATURES, 0.1, np.float32), np.full(FEATURES, 1.5, np.float32), learning_rate=rate, label_smoothing=0.1, seed=seed
    )
    made.grow([0, 1])
    return made


def trained(made: AdaptiveHead, first: int, steps: int, classes: int = 2) -> List[float]:
    losses = []
    for step in range(first, first + steps):
        some, ids = batch(step, classes)
        losses.append(made.train_step(some, ids, np.random.default_rng(step)))
    return losses


def accuracy(made: AdaptiveHead, classes: int) -> float:
    some, ids = batch(10**6, classes, 300)
    frozen = made.frozen()
    return float(np.mean([frozen.class_ids[column] == true for column, true in zip(frozen.scores(some).argmax(axis=1), ids)]))


def test_training_lowers_the_loss_and_finds_the_classes() -> None:
    made = head()
    losses = trained(made, 0, 60)
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:3])
    assert accuracy(made, 2) > 0.9


def test_it_begins_without_an_opinion() -> None:
    made = head()
    assert np.all(made.frozen().scores(batch(0)[0]) == 0)
    assert trained(made, 0, 1)[0] == pytest.approx(np.log(2), rel=1e-5)


def test_a_new_class_does_not_change_what_is_said_of_the_old_ones() -> None:
    made = head()
    trained(made, 0, 30)
    some = batch(99)[0]
    before = made.frozen().scores(some)
    made.grow([1, 0, 2])
    made.grow([2])
    assert made.class_ids == [0, 1, 2]
    np.testing.assert_array_equal(made.frozen().scores(some)[:, :2], before)
    trained(made, 100, 60, classes=3)
    assert accuracy(made, 3) > 0.85


def test_the_same_seed_and_batches_give_the_same_bits_and_another_seed_others() -> None:
    heads = [head(0), head(0), head(1)]
    for made in heads:
        trained(made, 0, 10)
    bits = [made.frozen().w1.tobytes() for made in heads]
    assert bits[0] == bits[1] != bits[2]


def test_a_restored_head_goes_on_to_the_same_bits() -> None:
    one, other = (
        head(),
        AdaptiveHead(np.zeros(FEATURES, np.float32), np.ones(FEATURES, np.float32), learning_rate=3e-3, label_smoothing=0.1, seed=9),
    )
    trained(one, 0, 7)
    other.restore({name: array.copy() for name, array in one.state().items()}, one.steps)
    for made in (one, other):
        made.grow([5])
        made.grow([2])
        trained(made, 50, 5, classes=3)
    assert one.class_ids == other.class_ids == [0, 1, 5, 2]
    assert [array.tobytes() for array in one.state().values()] == [array.tobytes() for array in other.state().values()]
    assert one.steps == other.steps == 12


def test_frozen_weights_stay_as_they_were_while_training_goes_on() -> None:
    made = head()
    trained(made, 0, 5)
    frozen, some = made.frozen(), batch(3)[0]
    before = frozen.scores(some)
    trained(made, 5, 5)
    np.testing.assert_array_equal(frozen.scores(some), before)


def test_a_step_is_pytorchs_adamw_on_the_same_loss() -> None:
    made = head(rate=1e-2)
    state = {name.split(".")[-1]: torch.from_numpy(array.copy()) for name, array in made.state().items() if name.startswith("head.weight")}
    parameters = [weight.requires_grad_() for weight in state.values()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.01)
    for step in range(4):
        some, ids = batch(step)
        dice = np.random.default_rng(step)
        mask = torch.from_numpy((dice.random((len(some), HIDDEN), dtype=np.float32) >= 0.3).astype(np.float32) / np.float32(0.7))
        normal = (torch.from_numpy(some) - 0.1) / 1.5
        hidden = functional.relu(normal @ state["w1"] + state["b1"]) * mask
        loss = functional.cross_entropy(hidden @ state["w2"] + state["b2"], torch.tensor(ids), label_smoothing=0.1)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        assert made.train_step(some, ids, np.random.default_rng(step)) == pytest.approx(float(loss.detach()), rel=1e-4)
    for name, weight in state.items():
        np.testing.assert_allclose(made.state()[f"head.weight.{name}"], weight.detach().numpy(), rtol=1e-3, atol=1e-4)
