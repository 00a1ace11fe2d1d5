"""Fixtures of all tests: the cache folder, the real backbone, photographs, and daemons in processes of their own."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Callable, Iterator

import pytest

import support
from fake_cuda import FakeCuda, install
from harness import DaemonProcess
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
def daemon_process(backbone: checkpoints.Backbone, cache_dir: Path, tmp_path: Path) -> Iterator[Callable[[], DaemonProcess]]:
    """start() -> a ready daemon on the test's own state folder, so that a second start finds what the first one kept; all are killed at
    the end.
    """
    with ExitStack() as until_end:
        yield lambda: until_end.enter_context(support.daemon(tmp_path / "state", cache_dir))
