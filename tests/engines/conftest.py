"""Fixtures of the TensorRT tests: a cache folder with a tiny backbone and its graph, and one more a version with a plan in it."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple

import pytest

import tiny
from latentd.engines.artefacts import Artefacts
from latentd.engines.choose import Choice, choose
from latentd.engines.compiling import PlanEngine, Progress
from latentd.engines.stage import stage_spec
from latentd.vision import checkpoints
from standin.host import HostMemory
from standin.strict import VERSIONS
from standin.use import install


class Bench(NamedTuple):
    """One cache folder with a tiny backbone and its exported graph in it."""

    folder: Path

    def engine(self, precision: str = "fp16", **flags: Any) -> PlanEngine:
        config = tiny.settings(self.folder, **flags)
        backbone = checkpoints.find(config.cache_dir, "tiny")
        return PlanEngine(config, Artefacts(backbone, stage_spec(config, backbone), config.cache_dir), precision, HostMemory)

    def choose(self, **flags: Any) -> Choice:
        config = tiny.settings(self.folder, **flags)
        return choose(config, checkpoints.find(config.cache_dir, "tiny"), HostMemory)

    def build(self, precision: str = "fp16", **flags: Any) -> List[Progress]:
        """Builds the plan, in a process; what was said meanwhile."""
        said: List[Progress] = []
        self.engine(precision, **flags).build(said.append, threading.Event())
        return said

    @property
    def cache(self) -> Path:
        return self.folder / "cache" / "tensorrt"

    def plan(self) -> Path:
        (path,) = self.cache.glob("*.plan")
        return path


@pytest.fixture(scope="session")
def with_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graph")
    config, backbone = tiny.settings(folder), tiny.backbone(folder)
    made = Artefacts(backbone, stage_spec(config, backbone), config.cache_dir)
    made.graph(), made.reference()
    return folder


@pytest.fixture(scope="session")
def with_plan(with_graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """version -> a folder in which it has built its FP16 plan; made once."""
    made: Dict[str, Path] = {}

    def folder(version: str) -> Path:
        if version not in made:
            bench = Bench(tmp_path_factory.mktemp("plan") / version)
            shutil.copytree(with_graph, bench.folder)
            with pytest.MonkeyPatch.context() as patch:
                install(patch, version)
                bench.build()
            made[version] = bench.folder
        return made[version]

    return folder


@pytest.fixture
def bench(with_graph: Path, tmp_path: Path) -> Bench:
    """Without a plan."""
    shutil.copytree(with_graph, tmp_path / "bench")
    return Bench(tmp_path / "bench")


@pytest.fixture(params=sorted(VERSIONS))
def version(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each version in turn, installed."""
    install(monkeypatch, request.param)
    return str(request.param)


@pytest.fixture
def built(version: str, with_plan: Callable[[str], Path], tmp_path: Path) -> Bench:
    """With the plan of the version that is installed."""
    shutil.copytree(with_plan(version), tmp_path / "built")
    return Bench(tmp_path / "built")


@pytest.fixture
def trt10(monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 10, installed, where the version makes no difference."""
    install(monkeypatch, "10")


@pytest.fixture
def built10(trt10: None, with_plan: Callable[[str], Path], tmp_path: Path) -> Bench:
    shutil.copytree(with_plan("10"), tmp_path / "built")
    return Bench(tmp_path / "built")
