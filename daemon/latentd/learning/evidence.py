"""What floor and adapted head said of taught images before they were learned: the evidence on which the gate lets the adapted head in.

The hold-out can't tell the two apart where images come as videos: its frames stand between frames that both have learned, and both know
them. A request that is still to be learned is as strange as the next one to be asked. Owned by the learner thread; nothing blocks.
"""

from __future__ import annotations

from collections import deque
from typing import AbstractSet, Any, Deque, Dict, Mapping, NamedTuple, Sequence, Tuple

import numpy as np
from numpy.typing import NDArray

from latentd.learning.analytic import LinearHead

Features = NDArray[np.float32]
KEPT = 1200  # samples: older ones were answered by blocks that had learned less, and a few hundred are a few dozen videos
_NEVER = np.float32(-1e9)  # the score of a class that was not known yet


class Row(NamedTuple):
    """group: the request that brought it; floor, own: scores (C,) of the classes class_ids."""

    group: int
    class_id: int
    class_ids: Tuple[int, ...]
    floor: NDArray[np.float32]
    own: NDArray[np.float32]


class Table(NamedTuple):
    """columns, groups: (H,); floor, own: scores (H, C) in the order of the class ids asked for."""

    columns: NDArray[np.int64]
    groups: NDArray[np.int64]
    floor: NDArray[np.float32]
    own: NDArray[np.float32]


class Evidence:
    def __init__(self) -> None:
        self._rows: Deque[Row] = deque(maxlen=KEPT)

    def __len__(self) -> int:
        return len(self._rows)

    def record(self, group: int, class_ids: Sequence[int], floor: Tuple[LinearHead, Features], own: Tuple[LinearHead, Features]) -> None:
        """Notes both answers to samples of these classes. floor, own: a head and the features (B, F) that it reads. A class that one of
        them does not know says nothing.
        """
        if not class_ids:
            return
        known = floor[0].class_ids
        scores = [_ordered(head, features @ head.weight + head.bias, known) for head, features in (floor, own)]
        for row, class_id in enumerate(class_ids):
            if class_id in known and class_id in own[0].class_ids:
                self._rows.append(Row(group, class_id, known, scores[0][row], scores[1][row]))

    def drop(self, groups: AbstractSet[int]) -> None:
        """Forgets what was noted of these requests."""
        self._rows = deque((row for row in self._rows if row.group not in groups), maxlen=KEPT)

    def table(self, class_ids: Tuple[int, ...]) -> Table:
        """All that is known of samples of these classes."""
        rows = [row for row in self._rows if row.class_id in class_ids]
        column = {class_id: index for index, class_id in enumerate(class_ids)}
        floor, own = (np.full((len(rows), len(class_ids)), _NEVER, np.float32) for _ in range(2))
        for index, row in enumerate(rows):
            kept = [place for place, class_id in enumerate(row.class_ids) if class_id in column]
            places = [column[row.class_ids[place]] for place in kept]
            floor[index, places], own[index, places] = row.floor[kept], row.own[kept]
        columns = np.array([column[row.class_id] for row in rows], np.int64)
        return Table(columns, np.array([row.group for row in rows], np.int64), floor, own)

    def state(self) -> Dict[str, NDArray[Any]]:
        """The arrays of a checkpoint."""
        class_ids = tuple(sorted({class_id for row in self._rows for class_id in row.class_ids}))
        table = self.table(class_ids)
        return {
            "evidence.class_ids": np.array(class_ids, np.int64),
            "evidence.truth": np.array([row.class_id for row in self._rows], np.int64),
            "evidence.groups": table.groups,
            "evidence.floor": table.floor,
            "evidence.own": table.own,
        }

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """From what `state` gave, or from a checkpoint of before there was any."""
        self._rows.clear()
        class_ids = tuple(int(class_id) for class_id in arrays.get("evidence.class_ids", ()))
        for index, class_id in enumerate(arrays.get("evidence.truth", ())):
            floor, own = (arrays[name][index].copy() for name in ("evidence.floor", "evidence.own"))
            self._rows.append(Row(int(arrays["evidence.groups"][index]), int(class_id), class_ids, floor, own))


def _ordered(head: LinearHead, scores: NDArray[np.float32], class_ids: Tuple[int, ...]) -> NDArray[np.float32]:
    """Scores (B, C') of this head in the order of class_ids, (B, C)."""
    column = {class_id: index for index, class_id in enumerate(head.class_ids)}
    ordered = np.full((len(scores), len(class_ids)), _NEVER, np.float32)
    for index, class_id in enumerate(class_ids):
        if class_id in column:
            ordered[:, index] = scores[:, column[class_id]]
    return ordered
