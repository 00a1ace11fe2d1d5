from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentd.errors import LabelInvalid
from latentd.learning import snapshot
from latentd.service.labels import UNKNOWN, clean_label


@pytest.mark.parametrize(
    "raw",
    ["", "   ", "\n", "a\x00b", "a\nb", "\x1b[31mred", "a\u202eb", "a\u2028b", "\ud800", "x" * 101, "x" * 10_000, "unknown", " unknown "],
)
def test_labels_that_can_not_be_used_are_refused(raw: str) -> None:
    with pytest.raises(LabelInvalid):
        clean_label(raw, 100)


@pytest.mark.parametrize(
    ("raw", "label"),
    [
        ("cat", "cat"),
        (" cat \n", "cat"),
        ("mono defective", "mono defective"),
        ("e\u0301clair", "éclair"),
        ("猫", "猫"),
        ("🐈", "🐈"),
        ("a/b", "a/b"),
        ("x" * 100, "x" * 100),
    ],
)
def test_other_labels_are_normalised(raw: str, label: str) -> None:
    assert clean_label(raw, 100) == label


@given(st.text(max_size=40))
def test_a_clean_label_stays_as_it_is(raw: str) -> None:
    try:
        label = clean_label(raw, 30)
    except LabelInvalid:
        return
    assert clean_label(label, 30) == label
    assert 0 < len(label) <= 30
    assert label.encode("utf-8").decode("utf-8") == label


def test_the_refused_word_is_the_one_that_snapshots_answer() -> None:
    assert UNKNOWN == snapshot.UNKNOWN
