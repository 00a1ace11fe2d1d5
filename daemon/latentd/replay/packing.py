"""Small unsigned integers laid side by side without a wasted bit, and read back by table. Any thread; nothing blocks.

Value i of a row takes bits [i * bits, (i + 1) * bits) of the row's bit string; bit j of the string is bit j % 8 of byte j // 8. The layout
is the same on every platform.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

# Reading value by value costs a shift and a mask each; one look-up of a wider field gives 2 or 4 values at once. The widest field, 14 bits,
# keeps its table inside a core's L2 cache.
_VALUES_PER_FIELD = {1: 4, 2: 4, 3: 4, 4: 2, 5: 2, 6: 2, 7: 2, 8: 1}
# A byte as two fields of 16 bits: of 4 bits each; and the middle one of three, whose halves belong to the fields of 12 bits on either side.
_HALVES = (np.arange(256, dtype="<u4") & 15) | (np.arange(256, dtype="<u4") >> 4) << 16
_PARTED = (np.arange(256, dtype="<u4") & 15) << 8 | (np.arange(256, dtype="<u4") >> 4) << 16
_OPAQUE = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` values of `bits` bits take: the next whole byte and no more."""
    return (count * bits + 7) // 8


def pack(values: Bytes, bits: int) -> Bytes:
    """Rows of values below 2**bits as rows of bytes.

    values: (R, V) uint8, bits: 1 to 8 -> (R, packed_bytes(V, bits)). Bits after the last value are zero.
    """
    R, V = values.shape
    if bits == 8:
        return values.copy()
    groups = -(-V // 8)  # eight values always fill `bits` whole bytes
    padded = np.zeros((R, groups * 8), np.uint8)
    padded[:, :V] = values
    words = padded.view("<u8")  # (R, G)
    for lane in (8, 16, 32):  # the upper of every two lanes moves down to where the lower one ends
        filled = bits * lane // 8
        lower = sum(((1 << filled) - 1) << start for start in range(0, 64, 2 * lane))
        upper = words >> np.uint64(lane - filled)
        upper &= np.uint64(lower << filled)
        words &= np.uint64(lower)
        words |= upper
    whole = words[:, :, None].view(np.uint8)[:, :, :bits]  # (R, G, bits), the little-endian tail cut off
    return np.ascontiguousarray(whole.reshape(R, groups * bits)[:, : packed_bytes(V, bits)])


class FieldTable:
    """What every packed value stands for, read several values at a time.

    levels: (2**bits,) of a 1- or 4-byte type; value v of a packed row is read as levels[v]. Immutable: any number of threads may read.
    """

    def __init__(self, levels: npt.NDArray[np.generic], bits: int) -> None:
        if bits not in _VALUES_PER_FIELD or levels.shape != (1 << bits,):
            raise ValueError(f"a table for {bits} bits needs 1 to 8 bits and {1 << bits} levels, not {levels.shape}")
        self._bits = bits
        self._values = _VALUES_PER_FIELD[bits]
        self._field_bits = self._values * bits
        self._group_bytes = self._field_bits // math.gcd(self._field_bits, 8)
        self._fields = self._group_bytes * 8 // self._field_bits
        self._shifts = np.arange(self._fields, dtype="<u8") * np.uint64(self._field_bits)
        fields = np.arange(1 << self._field_bits)
        # (fields, values of a field): what each field stands for
        tuples = np.stack([levels[(fields >> (place * bits)) & ((1 << bits) - 1)] for place in range(self._values)], axis=1)
        self._dtype = levels.dtype
        self._item = np.dtype(_OPAQUE[self._values * levels.dtype.itemsize])
        self._table = np.ascontiguousarray(tuples).view(self._item).reshape(-1)

    def read(self, packed: Bytes, out: npt.NDArray[np.generic]) -> None:
        """Fill out (R, V), of the levels' type and contiguous, from packed (R, packed_bytes(V, bits))."""
        R, V = out.shape
        per_group = self._fields * self._values
        groups = -(-V // per_group)
        if groups * per_group == V:
            self._look_up(packed, out)
            return
        padded = np.zeros((R, groups * self._group_bytes), np.uint8)
        padded[:, : packed.shape[1]] = packed
        whole = np.empty((R, groups * per_group), self._dtype)
        self._look_up(padded, whole)
        out[...] = whole[:, :V]

    def _look_up(self, packed: Bytes, out: npt.NDArray[np.generic]) -> None:
        items = out.view(self._item)  # (R, V / values of a field)
        # mode="clip" spares numpy a buffered copy of the result; every field is inside the table.
        np.take(self._table, self._cut(packed).reshape(items.shape), out=items, mode="clip")

    def _cut(self, packed: Bytes) -> npt.NDArray[np.integer]:
        """(R, groups * group_bytes) -> (R, groups, fields): the bytes themselves where a field is a byte, else cut out of the groups."""
        R, P = packed.shape
        if self._field_bits == 8:
            return packed[:, :, None]
        if self._field_bits == 4:
            return np.take(_HALVES, packed).view("<u2").reshape(R, P, 2)
        if self._field_bits == 12:
            pairs = np.take(_PARTED, packed[:, 1::3])
            pairs |= packed[:, ::3]
            pairs |= packed[:, 2::3].astype("<u4") << np.uint32(20)
            return pairs.view("<u2").reshape(R, P // 3, 2)
        words = np.zeros((R, P // self._group_bytes, 8), np.uint8)  # a group in each, whatever it takes
        words[:, :, : self._group_bytes] = packed.reshape(R, P // self._group_bytes, self._group_bytes)
        cut = words.view("<u8") >> self._shifts
        cut &= np.uint64((1 << self._field_bits) - 1)
        return cut.view("<i8")


def unpack(packed: Bytes, bits: int, count: int) -> Bytes:
    """The inverse of pack: (R, packed_bytes(count, bits)) -> (R, count) values below 2**bits."""
    values = np.empty((packed.shape[0], count), np.uint8)
    FieldTable(np.arange(1 << bits, dtype=np.uint8), bits).read(np.ascontiguousarray(packed), values)
    return values
