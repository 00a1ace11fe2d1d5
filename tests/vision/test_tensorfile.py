"""Safetensors files: damaged ones are refused, written ones are the same everywhere and whole or absent."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any, Dict, List, Tuple

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from latentd.errors import CheckpointError
from latentd.files import file_sha256, replacing
from latentd.vision.tensorfile import read_header, read_tensors, write_tensors

TENSORS: Dict[str, NDArray[np.float32]] = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a": np.array([7.5], np.float32),
    "empty": np.zeros((0, 4), np.float32),
}


def raw(path: Path, header: Dict[str, Any], data: bytes) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_what_is_written_the_safetensors_package_reads(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, TENSORS, {"format": "test"})
    read = load_file(path)
    assert {name: value.tolist() for name, value in read.items()} == {name: value.tolist() for name, value in TENSORS.items()}
    assert read_header(path).metadata == {"format": "test"}


def test_what_the_safetensors_package_writes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(TENSORS, path, {"x": "y"})
    arrays, header, sha256 = read_tensors(path)
    assert all(np.array_equal(arrays[name], value) for name, value in TENSORS.items())
    assert header.metadata == {"x": "y"}
    assert sha256 == file_sha256(path)


def test_the_same_tensors_give_the_same_bytes_whatever_their_order(tmp_path: Path) -> None:
    first = write_tensors(tmp_path / "a", TENSORS, {"p": "1", "q": "2"})
    second = write_tensors(tmp_path / "b", dict(reversed(list(TENSORS.items()))), {"q": "2", "p": "1"})
    assert first == second == file_sha256(tmp_path / "b")


def test_narrow_and_wide_floats_become_float32_and_counters_are_left_out(tmp_path: Path) -> None:
    values = np.array([1.0, -2.5, 0.15625], np.float32)
    bfloat16 = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    header = {
        "half": {"dtype": "F16", "shape": [3], "data_offsets": [0, 6]},
        "brain": {"dtype": "BF16", "shape": [3], "data_offsets": [6, 12]},
        "double": {"dtype": "F64", "shape": [3], "data_offsets": [12, 36]},
        "count": {"dtype": "I64", "shape": [], "data_offsets": [36, 44]},
    }
    path = raw(tmp_path / "a", header, values.astype("<f2").tobytes() + bfloat16 + values.astype("<f8").tobytes() + bytes(8))
    arrays, _, _ = read_tensors(path)
    assert sorted(arrays) == ["brain", "double", "half"]
    assert all(array.dtype == np.float32 and array.tolist() == values.tolist() for array in arrays.values())


def test_eight_bit_floats_are_refused_with_what_to_save_instead(tmp_path: Path) -> None:
    path = raw(tmp_path / "a", {"w": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}, bytes(2))
    with pytest.raises(CheckpointError, match="F8_E4M3") as refused:
        read_tensors(path)
    assert "float32" in refused.value.hint


@pytest.mark.parametrize("cut", [0, 4, 8, 40, -1])
def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, TENSORS, {})
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointError) as refused:
        read_header(path)
    assert str(path) in refused.value.detail


def test_a_file_with_bytes_too_many_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, TENSORS, {})
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(CheckpointError, match="promises"):
        read_header(path)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
        {"dtype": "X99", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": "one", "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1]},
        ["F32"],
    ],
)
def test_a_header_that_contradicts_itself_is_refused(tmp_path: Path, entry: Any) -> None:
    with pytest.raises(CheckpointError, match="header can't be read"):
        read_header(raw(tmp_path / "a", {"w": entry}, bytes(4)))


@pytest.mark.parametrize("content", [b"", b"plain text, nothing else", b"\xff" * 64, struct.pack("<Q", 12) + b"[1, 2, 3, 4]"])
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        read_header(path)


def test_a_file_that_is_not_there_is_an_error_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent can't be read: No such file"):
        read_header(tmp_path / "absent")


def test_a_write_that_fails_leaves_the_old_file_and_no_rubbish(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")

    def interrupted() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_content_is_on_disk_before_it_takes_its_name_and_the_name_before_the_call_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    synced: List[Tuple[str, bool]] = []
    real = os.fsync

    def recorded(handle: int) -> None:
        synced.append((os.readlink(f"/proc/self/fd/{handle}"), path.exists()))
        real(handle)

    monkeypatch.setattr(os, "fsync", recorded)
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert synced == [(str(temporary), False), (str(tmp_path), True)]


def test_what_a_killed_writer_left_is_removed_by_a_later_one_but_not_a_running_ones(tmp_path: Path) -> None:
    killed, running = tmp_path / ".a.11.tmp", tmp_path / ".a.12.tmp"
    for path in (killed, running):
        path.write_text("half")
    os.utime(killed, (0, 0))
    with replacing(tmp_path / "a") as temporary:
        temporary.write_text("new")
    assert not killed.exists()
    assert running.exists()
    assert (tmp_path / "a").read_text() == "new"
