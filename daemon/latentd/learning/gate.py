"""The gate: what was trained takes part in answers only where the hold-out finds it better than the floor beyond chance.

A candidate that merely looks no worse on a hundred samples is, on average, worse: on ELPV validation splits, letting it in cost 0.6 point.
So its gain must pass a one-sided sign test on the answers that change (McNemar 1947).

Also calibrates what the answers say of themselves: the temperatures of the scores and the weight of the trained part, all on samples that
neither was trained on: the hold-out, or images that were answered before they were learned. Pure functions of those, so the same log
publishes the same version.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, Optional, Tuple

import numpy as np
from numpy.typing import NDArray

from latentd.learning.analytic import LinearHead
from latentd.learning.snapshot import blend, softmax

MIN_HOLDOUT = 30  # fewer hold-out samples decide nothing: the floor answers alone
MAX_NEGATIVE_FLIPS = 0.02  # of the hold-out: right answers of the floor that the candidate gets wrong
FLIPS_PER_GAIN = 0.5  # or, of images not seen before, this many for each that it gets right and the floor does not
CHANCE_Z = 1.64  # standard deviations of a fair coin that the net gain must pass: 5 % one-sided
HOLDOUT_Z = 2.33  # on the hold-out, 1 %: the same hundred samples are asked at every version, and luck has many tries
DEFAULT_TEMPERATURE = 1.5
SURE_NATS = 8.0  # without a hold-out: the mean of a class wins over another class by this much, however few samples make it look far
TEMPERATURES = (0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_WEIGHTS = (0.3, 0.5, 0.7)
_EVEN = (0.5,)  # on images not seen before: both knew less when they answered them, and which has the more to say now those can't tell


class Opinion(NamedTuple):
    """What a trained part says of the hold-out: scores (H, C') in the order of class_ids. temperatures: to choose from; of a softmax that
    was trained as one there is but one.
    """

    class_ids: Tuple[int, ...]
    scores: NDArray[np.float32]
    temperatures: Tuple[float, ...] = (1.0,)


@dataclass(frozen=True)
class Verdict:
    """weight: of the trained part in the answers, 0 when it is kept out; reason says why, with the numbers. opinion_temperature: of its
    scores. holdout: samples that it was judged on, and of them: right by the floor and by the candidate, right only by the floor (negative
    flips; more than `flips_allowed` keep it out) and only by the candidate (positive ones).
    """

    temperature: float
    opinion_temperature: float
    weight: float
    reason: str
    holdout: int
    floor_correct: int
    candidate_correct: int
    negative_flips: int
    positive_flips: int
    flips_allowed: int
    answers: NDArray[np.int64]  # (holdout,) columns of the analytic head that the published snapshot answers


def judge(analytic: LinearHead, opinion: Optional[Opinion], features: NDArray[np.float32], columns: NDArray[np.int64]) -> Verdict:
    """Calibrates and decides on the hold-out: features (H, F), columns (H,) the true class's column in the analytic head."""
    count = len(columns)
    scores = features @ analytic.weight + analytic.bias
    if opinion is not None and count >= MIN_HOLDOUT:
        return decide(analytic.class_ids, scores, opinion, columns)
    temperature = floor_temperature(analytic, scores, columns)
    answers = answers_of(analytic.class_ids, scores, temperature)
    reason = "nothing trained yet" if opinion is None else f"{count} hold-out samples are too few to judge ({MIN_HOLDOUT} needed)"
    return Verdict(temperature, 1.0, 0.0, reason, count, int((answers == columns).sum()), 0, 0, 0, 0, answers)


def floor_temperature(analytic: LinearHead, scores: NDArray[np.float32], columns: NDArray[np.int64]) -> float:
    """The one of least surprise on these scores (H, C), or a rule where they are too few."""
    if len(columns) < MIN_HOLDOUT:
        return max(DEFAULT_TEMPERATURE, analytic.separation / 2 / SURE_NATS)
    return _best_temperature(scores, columns)


def decide(
    class_ids: Tuple[int, ...],
    scores: NDArray[np.float32],
    opinion: Opinion,
    columns: NDArray[np.int64],
    groups: Optional[NDArray[np.int64]] = None,
    of: str = "hold-out",
) -> Verdict:
    """Calibrates and decides on the floor's scores (H, C) and the opinion on the same samples.

    groups: (H,) samples of one group may resemble each other, so that a whole group counts as one throw of the coin; None: the samples are
    kept ones, that resemble what was learned, and each is its own.
    of: what the samples are, for the reason.
    """
    count, temperature = len(columns), _best_temperature(scores, columns)
    floor_answers = answers_of(class_ids, scores, temperature)
    weights = _WEIGHTS if groups is None else _EVEN
    own, weight, answers = _best_blend(class_ids, softmax(scores / temperature), opinion, columns, weights)
    right, floor_right = answers == columns, floor_answers == columns
    flips, gains = int((floor_right & ~right).sum()), int((right & ~floor_right).sum())
    net = np.bincount(np.unique(groups, return_inverse=True)[1] if groups is not None else np.arange(count), right * 1.0 - floor_right)
    numbers = f"{of} {int(right.sum())} against {int(floor_right.sum())} right of {count}, {flips} negative flips"
    by_chance = gains - flips <= (HOLDOUT_Z if groups is None else CHANCE_Z) * float(np.square(net).sum()) ** 0.5
    bearable = int(max(MAX_NEGATIVE_FLIPS * count, 0.0 if groups is None else FLIPS_PER_GAIN * gains))
    if by_chance or flips > bearable:
        weight, answers, reason = 0.0, floor_answers, f"kept out: {numbers}"
    else:
        reason = f"takes part: {numbers}"
    return Verdict(temperature, own, weight, reason, count, int(floor_right.sum()), int(right.sum()), flips, gains, bearable, answers)


def unless_it_flips(
    found: Verdict, analytic: LinearHead, opinion: Opinion, features: NDArray[np.float32], columns: NDArray[np.int64]
) -> Verdict:
    """A verdict found on other samples, with its answers to the hold-out (as for `judge`). Where those flip too many right ones it is
    "kept out", with the numbers of the hold-out.
    """
    ids, scores = analytic.class_ids, features @ analytic.weight + analytic.bias
    cooled = Opinion(opinion.class_ids, opinion.scores / np.float32(found.opinion_temperature))
    floor, answers = answers_of(ids, scores, found.temperature), answers_of(ids, scores, found.temperature, cooled, found.weight)
    right, floor_right, count = answers == columns, floor == columns, len(columns)
    flips, bearable = int((floor_right & ~right).sum()), int(MAX_NEGATIVE_FLIPS * count)
    if flips <= bearable:
        return replace(found, answers=answers)
    return replace(
        found,
        weight=0.0,
        reason=f"kept out: hold-out {int(right.sum())} against {int(floor_right.sum())} right of {count}, {flips} negative flips",
        holdout=count,
        floor_correct=int(floor_right.sum()),
        candidate_correct=int(right.sum()),
        negative_flips=flips,
        positive_flips=int((right & ~floor_right).sum()),
        flips_allowed=bearable,
        answers=floor,
    )


def answers_of(
    class_ids: Tuple[int, ...], scores: NDArray[np.float32], temperature: float, opinion: Optional[Opinion] = None, weight: float = 0.0
) -> NDArray[np.int64]:
    """The columns that floor scores (H, C), and an opinion of this weight with its temperature in its scores, answer (H,)."""
    if not scores.shape[1]:
        return np.zeros(len(scores), np.int64)
    floor = softmax(scores / temperature)
    mixed = floor if opinion is None else blend(floor, class_ids, softmax(opinion.scores), opinion.class_ids, weight)
    answers: NDArray[np.int64] = np.argmax(mixed, axis=1)
    return answers


def _best_blend(
    class_ids: Tuple[int, ...], floor: NDArray[np.float64], opinion: Opinion, columns: NDArray[np.int64], weights: Tuple[float, ...]
) -> Tuple[float, float, NDArray[np.int64]]:
    """The opinion's temperature and weight of least negative log-likelihood, and the answers that they give."""
    choices = [
        (temperature, weight, blend(floor, class_ids, softmax(opinion.scores / temperature), opinion.class_ids, weight))
        for temperature in opinion.temperatures
        for weight in weights
    ]
    temperature, weight, best = min(choices, key=lambda choice: _surprise(choice[2], columns))
    return temperature, weight, np.argmax(best, axis=1)


def _best_temperature(scores: NDArray[np.float32], columns: NDArray[np.int64]) -> float:
    return min(TEMPERATURES, key=lambda value: _surprise(softmax(scores / value), columns))


def _surprise(probabilities: NDArray[np.float64], columns: NDArray[np.int64]) -> float:
    """Mean negative log-likelihood of the truth, in nats."""
    return float(-np.log(np.maximum(probabilities[np.arange(len(columns)), columns], 1e-9)).mean())
