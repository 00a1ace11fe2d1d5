"""Whether the blocks would be any better, asked before they have answered anything: of sleeps that some of the samples were kept away from.

The gate wants answers from before the image was learned. Where images are taught faster than the daemon sleeps, as a folder of photographs
is, the blocks have none when their first sleep is over, and the hold-out can't replace them: it stands between frames that both heads know.
So the runs are dealt out to four folds, and for each fold the blocks sleep once without it, and then both heads are asked. A run is what
was taught in a row under one label: the frames of one video know each other, so they stay together and count as one throw of the coin. A
class that was taught all in one go, as a folder is, is cut into four runs.

Costs three sleeps, once. Owned by the learner thread; yields between its steps.
"""

from __future__ import annotations

from typing import Dict, Generator, List, NamedTuple, Sequence, Tuple

import numpy as np
from numpy.typing import NDArray

from latentd.learning.adapted import Adapted, Rehearsed
from latentd.learning.analytic import LinearHead, RidgeSums
from latentd.learning.floor import Floor
from latentd.replay.memory import AWAY, DOUBTED, ReplayMemory
from latentd.replay.records import seq_of

FOLDS = 4  # with two, blocks that learned a half were a point worse than they become
ENOUGH = 300  # samples answered before they were learned: then nobody has to rehearse
_CHUNK = 256


class Course(NamedTuple):
    """What is learned, in the order it was taught: ids, class and run of M samples, and the fold (M,) that the run is in; -1: in none."""

    ids: List[str]
    class_ids: NDArray[np.int64]
    runs: NDArray[np.int64]
    folds: NDArray[np.int64]


class Answer(NamedTuple):
    """Of one run, which is named as a request is: by its first sample. floor, own: a head, and the features (B, F) that it reads."""

    run: int
    class_ids: List[int]
    floor: Tuple[LinearHead, NDArray[np.float32]]
    own: Tuple[LinearHead, NDArray[np.float32]]


def course(memory: ReplayMemory, seed: int) -> Course:
    """A class's runs are dealt out in turn, so that as few as can be are away at a time; a class with a single short run is never away."""
    ids: List[str] = []
    parts: List[NDArray[np.int64]] = [np.zeros(0, np.int64)]
    for chunk in memory.all(_CHUNK):
        known = chunk.standing != DOUBTED
        ids += [sample_id for sample_id, is_known in zip(chunk.ids, known) if is_known]
        parts.append(chunk.class_ids[known])
    class_ids = np.concatenate(parts)
    runs = np.cumsum(np.diff(class_ids, prepend=-1) != 0) - 1
    folds = np.full(len(runs), -1, np.int64)
    rng = np.random.Generator(np.random.PCG64(seed))
    for class_id in np.unique(class_ids):
        rows = np.flatnonzero(class_ids == class_id)
        if runs[rows[0]] == runs[rows[-1]] and len(rows) >= 2 * FOLDS:
            runs[rows] = runs.max() + 1 + np.arange(len(rows)) * FOLDS // len(rows)
        own, run_of = np.unique(runs[rows], return_inverse=True)
        if len(own) > 1:
            folds[rows] = ((rng.permutation(len(own)) + rng.integers(FOLDS)) % FOLDS)[run_of]
    return Course(ids, class_ids, runs, folds)


def rehearse(adapted: Adapted, floor: Floor, seed: int) -> Generator[int, None, bool]:
    """Fills the evidence of the adapted blocks, once every fold was asked; False where something came that voids it."""
    assert floor.whole is not None, "nothing is rehearsed without tokens"
    found, whole, learned = course(floor.memory, seed), floor.whole.memory, floor.sums.count
    answers: List[Answer] = []
    for fold in range(FOLDS):
        rows = np.flatnonzero(found.folds == fold)
        asked = [int(row) for row in rows if found.ids[row] in whole]
        if not asked:
            continue
        away = [found.ids[row] for row in asked]
        try:
            for sample_id in away:
                whole.judge(sample_id, AWAY)
            rehearsed = yield from adapted.rehearse(whole, learned, fold)
        finally:
            for sample_id in away:
                whole.judge(sample_id, floor.memory.standing(sample_id))
        if rehearsed is None:
            return False
        rival = yield from _floor_without(floor, [found.ids[row] for row in rows])
        answers += _ask(floor, found, asked, rehearsed, rival)
    adapted.evidence.drop({answer.run for answer in answers})  # from an earlier rehearsal
    for answer in answers:
        adapted.evidence.record(answer.run, answer.class_ids, answer.floor, answer.own)
    return True


def _floor_without(floor: Floor, ids: Sequence[str]) -> Generator[int, None, LinearHead]:
    """The floor's head as if these had never been taught."""
    sums = RidgeSums(floor.sums.width)
    for start in range(0, len(ids), _CHUNK):
        yield start
        some = [sample_id for sample_id in ids[start : start + _CHUNK] if sample_id in floor.memory]
        sums.add(floor.decode(floor.memory.get(some)), [floor.memory.class_of(sample_id) for sample_id in some])
    sums.become_rest_of(floor.sums)
    yield len(ids)
    return sums.solve()


def _ask(floor: Floor, found: Course, asked: Sequence[int], rehearsed: Rehearsed, rival: LinearHead) -> List[Answer]:
    """What both heads say of these samples, run by run."""
    assert floor.whole is not None, "the caller has looked"
    groups: Dict[int, List[int]] = {}
    for row in asked:
        if found.ids[row] in floor.whole.memory:
            groups.setdefault(int(found.runs[row]), []).append(row)
    answers = []
    for rows in groups.values():
        ids = [found.ids[row] for row in rows]
        codes = [code.tobytes() for code in floor.whole.memory.get(ids)]
        own, theirs = rehearsed.features(codes), floor.features(codes)
        classes = [int(class_id) for class_id in found.class_ids[rows]]
        answers.append(Answer(seq_of(ids[0]) or 0, classes, (rival, theirs), (rehearsed.head, own)))
    return answers


def wanted(adapted: Adapted) -> bool:
    """Whether too little is known of how the blocks answer what they have not learned."""
    return len(adapted.evidence) < ENOUGH
