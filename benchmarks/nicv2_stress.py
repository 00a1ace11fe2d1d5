"""Learning you can trust: latentd's head where teachers err, classes are unequal, disappear and come back, or were never taught.

Each stress is a pure change of a course; `run` teaches the changed course and says what came of it. Meant for the validation sessions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Callable, Dict, List, Sequence, Tuple

import numpy as np
import torch
from numpy.typing import NDArray

from joules import LearningEnergy
from latentd.config import Config
from latentd.learning.snapshot import Snapshot
from latentd.learning.unknown import to_answer
from methods.daemon import Latentd
from nicv2_run import Answers, per_class, right, setting_of, teach
from streams import Course, Objects50, Source

NOISE = 0.1  # share of wrong labels
STARVED = 0.1  # share of its frames that a starved class keeps
AWAY = 5  # classes that go away and come back
NEVER = 10  # classes never taught
LATE = "late classes"
_TINY = 1e-9  # a tenth ten times is one

Classes = NDArray[np.int64]
Score = Callable[[Snapshot, NDArray[np.float32]], NDArray[np.float64]]

# How known an image looks, by name: larger is more known.
SCORES: Dict[str, Score] = {
    "likeness": lambda snapshot, features: to_answer(snapshot.analytic, features)[1],
    "largest probability": lambda snapshot, features: snapshot.predict(features).max(axis=1),
}


def wrong_frames(course: Course, classes: int, seed: int, share: float = NOISE) -> Course:
    """Each taught frame is called something else with this probability."""
    rng = np.random.Generator(np.random.PCG64([seed, 10]))
    told = course.told.copy()
    for places in course.batches:
        wrong = places[rng.random(len(places)) < share]
        told[wrong] = _another(told[wrong], classes, rng)
    return replace(course, told=told)


def wrong_lessons(course: Course, classes: int, seed: int, share: float = NOISE) -> Course:
    """Whole videos are called something else: all frames of one class in a lesson at once."""
    rng = np.random.Generator(np.random.PCG64([seed, 11]))
    told = course.told.copy()
    for places in course.batches:
        for label in np.unique(course.told[places]).tolist():
            if rng.random() < share:
                same = places[course.told[places] == label]
                told[same] = _another(np.array([label]), classes, rng)[0]
    return replace(course, told=told)


def starved(course: Course, chosen: Classes, share: float = STARVED) -> Course:
    """Of the chosen classes only this share of the frames is taught, spread over the stream; a lesson that becomes empty is dropped."""
    met, batches = 0, []
    for places in course.batches:
        theirs = np.isin(course.told[places], chosen)
        turns = met + np.cumsum(theirs)  # how many of theirs there were, this one included
        met += int(theirs.sum())
        batches.append(places[~theirs | (np.floor(turns * share + _TINY) > np.floor((turns - 1) * share + _TINY))])
    return replace(course, batches=[places for places in batches if len(places)])


def away(course: Course, chosen: Classes) -> Tuple[Course, int, int]:
    """The chosen classes' lessons half at the start, half at the end, none between; and the numbers of lessons after which they have gone
    away and before which they are back. Lessons of several classes are taught by their class of most frames.
    """
    first, *rest = course.batches
    theirs = [places for places in rest if _class_of(course, places) in chosen]
    others = [places for places in rest if _class_of(course, places) not in chosen]
    early, late = _halves(course, theirs)
    batches = [first, *early, *others, *late]
    return replace(course, batches=batches), 1 + len(early), 1 + len(early) + len(others)


def never_taught(course: Course, chosen: Classes) -> Course:
    """The chosen classes are asked and not taught."""
    batches = [places[~np.isin(course.told[places], chosen)] for places in course.batches]
    return replace(course, batches=[places for places in batches if len(places)])


def auroc(known: NDArray[np.float64], unknown: NDArray[np.float64]) -> float:
    """How often a known score is above an unknown one, in percent; a tie counts half."""
    ordered = np.sort(unknown)
    below = np.searchsorted(ordered, known, side="left")
    ties = np.searchsorted(ordered, known, side="right") - below
    return float(100 * (below + 0.5 * ties).sum() / (len(known) * len(unknown)))


def run(name: str, order: int, protocol: int, validation: bool, closed_form: bool, source: Source, settings: Config) -> Dict[str, Any]:
    """One stress over one order; figures in percent. closed_form: the floor alone, a hundred times faster."""
    torch.set_num_threads(1)
    chosen = late_source(source) if name == LATE else source
    learn = replace(settings.learn, epochs=0.0) if closed_form else settings.learn
    return _STRESSES[name](chosen.course(protocol, order, validation), order, source, replace(settings, learn=learn))


def _learned(course: Course, order: int, source: Source, settings: Config, asked_after: Sequence[int] = ()) -> Tuple[Latentd, Answers]:
    setting = setting_of(source, course, order, settings)
    method = Latentd(setting.classes, setting.learn, setting.width, setting.tokens, floor_only=not setting.learn.epochs)
    with LearningEnergy(settings.energy) as energy:
        answers, _ = teach(method, course, setting.classes, energy, asked_after)
    return method, answers


def _clean(course: Course, order: int, source: Source, settings: Config) -> Dict[str, Any]:
    method, _ = _learned(course, order, source, settings)
    return {"accuracy": 100 * float(right(method, course, course.asked).mean())}


def _wrong_frames(course: Course, order: int, source: Source, settings: Config) -> Dict[str, Any]:
    return _clean(wrong_frames(course, len(source.classes), order), order, source, settings)


def _wrong_lessons(course: Course, order: int, source: Source, settings: Config) -> Dict[str, Any]:
    return _clean(wrong_lessons(course, len(source.classes), order), order, source, settings)


def _starved(course: Course, order: int, source: Source, settings: Config) -> Dict[str, Any]:
    chosen = _some(len(source.classes), len(source.classes) // 2, order, 12)
    full, _ = _learned(course, order, source, settings)
    method, _ = _learned(starved(course, chosen), order, source, settings)
    theirs = np.isin(course.labels[course.asked], chosen)
    found, before = right(method, course, course.asked), right(full, course, course.asked)
    return {
        "accuracy": 100 * float(found.mean()),
        "starved_classes": 100 * float(found[theirs].mean()),
        "starved_classes_before": 100 * float(before[theirs].mean()),
        "other_classes": 100 * float(found[~theirs].mean()),
        "other_classes_before": 100 * float(before[~theirs].mean()),
    }


def _away(course: Course, order: int, source: Source, settings: Config) -> Dict[str, Any]:
    first = np.unique(course.labels[course.batches[0]])
    candidates = np.setdiff1d(np.arange(len(source.classes)), first)
    rng = np.random.Generator(np.random.PCG64([order, 13]))
    chosen = np.sort(rng.permutation(candidates)[:AWAY])
    changed, gone, back = away(course, chosen)
    method, answers = _learned(changed, order, source, settings, (gone, back))
    taught, missed, again = (float(np.nanmean(row[chosen])) for row in answers.per_class)
    found = right(method, course, course.asked)
    final = per_class(course.labels[course.asked], found, len(source.classes))
    usual, _ = _learned(course, order, source, settings)
    usually = per_class(course.labels[course.asked], right(usual, course, course.asked), len(source.classes))
    return {
        "accuracy": 100 * float(found.mean()),
        "after_first_lessons": taught,
        "after_long_absence": missed,
        "taught_again": again,
        "same_classes_in_usual_order": float(np.nanmean(usually[chosen])),
        "other_classes": float(np.nanmean(np.delete(final, chosen))),
        "lessons_away": back - gone,
    }


def _never(course: Course, order: int, source: Source, settings: Config) -> Dict[str, Any]:
    chosen = _some(len(source.classes), NEVER, order, 14)
    method, _ = _learned(never_taught(course, chosen), order, source, settings)
    features = np.ascontiguousarray(course.features[course.asked])
    strange = np.isin(course.labels[course.asked], chosen)
    found = {f"auroc {name}": _auroc_of(score(method.snapshot, features), strange) for name, score in SCORES.items()}
    decided = right(method, course, course.asked[~strange])
    return {"accuracy": 100 * float(decided.mean()), **found}


_STRESSES: Dict[str, Callable[[Course, int, Source, Config], Dict[str, Any]]] = {
    "clean": _clean,
    "wrong frames": _wrong_frames,
    "wrong videos": _wrong_lessons,
    "starved classes": _starved,
    "away and back": _away,
    "never taught": _never,
    LATE: _clean,
}
NAMES: Tuple[str, ...] = tuple(_STRESSES)


def late_source(source: Source) -> Source:
    """The same source with classes arriving late; CORe50's own lists always do."""
    return replace(source, late=True) if isinstance(source, Objects50) else source


def summary(found: Sequence[Dict[str, Any]]) -> Dict[str, Any]:
    """Mean and standard deviation over orders of each figure."""
    return {key: {"mean": float(np.mean(values)), "std": float(np.std(values))} for key, values in _columns(found).items()}


def _columns(found: Sequence[Dict[str, Any]]) -> Dict[str, List[float]]:
    return {key: [float(row[key]) for row in found] for key in found[0]}


def _auroc_of(score: NDArray[np.float64], strange: NDArray[np.bool_]) -> float:
    return auroc(score[~strange], score[strange])


def _some(classes: int, count: int, order: int, salt: int) -> Classes:
    rng = np.random.Generator(np.random.PCG64([order, salt]))
    return np.sort(rng.permutation(classes)[:count])


def _another(labels: NDArray[np.int64], classes: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """A wrong class for each label."""
    return (labels + rng.integers(1, classes, len(labels))) % classes


def _class_of(course: Course, places: NDArray[np.int64]) -> int:
    return int(np.bincount(course.told[places]).argmax())


def _halves(course: Course, lessons: Sequence[NDArray[np.int64]]) -> Tuple[List[NDArray[np.int64]], List[NDArray[np.int64]]]:
    """The first half of each class's lessons, and the second."""
    of: Dict[int, List[int]] = {}
    for index, places in enumerate(lessons):
        of.setdefault(_class_of(course, places), []).append(index)
    early = {index for indices in of.values() for index in indices[: (len(indices) + 1) // 2]}
    return (
        [places for index, places in enumerate(lessons) if index in early],
        [places for index, places in enumerate(lessons) if index not in early],
    )
