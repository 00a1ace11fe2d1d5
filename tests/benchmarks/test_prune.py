"""The measurement of pruning: the same images before and after, and what its error counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import prune
import tiny
from latentd.learning.pruning import Lesson


def test_the_difference_is_of_the_same_images_and_its_error_counts_a_video_once() -> None:
    before = np.ones((3, 4), dtype=np.bool_)  # three frames of four videos, as they are asked
    after = before.copy()
    after[:, 1] = False  # one video is lost as a whole
    difference, error = prune.paired(before.ravel(), after.ravel(), 4)
    assert difference == pytest.approx(-0.25)
    assert error == pytest.approx(np.std([0, -1, 0, 0], ddof=1) / 2)


def test_what_is_right_before_and_after_has_no_error_however_many_are_wrong() -> None:
    right = np.random.default_rng(0).random(40) < 0.5
    assert prune.paired(right, right, 10) == (0.0, 0.0)


def test_frames_are_asked_video_after_video_so_that_they_can_be_told_apart() -> None:
    frames = np.zeros((2, 11, 12, 8, 8, 3), dtype=np.uint8)
    frames[...] = np.arange(2 * 11)[:, None].reshape(2, 11, 1, 1, 1, 1)  # every frame has its video's colour
    asked = prune._videos(frames, (3, 7), 12, 8)
    videos = asked.pixels[:, 0, 0, 0].reshape(12, 4)
    assert (videos == videos[0]).all() and len(set(videos[0].tolist())) == 4
    assert asked.class_ids.reshape(12, 4).tolist() == [[0, 1, 0, 1]] * 12


def test_every_step_is_asked_beside_the_whole_and_told(tmp_path: Path) -> None:
    base = tiny.backbone(tmp_path)
    settings = tiny.settings(tmp_path, energy__meters="")

    def lesson(seed: int) -> Lesson:
        return Lesson(tiny.pixels(12, seed=seed), np.arange(12, dtype=np.int64) % 3)

    exam = prune.Exam(lesson(1), lesson(2), lesson(3), lesson(4), (6, 4))
    bench = prune.Bench(settings, base, exam, tmp_path / "scratch")
    pupil = bench.pruned("residual")
    assert [len(step.removed) for step in pupil.outcome.steps] == [1, 2, 3]
    rows = bench.rows(pupil.backbones, True)
    assert [row["heads"] for row in rows] == [6, 5, 4, 3]
    assert (rows[0]["difference"], rows[0]["difference_error"]) == (0, 0)
    assert all(row["latency_ratio"] > 0 for row in rows)
    result = {"data": "noise", "chosen": "residual", "asked": "test", "curve": rows, "validation": {"residual": rows[::2]}}
    assert prune._markdown(result).count("50.0 %") == 1
    prune._plot(result, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 0
