"""A daemon that builds its TensorRT plan while it serves, on the stand-in: what it shows, when it swaps, and how it ends in the middle."""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator

import numpy as np
import pytest

import tiny
from latentd import headroom
from latentd.config import Config
from latentd.engines import upgrade
from latentd.engines.choose import choose
from latentd.engines.plans import PlanCache
from latentd.headroom import Headroom
from latentd.service import building, views
from latentd.service.batcher import Priority
from latentd.service.parts import Parts
from latentd.service.supervisor import Daemon
from service.fakes import picture
from standin.host import HostMemory
from standin.use import install

BUILD_S = 120.0


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    install(monkeypatch, "10")
    monkeypatch.setattr(building, "choose", functools.partial(choose, device=HostMemory))
    tiny.backbone(tmp_path)
    return tiny.settings(tmp_path, energy__meters="rapl")


@pytest.fixture
def start(config: Config) -> Iterator[Callable[[], Daemon]]:
    """start() -> a Daemon that runs; all are stopped at the end."""
    made = []

    def started() -> Daemon:
        made.append(Daemon(config))
        return made[-1]

    yield started
    for daemon in made:
        daemon.stop()


def classify(parts: Parts) -> Any:
    ticket = parts.batcher.reserve(1, Priority.CLASSIFY)[0]
    parts.batcher.enqueue(ticket, tiny.pixels(1)[0])
    return ticket.future.result(BUILD_S).features


def engine(parts: Parts) -> Dict[str, str]:
    return {attempt["engine"]: attempt["state"] for attempt in views.engine(parts.choice)["attempts"]}


def until(parts: Parts, name: str, state: str) -> None:
    deadline = time.monotonic() + BUILD_S
    while engine(parts)[name] != state:
        assert time.monotonic() < deadline, views.engine(parts.choice)
        threading.Event().wait(0.01)


def test_the_plan_is_built_beside_serving_and_takes_over(start: Callable[[], Daemon]) -> None:
    parts = start().start()
    assert parts.choice.stage.name == "onnxruntime-cpu"
    assert engine(parts)["tensorrt-fp16"] == "waiting", "nothing is built before the first answer"
    before = classify(parts)
    until(parts, "tensorrt-fp16", "serving")
    assert views.engine(parts.choice)["name"] == "tensorrt-fp16"
    assert engine(parts) == {
        "tensorrt-fp16": "serving",
        "tensorrt-fp32": "not tried",
        "onnxruntime-cuda": "unavailable",
        "onnxruntime-cpu": "replaced",
        "eager": "not tried",
    }
    np.testing.assert_allclose(classify(parts), before, atol=1e-4)
    assert parts.batcher.stage is parts.choice.stage


def test_a_build_waits_for_memory_and_the_status_says_so(start: Callable[[], Daemon], monkeypatch: pytest.MonkeyPatch) -> None:
    available = [1 << 30]
    monkeypatch.setattr(headroom, "read", lambda: Headroom(available[0], 6 << 30))
    monkeypatch.setattr(upgrade, "ROOM_S", 0.01)
    parts = start().start()
    classify(parts)
    wanted = "the machine has 1024 MiB of memory available, building takes 2400 (memory.build_bytes)"
    deadline = time.monotonic() + BUILD_S
    while parts.choice.attempts[0].reason != wanted:
        assert time.monotonic() < deadline, parts.choice.attempts
        threading.Event().wait(0.01)
    assert (engine(parts)["tensorrt-fp16"], parts.choice.stage.name) == ("waiting", "onnxruntime-cpu")
    available[0] = 3 << 30
    until(parts, "tensorrt-fp16", "serving")


def test_int8_waits_for_taught_images_while_fp16_serves(tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upgrade, "ROOM_S", 0.01)
    daemon = Daemon(tiny.settings(tmp_path, energy__meters="rapl", engine__precision="int8", engine__int8_min_cosine=0.9))
    parts = daemon.start()
    try:
        classify(parts)
        until(parts, "tensorrt-fp16", "serving")
        assert engine(parts)["tensorrt-int8"] == "waiting"
        assert "0 of 32 were taught" in parts.choice.attempts[0].reason
        asyncio.run(parts.pipeline.encode([picture(seed) for seed in range(16)], Priority.LEARN))
        asyncio.run(parts.pipeline.encode([picture(seed) for seed in range(16, 32)], Priority.LEARN))
        until(parts, "tensorrt-int8", "serving")
        assert (engine(parts)["tensorrt-fp16"], engine(parts)["tensorrt-fp32"]) == ("replaced", "not tried")
        assert parts.batcher.stage is parts.choice.stage
        assert len(classify(parts)) == 256
    finally:
        daemon.stop()


def test_a_start_with_a_plan_serves_from_it_at_once(start: Callable[[], Daemon]) -> None:
    first = start()
    parts = first.start()
    classify(parts)
    until(parts, "tensorrt-fp16", "serving")
    first.stop()
    parts = start().start()
    assert parts.choice.stage.name == "tensorrt-fp16"
    assert len(classify(parts)) == 256


def test_a_stop_in_the_middle_of_a_build_ends_it_and_the_next_start_builds(
    start: Callable[[], Daemon], config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STANDIN_FAULT", "hang")
    daemon = start()
    parts = daemon.start()
    classify(parts)
    until(parts, "tensorrt-fp16", "building")
    assert len(classify(parts)) == 256, "it serves meanwhile"
    daemon.stop()
    assert not PlanCache(config.cache_dir / "tensorrt").has_any()
    assert not list((config.cache_dir / "tensorrt").glob("*.tries.json"))
    monkeypatch.delenv("STANDIN_FAULT")
    parts = start().start()
    classify(parts)
    until(parts, "tensorrt-fp16", "serving")


def test_where_no_plan_can_be_built_the_other_engine_goes_on_and_says_why(
    start: Callable[[], Daemon], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STANDIN_FAULT", "build none")
    parts = start().start()
    classify(parts)
    until(parts, "tensorrt-fp32", "unavailable")
    assert engine(parts)["onnxruntime-cpu"] == "serving"
    assert "builds no plan" in parts.choice.attempts[0].reason
    assert len(classify(parts)) == 256
