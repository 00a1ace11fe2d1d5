"""INT8 plans on every version, on the stand-in: calibrated in the building process, cached, run, and refused with a reason."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path
from typing import Any, List

import numpy as np
import pytest

import tiny
from engines.conftest import Bench
from latentd.engines import choose, plans
from latentd.engines.compiling import PlanEngine
from latentd.engines.recent import ENOUGH, KEPT, RecentImages
from latentd.engines.stage import planar
from latentd.errors import EngineError
from latentd.vision.probe import probe_images
from standin.building import MAGIC
from standin.host import HostMemory
from standin.use import install

ENTROPY = ("8.5", "8.6")
FLAGS = {"engine__precision": "int8", "engine__int8_min_cosine": 0.9}
PROBES = len(probe_images(tiny.SIZE))


def head(path: Path) -> Any:
    return json.loads(path.read_bytes()[len(MAGIC) :].split(b"\n", 1)[0])


def taught(bench: Bench, count: int) -> PlanEngine:
    """The INT8 engine of a daemon that was taught this many images."""
    engine = bench.engine("int8", **FLAGS)
    recent = RecentImages()
    for pixels in tiny.pixels(count):
        recent.add(pixels)
    engine._images = recent.all
    return engine


def test_it_is_built_calibrated_and_passes_its_gate(bench: Bench, version: str) -> None:
    first = bench.choose(**FLAGS)
    assert [each.name for each in first.pending] == ["tensorrt-int8", "tensorrt-fp16", "tensorrt-fp32"]
    first.pending[0].build(lambda _: None, threading.Event())
    stage, attempt = first.pending[0].attempt()
    assert stage is not None
    assert (stage.name, attempt.state) == ("tensorrt-int8", "serving")
    assert attempt.cosine is not None
    assert 0.9 < attempt.cosine < 0.99999
    assert b"QuantizeLinear" in bench.plan().read_bytes()
    assert bench.choose(**FLAGS).stage.name == "tensorrt-int8"
    assert bench.choose().stage.name == "onnxruntime-cpu"  # nobody asked for it


def test_norms_stay_in_fp32_and_the_rest_may_fall_back_to_fp16(bench: Bench, version: str) -> None:
    bench.build("int8", **FLAGS)
    found = head(bench.plan())
    assert not found["overflow"]
    weakly = version != "11"
    assert (found["fp16"], found["int8"], found["pinned"] > 0) == (weakly, weakly, weakly)
    assert (b"/half" in bench.plan().read_bytes()) == (not weakly)


@pytest.mark.parametrize("old", ENTROPY)
def test_the_calibrator_sees_the_probe_images_and_what_was_taught(bench: Bench, monkeypatch: pytest.MonkeyPatch, old: str) -> None:
    install(monkeypatch, old)
    taught(bench, 5).build(lambda _: None, threading.Event())
    found = head(bench.plan())
    assert found["calibrated_on"] == PROBES + 5
    assert found["last_shown"] == hashlib.sha256(planar(tiny.pixels(5)[-1:]).tobytes()).hexdigest()


@pytest.mark.parametrize("old", ENTROPY)
def test_only_linear_layers_may_become_int8(bench: Bench, monkeypatch: pytest.MonkeyPatch, old: str) -> None:
    install(monkeypatch, old)
    bench.build("int8", **FLAGS)
    free = head(bench.plan())["free_for_int8"]
    assert {name.split("/")[2] for name in free} == {"qkv", "proj", "fc1", "fc2"}
    assert all(name.startswith("/blocks.") for name in free)


@pytest.mark.parametrize("old", ENTROPY)
def test_a_second_try_takes_the_ranges_of_the_first_and_another_build_its_own(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, old: str
) -> None:
    install(monkeypatch, old)
    monkeypatch.setenv("STANDIN_FAULT", "can't obey after calibrating")
    taught(bench, 2).build(lambda _: None, threading.Event())
    assert (head(bench.plan())["calibrated_on"], head(bench.plan())["calibrations"]) == (PROBES + 2, 1)
    bench.plan().unlink()
    taught(bench, 3).build(lambda _: None, threading.Event())
    assert head(bench.plan())["calibrated_on"] == PROBES + 3


def test_it_is_not_built_before_enough_was_taught_to_calibrate_on(bench: Bench, trt10: None) -> None:
    few, enough = taught(bench, ENOUGH - 1), taught(bench, ENOUGH)
    assert few.lacks() == "INT8 is calibrated on taught images: 31 of 32 were taught since the start"
    assert enough.lacks() is None
    assert bench.engine("fp16").lacks() is None


def test_photographs_judge_it_too_and_the_next_start_which_has_none_remembers(
    bench: Bench, trt10: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.build("int8", **FLAGS)
    asked: List[int] = []

    def likeness(stage: Any, pixels: Any, *_: Any) -> float:
        asked.append(len(pixels))
        return 0.5

    monkeypatch.setattr(choose, "likeness", likeness)
    stage, attempt = tried(bench, choose.JUDGES + 3)
    assert (stage, attempt.state, asked) == (None, "passed over", [choose.JUDGES])
    assert attempt.reason == "cosine with eager PyTorch 0.500000 (mean of taught images), below 0.9"
    assert tried(bench, 0)[1].reason == attempt.reason
    lowered = bench.choose(**{**FLAGS, "engine__int8_min_cosine": 0.4})
    assert lowered.stage.name == "tensorrt-int8"
    assert [each.name for each in bench.choose(**FLAGS).pending] == ["tensorrt-fp16", "tensorrt-fp32"]  # nothing to build again


def test_what_photographs_say_counts_though_it_can_not_be_stored(bench: Bench, trt10: None, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.build("int8", **FLAGS)

    def full(*_: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(choose, "likeness", lambda *_: 0.5)
    monkeypatch.setattr(plans, "_write_json", full)
    assert tried(bench, 8)[1].reason == "cosine with eager PyTorch 0.500000 (mean of taught images), below 0.9"


def test_photographs_that_it_agrees_on_let_it_serve(bench: Bench, trt10: None) -> None:
    bench.build("int8", **FLAGS)
    stage, attempt = tried(bench, 2)
    assert stage is not None
    assert attempt.state == "serving"
    kept = json.loads(bench.plan().with_suffix(".json").read_text())["photographs_cosine"]
    assert 0.9 < kept < 1
    assert bench.choose(**FLAGS).stage.name == "tensorrt-int8"


def test_photographs_of_which_it_makes_no_numbers_are_told_from_a_failure(bench: Bench, trt10: None) -> None:
    (candidate,) = (each for each in candidates(bench, tiny.settings(bench.folder, **FLAGS)) if each.name == "tensorrt-int8")
    bench.build("int8", **FLAGS)
    stage = candidate.open()
    pixels = tiny.pixels(3)
    reference = bench.engine("int8", **FLAGS)._artefacts.eager(pixels)
    assert 0.9 < choose.likeness(stage, pixels, reference, 2) < 1

    class Broken:
        spec = stage.spec

        def encode(self, pixels: Any) -> Any:
            return stage.encode(pixels)._replace(features=np.full((len(pixels), stage.spec.features_width), np.nan, np.float32))

    assert choose.likeness(Broken(), pixels, reference, 2) == 0.0  # type: ignore[arg-type]


def test_a_failure_under_the_eyes_of_photographs_is_not_held_against_the_plan(
    bench: Bench, trt10: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.build("int8", **FLAGS)

    def full(*_: Any) -> float:
        raise EngineError("tensorrt-int8 failed on 8 images: CUDA out of memory")

    monkeypatch.setattr(choose, "likeness", full)
    assert tried(bench, 8)[1].state == "passed over"
    monkeypatch.undo()
    install(monkeypatch, "10")
    assert bench.choose(**FLAGS).stage.name == "tensorrt-int8"


def test_one_that_was_given_up_does_not_pretend_to_wait(bench: Bench, trt10: None) -> None:
    engine = taught(bench, 0)
    assert engine.lacks() is not None
    _, key = engine._identified()
    for _ in range(plans.TRIES):
        plans.PlanCache(bench.cache).begin(key, "the build was cut off")
    assert engine.lacks() is None
    with pytest.raises(EngineError, match="given up after 3 tries"):
        engine.build(lambda _: None, threading.Event())


def test_a_machine_without_a_gpu_does_not_pretend_to_wait(bench: Bench, trt10: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDIN_MEMORY", "none")
    engine = taught(bench, 0)
    assert engine.lacks() is None
    with pytest.raises(EngineError, match="torch finds no GPU"):
        engine.build(lambda _: None, threading.Event())


def test_ranges_that_an_earlier_version_kept_are_removed(bench: Bench, trt10: None) -> None:
    bench.cache.mkdir(exist_ok=True)
    (bench.cache / "calibration-0123456789abcdef.cache").write_bytes(b"ranges")
    bench.build("int8", **FLAGS)
    assert not list(bench.cache.glob("calibration-*"))


def tried(bench: Bench, photographs: int) -> Any:
    """The INT8 plan, opened and gated, with so many taught images."""
    config = tiny.settings(bench.folder, **FLAGS)
    (candidate,) = (each for each in candidates(bench, config) if each.name == "tensorrt-int8")
    assert candidate.plan is not None
    return choose._try(candidate, candidate.plan._artefacts, config, lambda: list(tiny.pixels(photographs, seed=9)))


def candidates(bench: Bench, config: Any) -> List[choose.Candidate]:
    artefacts = bench.engine("int8", **FLAGS)._artefacts
    return choose._tensorrt_candidates(config, artefacts, HostMemory, tuple)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("slow int8", "no fast INT8"), ("no calibration profile", "no calibration profile"), ("build none", "builds no plan")],
)
def test_what_tensorrt_refuses_is_said(bench: Bench, monkeypatch: pytest.MonkeyPatch, fault: str, reason: str) -> None:
    install(monkeypatch, "8.5")
    monkeypatch.setenv("STANDIN_FAULT", fault)
    with pytest.raises(EngineError, match=reason):
        bench.build("int8", **FLAGS)


def test_without_device_memory_to_calibrate_with_the_reason_is_said(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "8.6")
    engine = bench.engine("int8", **FLAGS)
    engine._identified()
    monkeypatch.setenv("STANDIN_MEMORY", "none")
    with pytest.raises(EngineError, match="torch finds no GPU"):
        engine.build(lambda _: None, threading.Event())


def test_one_that_is_not_exact_enough_makes_room_for_fp16(bench: Bench, trt10: None) -> None:
    bench.build("int8", **FLAGS)
    bench.build("fp16", **FLAGS)
    choice = bench.choose(**{**FLAGS, "engine__int8_min_cosine": 1.0})
    assert choice.stage.name == "tensorrt-fp16"
    assert (choice.attempts[0].engine, choice.attempts[0].state) == ("tensorrt-int8", "passed over")
    assert "below 1" in choice.attempts[0].reason


def test_the_images_leave_nothing_on_the_disk(bench: Bench, version: str) -> None:
    taught(bench, 3).build(lambda _: None, threading.Event())
    assert sorted(path.name.split("-")[0] for path in bench.cache.iterdir()) == ["int8", "int8", "timing"]  # plan and checksum


def test_only_the_last_images_are_kept() -> None:
    recent = RecentImages()
    for index in range(KEPT + 3):
        recent.add(np.full((1, 1, 3), index, np.uint8))
    assert [int(pixels[0, 0, 0]) for pixels in recent.all()] == list(range(3, KEPT + 3))
