"""One method over one order of the stream: teach a lesson, settle, ask; and what comes of it.

Runs in a worker process (`perform`) or in the main one. Pure apart from clocks and the meter.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Collection, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np
import torch
from numpy.typing import NDArray

from joules import LearningEnergy
from latentd.config import Config
from methods import registry
from methods.protocol import Lesson, Method
from streams import Course, Source

CHUNK = 4096  # questions scored at a time


@dataclass(frozen=True)
class Job:
    """One run. changes: of the method's own settings. ask: False asks after the last lesson alone."""

    method: str
    order: int
    protocol: int = 391
    validation: bool = False
    changes: Mapping[str, Any] = field(default_factory=dict)
    ask: bool = True


@dataclass
class Answers:
    """Accuracies along the stream, in percent of the watched questions. lessons: after how many; watched: of all questions; per_class
    (E, C), NaN where a class has no question.
    """

    lessons: List[int] = field(default_factory=list)
    watched: List[float] = field(default_factory=list)
    per_class: List[NDArray[np.float64]] = field(default_factory=list)


def run(job: Job, source: Source, settings: Config) -> Dict[str, Any]:
    """The JSON values of one run."""
    torch.set_num_threads(1)
    course = source.course(job.protocol, job.order, job.validation)
    classes = len(source.classes)
    method = registry.make(job.method, setting_of(source, course, job.order, settings), **job.changes)
    asked_after = None if job.ask else [len(course.batches)]
    with LearningEnergy(settings.energy) as energy:
        answers, spent = teach(method, course, classes, energy, asked_after)
    final = right(method, course, course.asked)
    watched = answers.watched[-1]
    return {
        "method": job.method,
        "order": job.order,
        "changes": dict(job.changes),
        "accuracy": 100 * float(final.mean()),
        "accuracy_watched": watched,
        "questions": len(course.asked),
        "per_class": [round(float(value), 3) for value in per_class(course.labels[course.asked], final, classes)],
        "forgetting": forgetting(answers, first_taught(course, classes)),
        "curve": {"lessons": answers.lessons, "accuracy": [round(value, 3) for value in answers.watched]},
        "samples": sum(len(batch) for batch in course.batches),
        "bytes": method.size_bytes(),
        **spent,
        "energy": energy.figures(),
        "notes": method.notes(),
    }


def setting_of(source: Source, course: Course, order: int, settings: Config) -> registry.Setting:
    return registry.Setting(len(source.classes), course.features.shape[1], source.tokens, order, settings.learn)


def teach(
    method: Method, course: Course, classes: int, energy: LearningEnergy, asked_after: Optional[Collection[int]] = None
) -> Tuple[Answers, Dict[str, Any]]:
    """Streams the course through the method; gives Answers, and the seconds that learning and settling took.

    asked_after: numbers of lessons after which it is asked; None: after each `method.every`-th. After the last one it always is.
    """
    answers, learn_s, settle_s, settled = Answers(), 0.0, 0.0, 0
    for index, places in enumerate(course.batches):
        count = index + 1
        asked = count == len(course.batches) or (count % method.every == 0 if asked_after is None else count in asked_after)
        lesson = Lesson(index, np.ascontiguousarray(course.features[places]), course.told[places])
        begun = time.perf_counter()
        with energy.learning(len(places)):
            method.learn(lesson)
            learned = time.perf_counter()
            if asked:
                method.settle()
        done = time.perf_counter()
        learn_s, settle_s, settled = learn_s + learned - begun, settle_s + done - learned, settled + asked
        if asked:
            found = right(method, course, course.watched)
            answers.lessons.append(count)
            answers.watched.append(100 * float(found.mean()))
            answers.per_class.append(per_class(course.labels[course.watched], found, classes))
    return answers, {"learn_s": learn_s, "settle_s": settle_s, "settled": settled}


def right(method: Method, course: Course, places: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(n,) whether the likeliest class is the true one, of all classes."""
    found = [
        method.scores(np.ascontiguousarray(course.features[part])).argmax(axis=1) == course.labels[part]
        for part in np.split(places, range(CHUNK, len(places), CHUNK))
    ]
    answers: NDArray[np.bool_] = np.concatenate(found)
    return answers


def per_class(truth: NDArray[np.int64], found: NDArray[np.bool_], classes: int) -> NDArray[np.float64]:
    """(C,) percent right of each class's questions; NaN where it has none."""
    asked = np.bincount(truth, minlength=classes)
    correct = np.bincount(truth[found], minlength=classes)
    return np.where(asked > 0, 100.0 * correct / np.maximum(asked, 1), np.nan)


def first_taught(course: Course, classes: int) -> NDArray[np.int64]:
    """(C,) number of lessons after which a class was first there; one more than all where it never was."""
    first = np.full(classes, len(course.batches) + 1)
    for index, places in reversed(list(enumerate(course.batches))):
        first[np.unique(course.told[places])] = index + 1
    return first


def forgetting(answers: Answers, first: NDArray[np.int64]) -> Optional[float]:
    """Points that a class has lost against its best time since it was first taught, mean over the classes (Chaudhry et al. 2018).

    None where nobody asked before the end.
    """
    if len(answers.lessons) < 2:
        return None
    table = np.stack(answers.per_class)  # (E, C)
    since = np.array(answers.lessons)[:, None] >= first[None, :]
    best = np.where(since, table, -np.inf)[:-1].max(axis=0)
    lost = (best - table[-1])[np.isfinite(best)]
    return float(np.nanmean(lost)) if len(lost) else None


def mean_std(values: Sequence[float]) -> Dict[str, float]:
    """Over orders; the deviation is the population's."""
    return {"mean": float(np.mean(values)), "std": float(np.std(values))}
