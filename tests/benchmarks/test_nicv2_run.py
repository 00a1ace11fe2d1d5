"""Teaching and asking one order: what is asked when, per-class accuracy, forgetting."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any, Dict, List

import numpy as np
import pytest

import nicv2_run
from courses import CLASSES, SmallSource, course
from joules import LearningEnergy
from latentd import config
from methods import registry
from methods.protocol import Latents, Lesson, Scores
from nicv2_run import Answers, Job

SETTINGS = config.load({}, {"energy.meters": ""})
SOURCE = SmallSource()


class Parrot:
    """Answers the label of the newest lesson's last frame; remembers what happened."""

    def __init__(self, every: int = 1) -> None:
        self.every = every
        self.heard: List[str] = []
        self._label = 0

    def learn(self, lesson: Lesson) -> None:
        self.heard.append(f"lesson {lesson.number}")
        self._label = int(lesson.labels[-1])

    def settle(self) -> None:
        self.heard.append("settle")

    def scores(self, features: Latents) -> Scores:
        return np.tile(np.eye(CLASSES)[self._label], (len(features), 1))

    def size_bytes(self) -> int:
        return 1

    def notes(self) -> Dict[str, Any]:
        return {}


def test_a_method_is_settled_before_it_is_asked_and_always_after_the_last_lesson() -> None:
    parrot, given = Parrot(every=10), course()
    with LearningEnergy(SETTINGS.energy) as energy:
        answers, spent = nicv2_run.teach(parrot, given, CLASSES, energy)
    assert answers.lessons == [10, 20, 23]
    assert parrot.heard.count("settle") == spent["settled"] == 3
    assert parrot.heard[9:12] == ["lesson 9", "settle", "lesson 10"]
    assert parrot.heard[-1] == "settle"


def test_what_is_told_is_taught_and_what_is_true_is_asked() -> None:
    parrot, given = Parrot(), course()
    told = np.full_like(given.labels, 3)
    with LearningEnergy(SETTINGS.energy) as energy:
        answers, _ = nicv2_run.teach(parrot, replace(given, told=told), CLASSES, energy, ())
    assert answers.lessons == [23]
    assert answers.per_class[-1].tolist() == [0, 0, 0, 100, 0, 0]
    assert answers.watched == [pytest.approx(100 / 6)]


def test_a_class_without_questions_has_no_accuracy() -> None:
    found = nicv2_run.per_class(np.array([0, 0, 2]), np.array([True, False, True]), 4)
    assert found[[0, 2]].tolist() == [50, 100]
    assert np.isnan(found[[1, 3]]).all()


def test_forgetting_is_what_was_lost_since_a_classs_best_time() -> None:
    table = [np.array(row, float) for row in ([80, 0, 0], [90, 60, 0], [70, 65, 50])]
    answers = Answers([1, 2, 3], [0.0] * 3, table)
    # Class 0 fell from 90 to 70, class 1 rose by 5, class 2 was taught last: nothing to lose.
    assert nicv2_run.forgetting(answers, np.array([1, 2, 3])) == pytest.approx((20 - 5) / 2)


def test_accuracy_of_a_class_before_it_was_taught_is_no_memory_to_lose() -> None:
    answers = Answers([1, 2, 3], [0.0] * 3, [np.array([100.0]), np.array([10.0]), np.array([10.0])])
    assert nicv2_run.forgetting(answers, np.array([2])) == pytest.approx(0)


def test_forgetting_is_unknown_where_nobody_asked_before_the_end() -> None:
    assert nicv2_run.forgetting(Answers([5], [50.0], [np.array([50.0])]), np.array([1])) is None


def test_first_taught_is_the_lesson_that_first_named_the_class() -> None:
    given = course()
    first = nicv2_run.first_taught(given, CLASSES + 1)
    assert first[[0, 1]].tolist() == [1, 1]
    for label in range(CLASSES):
        assert label in given.told[given.batches[first[label] - 1]]
        assert all(label not in given.told[places] for places in given.batches[: first[label] - 1])
    assert first[CLASSES] == len(given.batches) + 1  # never


@pytest.mark.parametrize("name", registry.NAMES)
def test_a_run_reports_everything_and_is_the_same_when_run_again(name: str) -> None:
    changes = {"values": 64} if name == "ranpac" else {}
    found, again = (nicv2_run.run(Job(name, 0, 391, True, changes), SOURCE, SETTINGS) for _ in range(2))
    for part in ("accuracy", "per_class", "curve", "forgetting", "bytes"):
        assert found[part] == again[part]
    assert found["accuracy"] == pytest.approx(np.mean(found["per_class"]), abs=0.01)
    assert found["samples"] == 22 * 20 + 40
    assert found["energy"]["learn_j"] is None and "no meter" in found["energy"]["reason"]
    assert found["accuracy"] > (15 if name == "naive" else 90)


def test_latentds_own_settings_are_used() -> None:
    small = config.load(os.environ, {"learn.replay_bytes": 1 << 14, "learn.codec": "int4", "energy.meters": ""})
    found = nicv2_run.run(Job("latentd", 0, ask=False), SOURCE, small)
    assert found["notes"]["codec"] == "int4 token"
    assert found["notes"]["replay_bytes"] <= 1 << 14
    assert found["notes"]["latents"] < 400
