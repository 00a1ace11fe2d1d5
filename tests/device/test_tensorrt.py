"""A TensorRT plan on the real thing: built, run at every batch, and taken from the cache. Minutes on a board."""

from __future__ import annotations

import importlib.util
import threading
from pathlib import Path
from typing import List

import pytest

import tiny
from device.gpu import Model
from device.test_engines_agree import least_cosine
from latentd.engines.artefacts import Artefacts
from latentd.engines.compiling import PlanEngine, Progress
from latentd.engines.device import CudaMemory
from latentd.engines.eager import EagerStage

pytestmark = pytest.mark.device
LEAST = {"fp32": 0.999, "fp16": 0.999, "int8": 0.98}  # int8 of random weights; engine.int8_min_cosine is for real ones


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all precisions: the later ones find the timings of the first."""
    if importlib.util.find_spec("tensorrt") is None:
        pytest.skip("tensorrt is not installed; on a Jetson its bindings come with JetPack: a venv needs --system-site-packages")
    return tmp_path_factory.mktemp("plans")


@pytest.mark.parametrize("precision", LEAST)
def test_a_plan_is_built_agrees_with_the_cpu_at_every_batch_and_is_found_again(model: Model, folder: Path, precision: str) -> None:
    settings = tiny.settings(folder, engine__max_batch=4)
    artefacts = Artefacts(model.backbone, model.spec, settings.cache_dir)

    def engine() -> PlanEngine:
        return PlanEngine(settings, artefacts, precision, CudaMemory, lambda: list(model.pixels(32)))

    said: List[Progress] = []
    engine().build(said.append, threading.Event())
    assert "building" in [each.phase for each in said]
    reference = EagerStage(model.spec, model.vit)
    for _ in range(2):  # the second time with nothing but the cache
        stage = engine().open()
        for count in (1, 2, 4, 3, 1):
            pixels = model.pixels(count)
            found = stage.encode(pixels, tokens=True)
            assert least_cosine(found, reference.encode(pixels, tokens=True), model.spec.width) > LEAST[precision]
        stage.close()
