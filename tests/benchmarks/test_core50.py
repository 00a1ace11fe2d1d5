"""CORe50's official lists and frames: what is missing, short or wrong is named; what is whole is read."""

from __future__ import annotations

from pathlib import Path
from typing import Dict, List, Tuple

import numpy as np
import pytest
from PIL import Image

import core50

FIRST = "s1/o1/C_01_01_000.png"


def line(session: int, thing: int, number: int) -> str:
    return f"s{session}/o{thing}/C_{session:02d}_{thing:02d}_{number:03d}.png {thing - 1}"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same protocol with a few frames: 79 batches of 3 or 4 frames after one of 10, and 6 test frames."""
    monkeypatch.setattr(core50, "FIRST_BATCH", 10)
    monkeypatch.setattr(core50, "BATCH_FRAMES", {79: (3, 4)})
    monkeypatch.setattr(core50, "FRAMES", 10 + 78 * 4)
    monkeypatch.setattr(core50, "TEST_FRAMES", 6)


def lists() -> Dict[str, List[str]]:
    """File name -> lines of a whole run."""
    first = [line(1, thing, 0) for thing in range(1, 51, 5)]
    files = {"train_batch_00_filelist.txt": first}
    for index in range(1, 79):
        session = (2, 4, 5, 6, 8, 9, 11)[index % 7]
        files[f"train_batch_{index:02d}_filelist.txt"] = [line(session, 1 + index % 50, number + 10 * index) for number in range(4)]
    files["test_filelist.txt"] = [line(session, thing, 0) for session in (3, 7, 10) for thing in (1, 2)]
    return files


def write(folder: Path, files: Dict[str, List[str]]) -> Path:
    run = folder / "NIC_v2_79" / "run0"
    run.mkdir(parents=True)
    for name, lines in files.items():
        (run / name).write_text("\n".join(lines) + "\n")
    return folder


def problems(folder: Path) -> List[str]:
    with pytest.raises(core50.Incomplete) as caught:
        core50.read_lists(folder, 79, 0)
    return caught.value.problems


@pytest.mark.usefixtures("small")
def test_whole_lists_are_read_in_order(tmp_path: Path) -> None:
    found = core50.read_lists(write(tmp_path, lists()), 79, 0)
    assert [len(batch) for batch in found.batches] == [10] + [4] * 78
    assert found.batches[0][1] == core50.Frame("s1/o6/C_01_06_000.png", 1, 5)
    assert {frame.session for frame in found.test} == {3, 7, 10}


@pytest.mark.usefixtures("small")
def test_every_missing_and_every_short_list_is_named(tmp_path: Path) -> None:
    files = lists()
    del files["train_batch_07_filelist.txt"]
    files["train_batch_08_filelist.txt"] = files["train_batch_08_filelist.txt"][:2]
    del files["test_filelist.txt"]
    run = tmp_path / "NIC_v2_79" / "run0"
    assert problems(write(tmp_path, files)) == [
        f"{run / 'train_batch_07_filelist.txt'}: No such file or directory",
        f"{run / 'train_batch_08_filelist.txt'}: 2 frames instead of 3 to 4",
        f"{run / 'test_filelist.txt'}: No such file or directory",
    ]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("wrong", [FIRST, f"{FIRST} 7", "../o1/C_01_01_000.png 0", f"{FIRST} zero"])
def test_a_line_that_is_no_frame_with_its_class_is_named(tmp_path: Path, wrong: str) -> None:
    files = lists()
    files["train_batch_00_filelist.txt"][3] = wrong
    assert problems(write(tmp_path, files)) == [f"{tmp_path / 'NIC_v2_79/run0/train_batch_00_filelist.txt'}:4: not a frame and its class"]


@pytest.mark.usefixtures("small")
def test_a_frame_that_is_there_twice_is_named(tmp_path: Path) -> None:
    files = lists()
    files["train_batch_05_filelist.txt"][1] = files["train_batch_05_filelist.txt"][0]
    (problem,) = problems(write(tmp_path, files))
    assert "is there twice" in problem


@pytest.mark.usefixtures("small")
def test_lists_that_are_each_long_enough_must_also_add_up(tmp_path: Path) -> None:
    files = lists()
    files["train_batch_05_filelist.txt"].pop()
    (problem,) = problems(write(tmp_path, files))
    assert "321 frames, not 322" in problem


def test_a_long_list_of_problems_is_cut_with_a_count() -> None:
    told = str(core50.Incomplete([f"problem {number}" for number in range(100)]))
    assert told.count("problem ") == core50.MOST_PROBLEMS
    assert told.endswith("and 60 more")


def pictures(root: Path, frames: List[core50.Frame]) -> Path:
    for frame in frames:
        path = root / frame.path
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((128, 128, 3), frame.label, np.uint8)).save(path)
    return root


FRAMES = [core50.Frame(line(1, thing, number).split()[0], 1, thing - 1) for thing in (1, 2) for number in (0, 1)]


def test_missing_and_empty_frames_are_named_one_by_one_and_a_missing_video_once(tmp_path: Path) -> None:
    pictures(tmp_path, FRAMES[1:2])
    (tmp_path / FRAMES[0].path).write_bytes(b"")
    with pytest.raises(core50.Incomplete) as caught:
        core50.check_frames(tmp_path, FRAMES)
    assert caught.value.problems == [
        f"{tmp_path / FRAMES[0].path}: missing or empty",
        f"{tmp_path / 's1/o2'}: missing, with its 2 frames",
    ]


def test_whole_frames_pass_and_are_read_in_order(tmp_path: Path) -> None:
    pictures(tmp_path, FRAMES)
    core50.check_frames(tmp_path, FRAMES)
    read = core50.read_frames(tmp_path, [frame.path for frame in reversed(FRAMES)])
    assert read.shape == (4, 128, 128, 3)
    assert read[:, 0, 0, 0].tolist() == [1, 1, 0, 0]


@pytest.mark.usefixtures("small")
def test_held_out_sessions_leave_the_batches_and_are_asked(tmp_path: Path) -> None:
    whole = core50.read_lists(write(tmp_path, lists()), 79, 0)
    held = core50.without(whole, core50.VALIDATION_SESSIONS)
    assert {frame.session for frame in held.test} == {5, 9}
    assert not {frame.session for batch in held.batches for frame in batch} & {5, 9}
    assert sum(map(len, held.batches)) + len(held.test) == sum(map(len, whole.batches))
    assert all(held.batches)


def test_the_reduced_test_set_is_every_twentieth_frame_where_no_list_is_given(tmp_path: Path) -> None:
    test = [core50.Frame(f"s3/o1/C_03_01_{number:03d}.png", 3, 0) for number in reversed(range(60))]
    assert [test[place].path[-7:-4] for place in core50.one_in_twenty(tmp_path, test)] == ["000", "020", "040"]


def test_the_reduced_test_set_is_the_given_list(tmp_path: Path) -> None:
    test = [core50.Frame(*parts) for parts in named(5)]
    (tmp_path / "test_filelist_20.txt").write_text(f"{test[4].path} 0\n{test[1].path} 0\n")
    assert core50.one_in_twenty(tmp_path, test).tolist() == [4, 1]
    (tmp_path / "test_filelist_20.txt").write_text(line(7, 2, 0) + "\n")
    with pytest.raises(core50.Incomplete, match=r"is not in test_filelist\.txt"):
        core50.one_in_twenty(tmp_path, test)


def named(count: int) -> List[Tuple[str, int, int]]:
    return [(f"s3/o1/C_03_01_{number:03d}.png", 3, 0) for number in range(count)]
