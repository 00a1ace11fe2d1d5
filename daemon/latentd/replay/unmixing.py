"""Reading rotated tokens of few bits: the Hadamard transform begins in the look-up that unpacks them. Any thread; nothing blocks.

Sylvester's matrix of n channels is that of n / 4 groups times that of the four channels in a group. A field of packed bits stands for four
levels, so its entry in the table may hold them transformed already; what is left is a matrix product over the groups, a quarter of the
whole. For it groups lie before tokens, which costs one copy of the fields before and one of the result after.
"""

from __future__ import annotations

from typing import Dict

import numpy as np
import numpy.typing as npt

from latentd.replay.packing import Bytes, FieldTable
from latentd.replay.rotation import Floats, hadamard, lloyd_max

FIELD = 4  # channels
NARROW = (1, 2, 3)  # bits a value: wider fields of four would need tables beyond a core's cache
_STEP = 8  # tokens: half as many fill whole cache lines
_ITEM = np.dtype(np.complex128)  # four float32 that are moved as one

Fields = npt.NDArray[np.uint16]
Places = npt.NDArray[np.int64]


class Unmixing:
    """Tokens of width D whose blocks of `block` channels were Hadamard-transformed; block is a multiple of 8."""

    def __init__(self, block: int) -> None:
        self._rest = hadamard(block // FIELD)
        self._readers = {bits: FieldTable(lloyd_max(bits).levels, bits) for bits in NARROW}
        tables = [np.matmul(reader.tuples, hadamard(FIELD)) for reader in self._readers.values()]
        self._table = np.concatenate(tables).astype(np.float32).view(_ITEM).reshape(-1)
        starts = np.cumsum([0] + [len(table) for table in tables[:-1]])
        self._first: Dict[int, np.uint16] = {bits: np.uint16(start) for bits, start in zip(NARROW, starts)}

    def fields(self, packed: Bytes, bits: int) -> Fields:
        """(R, bytes) of whole groups of fields -> (R, fields): their places in the table."""
        found = self._readers[bits].fields(packed).reshape(len(packed), -1)
        places: Fields = np.add(found, self._first[bits], dtype=np.uint16)
        return places

    def levels(self, fields: Fields, order: Places, out: Floats) -> None:
        """Fields (R, T, D / 4) as tokens, transformed back, into the tokens `order` (T,) of out (R, N, D), which must be contiguous."""
        R, T, J = fields.shape
        room = -(-R * T // _STEP) * _STEP
        places = np.empty((J, room), np.intp)
        places[:, : R * T] = fields.reshape(R * T, J).T
        places[:, R * T :] = 0
        mixed = np.take(self._table, places, mode="clip")  # (J, room) of four
        unmixed = np.empty_like(mixed)
        np.matmul(self._rest, self._halves(mixed), out=self._halves(unmixed))
        out.view(_ITEM)[:, order] = unmixed[:, : R * T].T.reshape(R, T, J)

    def _halves(self, items: npt.NDArray[np.complex128]) -> Floats:
        """(J, room) of four as matrices (blocks, 2, groups, 2 * room): BLAS is faster on two that begin at cache lines than on one."""
        floats = items.view(np.float32)
        groups = len(self._rest)
        return floats.reshape(len(items) // groups, groups, 2, -1).transpose(0, 2, 1, 3)
