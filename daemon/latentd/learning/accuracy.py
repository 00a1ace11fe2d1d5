"""How good it is, with counts and intervals: prequential (predict first, then learn) and on the hold-out.

Tallies are owned by the learner thread; reports are immutable.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any, Callable, Deque, Dict, Mapping, Optional, Sequence, Tuple

from latentd.learning.drift import Drift
from latentd.learning.unknown import NOTHING_TAUGHT, UnknownReport

RECENT = 500
_Z95 = 1.959963984540054


@dataclass(frozen=True)
class Score:
    """Right answers of so many; the ratio and its 95 % Wilson interval are None where nothing was counted."""

    correct: int
    count: int

    @property
    def ratio(self) -> Optional[float]:
        return self.correct / self.count if self.count else None

    @property
    def low(self) -> Optional[float]:
        return self._bound(-1.0)

    @property
    def high(self) -> Optional[float]:
        return self._bound(1.0)

    def _bound(self, sign: float) -> Optional[float]:
        """Wilson 1927; exact enough from the first sample on, and never outside 0..1."""
        if not self.count:
            return None
        share, count = self.correct / self.count, self.count
        centre = share + _Z95**2 / (2 * count)
        spread = _Z95 * math.sqrt(share * (1 - share) / count + _Z95**2 / (4 * count**2))
        return min(1.0, max(0.0, (centre + sign * spread) / (1 + _Z95**2 / count)))


@dataclass(frozen=True)
class ClassAccuracy:
    name: str
    prequential: Score
    holdout: Score
    drift: Optional[Drift] = None


@dataclass(frozen=True)
class AccuracyReport:
    """confusion: true class -> answered class -> count, on the hold-out. Neither it nor the scores know "unknown": that is told apart."""

    prequential: Score
    prequential_recent: Score
    holdout: Score
    per_class: Tuple[ClassAccuracy, ...]
    confusion: Mapping[str, Mapping[str, int]]
    unknown: UnknownReport = NOTHING_TAUGHT


EMPTY = AccuracyReport(Score(0, 0), Score(0, 0), Score(0, 0), (), {})


class Prequential:
    """Running tallies by class id; a sample of a class that was not known yet counts as wrong."""

    def __init__(self) -> None:
        self._by_class: Dict[int, Tuple[int, int]] = {}
        self._recent: Deque[bool] = deque(maxlen=RECENT)

    def record(self, class_id: int, correct: bool) -> None:
        right, count = self._by_class.get(class_id, (0, 0))
        self._by_class[class_id] = (right + int(correct), count + 1)
        self._recent.append(correct)

    def forget_class(self, class_id: int) -> None:
        self._by_class.pop(class_id, None)

    def of(self, class_id: int) -> Score:
        return Score(*self._by_class.get(class_id, (0, 0)))

    def total(self) -> Score:
        return Score(sum(right for right, _ in self._by_class.values()), sum(count for _, count in self._by_class.values()))

    def recent(self) -> Score:
        return Score(sum(self._recent), len(self._recent))

    def state(self) -> Dict[str, Any]:
        return {"by_class": [[key, *value] for key, value in self._by_class.items()], "recent": [int(value) for value in self._recent]}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._by_class = {int(key): (int(right), int(count)) for key, right, count in state["by_class"]}
        self._recent = deque((bool(value) for value in state["recent"]), maxlen=RECENT)


def report(
    names: Mapping[int, str],
    prequential: Prequential,
    truth: Sequence[int],
    answers: Sequence[int],
    drift: Callable[[int], Optional[Drift]] = lambda _: None,
) -> AccuracyReport:
    """names: class id -> name. truth, answers: class ids of the hold-out samples and what was answered. drift: of a class id."""
    confusion: Dict[str, Dict[str, int]] = {}
    held: Dict[int, Tuple[int, int]] = {}
    for true, answered in zip(truth, answers):
        right, count = held.get(true, (0, 0))
        held[true] = (right + int(true == answered), count + 1)
        row = confusion.setdefault(names.get(true, str(true)), {})
        answer = names.get(answered, str(answered))
        row[answer] = row.get(answer, 0) + 1
    per_class = tuple(ClassAccuracy(name, prequential.of(key), Score(*held.get(key, (0, 0))), drift(key)) for key, name in names.items())
    total = Score(sum(right for right, _ in held.values()), sum(count for _, count in held.values()))
    return AccuracyReport(prequential.total(), prequential.recent(), total, per_class, confusion)
