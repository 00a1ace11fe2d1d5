from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import List, Mapping, Optional

import pytest

from cli.doctor.trees import STRANGER, configured, tree
from latentd.cli.doctor import software
from latentd.cli.doctor.machine import BROKEN, NOTE, OK, Machine, User, import_trouble
from latentd.errors import CheckpointError
from latentd.vision import checkpoints


def with_package(machine: Machine, name: str, file: str, text: str) -> Machine:
    tree(machine.root, {f"site/{name}/{file}": text})
    return replace(machine, package=lambda wanted: machine.root / "site" / name if wanted == name else None)


TORCH = "from typing import List, Mapping, Optional\n__version__ = '{version}'\ndebug = False\ncuda{hint} = {cuda}\ngit_version = 'x'\n"


@pytest.mark.parametrize(
    ("is_nx", "cuda", "hint", "state"),
    [
        (True, "'11.4'", "", OK),
        (True, "'11.4'", ": Optional[str]", OK),
        (True, "None", ": Optional[str]", BROKEN),
        (False, "None", ": Optional[str]", OK),
        (False, '"12.8"', "", OK),
    ],
)
def test_a_torch_without_cuda_is_broken_on_a_jetson_only(
    nx: Machine, laptop: Machine, is_nx: bool, cuda: str, hint: str, state: str
) -> None:
    text = TORCH.format(version="2.1.0a0+41361538.nv23.06", cuda=cuda, hint=hint)
    found = software.torch(with_package(nx if is_nx else laptop, "torch", "version.py", text), STRANGER)
    assert found.state == state
    assert "2.1.0a0+41361538.nv23.06" in found.detail
    assert ("pip put it" in found.detail) == (state == BROKEN)


def test_the_installed_torch_is_read_as_it_is(laptop: Machine) -> None:
    import torch

    found = software.torch(Machine(), STRANGER)
    assert found.state == OK
    assert torch.__version__ in found.detail
    assert ("CUDA" in found.detail) == (torch.version.cuda is not None)


def test_without_torch_nothing_can_be_learned(nx: Machine) -> None:
    assert software.torch(nx, STRANGER).state == BROKEN


def test_a_torch_that_can_not_be_imported_is_broken_and_is_tried_as_the_unit_would(nx: Machine, laptop: Machine) -> None:
    tried: List[Mapping[str, str]] = []

    def imports(name: str, environ: Mapping[str, str]) -> str:
        tried.append(environ)
        return "OSError: libopenblas.so.0: cannot open shared object file: No such file or directory"

    text = TORCH.format(version="2.1.0a0+41361538.nv23.06", cuda="'11.4'", hint="")
    for machine in (nx, laptop):
        found = software.torch(replace(with_package(machine, "torch", "version.py", text), imports=imports), STRANGER)
        assert (found.state, "libopenblas.so.0" in found.detail) == (BROKEN, True)
        assert ("libopenblas-base libopenmpi-dev libomp-dev" in found.fix) == (machine is nx)
    software.torch(replace(with_package(laptop, "torch", "version.py", text), imports=imports), User("latentd", 997, frozenset()))
    assert [sorted(environ) for environ in tried] == [["LD_LIBRARY_PATH", "LD_PRELOAD", "OPENBLAS_CORETYPE"], [], ["PYTHONNOUSERSITE"]]


@pytest.mark.parametrize(
    ("code", "trouble"),
    [
        ("", None),
        ("raise OSError('libopenblas.so.0: cannot open')", "OSError: libopenblas.so.0: cannot open"),
        ("import os; os.abort()", "ended by signal 6"),
        ("import sys; sys.exit(3)", "it said nothing"),
        ("import signal; signal.pause()", "not done after 1 s"),
    ],
)
def test_whether_a_package_can_be_imported_is_tried_in_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, trouble: Optional[str]
) -> None:
    monkeypatch.setattr("latentd.cli.doctor.machine.IMPORT_S", 30.0 if "pause" not in code else 1.0)
    (tmp_path / "fragile.py").write_text(code)
    assert import_trouble("fragile", {"PYTHONPATH": str(tmp_path)}) == trouble


def test_tensorrt_is_missed_on_a_jetson_only(nx: Machine, laptop: Machine) -> None:
    assert software.tensorrt(laptop).state == OK
    assert (software.tensorrt(nx).state, "python3-libnvinfer" in software.tensorrt(nx).fix) == (NOTE, True)
    assert software.tensorrt(with_package(nx, "tensorrt", "__init__.py", '__version__ = "8.5.2.2"\n')).detail == "8.5.2.2"
    assert software.tensorrt(with_package(nx, "tensorrt", "__init__.py", '__version__ = "8.2.1.8"\n')).state == NOTE
    assert software.tensorrt(with_package(nx, "tensorrt", "__init__.py", "")).state == OK


def test_the_cache_needs_the_weights_and_should_be_writable(nx: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    note = '{"key": {"precision": "fp16", "tensorrt": "8.5.2.2"}, "sha256": ""}'
    tree(nx.root, {"cache/onnx/a.onnx": "", "cache/tensorrt/b.plan": "", "cache/tensorrt/c.plan": "", "cache/tensorrt/c.json": note})
    absent: Optional[CheckpointError] = CheckpointError("no dinov2 here")

    def find(folder: Path, name: str) -> None:
        if absent is not None:
            raise absent

    monkeypatch.setattr(checkpoints, "find", find)
    found = software.plan_cache(configured(nx), User("root", 0, frozenset()))
    assert (found.state, "no dinov2 here" in found.detail) == (BROKEN, True)
    absent = None
    found = software.plan_cache(configured(nx), User("root", 0, frozenset()))
    assert found.state == OK
    assert found.detail.endswith("1 graphs; TensorRT plans: b.plan without a note, fp16 for TensorRT 8.5.2.2")
    (nx.root / "cache").chmod(0o777)
    for name in ("onnx", "tensorrt"):
        (nx.root / "cache" / name).chmod(0o777)
    assert software.plan_cache(configured(nx), STRANGER).state == OK
    for name in ("tensorrt", "."):
        (nx.root / "cache" / name).chmod(0o755)
        found = software.plan_cache(configured(nx), STRANGER)
        assert (found.state, f"{nx.root / 'cache' / name} can't be written by ann" in found.detail) == (NOTE, True)
