"""Who takes part in the answers: the gate is asked about the adapted blocks first, and about the trained head where those stay out.

Pure functions of what the learner thread owns, so the same log publishes the same version.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Mapping, NamedTuple, Optional, Tuple, Union

import numpy as np
from numpy.typing import NDArray

from latentd.learning.adapted import Adapted
from latentd.learning.adaptive import AdaptiveHead, TrainedHead
from latentd.learning.analytic import LinearHead
from latentd.learning.gate import MIN_HOLDOUT, TEMPERATURES, Opinion, Verdict, decide, judge, unless_it_flips
from latentd.learning.snapshot import AdaptedHead


class HeldOut(NamedTuple):
    """Samples kept out of training: ids, classes and features (H, F), and the column (H,) of their class in the analytic head."""

    ids: Tuple[str, ...]
    class_ids: Tuple[int, ...]
    features: NDArray[np.float32]
    columns: NDArray[np.int64]

    def only(self, rows: NDArray[np.intp]) -> HeldOut:
        ids, class_ids = (tuple(values[row] for row in rows) for values in (self.ids, self.class_ids))
        return HeldOut(ids, class_ids, self.features[rows], self.columns[rows])


class Judged(NamedTuple):
    """part: what the verdict is about; None where nothing was trained. asked: the hold-out samples that it was asked of."""

    part: Union[TrainedHead, AdaptedHead, None]
    verdict: Verdict
    asked: HeldOut


def judged(
    analytic: LinearHead, head: Optional[AdaptiveHead], adapted: Optional[Adapted], held: HeldOut, names: Mapping[int, str]
) -> Judged:
    """Who takes part beside the analytic head. names: of the classes that may be answered."""
    blocks = _blocks(analytic, adapted, held, names)
    if blocks is not None and blocks.verdict.weight:
        return blocks
    alone = _head(analytic, head, held)
    if blocks is None:
        return alone
    if head is None:
        return Judged(None, replace(blocks.verdict, answers=alone.verdict.answers, temperature=alone.verdict.temperature), held)
    reason = f"blocks {blocks.verdict.reason}; head {alone.verdict.reason}"
    return alone._replace(verdict=replace(alone.verdict, reason=reason))


def _head(analytic: LinearHead, head: Optional[AdaptiveHead], held: HeldOut) -> Judged:
    trained = None if head is None else head.frozen()
    opinion = None if trained is None else Opinion(trained.class_ids, trained.scores(held.features))
    return Judged(trained, judge(analytic, opinion, held.features, held.columns), held)


def _blocks(analytic: LinearHead, adapted: Optional[Adapted], held: HeldOut, names: Mapping[int, str]) -> Optional[Judged]:
    """Judged on what was answered before it was learned, where there is enough of it, and on the hold-out samples that have tokens, which
    else only object where too many answers would flip.
    """
    if adapted is None or adapted.serving is None:
        return None
    asked = held.only(np.flatnonzero([adapted.answers(sample_id) for sample_id in held.ids]))
    head = only_of(adapted.head(), names)
    opinion = adapted.opinion(head, asked.ids)
    table = adapted.evidence.table(analytic.class_ids)
    if len(table.columns) < MIN_HOLDOUT:
        verdict = judge(analytic, opinion, asked.features, asked.columns)
    else:
        own = Opinion(analytic.class_ids, table.own, TEMPERATURES)
        found = decide(analytic.class_ids, table.floor, own, table.columns, table.groups, "before learning")
        verdict = unless_it_flips(found, analytic, opinion, asked.features, asked.columns)
    return Judged(AdaptedHead(adapted.serving, head, verdict.opinion_temperature), verdict, asked)


def only_of(head: LinearHead, names: Mapping[int, str]) -> LinearHead:
    """The head without the classes that have no name."""
    columns = [column for column, class_id in enumerate(head.class_ids) if class_id in names]
    return head if len(columns) == len(head.class_ids) else head.only(columns)
