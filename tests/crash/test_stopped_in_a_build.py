"""The whole daemon, told to stop while a TensorRT plan is built, on the stand-in: nothing is left running, and the next start builds."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Dict, List, Mapping

import pytest

import tiny
from harness import DaemonProcess
from standin.use import install
from support import environment

BUILD_S = 120.0
CONFIGURED = {
    "LATENTD_BACKBONE__NAME": "tiny",
    "LATENTD_BACKBONE__IMAGE_SIZE": str(tiny.SIZE),
    "LATENTD_BACKBONE__CLASS_TOKENS": "2",
    "LATENTD_ENERGY__METERS": "rapl",
    "LATENTD_MEMORY__BUILD_BYTES": "0",
}


def until(daemon: DaemonProcess, state: str) -> None:
    """Returns when the FP16 plan is in this state."""
    deadline = time.monotonic() + BUILD_S
    while states(daemon)["tensorrt-fp16"] != state:
        assert time.monotonic() < deadline, daemon.log
        time.sleep(0.05)


def states(daemon: DaemonProcess) -> Dict[str, str]:
    return {attempt["engine"]: attempt["state"] for attempt in daemon.get("/v1/status")["engine"]["attempts"]}


def builders(daemon: DaemonProcess) -> List[Path]:
    """Its processes that build, in /proc."""
    tasks = Path(f"/proc/{daemon.pid}/task").iterdir()
    children = [Path("/proc") / child for task in tasks for child in (task / "children").read_text().split()]
    return [child for child in children if builds(child)]


def builds(process: Path) -> bool:
    try:
        return b"latentd.engines.tensorrt_build" in (process / "cmdline").read_bytes()
    except OSError:  # it has ended
        return False


def started(folder: Path, environ: Mapping[str, str]) -> DaemonProcess:
    return DaemonProcess(folder / "state", "--cache-dir", str(folder / "cache"), environ=environ)


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_what_ends_the_daemon_in_a_build_ends_the_build_and_the_next_start_builds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    install(monkeypatch, "8.5")
    tiny.backbone(tmp_path)
    with started(tmp_path, environment({**CONFIGURED, "STANDIN_FAULT": "hang"})) as daemon:
        until(daemon, "building")
        (builder,) = builders(daemon)
        getattr(daemon, end)()
    deadline = time.monotonic() + BUILD_S
    while builds(builder):
        assert time.monotonic() < deadline, "the build goes on without the daemon"
        time.sleep(0.05)
    cache = tmp_path / "cache" / "tensorrt"
    assert not list(cache.glob("*.plan"))
    assert len(list(cache.glob("*.tries.json"))) == (0 if end == "stop" else 1)  # an orderly stop is not held against the plan
    with started(tmp_path, environment(CONFIGURED)) as daemon:
        until(daemon, "serving")
    assert not list(cache.glob("*.tries.json"))
