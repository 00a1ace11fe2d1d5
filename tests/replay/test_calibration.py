"""Calibration: measured before the first image is taught, then the same for as long as anything is taught."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Callable, Dict, List

import numpy as np
import numpy.typing as npt
import pytest

from latentd.errors import ConfigError
from latentd.replay.calibration import FILE, kept

FACTS: Dict[str, Any] = {"codec": "int8 tensor", "shape": [4, 384], "backbone": "tiny"}
RANGE = np.array([-1.1, 6.25], np.float32)


class Measure:
    """What measuring gives, and how often it was asked."""

    def __init__(self, *values: float) -> None:
        self.values, self.calls = values or tuple(RANGE.tolist()), 0

    def __call__(self) -> npt.NDArray[np.float32]:
        self.calls += 1
        return np.array(self.values, np.float32)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def with_one_bit_changed(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def not_safetensors(path: Path) -> None:
    path.write_text("low = -1\n")


def of_another_kind(path: Path) -> None:
    path.unlink()
    kept(path, {**FACTS, "codec": "int6 tensor"}, False, Measure(0, 1))


HARM: List[Callable[[Path], None]] = [Path.unlink, cut_short, with_one_bit_changed, not_safetensors, of_another_kind]


def test_it_is_measured_once_and_read_back_bit_for_bit(tmp_path: Path) -> None:
    measure = Measure()
    np.testing.assert_array_equal(kept(tmp_path / FILE, FACTS, False, measure), RANGE)
    for taught in (False, True):
        np.testing.assert_array_equal(kept(tmp_path / FILE, FACTS, taught, Measure(0, 1)), RANGE)
    assert measure.calls == 1
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


@pytest.mark.parametrize("harm", HARM, ids=lambda harm: harm.__name__)
def test_what_was_taught_is_never_read_with_another_calibration(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    kept(tmp_path / FILE, FACTS, False, Measure())
    harm(tmp_path / FILE)
    measure = Measure()
    with pytest.raises(ConfigError, match="can't be read without its calibration") as refused:
        kept(tmp_path / FILE, FACTS, True, measure)
    assert "--state-dir" in refused.value.hint
    assert measure.calls == 0


@pytest.mark.parametrize("harm", HARM, ids=lambda harm: harm.__name__)
def test_where_nothing_was_taught_it_is_measured_again(
    tmp_path: Path, harm: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    kept(tmp_path / FILE, FACTS, False, Measure(0, 1))
    harm(tmp_path / FILE)
    there = (tmp_path / FILE).exists()
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(kept(tmp_path / FILE, FACTS, False, Measure()), RANGE)
    assert ("calibrating again" in caplog.text) == there
    np.testing.assert_array_equal(kept(tmp_path / FILE, FACTS, True, Measure(0, 1)), RANGE)


def test_a_first_start_that_is_cut_short_leaves_no_half_file(tmp_path: Path) -> None:
    def dies() -> npt.NDArray[np.float32]:
        raise RuntimeError("the engine died")

    with pytest.raises(RuntimeError):
        kept(tmp_path / FILE, FACTS, False, dies)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_takes_no_file_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="can't be written"):
        kept(tmp_path / "file" / FILE, FACTS, False, Measure())
