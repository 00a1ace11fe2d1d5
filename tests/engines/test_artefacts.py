"""The cached graph and probe answers: read when whole, made again when not, and never many."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, List

import numpy as np
import pytest

import tiny
from latentd.engines import artefacts
from latentd.engines.artefacts import Artefacts
from latentd.engines.export import EXPORTER_VERSION
from latentd.engines.stage import StageSpec, stage_spec
from latentd.errors import EngineError
from latentd.vision.checkpoints import Backbone
from latentd.vision.probe import probe_images


@pytest.fixture
def backbone(tmp_path: Path) -> Backbone:
    return tiny.backbone(tmp_path)


@pytest.fixture
def spec(tmp_path: Path, backbone: Backbone) -> StageSpec:
    return stage_spec(tiny.settings(tmp_path), backbone)


def never(*_: Any) -> None:
    raise AssertionError("nothing should be made here")


def test_a_second_start_reads_graph_and_answers_without_making_them(
    tmp_path: Path, backbone: Backbone, spec: StageSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Artefacts(backbone, spec, tmp_path / "cache")
    path, reference = first.graph(), first.reference()
    monkeypatch.setattr(artefacts, "export", never)
    monkeypatch.setattr(Artefacts, "vit", never)
    second = Artefacts(backbone, spec, tmp_path / "cache")
    assert second.graph() == path
    assert np.array_equal(second.reference().features, reference.features)
    assert np.array_equal(second.reference().tokens, reference.tokens)


@pytest.mark.parametrize("damage", ["cut", "replaced", "checksum gone", "file gone"])
def test_a_damaged_graph_is_exported_again(tmp_path: Path, backbone: Backbone, spec: StageSpec, damage: str) -> None:
    path = Artefacts(backbone, spec, tmp_path / "cache").graph()
    whole = path.read_bytes()
    checksum = path.with_name(path.name + ".sha256")
    if damage == "cut":
        path.write_bytes(whole[:-1])
    elif damage == "replaced":
        path.write_bytes(whole[::-1])
    else:
        (checksum if damage == "checksum gone" else path).unlink()
    again = Artefacts(backbone, spec, tmp_path / "cache").graph()
    assert again == path
    assert path.read_bytes() == whole
    assert checksum.read_text().endswith(f"  {path.name}\n")


def test_damaged_probe_answers_are_computed_again(tmp_path: Path, backbone: Backbone, spec: StageSpec) -> None:
    first = Artefacts(backbone, spec, tmp_path / "cache").reference()
    stored = next((tmp_path / "cache" / "onnx").glob("*.probe.npz"))
    stored.write_bytes(stored.read_bytes()[:50])
    again = Artefacts(backbone, spec, tmp_path / "cache").reference()
    assert np.array_equal(again.features, first.features)


@pytest.mark.parametrize("change", [{"split": 1}, {"class_tokens": 1}, {"backbone_sha256": "f" * 64}, {"image_size": 28}])
def test_whatever_changes_the_graph_changes_its_file(tmp_path: Path, backbone: Backbone, spec: StageSpec, change: Any) -> None:
    other = dataclasses.replace(spec, **change)
    stems = {Artefacts(backbone, each, tmp_path / "cache")._stem for each in (spec, other)}
    assert len(stems) == 2


def test_what_looks_at_the_layers_gets_the_graph_with_all_tokens_of_the_last_block(
    tmp_path: Path, backbone: Backbone, spec: StageSpec
) -> None:
    depth = backbone.shape.depth
    above, none_above = (Artefacts(backbone, dataclasses.replace(spec, split=split), tmp_path / "cache") for split in (depth - 1, depth))
    assert none_above.graph(whole=True) == none_above.graph()
    assert above.graph(whole=True) != above.graph()
    assert above.derived("copy", lambda content: content).read_bytes() == above.graph(whole=True).read_bytes() != above.graph().read_bytes()


def test_a_newer_exporter_does_not_use_an_older_ones_graph(
    tmp_path: Path, backbone: Backbone, spec: StageSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = Artefacts(backbone, spec, tmp_path / "cache").graph()
    monkeypatch.setattr(artefacts, "EXPORTER_VERSION", EXPORTER_VERSION + 1)
    assert Artefacts(backbone, spec, tmp_path / "cache").graph() != old


def test_the_folder_keeps_only_the_newest(tmp_path: Path, backbone: Backbone, spec: StageSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artefacts, "_KEPT", 2)
    made: List[Path] = []
    for split in (1, 2, 3):
        made.append(Artefacts(backbone, dataclasses.replace(spec, split=split), tmp_path / "cache").graph())
        os.utime(made[-1].with_name(made[-1].name + ".sha256"), (split, split))
    assert [path.exists() for path in made] == [False, True, True]
    assert len(list((tmp_path / "cache" / "onnx").iterdir())) == 4


def test_a_cache_folder_that_can_not_be_written_is_an_engine_error_that_names_it(
    tmp_path: Path, backbone: Backbone, spec: StageSpec
) -> None:
    (tmp_path / "cache" / "onnx").write_text("a file where the folder should be")
    with pytest.raises(EngineError, match=r"can't be stored in .*onnx"):
        Artefacts(backbone, spec, tmp_path / "cache").graph()


def test_probe_answers_that_can_not_be_stored_still_serve(tmp_path: Path, backbone: Backbone, spec: StageSpec) -> None:
    (tmp_path / "cache" / "onnx").write_text("a file where the folder should be")
    reference = Artefacts(backbone, spec, tmp_path / "cache").reference()
    assert reference.features.shape == (4, 256)
    assert reference.tokens.shape == (4, 37, 128)


def test_a_module_that_was_let_go_is_made_again(tmp_path: Path, backbone: Backbone, spec: StageSpec) -> None:
    made = Artefacts(backbone, spec, tmp_path / "cache")
    reference, first = made.reference(), made.vit()
    made.release()
    assert made.vit() is not first
    np.testing.assert_array_equal(made.eager(probe_images(spec.image_size)).features, reference.features)


def test_a_warm_start_never_imports_torch(tmp_path: Path, backbone: Backbone, spec: StageSpec) -> None:
    made = Artefacts(backbone, spec, tmp_path / "cache")
    made.graph(), made.reference()
    script = (
        "import sys; from pathlib import Path; from latentd import config; from latentd.vision import checkpoints; "
        "from latentd.engines.choose import choose; "
        "flags = {'state.cache_dir': sys.argv[1], 'backbone.name': 'tiny', 'backbone.image_size': 24, 'backbone.class_tokens': 2}; "
        "settings = config.load({}, flags, is_service=False); "
        "choice = choose(settings, checkpoints.find(settings.cache_dir, 'tiny')); "
        "assert choice.stage.name == 'onnxruntime-cpu', choice; "
        "assert 'torch' not in sys.modules and 'onnx' not in sys.modules, sorted(sys.modules)"
    )
    sources = str(Path(artefacts.__file__).parents[2])
    environ = {**os.environ, "PYTHONPATH": sources}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, str(tmp_path / "cache")], env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
