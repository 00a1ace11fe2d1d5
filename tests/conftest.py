"""Fixtures of all tests: the cache folder, the real backbone, photographs, and daemons in processes of their own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Callable, Iterator, List

import pytest

import support
from fake_cuda import FakeCuda, install
from latentd import config
from latentd.errors import CheckpointError
from latentd.vision import checkpoints


@pytest.fixture(scope="session")
def cache_dir() -> Path:
    """The cache folder of whoever runs the tests: `latentd backbone pull` puts the weights there."""
    return config.load(os.environ, {}).cache_dir


@pytest.fixture(scope="session")
def backbone(cache_dir: Path) -> checkpoints.Backbone:
    """The default backbone; the test is skipped where it was not pulled."""
    try:
        return checkpoints.find(cache_dir, checkpoints.DEFAULT)
    except CheckpointError as absent:
        pytest.skip(f"{absent}: `latentd backbone pull` fetches it")


@pytest.fixture(scope="session")
def photo() -> Callable[..., bytes]:
    """photo(seed, motif="discs" | "stripes" | "rings", size=(width, height), format="JPEG") -> encoded picture."""
    return support.photo


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """A GPU for TorchQueue to work on, without one."""
    return install(monkeypatch)


@pytest.fixture
def daemon_process(backbone: checkpoints.Backbone, cache_dir: Path, tmp_path: Path) -> Iterator[Callable[..., support.DaemonProcess]]:
    """start(*flags, state_dir=…, environ=…) -> a ready DaemonProcess with .url, .log, .stop(), .kill(); all are killed at the end.

    state_dir is one temporary folder a test unless told, so that a second start finds what the first one kept.
    """
    running: List[support.DaemonProcess] = []

    def start(*flags: str, state_dir: Path = tmp_path / "state", **more: Any) -> support.DaemonProcess:
        running.append(support.DaemonProcess(state_dir, cache_dir, *flags, **more))
        return running[-1]

    yield start
    for process in running:
        process.kill()
