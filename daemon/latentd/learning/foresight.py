"""What taught images look like before they are learned: the yardstick of `unknown` and of drift. Owned by the learner thread.

Served snapshots come when there is time for them, so they can't be the yardstick: the same log must give the same threshold. This one is a
copy of the floor, made again whenever what was learned has grown by a quarter.
"""

from __future__ import annotations

from typing import Any, Dict, Mapping, Optional, Sequence, Tuple

import numpy as np
from numpy.typing import NDArray

from latentd.learning.analytic import Landmarks, LinearHead, RidgeSums
from latentd.learning.drift import DriftWatch
from latentd.learning.unknown import RightAnswers, likeness, to_answer
from latentd.replay.records import Entry

GROWTH = 1.25
LEAST = 16  # samples between two yardsticks at least


class Foresight:
    """Looks at every taught sample once, in the order of the log, before it is learned."""

    def __init__(self) -> None:
        self.answers = RightAnswers()
        self.drift = DriftWatch()
        self._head: Optional[LinearHead] = None
        self._made_at = 0  # samples that the yardstick knows

    def look(self, taught: Sequence[Entry], features: NDArray[np.float32]) -> None:
        """taught: entries with a class, of features (B, F). A class that the yardstick does not know says nothing yet."""
        head = self._head
        if head is None or not taught:
            return
        column = {class_id: index for index, class_id in enumerate(head.class_ids)}
        alike, (answers, sureness) = likeness(head, features), to_answer(head, features)
        for row, entry in enumerate(taught):
            own = column.get(entry.class_id) if entry.class_id is not None else None
            if own is None or entry.class_id is None:
                continue
            self.drift.observe(entry.class_id, entry.seq, float(alike[row, own]))
            if int(answers[row]) == own:
                self.answers.record(entry.class_id, float(sureness[row]))

    def is_due(self, sums: RidgeSums) -> bool:
        """Whether the yardstick is too old, or missing."""
        return sums.count >= max(GROWTH * self._made_at, self._made_at + LEAST)

    def renew(self, sums: RidgeSums) -> None:
        """Makes the yardstick from what was learned so far. As long as a snapshot takes to make."""
        head = sums.solve()
        self._head, self._made_at = head if len(head.class_ids) > 1 else None, sums.count

    def forget(self, class_id: Optional[int] = None) -> None:
        """Drops the yardstick, which has seen what must not have been seen; and what is known of this class."""
        self._head, self._made_at = None, 0
        if class_id is not None:
            self.answers.forget_class(class_id)
            self.drift.forget_class(class_id)

    def state(self) -> Tuple[Dict[str, NDArray[Any]], Dict[str, Any]]:
        """Arrays and JSON-able facts that `restore` takes back."""
        facts = {"made_at": self._made_at, "answers": self.answers.state(), "drift": self.drift.state()}
        if self._head is None or self._head.landmarks is None:
            return {}, facts
        head, marks = self._head, self._head.landmarks
        arrays: Dict[str, NDArray[Any]] = {"class_ids": np.array(head.class_ids, np.int64), "weight": head.weight, "bias": head.bias}
        arrays.update(middle=marks.middle, origin=marks.origin, length=marks.length, spread=marks.spread)
        return {f"foresight.{name}": value for name, value in arrays.items()}, facts

    def restore(self, arrays: Mapping[str, NDArray[Any]], facts: Mapping[str, Any]) -> None:
        self._made_at = int(facts["made_at"])
        self.answers.restore(facts["answers"])
        self.drift.restore(facts["drift"])
        own = {name[len("foresight.") :]: value for name, value in arrays.items() if name.startswith("foresight.")}
        if own:
            marks = Landmarks(own["middle"], own["origin"], own["length"], own["spread"])
            ids = tuple(int(value) for value in own["class_ids"])
            self._head = LinearHead(ids, own["weight"], own["bias"], landmarks=marks)
