from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Optional

import pytest

from cli.doctor.trees import STRANGER, configured, tree
from latentd.cli.doctor import software
from latentd.cli.doctor.machine import BROKEN, NOTE, OK, Machine, User
from latentd.errors import CheckpointError
from latentd.vision import checkpoints


def with_package(machine: Machine, name: str, file: str, text: str) -> Machine:
    tree(machine.root, {f"site/{name}/{file}": text})
    return replace(machine, package=lambda wanted: machine.root / "site" / name if wanted == name else None)


TORCH = "from typing import Optional\n__version__ = '{version}'\ndebug = False\ncuda{hint} = {cuda}\ngit_version = 'x'\n"


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
    found = software.torch(with_package(nx if is_nx else laptop, "torch", "version.py", text))
    assert found.state == state
    assert "2.1.0a0+41361538.nv23.06" in found.detail
    assert ("pip put it" in found.detail) == (state == BROKEN)


def test_the_installed_torch_is_read_as_it_is(laptop: Machine) -> None:
    import torch

    found = software.torch(Machine())
    assert torch.__version__ in found.detail
    assert ("CUDA" in found.detail) == (torch.version.cuda is not None)


def test_without_torch_nothing_can_be_learned(nx: Machine) -> None:
    assert software.torch(nx).state == BROKEN


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
