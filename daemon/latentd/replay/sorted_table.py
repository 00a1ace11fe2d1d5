"""A table in numpy arrays, ordered by its key: the bookkeeping of the replay memory, whose bytes can be counted. One thread at a time."""

from __future__ import annotations

from typing import Any, Dict, Tuple

import numpy as np
import numpy.typing as npt


class SortedTable:
    """Rows of a unique key and named values in ascending order of the key, up to a fixed capacity.

    A dict of Python objects would be shorter, but takes about 200 bytes an entry where this takes the bytes of its types, and its order
    would depend on the order of arrival. Finding is a binary search; inserting and deleting move the rows behind.
    """

    def __init__(self, capacity: int, key: str, **columns: str) -> None:
        self.count = 0
        self._keys: npt.NDArray[Any] = np.empty(capacity, key)
        self._columns: Dict[str, npt.NDArray[Any]] = {name: np.empty(capacity, kind) for name, kind in columns.items()}
        self.row_bytes = self._keys.itemsize + sum(column.itemsize for column in self._columns.values())

    @property
    def keys(self) -> npt.NDArray[Any]:
        """All keys, ascending; a view."""
        return self._keys[: self.count]

    def __getitem__(self, column: str) -> npt.NDArray[Any]:
        """One column in the order of the keys; a view that may be written to."""
        return self._columns[column][: self.count]

    def find(self, key: Any) -> Tuple[int, bool]:
        """(place, True) of the key, or (the place where it belongs, False)."""
        place = int(np.searchsorted(self.keys, np.asarray(key, self._keys.dtype)))
        return place, place < self.count and bool(self._keys[place] == key)

    def insert(self, place: int, key: Any, **values: Any) -> None:
        """Put a row where find said it belongs; the caller has checked that there is room and that the key is new."""
        for column, value in [(self._keys, key)] + [(self._columns[name], value) for name, value in values.items()]:
            column[place + 1 : self.count + 1] = column[place : self.count]
            column[place] = value
        self.count += 1

    def delete(self, place: int) -> None:
        for column in [self._keys, *self._columns.values()]:
            column[place : self.count - 1] = column[place + 1 : self.count]
        self.count -= 1
