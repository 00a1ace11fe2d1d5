"""Version files: whole or not there, ordered by the log, and never trusted blindly."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any, Callable, Dict, List

import numpy as np
import pytest

from latentd.errors import LearnerError
from latentd.learning import checkpoint

END = 10**6  # of a log that holds everything


def arrays(value: float = 1.0) -> Dict[str, Any]:
    return {
        "wide": np.full((3, 4), value),
        "narrow": np.arange(6, dtype=np.float32)[::2],
        "empty": np.zeros((0, 5)),
        "seqs": np.array([1, 2**40], np.int64),
    }


def save(folder: Path, version: int, seq: int, keep: int = 3) -> Path:
    return checkpoint.write(folder, arrays(version), {"version": version, "seq": seq, "text": "ä"}, keep)


def newest_version(folder: Path, head_seq: int = END) -> Any:
    found = checkpoint.newest(folder, head_seq)
    return None if found is None else found[1]["version"]


def names(folder: Path) -> List[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_saved_comes_back_to_the_last_bit(tmp_path: Path) -> None:
    save(tmp_path / "versions", 7, 70)
    found = checkpoint.newest(tmp_path / "versions", END)
    assert found is not None
    assert found[1] == {"version": 7, "seq": 70, "text": "ä"}
    for name, array in arrays(7).items():
        assert (found[0][name].dtype, found[0][name].shape) == (array.dtype, array.shape)
        assert found[0][name].tobytes() == array.tobytes()


def test_without_a_folder_there_is_no_version(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "versions", END) is None
    assert checkpoint.versions(tmp_path / "versions") == []


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for version in range(1, 6):
        save(tmp_path, version, 10 * version)
    assert names(tmp_path) == [f"version-{version:08d}-{10 * version:012d}.safetensors" for version in (3, 4, 5)]
    save(tmp_path, 6, 60, keep=1)
    assert names(tmp_path) == ["version-00000006-000000000060.safetensors"]


def test_the_clock_does_not_decide_what_is_newest(tmp_path: Path) -> None:
    for version in (1, 2, 3):
        os.utime(save(tmp_path, version, 10 * version), (2_000_000_000, 2_000_000_000 - version))
    save(tmp_path, 4, 40)  # written by a device whose clock began at its epoch again
    os.utime(tmp_path / "version-00000004-000000000040.safetensors", (5, 5))
    assert newest_version(tmp_path) == 4
    save(tmp_path, 5, 50)
    assert [checkpoint.seq_of(path) for path in checkpoint.versions(tmp_path)] == [30, 40, 50]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign"])
def test_a_broken_version_is_set_aside_for_the_one_before(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 1, 10)
    path = save(tmp_path, 2, 20)
    whole = path.read_bytes()
    middle = len(whole) - 20
    broken = {
        "cut": whole[:-9],
        "flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        "empty": b"",
        "foreign": b"x" * 500,
    }
    path.write_bytes(broken[damage])
    assert newest_version(tmp_path) == 1
    assert names(tmp_path) == ["version-00000001-000000000010.safetensors", "version-00000002-000000000020.aside"]
    save(tmp_path, 2, 20)
    assert newest_version(tmp_path) == 2


def test_a_version_that_knows_more_than_the_log_belongs_to_another_log(tmp_path: Path) -> None:
    save(tmp_path, 1, 10)
    save(tmp_path, 2, 20)
    assert newest_version(tmp_path, head_seq=15) == 1
    assert newest_version(tmp_path, head_seq=0) is None
    assert names(tmp_path) == ["version-00000001-000000000010.aside", "version-00000002-000000000020.aside"]
    assert newest_version(tmp_path) is None, "it does not come back when the new log has grown"


@pytest.mark.parametrize("act", ["fsync", "replace"])
def test_a_disk_that_refuses_is_an_error_that_leaves_the_versions_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: str) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    save(tmp_path, 1, 10)
    monkeypatch.setattr(os, act, full)
    with pytest.raises(LearnerError, match="No space left"):
        save(tmp_path, 2, 20)
    monkeypatch.undo()
    assert names(tmp_path) == ["version-00000001-000000000010.safetensors"]
    assert newest_version(tmp_path) == 1


def test_what_a_power_cut_left_behind_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "version.tmp").write_bytes(b"half a ver")
    (tmp_path / "version-notes.txt").write_text("somebody's own")
    save(tmp_path, 1, 10)
    assert names(tmp_path) == ["version-00000001-000000000010.safetensors", "version-notes.txt"]


def noted(act: Callable[..., Any], order: List[str]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        order.append(act.__name__)
        return act(*arguments)

    return call


def test_a_version_is_on_the_disk_before_its_name_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: List[str] = []
    for act in (os.fsync, os.replace):
        monkeypatch.setattr(os, act.__name__, noted(act, order))
    save(tmp_path, 1, 10)
    assert order == ["fsync", "replace", "fsync"]
