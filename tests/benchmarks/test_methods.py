"""The field on small latents: every method against a plain way to compute the same, and the protocol that all share."""

from __future__ import annotations

from typing import Any, Dict, List, Tuple

import numpy as np
import pytest

from latentd.config import LearnConfig
from methods import registry
from methods.daemon import Latentd
from methods.gradient import LatentReplay, SoftmaxHead
from methods.protocol import Labels, Latents, Lesson, Method, Normal
from methods.statistics import NearestMean, RanPac, Ridge, Slda, chosen_ridge

CLASSES, TOKENS, WIDTH = 5, 2, 32
SETTING = registry.Setting(CLASSES, WIDTH, TOKENS, 0, LearnConfig())
QUICK: Dict[str, Dict[str, Any]] = {"ranpac": {"values": 64}}


def latents(label: int, count: int, seed: int) -> Latents:
    """A cloud around a centre of the label's own, wide along the first feature, which says nothing of the class."""
    rng = np.random.default_rng([label, seed])
    cloud = rng.standard_normal((count, WIDTH)).astype(np.float32)
    cloud[:, 0] *= 10
    return cloud + 3 * np.random.default_rng(label).standard_normal(WIDTH).astype(np.float32)


def lessons(seed: int = 0) -> List[Lesson]:
    """Two classes first, then one class at a time, each class twice."""
    first = Lesson(0, np.concatenate([latents(0, 20, seed), latents(1, 20, seed)]), np.repeat([0, 1], 20))
    later = [
        Lesson(1 + turn, latents(label, 15, 10 + turn + seed), np.full(15, label)) for turn, label in enumerate((2, 3, 4, 0, 1, 2, 3, 4))
    ]
    return [first, *later]


def questions() -> Tuple[Latents, Labels]:
    return np.concatenate([latents(label, 20, 99) for label in range(CLASSES)]), np.repeat(np.arange(CLASSES), 20)


def taught(method: Method, given: List[Lesson]) -> Method:
    for lesson in given:
        method.learn(lesson)
    method.settle()
    return method


@pytest.mark.parametrize("name", registry.NAMES)
def test_every_method_knows_most_of_what_it_was_taught(name: str) -> None:
    method = taught(registry.make(name, SETTING, **QUICK.get(name, {})), lessons())
    asked, truth = questions()
    assert (method.scores(asked).argmax(axis=1) == truth).mean() > (0.35 if name == "naive" else 0.9)


@pytest.mark.parametrize("name", registry.NAMES)
def test_a_class_that_was_never_taught_is_never_the_answer(name: str) -> None:
    method = taught(registry.make(name, SETTING, **QUICK.get(name, {})), lessons()[:3])  # classes 0 to 3 only
    scores = method.scores(questions()[0])
    assert np.isneginf(scores[:, 4]).all()
    assert np.isfinite(scores[:, :4]).all()


@pytest.mark.parametrize("name", registry.NAMES)
def test_the_same_lessons_give_the_same_answers(name: str) -> None:
    made = [taught(registry.make(name, SETTING, **QUICK.get(name, {})), lessons()) for _ in range(2)]
    assert np.array_equal(made[0].scores(questions()[0]), made[1].scores(questions()[0]))


@pytest.mark.parametrize("name", registry.NAMES)
def test_every_method_says_what_it_keeps(name: str) -> None:
    method = taught(registry.make(name, SETTING, **QUICK.get(name, {})), lessons())
    assert method.size_bytes() >= 4 * WIDTH
    assert isinstance(method.notes(), dict)


@pytest.mark.parametrize("name", registry.NAMES)
def test_every_method_has_a_title_and_every_grid_a_method(name: str) -> None:
    assert name in registry.TITLES
    assert set(registry.GRIDS) <= set(registry.NAMES)
    for changes in registry.GRIDS.get(name, []):
        registry.make(name, SETTING, **changes)


def everything(given: List[Lesson]) -> Tuple[Latents, Labels]:
    return np.concatenate([lesson.features for lesson in given]), np.concatenate([lesson.labels for lesson in given])


def normalised(given: List[Lesson]) -> Tuple[Normal, Latents, Labels]:
    normal = Normal()
    normal.fit(given[0].features)
    features, labels = everything(given)
    return normal, normal(features), labels


def test_normalisation_comes_from_the_first_lesson_alone() -> None:
    first, second = lessons()[:2]
    normal = Normal()
    normal.fit(first.features)
    before = normal(second.features)
    normal.fit(second.features)
    assert np.array_equal(normal(second.features), before)
    assert normal(first.features).mean(axis=0) == pytest.approx(np.zeros(WIDTH), abs=1e-5)


@pytest.mark.parametrize("kind", ["euclid", "cosine"])
def test_the_nearest_mean_is_the_nearest_mean(kind: str) -> None:
    given = lessons()
    normal, features, labels = normalised(given)
    means = np.stack([features[labels == label].mean(axis=0) for label in range(CLASSES)])
    asked = normal(questions()[0])
    distances = ((asked[:, None] - means[None]) ** 2).sum(axis=2)
    cosines = asked @ means.T / np.linalg.norm(asked, axis=1)[:, None] / np.linalg.norm(means, axis=1)
    wanted = distances.argmin(axis=1) if kind == "euclid" else cosines.argmax(axis=1)
    assert np.array_equal(taught(NearestMean(CLASSES, kind), given).scores(questions()[0]).argmax(axis=1), wanted)


def test_slda_equals_its_recursion_sample_by_sample() -> None:
    given, shrinkage = lessons(), 0.05
    normal, features, labels = normalised(given)
    covariance, means, counts = np.zeros((WIDTH, WIDTH)), np.zeros((CLASSES, WIDTH)), np.zeros(CLASSES)
    for seen, (row, label) in enumerate(zip(features.astype(np.float64), labels.tolist())):
        apart = row - means[label] if counts[label] else np.zeros(WIDTH)
        covariance = (seen * covariance + seen / (seen + 1) * np.outer(apart, apart)) / (seen + 1)
        means[label] = (counts[label] * means[label] + row) / (counts[label] + 1)
        counts[label] += 1
    precision = np.linalg.inv((1 - shrinkage) * covariance + shrinkage * np.eye(WIDTH))
    weight = precision @ means.T
    wanted = normal(questions()[0]) @ weight - 0.5 * np.einsum("cf,fc->c", means, weight)
    assert taught(Slda(CLASSES, shrinkage), given).scores(questions()[0]) == pytest.approx(wanted, rel=1e-3, abs=1e-3)


def test_streaming_ridge_equals_ridge_on_everything_at_once_in_any_order() -> None:
    given, ridge = lessons(), 7.0
    normal, features, labels = normalised(given)
    rows = np.concatenate([features, np.ones((len(features), 1))], axis=1).astype(np.float64)
    weight = np.linalg.solve(rows.T @ rows + ridge * np.eye(WIDTH + 1), rows.T @ np.eye(CLASSES)[labels])
    asked = questions()[0]
    wanted = np.concatenate([normal(asked), np.ones((len(asked), 1))], axis=1) @ weight
    assert taught(Ridge(CLASSES, ridge), given).scores(asked) == pytest.approx(wanted, abs=1e-4)
    turned = taught(Ridge(CLASSES, ridge), [given[0], *reversed(given[1:])])
    assert turned.scores(asked) == pytest.approx(wanted, abs=1e-4)


def test_random_projection_ridge_equals_ridge_on_the_projected_features() -> None:
    given = lessons()
    method = RanPac(CLASSES, seed=3, values=64, ridge=2.0)
    taught(method, given)
    normal, features, labels = normalised(given)
    projection = np.random.Generator(np.random.PCG64(3)).standard_normal((WIDTH, 64), dtype=np.float32) / np.float32(WIDTH**0.5)
    rows = np.maximum(features @ projection, 0).astype(np.float64)
    weight = np.linalg.solve(rows.T @ rows + 2.0 * np.eye(64), rows.T @ np.eye(CLASSES)[labels])
    asked = questions()[0]
    assert method.scores(asked) == pytest.approx(np.maximum(normal(asked) @ projection, 0) @ weight, abs=1e-4)


def test_the_ridge_that_is_chosen_errs_least_on_the_held_part() -> None:
    rng = np.random.default_rng(0)
    rows, labels = rng.standard_normal((60, 200)), rng.integers(0, CLASSES, 60)
    assert chosen_ridge(rows, labels, CLASSES, np.random.Generator(np.random.PCG64(0))) >= 1e2  # nothing to learn: answer near zero
    rows = np.eye(CLASSES)[labels] @ rng.standard_normal((CLASSES, 200)) + 1e-3 * rows
    assert chosen_ridge(rows, labels, CLASSES, np.random.Generator(np.random.PCG64(0))) <= 1.0


def test_a_step_of_the_softmax_head_is_sgd_with_momentum_and_l2() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    head = SoftmaxHead(WIDTH, CLASSES, decay=0.01, smoothing=0.1)
    weight, bias = torch.zeros((WIDTH, CLASSES), requires_grad=True), torch.zeros(CLASSES, requires_grad=True)
    optimizer = torch.optim.SGD([{"params": [weight], "weight_decay": 0.01}, {"params": [bias]}], lr=0.05, momentum=0.9)
    for _ in range(5):
        features, labels = rng.standard_normal((8, WIDTH)).astype(np.float32), rng.integers(0, CLASSES, 8)
        head.step(features, labels, 0.05)
        scores = torch.from_numpy(features) @ weight + bias
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(scores, torch.from_numpy(labels), label_smoothing=0.1).backward()
        optimizer.step()
    assert head.weight.numpy() == pytest.approx(weight.detach().numpy(), abs=1e-5)
    assert head.bias.numpy() == pytest.approx(bias.detach().numpy(), abs=1e-5)


def test_cwr_leaves_the_weights_of_absent_classes_alone() -> None:
    given = lessons()
    method = LatentReplay(CLASSES, seed=0, capacity=10)
    taught(method, given[:4])
    assert method.memory is not None
    absent = [label for label in range(4) if label not in method.memory.labels and label != 4]
    before = method.scores(questions()[0])
    method.learn(given[4])
    after = method.scores(questions()[0])
    present = [label for label in range(4) if label not in absent]
    assert np.array_equal(before[:, absent], after[:, absent])
    assert not np.allclose(before[:, present], after[:, present])


def test_a_class_seen_for_the_first_time_gets_its_weights_less_the_common_mean() -> None:
    method = LatentReplay(CLASSES, seed=0)
    method.learn(lessons()[0])
    assert method._head is not None and method._kept is not None
    weights = method._head.weight[:, [0, 1]]
    assert np.allclose(method._kept[:, [0, 1]].numpy(), (weights - weights.mean()).numpy())


def test_latentd_holds_out_every_tenth_sample_of_a_class_as_the_journal_does() -> None:
    method = taught(registry.make("latentd", SETTING), lessons())
    assert isinstance(method, Latentd)
    trainer = method.trainer
    held = {label: sum(1 for class_id, _ in trainer._floor.holdout.values() if class_id == label) for label in range(CLASSES)}
    assert held == {0: 3, 1: 3, 2: 3, 3: 3, 4: 3}  # of 35, 35, 30, 30, 30
    assert trainer.sums.count == 160 - 15


def test_the_floor_alone_trains_no_head() -> None:
    assert taught(registry.make("latentd-floor", SETTING), lessons()).notes()["verdict"] == "nothing trained yet"
