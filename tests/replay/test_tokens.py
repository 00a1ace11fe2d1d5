"""Codes with their tokens or without, and a journal that drops all tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Dict

import numpy as np
import pytest

from latentd.replay import log_table
from latentd.replay.journal import Journal
from latentd.replay.records import NewSample
from lessons import WAIT_S, limits
from sleepers import CODEC, D, code, latent


def journal_in(folder: Path) -> Journal:
    journal = Journal(folder / "journal.sqlite", codec=CODEC, feature_width=2 * D, limits=limits())
    journal.start(WAIT_S)
    return journal


def teach(journal: Journal, count: int) -> None:
    for seq in range(1, count + 1):
        features = latent(seq % 2, seq)[0]
        journal.admit([NewSample(("cat", "dog")[seq % 2], code(seq % 2, seq), features, f"{seq:032x}{seq:032x}")]).result(WAIT_S)


def lengths(journal: Journal) -> Dict[str, int]:
    return {entry.sample_id: len(entry.code or b"") for entry in journal.entries(0, 1000).result(WAIT_S)}


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
