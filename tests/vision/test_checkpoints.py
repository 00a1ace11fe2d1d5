"""Installing backbones: whole or not at all, verified when read, and every refusal says what to do."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from latentd.errors import CheckpointError
from latentd.files import file_sha256
from latentd.vision import checkpoints
from latentd.vision.vit import Vit


def import_tiny(tmp_path: Path, **options: str) -> checkpoints.Backbone:
    path = tiny.save(tiny.as_timm(tiny.vit()), tmp_path / "weights.safetensors")
    return checkpoints.import_file(path, tmp_path / "cache", **options)


def test_an_imported_backbone_is_listed_found_and_loaded(tmp_path: Path) -> None:
    imported = import_tiny(tmp_path, name="mine")
    assert imported.name == "mine"
    assert imported.path == tmp_path / "cache" / "backbones" / "mine.safetensors"
    assert checkpoints.installed(tmp_path / "cache") == [imported]
    assert checkpoints.find(tmp_path / "cache", "mine") == imported
    assert imported.sha256 == file_sha256(imported.path)
    assert "weights.safetensors" in imported.source
    images = tiny.normalised(1, tiny.DINOV2)
    assert np.array_equal(Vit.load(imported).final_tokens(images), tiny.vit().final_tokens(images))


def test_the_name_is_the_files_unless_it_is_given(tmp_path: Path) -> None:
    assert import_tiny(tmp_path).name == "weights"


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "x" * 81, "white space"])
def test_a_name_that_is_no_file_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="can't name a backbone"):
        checkpoints.find(tmp_path, name)
    if name:
        with pytest.raises(CheckpointError, match="can't name a backbone"):
            import_tiny(tmp_path, name=name)


def test_importing_the_same_weights_again_changes_nothing(tmp_path: Path) -> None:
    first = import_tiny(tmp_path)
    stamp = first.path.stat().st_mtime_ns
    assert import_tiny(tmp_path) == first
    assert first.path.stat().st_mtime_ns == stamp


def test_other_weights_do_not_take_a_name_that_is_in_use(tmp_path: Path) -> None:
    first = import_tiny(tmp_path, name="mine")
    other = tiny.save(tiny.as_timm(tiny.vit(seed=1)), tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="already another backbone mine") as refused:
        checkpoints.import_file(other, tmp_path / "cache", name="mine")
    assert "--name" in refused.value.hint
    assert checkpoints.find(tmp_path / "cache", "mine") == first


def test_an_installed_backbone_can_be_carried_to_another_device(tmp_path: Path) -> None:
    first = import_tiny(tmp_path, name="mine")
    carried = checkpoints.import_file(first.path, tmp_path / "elsewhere")
    assert (carried.name, carried.sha256, carried.shape, carried.source) == (first.name, first.sha256, first.shape, first.source)


def test_a_backbone_that_is_absent_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no backbone mine") as other:
        checkpoints.find(tmp_path, "mine")
    assert "backbone import" in other.value.hint
    with pytest.raises(CheckpointError) as default:
        checkpoints.find(tmp_path, checkpoints.DEFAULT)
    assert "backbone pull" in default.value.hint
    assert checkpoints.installed(tmp_path) == []


def test_an_interrupted_installation_does_not_count(tmp_path: Path) -> None:
    imported = import_tiny(tmp_path)
    imported.path.with_name(imported.path.name + ".sha256").unlink()
    assert checkpoints.installed(tmp_path / "cache") == []
    assert import_tiny(tmp_path) == imported


def test_a_changed_byte_is_noticed_when_the_weights_are_read(tmp_path: Path) -> None:
    imported = import_tiny(tmp_path)
    content = bytearray(imported.path.read_bytes())
    content[-1] ^= 1
    imported.path.write_bytes(content)
    found = checkpoints.find(tmp_path / "cache", imported.name)
    with pytest.raises(CheckpointError, match="changed since it was installed"):
        Vit.load(found)
    assert import_tiny(tmp_path) == imported
    Vit.load(imported)


def test_a_truncated_installed_backbone_is_refused_and_not_listed(tmp_path: Path) -> None:
    imported = import_tiny(tmp_path)
    imported.path.write_bytes(imported.path.read_bytes()[:-100])
    assert checkpoints.installed(tmp_path / "cache") == []
    with pytest.raises(CheckpointError, match="its header promises"):
        checkpoints.find(tmp_path / "cache", imported.name)


def test_a_file_in_the_folder_that_latentd_did_not_write_is_not_a_backbone(tmp_path: Path) -> None:
    imported = import_tiny(tmp_path)
    tiny.save(tiny.as_timm(tiny.vit()), imported.path)
    with pytest.raises(CheckpointError, match="not written by this latentd"):
        checkpoints.find(tmp_path / "cache", imported.name)


def pickled_by_torch() -> bytes:
    stream = io.BytesIO()
    torch.save({"cls_token": torch.zeros(1, 1, 8)}, stream)
    return stream.getvalue()


def pickled_by_old_torch() -> bytes:
    stream = io.BytesIO()
    torch.save({"cls_token": torch.zeros(1, 1, 8)}, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


@pytest.mark.parametrize("name", ["model.pth", "model.bin", "model.safetensors"])
@pytest.mark.parametrize("content", [pickled_by_torch(), pickled_by_old_torch(), pickle.dumps({"a": 1})])
def test_a_pickle_is_refused_whatever_its_name_with_the_way_to_convert_it(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is a pickle") as refused:
        checkpoints.import_file(path, tmp_path / "cache")
    assert "weights_only=True" in refused.value.hint
    assert "save_file({k:" in refused.value.hint
    assert not (tmp_path / "cache").exists()


def test_a_safetensors_file_whose_first_bytes_look_like_a_pickle_is_read(tmp_path: Path) -> None:
    """A header of 0x0480 bytes starts with 80 04, as does a pickle of protocol 4."""
    path = tmp_path / "weights.safetensors"
    header = b"{}".ljust(0x0480)
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError, match="no architecture that latentd knows"):
        checkpoints.import_file(path, tmp_path / "cache")


def test_other_archives_and_graphs_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "some.whl", "w") as archive:
        archive.writestr("some/file.py", "")
    (tmp_path / "some.onnx").write_bytes(b"\x08\x07\x12\x07pytorch")
    for name in ("some.whl", "some.onnx"):
        with pytest.raises(CheckpointError, match="not a file that latentd can take weights from"):
            checkpoints.import_file(tmp_path / name, tmp_path / "cache")


def test_a_missing_file_and_a_folder_are_errors_with_the_path(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.safetensors", tmp_path):
        with pytest.raises(CheckpointError, match=r"can't be read: "):
            checkpoints.import_file(path, tmp_path / "cache")


def test_a_truncated_file_is_refused_and_nothing_is_installed(tmp_path: Path) -> None:
    path = tiny.save(tiny.as_timm(tiny.vit()), tmp_path / "weights.safetensors")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="its header promises"):
        checkpoints.import_file(path, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_cache_folder_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match=r"can't be stored in .*cache") as imported:
        import_tiny(tmp_path)
    assert "state.cache_dir" in imported.value.hint
    with pytest.raises(CheckpointError, match=r"can't be stored in .*cache"):
        checkpoints.pull(tmp_path / "cache")
