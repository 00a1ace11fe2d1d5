"""INT8 plans on every version, on the stand-in: calibrated in the building process, cached, run, and refused with a reason."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from engines.conftest import Bench
from latentd.engines.compiling import PlanEngine
from latentd.engines.recent import KEPT, RecentImages
from latentd.errors import EngineError
from latentd.vision.probe import probe_images
from standin.building import MAGIC
from standin.strict import VERSIONS
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
    assert head(bench.plan())["calibrated_on"] == PROBES + 5
    (kept,) = bench.cache.glob("calibration-*.cache")
    shown = kept.read_bytes().split(b"\n", 1)[1]
    last = np.frombuffer(shown, np.float32).reshape(-1, 3, tiny.SIZE, tiny.SIZE)[-1]
    np.testing.assert_array_equal(last.transpose(1, 2, 0).astype(np.uint8), tiny.pixels(5)[-1])


def test_its_ranges_are_kept_and_used_again_and_those_of_another_version_are_not(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "8.5")
    taught(bench, 2).build(lambda _: None, threading.Event())
    bench.plan().unlink()
    bench.build("int8", **FLAGS)
    assert head(bench.plan())["calibrated_on"] == PROBES + 2
    bench.plan().unlink()
    (kept,) = bench.cache.glob("calibration-*.cache")
    kept.write_bytes(b"TRT-7.0-EntropyCalibration2\nother")
    bench.build("int8", **FLAGS)
    assert head(bench.plan())["calibrated_on"] == PROBES
    assert kept.read_bytes().startswith(f"TRT-{VERSIONS['8.5']}-".encode())


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


def test_the_images_leave_nothing_on_the_disk(bench: Bench, trt10: None) -> None:
    taught(bench, 3).build(lambda _: None, threading.Event())
    names = {path.suffix for path in bench.cache.iterdir()}
    assert names == {".plan", ".json", ".cache"}
    assert not list(bench.cache.glob("calibration-*"))  # 10 takes its ranges from the graph


def test_only_the_last_images_are_kept() -> None:
    recent = RecentImages()
    for index in range(KEPT + 3):
        recent.add(np.full((1, 1, 3), index, np.uint8))
    assert [int(pixels[0, 0, 0]) for pixels in recent.all()] == list(range(3, KEPT + 3))
