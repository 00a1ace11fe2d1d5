"""A whole daemon on a device that is short of memory or above its power budget: it answers, says what it waits for, and learns later."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

import httpx
import pytest

import tiny
from latentd import headroom
from latentd.config import Config, MemoryConfig
from latentd.engines.choose import Choice, choose
from latentd.headroom import Headroom
from latentd.learning import pacing
from latentd.service import building
from latentd.service.app import create_app
from latentd.service.parts import Parts
from latentd.service.supervisor import Daemon
from service.fakes import BASE, WAIT_S, picture


class Device:
    """Its memory is what a test says."""

    def __init__(self) -> None:
        self.available_bytes = 4 << 30

    def read(self) -> Headroom:
        return Headroom(self.available_bytes, 8 << 30)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    found = Device()
    monkeypatch.setattr(headroom, "read", found.read)
    monkeypatch.setattr(pacing, "LOOK_S", 0.01)
    return found


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Parts]]:
    tiny.backbone(tmp_path)
    running: List[Daemon] = []

    def started(**flags: Any) -> Parts:
        while running:
            running.pop().stop()
        reserve = MemoryConfig().reserve_bytes
        usual = {"engine__order": "eager", "energy__meters": "rapl", "memory__reserve_bytes": reserve}
        running.append(Daemon(tiny.settings(tmp_path, **{**usual, **flags})))
        return running[-1].start()

    yield started
    for daemon in running:
        daemon.stop()


def call(parts: Parts, method: str, path: str, **request: Any) -> Dict[str, Any]:
    async def answer() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=create_app(parts)), base_url=BASE) as client:
            return await client.request(method, path, **request)

    found: Dict[str, Any] = asyncio.run(answer()).raise_for_status().json()
    return found


def teach(parts: Parts, seed: int, label: str) -> None:
    call(parts, "POST", "/v1/learn", params={"label": label}, content=picture(seed), headers={"Content-Type": "image/png"})


def wait_for(parts: Parts, state: str) -> Dict[str, Any]:
    for _ in range(int(WAIT_S / 0.01)):
        found = call(parts, "GET", "/v1/learner")
        if found["state"] == state:
            return found
        threading.Event().wait(0.01)
    raise AssertionError(f"the learner is {found['state']}, not {state}")


def test_while_memory_is_short_it_serves_and_learning_waits_over_a_restart_too(device: Device, start: Callable[..., Parts]) -> None:
    parts = start()
    device.available_bytes = 100 << 20
    teach(parts, 1, "cat")
    found = wait_for(parts, "waiting")
    assert "the machine has 100 MiB of memory available" in found["reason"]
    plan = call(parts, "GET", "/v1/status")["memory"]["plan"]
    assert (plan["available_bytes"], plan["fits"]) == (100 << 20, True), "there was as much at the start"
    assert {part["name"] for part in plan["parts"]} >= {"engine: weights", "replay memory", "sums", "decoders", "left to the system"}
    parts = start()  # which does not wait for what can't be learned now
    status = call(parts, "GET", "/v1/status")
    assert (status["version"], status["memory"]["plan"]["fits"]) == (0, False)
    call(parts, "POST", "/v1/classify", content=picture(1), headers={"Content-Type": "image/png"})
    device.available_bytes = 4 << 30
    wait_for(parts, "idle")
    assert call(parts, "GET", "/v1/status")["version"] == 1


def test_a_budget_that_is_changed_in_the_files_counts_at_once(
    device: Device, start: Callable[..., Parts], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = start(energy__budget_w=5.0)
    monkeypatch.setattr(type(parts.ledger), "power_w", property(lambda ledger: 7.5))
    teach(parts, 1, "cat")
    assert wait_for(parts, "waiting")["reason"].startswith("7.5 W are drawn, energy.budget_w is 5 W; learning goes on below 4.75 W")
    newer: Config = replace(parts.config, energy=replace(parts.config.energy, budget_w=0.0))
    parts.restrain(newer)
    wait_for(parts, "idle")
    assert call(parts, "GET", "/v1/status")["version"] == 1


def test_whether_the_plan_fits_is_decided_before_an_engine_takes_of_the_memory(
    device: Device, start: Callable[..., Parts], monkeypatch: pytest.MonkeyPatch
) -> None:
    def choose_and_take(*arguments: Any, **options: Any) -> Choice:
        device.available_bytes = 0
        return choose(*arguments, **options)

    device.available_bytes = 64 << 30
    monkeypatch.setattr(building, "choose", choose_and_take)
    plan = call(start(), "GET", "/v1/memory")["plan"]
    assert (plan["available_bytes"], plan["fits"]) == (0, True)
