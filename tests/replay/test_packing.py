"""Packing: exact, reversible, and the documented layout."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentd.replay.packing import FieldTable, pack, packed_bytes, unpack


@given(bits=st.integers(1, 8), rows=st.integers(0, 4), count=st.integers(1, 70), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=300, deadline=None)
def test_unpacking_gives_back_what_was_packed(bits: int, rows: int, count: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 1 << bits, (rows, count), dtype=np.uint8)
    packed = pack(values, bits)
    assert packed.shape == (rows, packed_bytes(count, bits))
    np.testing.assert_array_equal(unpack(packed, bits, count), values)


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_value_takes_its_bits_of_one_little_endian_number(bits: int) -> None:
    values = [(7 * place + 3) % (1 << bits) for place in range(13)]
    number = sum(value << (place * bits) for place, value in enumerate(values))
    expected = number.to_bytes((13 * bits + 7) // 8, "little")
    assert pack(np.array([values], np.uint8), bits).tobytes() == expected


@pytest.mark.parametrize(("bits", "expected"), [(1, 48), (2, 96), (3, 144), (4, 192), (5, 240), (6, 288), (7, 336), (8, 384)])
def test_three_bits_cost_three_bits(bits: int, expected: int) -> None:
    assert packed_bytes(384, bits) == expected
    assert packed_bytes(1, bits) == 1


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_table_reads_levels_in_place_of_values(bits: int) -> None:
    rng = np.random.default_rng(bits)
    levels = rng.standard_normal(1 << bits, dtype=np.float32)
    values = rng.integers(0, 1 << bits, (3, 48), dtype=np.uint8)
    out = np.empty((3, 48), np.float32)
    FieldTable(levels, bits).read(pack(values, bits), out)
    np.testing.assert_array_equal(out, levels[values])


@pytest.mark.parametrize("bits", [0, 9])
def test_a_table_for_other_bits_is_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="1 to 8 bits"):
        FieldTable(np.zeros(1 << bits, np.float32), bits)
