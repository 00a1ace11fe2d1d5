"""Codes with their tokens or without, and a journal that drops all tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from latentd.replay import log_table
from lessons import WAIT_S
from sleepers import CODEC, D, code
from tokened import journal_in, lengths, teach


def test_all_tokens_can_be_dropped_at_once_and_that_is_durable(tmp_path: Path) -> None:
    journal = journal_in(tmp_path)
    teach(journal, 5)
    size = journal.status().size_bytes
    while journal.drop_tokens().result(WAIT_S):
        pass
    journal.close(WAIT_S)
    again = journal_in(tmp_path)
    try:
        assert set(lengths(again).values()) == {CODEC.features_bytes}
        assert again.status().size_bytes <= size
        teach(again, 5)
        assert again.status().samples == 5, "the same images are still known as taught"
    finally:
        again.close(WAIT_S)


def test_many_tokens_are_dropped_in_pieces_that_each_take_little_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_table, "_TRIM", 2)
    journal = journal_in(tmp_path)
    try:
        teach(journal, 5)
        left = []
        while journal.drop_tokens().result(WAIT_S):
            left.append(sum(length == CODEC.code_bytes for length in lengths(journal).values()))
        assert left == [3, 1, 0]
    finally:
        journal.close(WAIT_S)


def test_a_code_is_read_with_its_tokens_or_without_and_in_no_other_length() -> None:
    codes = [code(0, 1), code(1, 2)[: CODEC.features_bytes]]
    features = CODEC.features_of(codes)
    np.testing.assert_array_equal(features[0], CODEC.decode_features(np.frombuffer(codes[0], np.uint8)[None])[0])
    np.testing.assert_array_equal(features[1], CODEC.decode_features(np.frombuffer(codes[1], np.uint8)[None])[0])
    assert [CODEC.holds_tokens(each) for each in codes] == [True, False]
    assert CODEC.features_of([]).shape == (0, 2 * D)
    with pytest.raises(ValueError, match="bytes, not"):
        CODEC.features_of([codes[0][:-1]])
