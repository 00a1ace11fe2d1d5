from __future__ import annotations

from typing import Optional

import pytest

from latentd.cli.figures import duration, joules, percent, score, size
from latentd.cli.terminal import plain


@pytest.mark.parametrize(
    ("energy_j", "text"), [(None, "-"), (0.0, "0.00 J"), (0.0123, "12.3 mJ"), (1.5, "1.50 J"), (18_342.0, "18.3 kJ"), (-0.05, "-50.0 mJ")]
)
def test_joules(energy_j: Optional[float], text: str) -> None:
    assert joules(energy_j) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "-"), (0.4, "0 s"), (59, "59 s"), (61, "1 min"), (3 * 3600 + 120, "3 h 2 min"), (100 * 3600, "4 d 4 h")]
)
def test_durations(seconds: Optional[float], text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(None, "-"), (0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (48 << 20, "48.0 MiB"), (5 << 30, "5.0 GiB")]
)
def test_sizes(count: Optional[int], text: str) -> None:
    assert size(count) == text


def test_what_was_not_measured_is_never_a_zero() -> None:
    assert percent(None) == "-"
    assert score(None) == score({"value": None, "correct": 0, "count": 0, "low": None, "high": None}) == "not known yet"
    assert score({"value": 0.9, "correct": 9, "count": 10, "low": 0.6, "high": 0.98}) == "90.0 % (60 to 98, of 10)"


def test_names_can_not_move_the_cursor() -> None:
    assert plain("a\x1b[2Jb\r\x07\u202e") == r"a\x1b[2Jb\r\x07\u202e"
    assert plain("caf\udce9 Käse 猫") == r"caf\xe9 Käse 猫"
