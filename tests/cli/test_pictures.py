from __future__ import annotations

import os
from pathlib import Path
from typing import List

import pytest

from latentd.cli.pictures import Found, find, find_by_class, read
from latentd.errors import FileUnusable, TooLarge


def names(found: Found, root: Path) -> List[str]:
    return [os.path.relpath(picture.path, root) for picture in found.pictures]


def test_a_folder_gives_its_images_in_name_order_however_deep(folder: Path) -> None:
    found = find([str(folder)])
    assert names(found, folder) == ["cat/0.png", "cat/old/1.PNG", "dog/0.png", "dog/1.png"]
    assert {picture.label for picture in found.pictures} == {None}


def test_a_folder_a_class_gives_labels_and_takes_the_classes_in_turn(folder: Path) -> None:
    found = find_by_class(str(folder))
    assert [(picture.label, name) for picture, name in zip(found.pictures, names(found, folder))] == [
        ("cat", "cat/0.png"),
        ("dog", "dog/0.png"),
        ("cat", "cat/old/1.PNG"),
        ("dog", "dog/1.png"),
    ]


def test_no_image_is_lost_when_classes_differ_in_size(folder: Path) -> None:
    (folder / "dog" / "0.png").unlink()
    assert sorted(names(find_by_class(str(folder)), folder)) == ["cat/0.png", "cat/old/1.PNG", "dog/1.png"]


def test_hidden_files_are_left_alone_and_other_files_are_counted(folder: Path) -> None:
    for name in ("cat/.thumb.png", ".git/a.png", "cat/.cache/b.png", "cat/notes.txt", "loose.png"):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    found = find_by_class(str(folder))
    assert len(found.pictures) == 4
    assert found.passed_over == 2
    assert found.unusable == []


def test_a_file_that_is_named_is_taken_whatever_its_name_is(tmp_path: Path) -> None:
    assert [picture.path for picture in find([str(tmp_path / ".odd"), "-"], "cat").pictures] == [str(tmp_path / ".odd"), "-"]


def test_a_file_name_that_is_not_utf_8_is_read_all_the_same(folder: Path) -> None:
    (folder / os.fsdecode(b"cat/caf\xe9.png")).write_bytes(b"image")
    odd = [picture for picture in find_by_class(str(folder)).pictures if "caf" in picture.path]
    assert [read(picture.path, 100) for picture in odd] == [b"image"]


def test_a_class_folder_whose_name_is_not_utf_8_is_a_problem_of_its_own(folder: Path) -> None:
    odd = folder / os.fsdecode(b"cl\xe9")
    odd.mkdir()
    (odd / "0.png").write_bytes(b"image")
    found = find_by_class(str(folder))
    assert len(found.pictures) == 4
    (outcome,) = found.unusable
    assert "cl\\xe9: the name of this folder is not UTF-8" in outcome.result["problem"]["detail"]


def test_a_folder_that_can_not_be_listed_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(FileUnusable, match="No such file"):
        find_by_class(str(tmp_path / "absent"))


def test_a_broken_link_and_a_pipe_are_unusable_and_do_not_block(tmp_path: Path) -> None:
    (tmp_path / "link.png").symlink_to(tmp_path / "absent")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(FileUnusable, match="No such file"):
        read(str(tmp_path / "link.png"), 100)
    with pytest.raises(FileUnusable, match="not a regular file"):
        read(str(tmp_path / "pipe.png"), 100)


def test_a_file_over_the_limit_is_not_sent(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"12345")
    assert read(str(tmp_path / "a.png"), 5) == b"12345"
    with pytest.raises(TooLarge, match="larger than 4 bytes"):
        read(str(tmp_path / "a.png"), 4)
